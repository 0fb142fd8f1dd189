// @ts-check
/** The page: a picture, a mask over it, a request beside it, and a job at a time. */

import { Api, Unreachable } from "./api.js";
import { Controls } from "./controls.js";
import { $, make, randomName, settle } from "./dom.js";
import { usualFeather } from "./feather.js";
import { decodePicture, listenForFiles, maskFromAlpha } from "./files.js";
import { Form } from "./form.js";
import { History } from "./history.js";
import { followJob } from "./job.js";
import { Mask } from "./mask.js";
import { setText, tell } from "./messages.js";
import { carriesRequest, encodeGrey } from "./png.js";
import { Pointers } from "./pointers.js";
import { Stage } from "./stage.js";
import { Store, loadSettings, saveSettings } from "./store.js";
import { Subjects } from "./subjects.js";

class App {
  constructor() {
    this.api = new Api(askKey);
    this.store = new Store();
    this.stage = new Stage($("stage"));
    /** @type {import("./pointers.js").Hand} */
    this.hand = { tool: "brush", size: 64, pressure: true, busy: false };
    this.pointers = new Pointers(this.stage, $("ring"), this.hand);
    this.controls = new Controls(this.stage, this.pointers, this.hand);
    this.history = new History(this.store);
    /** The picture's file. @type {Blob | null} */
    this.picture = null;
    /** @type {{pixels?: number, bytes?: number}} */
    this.limits = {};
    /** @type {{id: string | null, stop: AbortController} | null} */
    this.job = null;
    this.saveMask = settle(() => this._saveMask(), 150);
    this._listen();
  }

