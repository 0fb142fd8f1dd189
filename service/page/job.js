// @ts-check
/** Follows one job to its end, over lost connections. */

import { ApiError, Unreachable } from "./api.js";

const MOST_TRIES = 8;
const PREVIEW_STEPS = 3;

/**
 * @typedef {{queued(position: number): void, step(step: number, steps: number): void, preview(image: string): void}} Watcher
 * @param {import("./api.js").Api} api @param {string} id @param {Watcher} watcher @param {AbortSignal} signal
 * @returns {Promise<{images: string[], request: any, warnings?: any[], seconds?: any} | null>} null: it was cancelled
 */
export async function followJob(api, id, watcher, signal) {
  for (let tries = 0; tries < MOST_TRIES; tries++) {
    if (tries) await new Promise((resolve) => setTimeout(resolve, Math.min(4000, 250 * 2 ** tries)));
    try {
      for await (const { name, data } of api.events(id, PREVIEW_STEPS, signal)) {
        tries = 0; // it is alive
        if (name === "done") return data;
        if (name === "cancelled") return null;
        if (name === "failed") throw new ApiError(500, data.error ?? {});
        if (name === "queued") watcher.queued(data.position);
        if (name === "step") watcher.step(data.step, data.steps);
        if (name === "preview") watcher.preview(data.image);
      }
    } catch (error) {
      if (!(error instanceof Unreachable)) throw error;
    }
    if (signal.aborted) return null;
  }
  throw new Unreachable();
}
