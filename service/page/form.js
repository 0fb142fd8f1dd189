// @ts-check
/** The panel: from its controls to a request, and back. */

import { $, icon, make } from "./dom.js";
import { FieldError, makeField } from "./fields.js";
import { clearErrors, setText, showFieldError } from "./messages.js";
import { Substitute } from "./substitute.js";

const MAIN = { num_inference_steps: "Steps", guidance_scale: "Guidance", num_images_per_prompt: "Pictures" };
const ELSEWHERE = new Set(["prompt", "subject", "substitute", "seed", "schema"]);
const MOST_SEED = (1n << 64n) - 1n;

export class Form {
  /** @param {Record<string, any>} properties the schema of every field of a request @param {import("./subjects.js").Subjects} subjects */
  constructor(properties, subjects) {
    this.element = $("form");
    this.prompt = $("prompt");
    this.subjects = subjects;
    this.substitute = new Substitute();
    this.onchange = () => {};
    this.seed = makeSeed();
    /** @type {Map<string, import("./fields.js").Field>} */
    this.fields = new Map();
    $("settings").append(this.seed.row);
    for (const [name, schema] of Object.entries(properties)) {
      if (ELSEWHERE.has(name)) continue;
      const label = /** @type {Record<string, string>} */ (MAIN)[name];
      const field = makeField(name, label ? { ...schema, description: "" } : schema, label);
      this.fields.set(name, field);
      $(label ? "settings" : "advanced-fields").append(field.row);
    }
    this._listen();
    this.followSubject();
  }

  _listen() {
    const changed = () => {
      this._countAdvanced();
      this._hintToken();
      this.onchange();
    };
    this.element.addEventListener("input", (/** @type {any} */ event) => {
      const row = event.target.closest("[data-field]");
      if (row) clearErrors(row);
      changed();
    });
    this.substitute.onchange = changed;
    this.subjects.onchange = () => {
      this.followSubject();
      changed();
    };
    this.seed.onroll = changed;
    $("advanced-reset").addEventListener("click", () => {
      this._advanced().forEach((field) => field.set(undefined));
      changed();
    });
    $("advanced-search").addEventListener("input", (/** @type {any} */ event) => this._filter(event.target.value));
  }

  /** Bring what depends on the subject up to date. */
  followSubject() {
    const { subject } = this.subjects;
    this.substitute.offer(subject ? subject.attributes : null);
    const named = subject ? `${subject.token} ${subject.class_name}`.trim() : "mug";
    this.prompt.placeholder = `a photo of a ${named} on the table`;
    this._hintToken();
  }

  /** Say how the prompt names the subject, where it does not. */
  _hintToken() {
    const { subject } = this.subjects;
    const hint = $("token-hint");
    hint.hidden = !subject || !subject.token || this.prompt.value.toLowerCase().includes(subject.token.toLowerCase());
    if (hint.hidden || !subject) return;
    const named = `${subject.token} ${subject.class_name}`.trim();
    const insert = () => {
      const { value, selectionStart: at } = this.prompt;
      const gap = at > 0 && !/\s$/.test(value.slice(0, at)) ? " " : "";
      this.prompt.setRangeText(gap + named, at, this.prompt.selectionEnd, "end");
      this.prompt.focus();
      this.prompt.dispatchEvent(new Event("input", { bubbles: true }));
    };
    const button = make("button", { type: "button", class: "link", onclick: insert }, named);
    hint.replaceChildren("In the prompt the subject is called ", button);
  }

  _advanced() {
    return [...this.fields.values()].filter((field) => !(field.name in MAIN));
  }

  _countAdvanced() {
    const changed = this._advanced().filter((field) => !field.isUsual());
    this.fields.forEach((field) => field.row.classList.toggle("changed", changed.includes(field)));
    $("advanced-count").textContent = changed.length ? `${changed.length} changed` : "";
    $("advanced-reset").disabled = !changed.length;
  }