  _listen() {
    const { controls, history } = this;
    listenForFiles((file) => this.take(file));
    controls.onmode = (mode) => this.setMode(mode);
    controls.onpaint = () => this.paint();
    controls.onfeather = (shown) => this.stage.setFeather(shown ? this.feather : null);
    history.onchoose = (entry) => this.choose(entry);
    history.onclear = () => this.setResult(null);
    $("form").addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      this.paint();
    });
    $("cancel").addEventListener("click", () => this.cancel());
    $("again").addEventListener("click", () => {
      if (history.chosen) this.useSettings(history.chosen.request);
    });
    $("go-on").addEventListener("click", () => {
      if (history.chosen) this.open(history.chosen.after);
    });
  }

  /** Ask the service what it offers, and go on where the last page load stopped. */
  async start() {
    this.controls.refresh();
    const settings = loadSettings();
    this.api.engine = settings.engine ?? "";
    const schema = await this.api.schema().catch((error) => {
      if (!this.api.engine || error instanceof Unreachable) throw error;
      this.api.engine = ""; // the one that was chosen is served no longer
      return this.api.schema();
    });
    this.limits = schema.limits ?? {};
    showEngines(schema);
    this.subjects = new Subjects(this.api, Boolean(schema.can_enroll), async () => this.takeSubject());
    this.form = new Form(usualFields(schema), this.subjects);
    await this.subjects.load(settings.form ? settings.form.subject : null);
    if (settings.form) this.form.write(settings.form);
    this.form.onchange = () => {
      saveSettings({ form: this.form?.keep() });
      if (this.stage.feather !== null && this.stage.feather !== this.feather) this.stage.setFeather(this.feather);
    };
    await this.history.load();
    await this.reopen(settings.size);
    if (settings.job) await this.follow(settings.job);
  }

  /** The picture and the mask of before the page was loaded again. @param {number} [size] */
  async reopen(size) {
    const picture = await this.store.get("picture");
    if (!picture) return;
    const kept = await this.store.get("mask");
    await this.open(picture, kept && Mask.unpack(kept.width, kept.height, kept.runs));
    if (size) this.controls.setSize(size);
  }

  /** Pixels over which a result fades into this picture. */
  get feather() {
    const { width, height } = this.stage.view.picture;
    return this.form?.feather ?? usualFeather(Math.min(width, height));
  }

  /** A file that was dropped, pasted or chosen: a finished picture brings its settings back. @param {File} file */
  async take(file) {
    if (this.job) return tell("Wait for the picture that is being painted, or cancel it.");
    if (this.form && (await carriesRequest(file))) {
      const request = await this.api.readRequest(file).catch(() => null);
      if (request) {
        this.useSettings(request, this.picture ? ["Open it, too", () => this.open(file)] : undefined);
        if (this.picture) return;
      }
    }
    await this.open(file);
  }

  /** @param {Blob} file @param {Mask} [mask] */
  async open(file, mask) {
    try {
      const picture = await decodePicture(file, this.limits);
      const fits = mask && mask.width === picture.width && mask.height === picture.height;
      this.picture = file;
      this.setMask(picture, fits ? mask : maskFromAlpha(picture));
      this.controls.suit(picture);
      $("empty").hidden = true;
      $("stage-note").textContent = `A picture of ${picture.width} by ${picture.height} pixels is open.`;
      setText($("problem"), "");
      await this.store.put("picture", file);
      this._saveMask();
    } catch (error) {
      tell(/** @type {Error} */ (error).message, { bad: true });
    }
  }

  /** @param {ImageBitmap} picture @param {Mask} mask */
  setMask(picture, mask) {
    this.history.mark(null);
    this.stage.open(picture, mask);
    if (this.stage.feather !== null) this.stage.setFeather(this.feather);
    mask.onchange = () => {
      this.controls.refresh();
      this.saveMask();
      setText($("problem"), "");
    };
    this.controls.refresh();
  }

  _saveMask() {
    const { mask } = this.stage;
    if (mask) this.store.put("mask", { width: mask.width, height: mask.height, runs: mask.pack() });
    saveSettings({ size: this.hand.size });
  }

  /** What a subject can be made of: the picture with its mask. */
  async takeSubject() {
    const { mask } = this.stage;
    if (!this.picture || !mask || mask.isEmpty) return null;
    return { image: this.picture, mask: await encodeGrey(mask.data, mask.width, mask.height) };
  }

  /** @param {Record<string, any>} request @param {[string, () => void]} [action] */
  useSettings(request, action) {
    if (!this.form) return;
    const known = this.form.write(request);
    const missing = known ? "" : ` There is no subject “${request.subject}” here, so another one is chosen.`;
    tell(`The settings of that picture are set.${missing}`, { action });
  }

  async paint() {
    if (this.job || !this.form) return;
    this.form.clearErrors();
    const { mask } = this.stage;
    if (!this.picture || !mask) return setText($("problem"), "Open a picture first.");
    if (mask.isEmpty) return setText($("problem"), "Mark the place to repaint first: brush over it.");
    let request;
    try {
      request = this.form.read();
    } catch (error) {
      return this.form.fail(/** @type {Error} */ (error));
    }
    await this.follow(null, async () => {
      const bytes = await encodeGrey(mask.data, mask.width, mask.height);
      const key = randomName();
      const send = () => this.api.startJob(/** @type {Blob} */ (this.picture), bytes, request, key);
      return send().catch((error) => {
        if (!(error instanceof Unreachable)) throw error;
        return send(); // it may have arrived: the key makes it one job
      });
    });
  }

  /**
   * Watch a job until it ends, and show what it made.
   * @param {string | null} id of a job that runs already @param {() => Promise<{id: string, position?: number}>} [begin]
   */
  async follow(id, begin) {
    const job = { id, stop: new AbortController() };
    this.job = job;
    this.setRunning(true, "Sending");
    $("stage-note").textContent = "Painting."; // for screen readers, instead of every step
    try {
      if (begin) {
        const begun = await begin();
        job.id = begun.id;
        saveSettings({ job: job.id });
        if (job.stop.signal.aborted) await this.api.cancelJob(begun.id);
        else this.watcher.queued(begun.position ?? 0);
      }
      const done = await followJob(this.api, /** @type {string} */ (job.id), this.watcher, new AbortController().signal);
      if (done) await this.finish(/** @type {string} */ (job.id), done);
      else tell("Cancelled.");
    } catch (error) {
      const gone = /** @type {any} */ (error).status === 404;
      if (gone && job.stop.signal.aborted) tell("Cancelled."); // it had just ended, so the service forgot it
      else if (!gone || begin) this.form?.fail(/** @type {Error} */ (error)); // else a job of an earlier page load
    } finally {
      this.job = null;
      saveSettings({ job: null });
      this.setRunning(false);
    }
  }

  /** @returns {import("./job.js").Watcher} */
  get watcher() {
    return {
      queued: (position) => {
        setText($("running-text"), position > 0 ? `In the queue, ${position} before you` : "Starting");
      },
      step: (step, steps) => {
        setText($("running-text"), step ? `Step ${step} of ${steps}` : "Starting");
        $("progress").value = step / steps;
      },
      preview: (image) => this.showPreview(image),
    };
  }

  /** @param {string} address */
  async showPreview(address) {
    const image = new Image();
    image.src = address;
    await image.decode().catch(() => {});
    if (!this.job || !image.naturalWidth) return;
    this.stage.preview = await createImageBitmap(image);
    this.stage.draw();
  }

  /** @param {string} id @param {{images: string[], request: any, warnings?: any[]}} done */
  async finish(id, { images, request, warnings = [] }) {
    setText($("running-text"), "Fetching the picture");
    const blobs = await Promise.all(images.map((_, number) => this.api.jobImage(id, number)));
    const entries = blobs.map((after, number) => ({
      before: /** @type {Blob} */ (this.picture),
      after,
      request: { ...request, seed: String(BigInt(request.seed ?? 0) + BigInt(number)), num_images_per_prompt: 1 },
      warnings,
      name: `dreammix-${id.slice(0, 6)}-${number}.png`,
    }));
    this.history.add(entries);
    await this.choose(entries[0]);
    $("stage-note").textContent = "Finished. The result is shown.";
    warnings.forEach((each) => tell(typeof each === "string" ? each : each.message));
  }

  /** @param {import("./history.js").Entry} entry */
  async choose(entry) {
    const [before, after] = await Promise.all([entry.before, entry.after].map((blob) => createImageBitmap(blob)));
    this.history.mark(entry);
    const link = $("download");
    URL.revokeObjectURL(link.href);
    link.href = URL.createObjectURL(entry.after);
    link.download = entry.name;
    if (!this.picture) await this.open(entry.before);
    this.history.mark(entry);
    this.setResult({ before, after }, this.stage.mode === "compare" ? "compare" : "result");
  }

  /** @param {import("./stage.js").Stage["result"]} result @param {import("./stage.js").Mode} [mode] */
  setResult(result, mode = "mask") {
    this.stage.show(result, mode);
    this.controls.refresh();
  }

  /** @param {import("./stage.js").Mode} mode */
  setMode(mode) {
    if (this.hand.busy || (mode !== "mask" && !this.stage.result)) return;
    this.setResult(this.stage.result, mode);
  }

  async cancel() {
    const { job } = this;
    if (!job) return;
    $("cancel").disabled = true;
    setText($("running-text"), "Cancelling");
    job.stop.abort();
    if (job.id) await this.api.cancelJob(job.id).catch((error) => tell(error.message, { bad: true }));
  }

  /** @param {boolean} running @param {string} [text] */
  setRunning(running, text = "") {
    this.hand.busy = running;
    this.pointers.cancel();
    if (running && this.stage.mode !== "mask") this.stage.show(this.stage.result, "mask");
    this.stage.preview = null;
    $("running").hidden = !running;
    $("paint").hidden = running;
    $("cancel").disabled = false;
    $("progress").value = 0;
    setText($("running-text"), text);
    document.body.classList.toggle("busy", running);
    this.controls.refresh();
  }
}

