// @ts-check
/** Pictures that are dropped, pasted or chosen. */

import { $ } from "./dom.js";
import { Mask } from "./mask.js";

/** @param {(file: File) => void} take */
export function listenForFiles(take) {
  const input = $("file");
  for (const id of ["open", "choose"]) $(id).addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    if (input.files[0]) take(input.files[0]);
    input.value = "";
  });
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData?.files ?? [];
    if (!file) return;
    event.preventDefault();
    take(file);
  });
  listenForDrops(take);
}

/** @param {(file: File) => void} take */
function listenForDrops(take) {
  const sign = $("drop");
  const holdsFiles = (/** @type {DragEvent} */ event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    sign.hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) sign.hidden = true;
  });
  document.addEventListener("drop", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    sign.hidden = true;
    const [file] = event.dataTransfer?.files ?? [];
    if (file) take(file);
  });
}

/**
 * A picture, upright, as the service will see it.
 * @param {Blob} blob @param {{pixels?: number, bytes?: number}} limits @returns {Promise<ImageBitmap>}
 */
export async function decodePicture(blob, limits) {
  if (limits.bytes && blob.size > limits.bytes) {
    throw new Error(`The file has ${spellBytes(blob.size)}, and this service takes up to ${spellBytes(limits.bytes)}.`);
  }
  let picture;
  try {
    picture = await createImageBitmap(blob, { imageOrientation: "from-image" });
  } catch {
    throw new Error("This browser cannot read the file as a picture. JPEG, PNG and WebP always work.");
  }
  const pixels = picture.width * picture.height;
  if (limits.pixels && pixels > limits.pixels) {
    const [has, takes] = [pixels, limits.pixels].map((each) => (each / 1e6).toFixed(1));
    throw new Error(`The picture has ${has} million pixels, and this service takes up to ${takes}.`);
  }
  return picture;
}

/** What is transparent in a picture is marked, where something is and something is not. @param {ImageBitmap} picture */
export function maskFromAlpha(picture) {
  const { width, height } = picture;
  const mask = new Mask(width, height);
  const canvas = new OffscreenCanvas(width, height);
  const pen = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d"));
  pen.drawImage(picture, 0, 0);
  const { data } = pen.getImageData(0, 0, width, height);
  for (let i = 0; i < mask.data.length; i++) mask.data[i] = data[4 * i + 3] <= 127 ? 255 : 0;
  return mask.data.includes(0) ? mask : new Mask(width, height);
}

/** @param {number} bytes */
function spellBytes(bytes) {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}
