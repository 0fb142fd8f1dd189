// @ts-check
/** The subjects there are, and which one is painted. */

import { $, icon, make } from "./dom.js";
import { clearErrors, setText, showFieldError, tell } from "./messages.js";

/**
 * @typedef {{name: string, token: string, class_name: string, attributes: Record<string, string[]>,
 *   thumbnail: boolean, removable: boolean}} Subject
 */

export class Subjects {
  /**
   * @param {import("./api.js").Api} api @param {boolean} canEnroll
   * @param {() => Promise<{image: Blob, mask: Blob} | null>} takePicture the picture and its mask, where both are there
   */
  constructor(api, canEnroll, takePicture) {
    this.api = api;
    this.takePicture = takePicture;
    /** @type {Subject[]} */
    this.all = [];
    /** Name of the chosen one; "": none. */
    this.chosen = "";
    this.onchange = () => {};
    this._box = $("subjects");
    this._prepareDialog(canEnroll);
  }

  /** @returns {Subject | undefined} */
  get subject() {
    return this.all.find((each) => each.name === this.chosen);
  }

  /** @param {string | null | undefined} [wanted] name of the one to choose; null: the usual one */
  async load(wanted = this.chosen) {
    const { subjects, default: usual } = await this.api.subjects();
    this.all = subjects;
    this.usual = usual ?? "";
    this.chosen = this._find(wanted);
    this._draw();
    this.onchange();
  }

  /** @param {string | null | undefined} name null: the usual one. @returns whether there is such a subject */
  choose(name) {
    this.chosen = this._find(name);
    const radio = [...this._box.querySelectorAll("input")].find((each) => each.value === this.chosen);
    if (radio) radio.checked = true;
    this.onchange();
    return name === null || name === undefined || this.chosen === name;
  }

  /** @param {string | null | undefined} name */
  _find(name) {
    const known = name === "" || this.all.some((each) => each.name === name);
    return known ? /** @type {string} */ (name) : (this.usual ?? "");
  }

  _draw() {
    const cards = this.all.map((subject) => this._makeCard(subject.name, subject));
    const add = make("button", { type: "button", class: "card-add", onclick: () => this._ask() }, icon("i-plus"));
    const label = make("span", { class: "card-name" }, "Add");
    this._box.replaceChildren(...cards, this._makeCard("", undefined), make("div", { class: "card" }, add, label));
    add.setAttribute("aria-label", "Add a subject");
  }

  /** @param {string} name @param {Subject | undefined} subject */
  _makeCard(name, subject) {
    const choose = () => this.choose(name);
    const radio = make("input", { type: "radio", name: "subject", value: name, onchange: choose });
    radio.checked = name === this.chosen;
    const face = make("span", { class: subject ? "face" : "face none" }, subject ? name.slice(0, 1).toUpperCase() : "–");
    if (subject?.thumbnail) this._fillFace(face, name);
    const label = make("span", { class: "card-name" }, subject ? name : "None");
    const what = subject ? `${name}, ${subject.token} ${subject.class_name}` : "No subject";
    radio.setAttribute("aria-label", what);
    const card = make("div", { class: "card", title: what }, make("label", {}, radio, face, label));
    if (subject?.removable) {
      const remove = () => this._remove(name);
      const button = make("button", { type: "button", class: "card-remove", onclick: remove }, icon("i-close"));
      button.setAttribute("aria-label", `Remove ${name}`);
      card.append(button);
    }
    return card;
  }

  /** @param {HTMLElement} face @param {string} name */
  async _fillFace(face, name) {
    try {
      const url = URL.createObjectURL(await this.api.thumbnail(name));
      face.replaceChildren(make("img", { src: url, alt: "", onload: () => URL.revokeObjectURL(url) }));
    } catch {
      // The letter stays.
    }
  }

  /** @param {string} name */
  async _remove(name) {
    if (!confirm(`Remove the subject “${name}”?`)) return;
    try {
      await this.api.removeSubject(name);
      await this.load();
    } catch (error) {
      tell(/** @type {Error} */ (error).message, { bad: true });
    }
  }

  /** @param {boolean} canEnroll */
  _prepareDialog(canEnroll) {
    const form = $("subject-form");
    $("subject-ways").hidden = !canEnroll;
    const showWay = () => {
      const way = form.elements.way.value;
      form.querySelectorAll("[data-way]").forEach((/** @type {any} */ each) => (each.hidden = each.dataset.way !== way));
    };
    form.addEventListener("change", showWay);
    form.addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      this._add();
    });
    this._showWay = showWay;
  }

  async _ask() {
    const form = $("subject-form");
    form.reset();
    clearErrors(form);
    setText($("subject-problem"), "");
    this._showWay?.();
    const picture = await this.takePicture();
    $("enrol-hint").textContent = picture
      ? "The marked part of the picture is the subject. Give it a name and say what it is."
      : "Open a picture of the subject and mark the subject in it; then come back here.";
    $("subject-dialog").showModal();
  }

  async _add() {
    const form = $("subject-form");
    clearErrors(form);
    setText($("subject-problem"), "");
    const button = $("subject-add");
    button.disabled = true;
    try {
      const added = form.elements.way.value === "file" ? await this._upload() : await this._enrol();
      if (!added) return;
      $("subject-dialog").close();
      await this.load(added.name);
      tell(`“${added.name}” is added.`);
    } catch (error) {
      const { field, message } = /** @type {any} */ (error);
      if (!field || !showFieldError(form, field, message)) setText($("subject-problem"), message);
    } finally {
      button.disabled = false;
    }
  }

  async _upload() {
    const [file] = $("subject-file").files;
    if (!file) return void showFieldError($("subject-form"), "file", "Choose the subject's file.");
    return this.api.addSubject("v1/subjects", { file, ...written(["name", "token", "class"]) });
  }

  async _enrol() {
    const form = $("subject-form");
    const fields = written(["name", "class"]);
    if (!fields.name) return void showFieldError(form, "name", "Give the subject a name.");
    if (!fields.class_name) return void showFieldError(form, "class_name", "Say what it is, as in “mug”.");
    const picture = await this.takePicture();
    if (!picture) return void setText($("subject-problem"), "Open a picture and mark the subject in it first.");
    return this.api.addSubject("v1/subjects/enroll", { ...picture, ...fields });
  }
}

/** What was written into the dialog, by the API's names. @param {string[]} names */
function written(names) {
  const entries = names.map((name) => [name === "class" ? "class_name" : name, $(`subject-${name}`).value.trim()]);
  return Object.fromEntries(entries.filter(([, value]) => value));
}