/**
 * The schema of a request's fields, with the defaults of the engine and the limits of the service.
 * @param {any} schema @returns {Record<string, any>}
 */
function usualFields({ request, defaults = {}, limits = {} }) {
  const fields = structuredClone(request.properties);
  for (const [name, value] of Object.entries(defaults)) if (fields[name]) fields[name].default = value;
  if (limits.pictures) fields.num_images_per_prompt.maximum = limits.pictures;
  return fields;
}

/** Name the engine; where there are several, let the user choose. @param {any} schema */
function showEngines({ engine, engines = [] }) {
  const place = $("engine");
  if (engines.length < 2) {
    place.textContent = [engine?.name, engine?.backend].filter(Boolean).join(" · ");
    return;
  }
  const options = engines.map((/** @type {any} */ { name }) => make("option", { value: name }, name));
  const choice = make("select", { "aria-label": "Engine" }, ...options);
  choice.value = engine.name;
  choice.addEventListener("change", () => {
    saveSettings({ engine: choice.value });
    location.reload(); // its fields, defaults and subjects are others
  });
  place.replaceChildren(choice);
}

/** @param {boolean} wrong whether a key was given and refused @returns {Promise<string | null>} */
function askKey(wrong) {
  const dialog = $("key-dialog");
  if (wrong) $("key-text").textContent = "That key is not the right one. Try again.";
  $("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    let key = /** @type {string | null} */ (null);
    const take = () => (key = $("key").value.trim());
    const form = dialog.querySelector("form");
    form.addEventListener("submit", take, { once: true });
    dialog.addEventListener(
      "close",
      () => {
        form.removeEventListener("submit", take);
        resolve(key || null);
      },
      { once: true },
    );
  });
}

const app = new App();
app.start().catch((error) => {
  tell(error.message, { bad: true, action: ["Try again", () => location.reload()] });
});
