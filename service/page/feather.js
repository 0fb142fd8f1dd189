// @ts-check
/** How far a result reaches beyond the mask (docs/algorithm.md, 9.1). */

/** Pixels of the picture over which a result fades, where the request does not say. @param {number} shortSide */
export function usualFeather(shortSide) {
  const exact = (32 * shortSide) / 1024;
  const rounded = exact % 2 === 0.5 ? Math.floor(exact) : Math.round(exact); // halves go to the even number
  return Math.min(Math.max(2, rounded), 32767);
}

/**
 * The weight of the result at every pixel, 0..255: 255 on the mask, then falling with the Chebyshev distance.
 * @param {Uint8Array} mask @param {number} width @param {number} height @param {number} feather
 */
export function featherWeights(mask, width, height, feather) {
  const reach = Math.max(1, feather);
  const distance = chebyshevDistance(mask, width, height);
  const weights = new Uint8Array(mask.length);
  for (let i = 0; i < weights.length; i++) {
    if (distance[i] < reach) weights[i] = Math.min(255, Math.floor((256 * (reach - distance[i])) / reach));
  }
  return weights;
}

/**
 * The distance of every pixel to the nearest marked one, by two passes over the eight neighbours.
 * @param {Uint8Array} mask @param {number} width @param {number} height
 */
export function chebyshevDistance(mask, width, height) {
  const far = width + height;
  const across = width + 2; // a border of far pixels spares every test at the edges
  const field = new Int32Array(across * (height + 2)).fill(far);
  const forward = [-1, -across, -across - 1, -across + 1];
  const backward = [1, across, across + 1, across - 1];
  const relax = (/** @type {number} */ at, /** @type {number[]} */ neighbours) => {
    let least = field[at];
    for (const step of neighbours) least = Math.min(least, field[at + step] + 1);
    field[at] = least;
  };
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const at = (y + 1) * across + x + 1;
      if (mask[y * width + x] > 127) field[at] = 0;
      else relax(at, forward);
    }
  }
  const distance = new Int32Array(width * height);
  for (let y = height - 1; y >= 0; y--) {
    for (let x = width - 1; x >= 0; x--) {
      const at = (y + 1) * across + x + 1;
      relax(at, backward);
      distance[y * width + x] = field[at];
    }
  }
  return distance;
}
