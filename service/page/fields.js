// @ts-check
/**
 * Controls made from the JSON schema of a request's fields.
 *
 * @typedef {{name: string, row: HTMLElement, get(): any, set(value: any): void, isUsual(): boolean}} Field
 * @typedef {{kind: string, nullable: boolean, choices: any[], least?: number, above?: number, most?: number,
 *   usual: any, help: string}} Facts
 */

import { make } from "./dom.js";

const ACRONYMS = /\b(lcg|gch|tas|vae|lcm)\b/g;
const NOT_SET = "";

/** A value that cannot be sent, with the name of its field. */
export class FieldError extends Error {
  /** @param {string} field @param {string} message */
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

/** "lcg_mask_dilate" as people write it. @param {string} name */
export function spellName(name) {
  const words = name.replaceAll("_", " ").replace(ACRONYMS, (word) => word.toUpperCase());
  return words[0].toUpperCase() + words.slice(1);
}

/** What a field takes, whichever way the schema says it. @param {any} schema @returns {Facts} */
export function readSchema(schema) {
  const ways = schema.anyOf ?? schema.oneOf ?? [schema];
  const types = ways.flatMap((/** @type {any} */ way) => way.type ?? (way.enum || "const" in way ? "string" : []));
  const way = ways.find((/** @type {any} */ each) => each.type !== "null") ?? schema;
  const merged = { ...schema, ...way };
  const choices = (merged.enum ?? []).filter((/** @type {any} */ each) => each !== null);
  const type = types.find((/** @type {string} */ each) => each !== "null") ?? "string";
  const items = merged.items ?? merged.prefixItems?.[0] ?? {};
  let kind = type;
  if (choices.length) kind = "choice";
  if (type === "array") kind = items.enum ? "several" : items.type === "integer" ? "integers" : "words";
  return {
    kind,
    nullable: types.includes("null") || (merged.enum ?? []).includes(null),
    choices: kind === "several" ? items.enum : choices,
    least: merged.minimum ?? (kind === "integers" ? items.minimum : undefined),
    above: merged.exclusiveMinimum,
    most: merged.maximum ?? (kind === "integers" ? items.maximum : undefined),
    usual: schema.default,
    help: schema.description ?? "",
  };
}

/**
 * @param {string} name @param {any} schema @param {string} [label] @returns {Field}
 */
export function makeField(name, schema, label = spellName(name)) {
  const facts = readSchema(schema);
  const id = `field-${name}`;
  const { element, get, set } = makeControl(id, name, label, facts);
  const parts = [];
  if (element.tagName === "FIELDSET") {
    element.prepend(make("legend", {}, label));
    parts.push(element);
  } else if (facts.kind === "boolean" && !facts.nullable) {
    parts.push(make("label", { class: "tick", for: id }, element, label));
  } else {
    parts.push(make("label", { for: id }, label), element);
  }
  if (facts.help) {
    parts.push(make("p", { class: "help", id: `${id}-help` }, facts.help[0].toUpperCase() + facts.help.slice(1)));
    element.setAttribute("aria-describedby", `${id}-help`);
  }
  const row = make("div", { class: "field", "data-field": name }, ...parts);
  const isUsual = () => {
    try {
      return JSON.stringify(get()) === JSON.stringify(facts.usual);
    } catch {
      return false;
    }
  };
  set(facts.usual);
  return { name, row, get, set: (value) => set(value === undefined ? facts.usual : value), isUsual };
}

/**
 * @param {string} id @param {string} name @param {string} label @param {Facts} facts
 * @returns {{element: any, get: () => any, set: (value: any) => void}}
 */
function makeControl(id, name, label, facts) {
  if (facts.kind === "boolean" && !facts.nullable) {
    const box = make("input", { type: "checkbox", id });
    return { element: box, get: () => box.checked, set: (value) => (box.checked = Boolean(value)) };
  }
  if (facts.kind === "boolean" || facts.kind === "choice") return makeChoice(id, facts);
  if (facts.kind === "several") return makeBoxes(id, facts);
  if (facts.kind === "integer" || facts.kind === "number") return makeNumber(id, name, label, facts);
  if (facts.kind === "integers") return makePair(id, name, label, facts);
  return makeText(id, facts);
}

/** @param {string} id @param {Facts} facts */
function makeChoice(id, facts) {
  const choices = facts.kind === "boolean" ? [true, false] : facts.choices;
  const spell = (/** @type {any} */ each) => (each === true ? "Yes" : each === false ? "No" : String(each));
  const options = choices.map((each) => make("option", { value: spell(each) }, spell(each)));
  const none = facts.kind === "boolean" ? "Automatic" : "Not set";
  if (facts.nullable) options.unshift(make("option", { value: NOT_SET }, none));
  const element = make("select", { id }, ...options);
  return {
    element,
    get: () => (element.value === NOT_SET ? null : choices.find((each) => spell(each) === element.value)),
    set: (/** @type {any} */ value) => (element.value = value === null ? NOT_SET : spell(value)),
  };
}

/** @param {string} id @param {Facts} facts */
function makeBoxes(id, facts) {
  const boxes = facts.choices.map((each) => make("input", { type: "checkbox", value: each }));
  const labels = boxes.map((box) => make("label", { class: "tick" }, box, spellName(box.value)));
  return {
    element: make("fieldset", { id }, ...labels),
    get: () => boxes.filter((box) => box.checked).map((box) => box.value),
    set: (/** @type {any[]} */ value) => boxes.forEach((box) => (box.checked = (value ?? []).includes(box.value))),
  };
}

/** @param {string} id @param {string} name @param {string} label @param {Facts} facts */
function makeNumber(id, name, label, facts) {
  const usual = facts.usual === null || facts.usual === undefined ? "automatic" : spellNumber(facts.usual);
  const whole = facts.kind === "integer";
  const element = make("input", {
    id,
    type: "text",
    inputMode: whole ? "numeric" : "decimal",
    autocomplete: "off",
    placeholder: usual,
  });
  element.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    const way = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    const now = Number(element.value || facts.usual);
    if (!way || Number.isNaN(now)) return;
    event.preventDefault();
    const step = (whole || now >= 3 ? 1 : 0.1) * way;
    const next = Math.min(facts.most ?? Infinity, Math.max(facts.least ?? facts.above ?? -Infinity, now + step));
    element.value = spellNumber(next);
    element.dispatchEvent(new Event("input", { bubbles: true }));
  });
  /** What was set exactly, while the text still says it: 0.6666666666666666 is shown as 0.6667. @type {any} */
  let exact = null;
  const get = () => {
    const text = element.value.trim().replace(",", ".");
    if (text === "") return facts.usual ?? null;
    if (exact !== null && text === spellNumber(exact)) return exact;
    const value = Number(text);
    const allowed = `${label}: ${spellRange(facts, whole)}.`;
    if (!Number.isFinite(value) || (whole && !Number.isInteger(value))) throw new FieldError(name, allowed);
    if (value < (facts.least ?? -Infinity) || value > (facts.most ?? Infinity)) throw new FieldError(name, allowed);
    if (facts.above !== undefined && value <= facts.above) throw new FieldError(name, allowed);
    return value;
  };
  const set = (/** @type {any} */ value) => {
    exact = value ?? null;
    element.value = value === null || value === undefined ? "" : spellNumber(value);
  };
  return { element, get, set };
}

