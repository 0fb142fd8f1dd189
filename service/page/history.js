// @ts-check
/** What was painted in this session. */

import { $, make } from "./dom.js";

const MOST_ENTRIES = 40;
const MOST_BYTES = 256e6; // of their pictures
const THUMB = 128; // pixels of its longer side

/**
 * @typedef {{before: Blob, after: Blob, request: Record<string, any>, warnings: string[], name: string}} Entry
 */

export class History {
  /** @param {import("./store.js").Store} store */
  constructor(store) {
    this.store = store;
    /** Newest first. @type {Entry[]} */
    this.entries = [];
    /** @type {Entry | null} */
    this.chosen = null;
    /** @type {(entry: Entry) => void} */
    this.onchoose = () => {};
    this.onclear = () => {};
    $("history-clear").addEventListener("click", () => {
      this.entries = [];
      this.chosen = null;
      this._changed();
      this.onclear();
    });
  }

  async load() {
    this.entries = (await this.store.get("history")) ?? [];
    this._draw();
  }

  /** @param {Entry[]} entries of one job */
  add(entries) {
    let bytes = 0;
    this.entries = [...entries, ...this.entries].slice(0, MOST_ENTRIES).filter((entry, number) => {
      bytes += entry.before.size + entry.after.size;
      return number < entries.length || bytes <= MOST_BYTES;
    });
    this._changed();
  }

  /** @param {Entry | null} entry */
  mark(entry) {
    this.chosen = entry;
    [...$("history-list").querySelectorAll("button")].forEach((button, number) =>
      button.setAttribute("aria-pressed", String(this.entries[number] === entry)),
    );
  }

  _changed() {
    this._draw();
    this.store.put("history", this.entries);
  }

  _draw() {
    $("history").hidden = !this.entries.length;
    $("history-list").replaceChildren(...this.entries.map((entry) => this._makeItem(entry)));
    this.mark(this.chosen);
  }

  /** @param {Entry} entry */
  _makeItem(entry) {
    const { prompt, seed } = entry.request;
    const canvas = make("canvas", { width: THUMB, height: THUMB });
    drawThumb(canvas, entry.after);
    const choose = () => this.onchoose(entry);
    const button = make("button", { type: "button", class: "thumb", title: prompt, onclick: choose }, canvas);
    button.setAttribute("aria-label", `${prompt}, seed ${seed}`);
    return make("div", { role: "listitem" }, button);
  }
}

/** @param {HTMLCanvasElement} canvas @param {Blob} blob */
async function drawThumb(canvas, blob) {
  const picture = await createImageBitmap(blob);
  const scale = THUMB / Math.min(picture.width, picture.height);
  const [width, height] = [picture.width * scale, picture.height * scale];
  const pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  pen.imageSmoothingQuality = "high";
  pen.drawImage(picture, (THUMB - width) / 2, (THUMB - height) / 2, width, height);
  picture.close();
}
