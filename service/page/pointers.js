// @ts-check
/**
 * Turns mouse, pen and fingers on the stage into gestures.
 *
 * Every pointer is captured: a stroke that leaves the stage goes on, and ends when it is lifted, wherever that is. A pen
 * draws. Once a pen has been seen, one finger does nothing (it is a palm); two fingers move and zoom, always.
 */

import { beginGesture } from "./tools.js";

const ERASER_BUTTON = 5; // the other end of a pen
const KEY_STEP = 8; // CSS pixels for an arrow key; with Shift five times as far

/** @typedef {{tool: import("./tools.js").ToolName, size: number, pressure: boolean, busy: boolean}} Hand */

export class Pointers {
  /**
   * @param {import("./stage.js").Stage} stage @param {HTMLElement} ring shows the brush's size
   * @param {Hand} hand the tool, its size, whether a pen's pressure counts, and whether the mask must stay as it is
   */
  constructor(stage, ring, hand) {
    this.stage = stage;
    this.ring = ring;
    this.hand = hand;
    this.spaceHeld = false;
    this.penSeen = false;
    this.onpen = () => {};
    /** Called when the mask cannot be drawn on now, before a gesture would begin. */
    this.onblocked = () => {};
    /** @type {import("./tools.js").Gesture | null} */
    this._gesture = null;
    /** The pointer that draws or pans. */
    this._active = NaN;
    this._panning = false;
    /** Where the pointer that pans was. */
    this._last = { x: 0, y: 0 };
    /** @type {Map<number, {x: number, y: number}>} */
    this._fingers = new Map();
    /** @type {{x: number, y: number} | null} where the keyboard's brush is, on the stage */
    this._keyPoint = null;
    this._listen();
  }

  get drawing() {
    return this._gesture !== null;
  }

