// @ts-check
/** What outlives a reload: settings in the session's storage, pictures and masks in a database of the browser. */

const SETTINGS = "dreammix-settings";
const SESSION = "dreammix-session";
const KEPT_HOURS = 24;

/** @returns {Record<string, any>} */
export function loadSettings() {
  try {
    return JSON.parse(sessionStorage.getItem(SETTINGS) ?? "{}");
  } catch {
    return {};
  }
}

/** @param {Record<string, any>} changes */
export function saveSettings(changes) {
  sessionStorage.setItem(SETTINGS, JSON.stringify({ ...loadSettings(), ...changes }));
}

/**
 * One session's records by name. Where the browser has no database (private windows of some), nothing is kept.
 * Sessions that were not used for a day are forgotten.
 */
export class Store {
  constructor() {
    this._session = sessionStorage.getItem(SESSION) ?? String(Date.now()) + Math.random().toString(16).slice(2);
    sessionStorage.setItem(SESSION, this._session);
    /** @type {Promise<IDBDatabase | null>} */
    this._base = openBase().catch(() => null);
    this._forgetOld();
  }

  /** @param {string} name @returns {Promise<any>} */
  async get(name) {
    const record = await this._run("readonly", (records) => records.get([this._session, name]));
    return record?.value;
  }

  /** @param {string} name @param {any} value undefined: forget it */
  async put(name, value) {
    const record = { session: this._session, name, value, used: Date.now() };
    await this._run("readwrite", (records) =>
      value === undefined ? records.delete([this._session, name]) : records.put(record),
    );
  }

  async _forgetOld() {
    const oldest = Date.now() - KEPT_HOURS * 3_600_000;
    const all = (await this._run("readonly", (records) => records.getAllKeys())) ?? [];
    const others = all.filter((/** @type {any} */ key) => key[0] !== this._session);
    for (const key of others) {
      const record = await this._run("readonly", (records) => records.get(key));
      if (record && record.used < oldest) await this._run("readwrite", (records) => records.delete(key));
    }
  }

  /** @param {IDBTransactionMode} mode @param {(records: IDBObjectStore) => IDBRequest} act @returns {Promise<any>} */
  async _run(mode, act) {
    const base = await this._base;
    if (!base) return undefined;
    return new Promise((resolve) => {
      try {
        const transaction = base.transaction("records", mode);
        const request = act(transaction.objectStore("records"));
        transaction.oncomplete = () => resolve(request.result);
        transaction.onabort = transaction.onerror = () => resolve(undefined); // full: the page works on without it
      } catch {
        resolve(undefined);
      }
    });
  }
}

/** @returns {Promise<IDBDatabase>} */
function openBase() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("dreammix", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("records", { keyPath: ["session", "name"] });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
