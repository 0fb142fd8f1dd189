// @ts-check
/** The buttons, sliders and keys around the stage. */

import { $ } from "./dom.js";
import { clampSize, stepSize } from "./tools.js";

const ZOOM = 1.25;

export class Controls {
  /**
   * @param {import("./stage.js").Stage} stage @param {import("./pointers.js").Pointers} pointers
   * @param {import("./pointers.js").Hand} hand
   */
  constructor(stage, pointers, hand) {
    this.stage = stage;
    this.pointers = pointers;
    this.hand = hand;
    /** The largest brush the slider gives, in pixels of the picture. */
    this.largest = 512;
    /** Called when the feather is to be shown or no longer. @type {(shown: boolean) => void} */
    this.onfeather = () => {};
    /** @type {(mode: import("./stage.js").Mode) => void} */
    this.onmode = () => {};
    /** @type {() => void} */
    this.onpaint = () => {};
    this._listenToTools();
    this._listenToDivider();
    document.addEventListener("keydown", (event) => this._keyDown(event));
    document.addEventListener("keyup", (event) => event.key === " " && this._setSpace(false));
    window.addEventListener("blur", () => this._setSpace(false));
    stage.ondraw = () => this._follow();
    this.setTool(hand.tool);
  }

  _listenToTools() {
    $("rail").addEventListener("click", (/** @type {any} */ event) => {
      const { tool } = event.target.closest("button")?.dataset ?? {};
      if (tool) this.setTool(tool);
    });
    const { stage } = this;
    const actions = {
      undo: () => this._edit("undo"),
      redo: () => this._edit("redo"),
      invert: () => this._edit("invert"),
      clear: () => this._edit("clear"),
      feather: () => this._toggleFeather(),
      "zoom-in": () => this._zoom(ZOOM),
      "zoom-out": () => this._zoom(1 / ZOOM),
      "zoom-fit": () => (stage.view.fit(), stage.draw()),
      "show-keys": () => $("keys-dialog").showModal(),
      theme: () => switchTheme(),
    };
    for (const [id, act] of Object.entries(actions)) $(id).addEventListener("click", act);
    $("size").addEventListener("input", (/** @type {any} */ event) => {
      this.setSize(this.largest ** (Number(event.target.value) / 100));
    });
    $("pressure").addEventListener("change", (/** @type {any} */ event) => (this.hand.pressure = event.target.checked));
    $("advanced").addEventListener("toggle", () => $("advanced").scrollIntoView({ block: "start" }));
    this.pointers.onpen = () => ($("pressure-part").hidden = false);
    $("modes").addEventListener("change", (/** @type {any} */ event) => this.onmode(event.target.value));
    document.addEventListener("click", (/** @type {any} */ event) => {
      if (event.target.closest?.("[data-close]")) event.target.closest("dialog").close();
    });
  }

  /** @param {import("./tools.js").ToolName} tool */
  setTool(tool) {
    this.hand.tool = tool;
    $("rail")
      .querySelectorAll("[data-tool]")
      .forEach((/** @type {any} */ each) => each.setAttribute("aria-pressed", String(each.dataset.tool === tool)));
    this.stage.canvas.dataset.tool = tool;
    if (this.stage.mode !== "mask" && tool !== "hand") this.onmode("mask");
    this._showParts();
  }

  /** @param {number} size pixels of the picture */
  setSize(size) {
    this.hand.size = clampSize(size);
    $("size").value = String((100 * Math.log(this.hand.size)) / Math.log(this.largest));
    $("size").setAttribute("aria-valuetext", `${this.hand.size} pixels`);
    $("size-value").textContent = `${this.hand.size} px`;
  }

  /** A brush that suits a picture. @param {{width: number, height: number}} picture @param {number} [size] */
  suit({ width, height }, size) {
    const short = Math.min(width, height);
    this.largest = Math.max(64, Math.round(short * 0.75));
    this.setSize(size ?? Math.max(4, short / 7));
  }

  /** Show which buttons do something now. */
  refresh() {
    const { mask, mode } = this.stage;
    const off = !mask || this.hand.busy || mode !== "mask";
    $("undo").disabled = off || !mask.canUndo;
    $("redo").disabled = off || !mask.canRedo;
    $("invert").disabled = $("clear").disabled = $("feather").disabled = off;
    $("modes").hidden = !this.stage.result || this.hand.busy;
    /** @type {any} */ (document.querySelector(`[name=mode][value=${mode}]`)).checked = true;
    this.stage.canvas.dataset.mode = this.hand.busy ? "busy" : mode;
    this._showParts();
    this.stage.draw();
  }

  _showParts() {
    const { tool } = this.hand;
    const shown = this.stage.mode;
    $("brush-part").hidden = shown !== "mask" || (tool !== "brush" && tool !== "eraser");
    $("result-part").hidden = shown === "mask";
    $("bar").hidden = !this.stage.picture;
    $("rail").hidden = !this.stage.picture || shown !== "mask";
  }

  /** @param {"undo" | "redo" | "invert" | "clear"} what */
  _edit(what) {
    if (this.hand.busy || this.stage.mode !== "mask" || this.pointers.drawing) return;
    this.stage.mask?.[what]();
  }

  _toggleFeather() {
    if (!this.stage.picture) return;
    const shown = this.stage.feather === null;
    $("feather").setAttribute("aria-pressed", String(shown));
    this.onfeather(shown);
  }

