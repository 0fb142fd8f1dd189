// @ts-check
/** The service's own HTTP API, by relative addresses: the page works below any path. */

export class ApiError extends Error {
  /** @param {number} status @param {{type?: string, message?: string, field?: string | null}} error */
  constructor(status, { type, message, field }) {
    super(message || `The service answered with status ${status}.`);
    this.status = status;
    this.type = type ?? "unknown";
    this.field = field ?? null;
  }
}

/** The service cannot be reached. */
export class Unreachable extends Error {
  constructor() {
    super("The service cannot be reached. Is it still running?");
  }
}

const KEY = "dreammix-key";

export class Api {
  /** @param {(wrong: boolean) => Promise<string | null>} askKey asks the user for the API key; null: not given */
  constructor(askKey) {
    this._askKey = askKey;
    this._key = sessionStorage.getItem(KEY);
    /** @type {Promise<string | null> | null} */
    this._asking = null;
    /** Which engine is meant; "": the service's first one. */
    this.engine = "";
  }

  /**
   * Call the service; ask for the key where it wants one.
   * @param {string} path @param {RequestInit} [options] @returns {Promise<Response>} an answer of status 2xx
   */
  async call(path, options = {}) {
    for (;;) {
      const used = this._key;
      const headers = new Headers(options.headers);
      if (used) headers.set("Authorization", `Bearer ${used}`);
      const answer = await reach(path, { ...options, headers });
      if (answer.ok) return answer;
      if (answer.status !== 401) throw await readError(answer);
      if (this._key !== used) continue; // another call has just asked
      this._asking ??= this._askKey(used !== null).finally(() => (this._asking = null));
      const key = await this._asking;
      if (key === null) throw await readError(answer);
      this._key = key;
      sessionStorage.setItem(KEY, key);
    }
  }

  /** @param {string} path @param {RequestInit} [options] @returns {Promise<any>} */
  async json(path, options) {
    return parseJson(await (await this.call(path, options)).text());
  }

  /** @param {string} path */
  async blob(path) {
    return (await this.call(path)).blob();
  }

  /** @param {string} path */
  _ofEngine(path) {
    return this.engine ? `${path}?engine=${encodeURIComponent(this.engine)}` : path;
  }

  schema() {
    return this.json(this._ofEngine("v1/schema"));
  }

  subjects() {
    return this.json(this._ofEngine("v1/subjects"));
  }

  /** @param {string} name */
  thumbnail(name) {
    return this.blob(this._ofEngine(`v1/subjects/${encodeURIComponent(name)}/thumbnail`));
  }

  /** @param {string} path `v1/subjects` or `v1/subjects/enroll` @param {Record<string, Blob | string>} fields */
  addSubject(path, fields) {
    return this.json(this._ofEngine(path), { method: "POST", body: makeForm(fields) });
  }

  /** @param {string} name */
  removeSubject(name) {
    return this.call(this._ofEngine(`v1/subjects/${encodeURIComponent(name)}`), { method: "DELETE" });
  }

  /** @param {Blob} image @param {Blob} mask @param {Record<string, any>} request @param {string} key */
  startJob(image, mask, request, key) {
    const engine = this.engine ? { engine: this.engine } : {};
    const body = makeForm({ image, mask, request: writeJson(request), ...engine });
    return this.json("v1/jobs", { method: "POST", body, headers: { "Idempotency-Key": key } });
  }

  /** @param {string} id */
  cancelJob(id) {
    return this.call(`v1/jobs/${id}`, { method: "DELETE" });
  }

  /** @param {string} id @param {number} number */
  jobImage(id, number) {
    return this.blob(`v1/jobs/${id}/images/${number}`);
  }

  /** @param {Blob} image */
  async readRequest(image) {
    return (await this.json("v1/read-request", { method: "POST", body: makeForm({ image }) })).request;
  }

  /**
   * What happens to a job, as it happens.
   * @param {string} id @param {number} previews every so many steps @param {AbortSignal} signal
   */
  async *events(id, previews, signal) {
    const answer = await this.call(`v1/jobs/${id}/events?previews=${previews}`, { signal });
    yield* readEvents(/** @type {ReadableStream<Uint8Array>} */ (answer.body));
  }
}

/**
 * The events of a text/event-stream.
 * @param {ReadableStream<Uint8Array>} body @returns {AsyncGenerator<{name: string, data: any}>}
 */
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(() => ({ value: undefined, done: true }));
    if (done) return;
    rest = (rest + value).replaceAll("\r\n", "\n");
    const blocks = rest.split("\n\n");
    rest = /** @type {string} */ (blocks.pop());
    for (const block of blocks) {
      const lines = block.split("\n");
      const take = (/** @type {string} */ field) =>
        lines
          .filter((line) => line.startsWith(`${field}:`))
          .map((line) => line.slice(field.length + 1).replace(/^ /, ""))
          .join("\n");
      if (take("data")) yield { name: take("event"), data: parseJson(take("data")) };
    }
  }
}

/** Seeds reach beyond what a number holds exactly; such a seed stays text. @param {string} text */
export function parseJson(text) {
  return JSON.parse(text.replace(/"seed":\s*(\d{16,})/g, '"seed":"$1"'));
}

/** @param {Record<string, any>} request whose seed is text of digits */
export function writeJson(request) {
  const { seed, ...rest } = request;
  const text = JSON.stringify(rest);
  if (seed === undefined || seed === null || seed === "") return text.replace(/^\{/, '{"seed":null,').replace(",}", "}");
  return text.replace(/^\{/, `{"seed":${seed},`).replace(",}", "}");
}

/** @param {Record<string, Blob | string>} fields */
function makeForm(fields) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    if (typeof value === "string") form.append(name, value);
    else form.append(name, value, value instanceof File ? value.name : `${name}.png`);
  }
  return form;
}

/** @param {string} path @param {RequestInit} options */
async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Unreachable();
  }
}

/** @param {Response} answer */
async function readError(answer) {
  const body = await answer.json().catch(() => ({}));
  const error = new ApiError(answer.status, body.error ?? {});
  const wait = answer.headers.get("Retry-After");
  if (answer.status === 429 && wait) error.message += ` Try again in ${wait} s.`;
  return error;
}