  /** @param {string} text */
  _filter(text) {
    const words = text.toLowerCase().split(/\s+/);
    for (const { row } of this._advanced()) {
      const said = `${row.dataset.field} ${row.textContent}`.toLowerCase();
      row.hidden = !words.every((word) => said.includes(word));
    }
  }

  /**
   * The request that the panel says. What is as usual is left out.
   * @returns {Record<string, any>} @throws {FieldError}
   */
  read() {
    const prompt = this.prompt.value.trim();
    if (!prompt) throw new FieldError("prompt", "Say what to paint.");
    /** @type {Record<string, any>} */
    const request = { prompt, seed: this.seed.get() };
    if (this.subjects.all.length) request.subject = this.subjects.chosen;
    const substitute = this.subjects.subject ? this.substitute.get() : [];
    if (substitute.length) request.substitute = substitute;
    for (const field of this.fields.values()) {
      const value = field.get();
      if (!field.isUsual()) request[field.name] = value;
    }
    return request;
  }

  /** Whatever the panel holds, to be kept over a reload. */
  keep() {
    /** @type {Record<string, any>} */
    const kept = { prompt: this.prompt.value, seed: this.seed.input.value, subject: this.subjects.chosen };
    kept.substitute = this.substitute.get();
    for (const field of this.fields.values()) {
      try {
        if (!field.isUsual()) kept[field.name] = field.get();
      } catch {
        // What cannot be sent is not kept either.
      }
    }
    return kept;
  }

  /** Set every control from a request; what it does not name becomes as usual. @param {Record<string, any>} request */
  write(request) {
    clearErrors(this.element);
    this.prompt.value = request.prompt ?? "";
    this.seed.input.value = request.seed ?? "";
    const known = this.subjects.choose(request.subject);
    this.substitute.set(request.substitute);
    this.fields.forEach((field) => field.set(request[field.name]));
    this._countAdvanced();
    this._hintToken();
    this.onchange();
    return known;
  }

  /** The feather that is asked for, null: the usual one. @returns {number | null} */
  get feather() {
    try {
      return this.fields.get("feather")?.get() ?? null;
    } catch {
      return null;
    }
  }

  /** Say what went wrong, beside its field where there is one. @param {Error & {field?: string | null}} error */
  fail(error) {
    const name = error.field ?? "";
    const row = `[data-field="${CSS.escape(name)}"]`;
    const label = this.element.querySelector(`${row} label, ${row} legend`);
    const own = label && error.message.startsWith(`${name} `);
    const text = own ? label.textContent + error.message.slice(name.length) : error.message;
    if (!showFieldError(this.element, name, text)) setText($("problem"), error.message);
  }

  clearErrors() {
    clearErrors(this.element);
    setText($("problem"), "");
  }
}

/** The seed as text: it may be larger than what a number holds. Empty: drawn anew for every job. */
function makeSeed() {
  const attributes = { id: "field-seed", type: "text", inputMode: "numeric", autocomplete: "off" };
  const input = make("input", { ...attributes, placeholder: "random" });
  const dice = make("button", { type: "button", class: "square", "aria-label": "Roll a seed" }, icon("i-dice"));
  dice.dataset.tip = "Roll a seed";
  const label = make("label", { for: "field-seed" }, "Seed");
  const row = make("div", { class: "field", "data-field": "seed" }, label, make("div", { class: "joined" }, input, dice));
  const seed = {
    row,
    input,
    onroll: () => {},
    get: () => {
      const text = input.value.trim();
      if (text === "") return null;
      if (!/^\d+$/.test(text) || BigInt(text) > MOST_SEED) {
        throw new FieldError("seed", `Seed: a whole number from 0 to ${MOST_SEED}, or nothing for a new one each time.`);
      }
      return text;
    },
  };
  dice.addEventListener("click", () => {
    input.value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
    seed.onroll();
  });
  return seed;
}