  /** @param {number} factor */
  _zoom(factor) {
    if (!this.stage.picture) return;
    this.stage.view.zoom(factor);
    this.stage.draw();
  }

  /** @param {boolean} held */
  _setSpace(held) {
    this.pointers.spaceHeld = held;
    this.stage.canvas.classList.toggle("panning", held);
  }

  /** After each drawing: what lies over the picture goes with it. */
  _follow() {
    const { view, mode, split, picture } = this.stage;
    $("zoom-value").textContent = `${Math.round(view.scale * 100)}%`;
    const shown = mode === "compare" && picture !== null;
    const words = [$("word-before"), $("word-after")];
    const divider = $("divider");
    divider.hidden = words[0].hidden = words[1].hidden = !shown;
    if (!shown) return;
    const start = view.toStage({ x: 0, y: 0 });
    const end = view.toStage({ x: view.picture.width, y: view.picture.height });
    const [top, bottom] = [Math.max(0, start.y), Math.min(view.stage.height, end.y)];
    divider.style.left = `${start.x + (end.x - start.x) * split}px`;
    divider.style.top = words[0].style.top = words[1].style.top = `${top}px`;
    divider.style.height = `${bottom - top}px`;
    words[0].style.left = `${Math.max(0, start.x)}px`;
    words[1].style.right = `${Math.max(0, view.stage.width - end.x)}px`;
    divider.setAttribute("aria-valuenow", String(Math.round(split * 100)));
  }

  _listenToDivider() {
    const divider = $("divider");
    /** @param {number} split */
    const move = (split) => {
      this.stage.split = Math.min(1, Math.max(0, split));
      this.stage.draw();
    };
    divider.addEventListener("pointerdown", (/** @type {PointerEvent} */ event) => {
      divider.setPointerCapture(event.pointerId);
      event.preventDefault();
      divider.focus();
    });
    divider.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => {
      if (!divider.hasPointerCapture(event.pointerId)) return;
      const { left } = this.stage.canvas.getBoundingClientRect();
      move(this.stage.view.toPicture({ x: event.clientX - left, y: 0 }).x / this.stage.view.picture.width);
    });
    divider.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      const way = { ArrowLeft: -0.02, ArrowDown: -0.02, ArrowRight: 0.02, ArrowUp: 0.02, Home: -1, End: 1 }[event.key];
      if (!way) return;
      event.preventDefault();
      move(this.stage.split + way);
    });
  }

  /** @param {KeyboardEvent} event */
  _keyDown(event) {
    if (document.querySelector("dialog[open]")) return;
    const control = event.ctrlKey || event.metaKey;
    if (control && event.key === "Enter") {
      event.preventDefault();
      this.onpaint();
    }
    const target = /** @type {HTMLElement} */ (event.target);
    if (isWriting(target)) return;
    const act = control ? this._controlKey(event) : event.altKey ? undefined : this._plainKey(event, target);
    if (!act) return;
    event.preventDefault();
    act();
  }

  /** @param {KeyboardEvent} event @returns {(() => void) | undefined} */
  _controlKey(event) {
    const key = event.key.toLowerCase();
    if (key === "z") return () => this._edit(event.shiftKey ? "redo" : "undo");
    if (key === "y") return () => this._edit("redo");
    return undefined;
  }

  /** @param {KeyboardEvent} event @param {HTMLElement} target @returns {(() => void) | undefined} */
  _plainKey(event, target) {
    if (event.key === " " && target.closest("button, summary, input, a, [role=slider]")) return undefined;
    const smaller = () => this.setSize(stepSize(this.hand.size, -1));
    const larger = () => this.setSize(stepSize(this.hand.size, 1));
    /** @type {Record<string, () => void>} */
    const keys = {
      b: () => this.setTool("brush"),
      e: () => this.setTool("eraser"),
      r: () => this.setTool("rectangle"),
      l: () => this.setTool("lasso"),
      h: () => this.setTool("hand"),
      i: () => this._edit("invert"),
      f: () => this._toggleFeather(),
      delete: () => this._edit("clear"),
      backspace: () => this._edit("clear"),
      "[": smaller,
      "]": larger,
      "+": () => this._zoom(ZOOM),
      "=": () => this._zoom(ZOOM),
      "-": () => this._zoom(1 / ZOOM),
      0: () => (this.stage.view.fit(), this.stage.draw()),
      m: () => this.onmode("mask"),
      v: () => this.onmode("result"),
      c: () => this.onmode("compare"),
      "?": () => $("keys-dialog").showModal(),
      escape: () => this.pointers.cancel(),
      " ": () => this._setSpace(true),
    };
    return keys[event.key.toLowerCase()] ?? { BracketLeft: smaller, BracketRight: larger }[event.code];
  }
}

/** Whether keys are for the element that has the focus. @param {HTMLElement} target */
function isWriting(target) {
  if (target.closest("textarea, select")) return true;
  const input = /** @type {HTMLInputElement | null} */ (target.closest("input"));
  return input !== null && !["checkbox", "radio", "range", "file"].includes(input.type);
}

function switchTheme() {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const next = (root.dataset.theme ?? system) === "dark" ? "light" : "dark";
  root.dataset.theme = next;
  localStorage.setItem("dreammix-theme", next);
}
