// @ts-check
/** Which of the subject's attribute words the prompt may replace: none, "auto", or some. */

import { $, make } from "./dom.js";

export class Substitute {
  constructor() {
    this._box = $("substitute");
    this._auto = false;
    /** @type {Set<string>} */
    this._words = new Set();
    /** @type {Record<string, string[]>} */
    this._attributes = {};
    this.onchange = () => {};
  }

  /** @param {Record<string, string[]> | null} attributes kind -> words; null: there is no subject */
  offer(attributes) {
    $("substitute-group").hidden = attributes === null;
    this._attributes = attributes ?? {};
    this._draw();
  }

  /** @returns {string[] | "auto"} */
  get() {
    return this._auto && this._known().length ? "auto" : [...this._words];
  }

  /** @param {string[] | "auto" | null | undefined} value */
  set(value) {
    this._auto = value === "auto";
    this._words = new Set(Array.isArray(value) ? value : []);
    this._draw();
  }

  _known() {
    return [...new Set(Object.values(this._attributes).flat())];
  }

  _draw() {
    const known = this._known();
    const chips = [];
    if (known.length) {
      chips.push(this._makeChip("Auto", this._auto, "What the prompt contradicts", () => this._toggleAuto()));
    }
    for (const word of [...known, ...[...this._words].filter((each) => !known.includes(each))]) {
      const kind = Object.keys(this._attributes).find((each) => this._attributes[each].includes(word)) ?? "";
      const chosen = !this._auto && this._words.has(word);
      chips.push(this._makeChip(word, chosen, kind.replaceAll("_", " "), () => this._toggle(word)));
    }
    this._box.replaceChildren(...chips, this._makeEntry());
    const auto = known.length ? " Auto finds what the prompt contradicts." : "";
    $("substitute-hint").textContent = `Words of the subject: a “red” one replaces “blue”.${auto}`;
  }

  /** @param {string} text @param {boolean} chosen @param {string} title @param {() => void} onclick */
  _makeChip(text, chosen, title, onclick) {
    return make("button", { type: "button", class: "chip", "aria-pressed": chosen, title, onclick }, text);
  }

  _makeEntry() {
    const entry = make("input", { class: "chip-entry", placeholder: "Add a word", size: 10, autocomplete: "off" });
    entry.setAttribute("aria-label", "Another word of the subject");
    const take = () => {
      const word = entry.value.trim();
      if (!word) return false;
      this._auto = false;
      this._words.add(word);
      this._changed();
      return true;
    };
    entry.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      if (take()) /** @type {HTMLElement} */ (this._box.querySelector(".chip-entry")).focus();
    });
    entry.addEventListener("change", take);
    return entry;
  }

  _toggleAuto() {
    this._auto = !this._auto;
    this._words.clear();
    this._changed("Auto");
  }

  /** @param {string} word */
  _toggle(word) {
    this._auto = false;
    if (!this._words.delete(word)) this._words.add(word);
    this._changed(word);
  }

  /** @param {string} [focus] the chip that had the focus */
  _changed(focus) {
    this._draw();
    [...this._box.querySelectorAll(".chip")].find((each) => each.textContent === focus)?.focus();
    this.onchange();
  }
}
