// @ts-check
/** Draws the picture, the mask over it, and what a gesture is about to do. */

import { Mask } from "./mask.js";
import { View } from "./view.js";
import { featherWeights } from "./feather.js";
import { settle } from "./dom.js";

const TINT = [96, 88, 255]; // of the mask, on any picture
const INSIDE = 118;
const EDGE = 255;
const FEATHERED = 150;
const FEATHER_PIXELS = 1 << 20; // its preview is made from at most so many

/** @typedef {"mask" | "result" | "compare"} Mode */

export class Stage {
  /** @param {HTMLCanvasElement} canvas */
  constructor(canvas) {
    this.canvas = canvas;
    this.view = new View();
    /** @type {ImageBitmap | null} */
    this.picture = null;
    /** @type {Mask | null} */
    this.mask = null;
    /** @type {ImageBitmap | null} the picture while it is painted */
    this.preview = null;
    /** @type {{before: ImageBitmap, after: ImageBitmap} | null} */
    this.result = null;
    /** @type {Mode} */
    this.mode = "mask";
    this.split = 0.5;
    /** @type {import("./mask.js").Point[] | null} of a rectangle or lasso */
    this.outline = null;
    /** Pixels of the feather to be shown; null: it is not. @type {number | null} */
    this.feather = null;
    this.ondraw = () => {};
    this._overlay = document.createElement("canvas");
    /** @type {HTMLCanvasElement | null} */
    this._feathered = null;
    this._queued = false;
    /** What the next frame is to draw; null: everything. @type {import("./mask.js").Rect | null} */
    this._changed = null;
    /** The picture as it is shown, and of what; drawn anew only when one of these changes. */
    this._scaled = document.createElement("canvas");
    this._scaledOf = "";
    /** @type {CanvasImageSource | null} */
    this._scaledPicture = null;
    this._refreshFeather = settle(() => this._makeFeather(), 80);
    new ResizeObserver(() => this._resize()).observe(canvas);
    this._resize();
  }

  /** @param {ImageBitmap} picture @param {Mask} mask */
  open(picture, mask) {
    this.picture = picture;
    this.result = this.preview = this._feathered = null;
    this.mode = "mask";
    this.setMask(mask);
    this.view.setPicture(picture);
    this.draw();
  }

  /** @param {Mask} mask */
  setMask(mask) {
    this.mask = mask;
    this._overlay.width = mask.width;
    this._overlay.height = mask.height;
    mask.onpaint = (area) => {
      this._tint(area);
      if (this.feather !== null) this._refreshFeather();
      this.draw(area);
    };
    mask.onpaint(mask.whole);
  }

  /** @param {number | null} feather */
  setFeather(feather) {
    this.feather = feather;
    this._feathered = null;
    if (feather !== null) this._makeFeather();
    this.draw();
  }

  /** @param {{before: ImageBitmap, after: ImageBitmap} | null} result @param {Mode} mode */
  show(result, mode) {
    const size = this.view.picture;
    this.result = result;
    this.mode = result ? mode : "mask";
    const shown = this.mode === "mask" ? this.picture : result?.after;
    if (shown && (shown.width !== size.width || shown.height !== size.height)) this.view.setPicture(shown);
    this.draw();
  }

  /**
   * Draw at the next frame.
   * @param {import("./mask.js").Rect} [area] the part of the picture that has changed; everything where absent
   */
  draw(area) {
    if (!this._queued) {
      this._queued = true;
      this._changed = area ?? null;
      requestAnimationFrame(() => {
        this._queued = false;
        this._draw();
        this.ondraw();
      });
    } else if (!area) {
      this._changed = null;
    } else if (this._changed) {
      const old = this._changed;
      this._changed = {
        x0: Math.min(old.x0, area.x0),
        y0: Math.min(old.y0, area.y0),
        x1: Math.max(old.x1, area.x1),
        y1: Math.max(old.y1, area.y1),
      };
    }
  }

  _resize() {
    const { clientWidth, clientHeight } = this.canvas;
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.max(1, Math.round(clientWidth * ratio));
    this.canvas.height = Math.max(1, Math.round(clientHeight * ratio));
    this.view.setStage(clientWidth, clientHeight);
    this.draw();
  }

  _draw() {
    const pen = context(this.canvas);
    const ratio = this.canvas.width / Math.max(1, this.canvas.clientWidth);
    const { scale, x, y } = this.view;
    pen.save();
    if (this._changed) this._clip(pen, this._changed, ratio);
    pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (this.picture) {
      pen.setTransform(scale * ratio, 0, 0, scale * ratio, x * ratio, y * ratio);
      pen.imageSmoothingEnabled = scale < 3;
      if (this.mode === "mask") this._drawWork(pen);
      else this._drawResult(pen);
    }
    pen.restore();
  }