  _listen() {
    const { canvas } = this.stage;
    canvas.addEventListener("pointerdown", (event) => this._down(event));
    canvas.addEventListener("pointermove", (event) => this._move(event));
    for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) {
      canvas.addEventListener(name, (event) => this._up(/** @type {PointerEvent} */ (event)));
    }
    canvas.addEventListener("pointerleave", () => (this.ring.hidden = true));
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("auxclick", (event) => event.preventDefault());
    canvas.addEventListener("wheel", (event) => this._wheel(event), { passive: false });
    canvas.addEventListener("keydown", (event) => this._key(event));
    canvas.addEventListener("blur", () => this._endKeys());
  }

  /** @param {PointerEvent} event */
  _down(event) {
    if (!this.stage.picture) return;
    if (event.pointerType !== "touch") event.preventDefault(); // no focus ring, no middle-click scrolling
    this.stage.canvas.focus(/** @type {any} */ ({ preventScroll: true, focusVisible: false }));
    this._endKeys();
    capture(this.stage.canvas, event.pointerId);
    if (event.pointerType === "pen" && !this.penSeen) {
      this.penSeen = true;
      this.onpen();
    }
    if (event.pointerType === "touch") {
      this._fingers.set(event.pointerId, this._place(event));
      if (this._fingers.size === 2) this._drop();
      if (this._fingers.size > 1 || this.penSeen) return;
    }
    if (!Number.isNaN(this._active)) return;
    this._active = event.pointerId;
    this._last = this._place(event);
    this._panning = this._wantsPan(event);
    if (!this._panning) this._begin(event);
  }

  /** @param {PointerEvent} event */
  _wantsPan(event) {
    return event.button === 1 || this.spaceHeld || this.hand.tool === "hand" || this.stage.mode !== "mask";
  }

  /** @param {PointerEvent} event */
  _begin(event) {
    if (event.button !== 0 && event.button !== ERASER_BUTTON) {
      this._active = NaN;
      return;
    }
    if (this.hand.busy) {
      this.onblocked();
      return;
    }
    const mask = /** @type {import("./mask.js").Mask} */ (this.stage.mask);
    const erase = event.button === ERASER_BUTTON || event.altKey;
    const point = this.stage.view.toPicture(this._place(event));
    this._gesture = beginGesture(this.hand.tool, mask, point, this._radius(event), erase);
  }

  /** @param {PointerEvent} event */
  _move(event) {
    const place = this._place(event);
    if (event.pointerType !== "touch") this.showRing(place);
    const last = this._fingers.get(event.pointerId);
    if (last && this._fingers.size >= 2) {
      this._pinch(event.pointerId, last, place);
      return;
    }
    if (last) this._fingers.set(event.pointerId, place);
    if (event.pointerId !== this._active) return;
    if (this._panning) {
      this.stage.view.pan(place.x - this._last.x, place.y - this._last.y);
      this._last = place;
      this.stage.draw();
    } else if (this._gesture) {
      const passed = event.getCoalescedEvents?.() ?? [];
      for (const each of passed.length ? passed : [event]) this._advance(this._place(each), this._radius(each));
    }
  }

  /** @param {{x: number, y: number}} place @param {number} radius */
  _advance(place, radius) {
    const gesture = /** @type {import("./tools.js").Gesture} */ (this._gesture);
    gesture.move(this.stage.view.toPicture(place), radius);
    this.stage.outline = gesture.outline ?? null;
    if (gesture.outline) this.stage.draw();
  }

  /**
   * Two fingers: their middle moves, their distance zooms.
   * @param {number} id @param {{x: number, y: number}} last @param {{x: number, y: number}} place
   */
  _pinch(id, last, place) {
    const [other] = [...this._fingers].filter(([each]) => each !== id).map(([, point]) => point);
    const before = Math.hypot(last.x - other.x, last.y - other.y);
    const after = Math.hypot(place.x - other.x, place.y - other.y);
    const middle = { x: (place.x + other.x) / 2, y: (place.y + other.y) / 2 };
    this.stage.view.pan((place.x - last.x) / 2, (place.y - last.y) / 2);
    if (before > 8 && after > 8) this.stage.view.zoom(after / before, middle);
    this._fingers.set(id, place);
    this.stage.draw();
  }

  /** @param {PointerEvent} event */
  _up(event) {
    this._fingers.delete(event.pointerId);
    if (event.pointerId !== this._active) return;
    this._active = NaN;
    this._panning = false;
    this._finish();
  }

  _finish() {
    const gesture = this._gesture;
    this._gesture = null;
    this.stage.outline = null;
    gesture?.end();
    this.stage.draw();
  }

  /** Give up what is being drawn. */
  _drop() {
    this._gesture = null;
    this._active = NaN;
    this._panning = false;
    this.stage.outline = null;
    this.stage.mask?.cancel();
    this.stage.draw();
  }

  /** Escape. */
  cancel() {
    this._drop();
    this._keyPoint = null;
  }

  /** @param {WheelEvent} event */
  _wheel(event) {
    if (!this.stage.picture) return;
    event.preventDefault();
    const lines = event.deltaMode === 1 ? 16 : 1;
    this.stage.view.zoom(Math.exp(-event.deltaY * lines * (event.ctrlKey ? 0.01 : 0.0015)), this._place(event));
    this.stage.draw();
  }

  /** Arrow keys move the brush; Enter puts it down and lifts it. @param {KeyboardEvent} event */
  _key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.stage.picture || this.stage.mode !== "mask") return;
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!way && event.key !== "Enter") return;
    event.preventDefault();
    const { width, height } = this.stage.view.stage;
    this._keyPoint ??= { x: width / 2, y: height / 2 };
    if (way) {
      const step = KEY_STEP * (event.shiftKey ? 5 : 1);
      this._keyPoint.x = Math.min(width, Math.max(0, this._keyPoint.x + way[0] * step));
      this._keyPoint.y = Math.min(height, Math.max(0, this._keyPoint.y + way[1] * step));
      if (this._gesture) this._advance(this._keyPoint, this.hand.size / 2);
    } else if (this._gesture) {
      this._finish();
    } else if (this.hand.busy) {
      this.onblocked();
    } else if (this.hand.tool !== "hand" && this.stage.mask) {
      const point = this.stage.view.toPicture(this._keyPoint);
      this._gesture = beginGesture(this.hand.tool, this.stage.mask, point, this.hand.size / 2, false);
    }
    this.showRing(this._keyPoint);
  }

  _endKeys() {
    if (this._keyPoint && this._gesture && Number.isNaN(this._active)) this._finish();
    this._keyPoint = null;
  }

  /** @param {{x: number, y: number}} place */
  showRing(place) {
    const { tool, size, busy } = this.hand;
    const round = tool === "brush" || tool === "eraser";
    this.ring.hidden = !this.stage.picture || this.stage.mode !== "mask" || busy || this.spaceHeld || !round;
    if (!round && this._keyPoint && this.stage.mode === "mask") this.ring.hidden = false;
    const side = round ? Math.max(4, size * this.stage.view.scale) : 8;
    this.ring.style.width = this.ring.style.height = `${side}px`;
    this.ring.style.transform = `translate(${place.x - side / 2}px, ${place.y - side / 2}px)`;
  }

  /** @param {PointerEvent} event pixels of the picture */
  _radius(event) {
    const full = this.hand.size / 2;
    const presses = event.pointerType === "pen" && this.hand.pressure && event.pressure > 0;
    return presses ? full * (0.3 + 0.7 * event.pressure) : full;
  }

  /** @param {MouseEvent} event in CSS pixels of the stage */
  _place(event) {
    const box = this.stage.canvas.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }
}

/** @param {Element} element @param {number} id */
function capture(element, id) {
  try {
    element.setPointerCapture(id);
  } catch {
    // The pointer is gone already: its pointerup follows, or never came to be.
  }
}