/** @param {number} value */
export function spellNumber(value) {
  return String(Number.isInteger(value) ? value : Number(value.toFixed(4)));
}

/** @param {Facts} facts @param {boolean} whole */
function spellRange(facts, whole) {
  const what = whole ? "a whole number" : "a number";
  const from = facts.above !== undefined ? ` above ${facts.above}` : facts.least !== undefined ? ` from ${facts.least}` : "";
  return what + from + (facts.most !== undefined ? ` up to ${facts.most}` : "");
}

/** @param {string} id @param {string} name @param {string} label @param {Facts} facts */
function makePair(id, name, label, facts) {
  const element = make("input", { id, type: "text", placeholder: "automatic", autocomplete: "off" });
  return {
    element,
    get: () => {
      if (element.value.trim() === "") return facts.usual ?? null;
      const numbers = element.value.split(/[\s,x×]+/).filter(Boolean).map(Number);
      if (numbers.length !== 2 || !numbers.every((each) => Number.isInteger(each))) {
        throw new FieldError(name, `${label}: height and width, as in 512, 768.`);
      }
      return numbers;
    },
    set: (/** @type {any} */ value) => (element.value = value ? value.join(", ") : ""),
  };
}

/** @param {string} id @param {Facts} facts */
function makeText(id, facts) {
  const element = make("input", { id, type: "text", autocomplete: "off", placeholder: facts.usual ?? "" });
  let none = false; // null was set, and nothing has been written since
  element.addEventListener("input", () => (none = false));
  const words = facts.kind === "words";
  return {
    element,
    get: () => {
      if (words) return element.value.split(",").map((/** @type {string} */ each) => each.trim()).filter(Boolean);
      return element.value === "" ? (none ? null : (facts.usual ?? null)) : element.value;
    },
    set: (/** @type {any} */ value) => {
      none = value === null;
      element.value = words ? (value ?? []).join(", ") : (value ?? "");
    },
  };
}