  /**
   * Leave everything as it is but a part of the picture, and what smoothing mixes it with.
   * @param {CanvasRenderingContext2D} pen @param {import("./mask.js").Rect} area @param {number} ratio
   */
  _clip(pen, area, ratio) {
    const start = this.view.toStage({ x: area.x0 - 2, y: area.y0 - 2 });
    const end = this.view.toStage({ x: area.x1 + 2, y: area.y1 + 2 });
    const [left, top] = [start.x, start.y].map((each) => Math.floor(each * ratio) - 2);
    const [right, bottom] = [end.x, end.y].map((each) => Math.ceil(each * ratio) + 2);
    pen.beginPath();
    pen.rect(left, top, right - left, bottom - top);
    pen.clip();
  }

  /** @param {CanvasRenderingContext2D} pen */
  _drawWork(pen) {
    const picture = /** @type {ImageBitmap} */ (this.picture);
    const { width, height } = picture;
    this._drawScaled(pen, this.preview ?? picture, width, height);
    if (this.preview) return;
    if (this._feathered) pen.drawImage(this._feathered, 0, 0, width, height);
    pen.drawImage(this._overlay, 0, 0, width, height);
    if (!this.outline || this.outline.length < 2) return;
    pen.beginPath();
    this.outline.forEach(({ x, y }) => pen.lineTo(x, y));
    pen.closePath();
    const line = 1 / this.view.scale;
    for (const [colour, shift] of /** @type {const} */ ([["#fff", 0], ["#16181d", 5]])) {
      pen.strokeStyle = colour;
      pen.lineWidth = 1.5 * line;
      pen.setLineDash([5 * line, 5 * line]);
      pen.lineDashOffset = shift * line;
      pen.stroke();
    }
    pen.setLineDash([]);
  }

  /** @param {CanvasRenderingContext2D} pen */
  _drawResult(pen) {
    if (!this.result) return;
    const { before, after } = this.result;
    this._drawScaled(pen, after, after.width, after.height);
    if (this.mode !== "compare") return;
    pen.save();
    pen.beginPath();
    pen.rect(0, 0, after.width * this.split, after.height);
    pen.clip();
    pen.drawImage(before, 0, 0, after.width, after.height);
    pen.restore();
  }

  /**
   * Draw a picture in the place of the picture. To make a large one small well takes a while, so that is kept.
   * @param {CanvasRenderingContext2D} pen @param {ImageBitmap} picture @param {number} width @param {number} height
   */
  _drawScaled(pen, picture, width, height) {
    const place = pen.getTransform();
    const scaled = this._scaled;
    const wanted = [place.a, place.e, place.f, this.canvas.width, this.canvas.height].join();
    if (this._scaledPicture !== picture || this._scaledOf !== wanted) {
      [scaled.width, scaled.height] = [this.canvas.width, this.canvas.height];
      const drawn = context(scaled);
      drawn.setTransform(place);
      drawn.imageSmoothingEnabled = pen.imageSmoothingEnabled;
      drawn.imageSmoothingQuality = "high";
      drawn.drawImage(picture, 0, 0, width, height);
      [this._scaledPicture, this._scaledOf] = [picture, wanted];
    }
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.drawImage(scaled, 0, 0);
    pen.setTransform(place);
  }

  /** Bring the overlay up to date with the mask. @param {import("./mask.js").Rect} area */
  _tint(area) {
    const mask = /** @type {Mask} */ (this.mask);
    const { data, width, height } = mask;
    const [x0, y0] = [Math.max(0, area.x0 - 1), Math.max(0, area.y0 - 1)];
    const [x1, y1] = [Math.min(width, area.x1 + 1), Math.min(height, area.y1 + 1)];
    const image = new ImageData(x1 - x0, y1 - y0);
    const pixels = new Uint32Array(image.data.buffer);
    const [inside, edge] = [INSIDE, EDGE].map((alpha) => new Uint32Array(new Uint8Array([...TINT, alpha]).buffer)[0]);
    let to = 0;
    for (let y = y0; y < y1; y++) {
      for (let x = x0, at = y * width + x0; x < x1; x++, at++, to++) {
        if (!data[at]) continue;
        const within =
          (x === 0 || data[at - 1]) &&
          (x === width - 1 || data[at + 1]) &&
          (y === 0 || data[at - width]) &&
          (y === height - 1 || data[at + width]);
        pixels[to] = within ? inside : edge;
      }
    }
    context(this._overlay).putImageData(image, x0, y0);
  }

  _makeFeather() {
    if (this.feather === null || !this.mask) return;
    const { data, width, height } = this.mask;
    const step = Math.max(1, Math.ceil(Math.sqrt((width * height) / FEATHER_PIXELS)));
    const [across, down] = [Math.ceil(width / step), Math.ceil(height / step)];
    const small = new Uint8Array(across * down);
    for (let y = 0; y < down; y++) {
      for (let x = 0; x < across; x++) small[y * across + x] = data[y * step * width + x * step];
    }
    const weights = featherWeights(small, across, down, this.feather / step);
    const image = new ImageData(across, down);
    for (let i = 0; i < weights.length; i++) {
      if (small[i]) continue;
      image.data.set([...TINT, (weights[i] * FEATHERED) / 255], 4 * i);
    }
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [across, down];
    context(canvas).putImageData(image, 0, 0);
    this._feathered = canvas;
    this.draw();
  }
}

/** @param {HTMLCanvasElement} canvas */
function context(canvas) {
  return /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
}
