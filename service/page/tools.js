// @ts-check
/**
 * What a pointer does to the mask, from its first point to its last. Points are in pixels of the picture.
 *
 * @typedef {import("./mask.js").Mask} Mask
 * @typedef {import("./mask.js").Point} Point
 * @typedef {{move(point: Point, radius: number): void, end(): void, outline?: Point[]}} Gesture
 */

/** Paints or erases under the pointer. @implements {Gesture} */
class Stroke {
  /** @param {Mask} mask @param {Point} point @param {number} radius @param {number} value */
  constructor(mask, point, radius, value) {
    this.mask = mask;
    this.value = value;
    this.last = point;
    mask.begin();
    mask.fillStroke(point, point, radius, value);
  }

  /** @param {Point} point @param {number} radius */
  move(point, radius) {
    this.mask.fillStroke(this.last, point, radius, this.value);
    this.last = point;
  }

  end() {
    this.mask.commit();
  }
}

/** Fills a region when the pointer is lifted; until then only its outline is shown. @implements {Gesture} */
class Region {
  /** @param {Mask} mask @param {Point} point @param {number} value */
  constructor(mask, point, value) {
    this.mask = mask;
    this.value = value;
    this.first = point;
    this.outline = [point];
  }

  end() {
    this.mask.begin();
    this.fill();
    this.mask.commit();
  }

  fill() {
    this.mask.fillPolygon(this.outline, this.value);
  }
}

class Rectangle extends Region {
  /** @param {Point} point */
  move(point) {
    const { x, y } = this.first;
    this.outline = [this.first, { x: point.x, y }, point, { x, y: point.y }];
  }

  fill() {
    if (this.outline.length === 4) this.mask.fillRect(this.first, this.outline[2], this.value);
  }
}

class Lasso extends Region {
  /** @param {Point} point */
  move(point) {
    this.outline.push(point);
  }
}

/** @typedef {"brush" | "eraser" | "rectangle" | "lasso" | "hand"} ToolName */

/**
 * Begin what a tool does.
 * @param {ToolName} tool @param {Mask} mask @param {Point} point @param {number} radius
 * @param {boolean} erase the opposite of what the tool does
 * @returns {Gesture}
 */
export function beginGesture(tool, mask, point, radius, erase) {
  const value = erase !== (tool === "eraser") ? 0 : 255;
  if (tool === "rectangle") return new Rectangle(mask, point, value);
  if (tool === "lasso") return new Lasso(mask, point, value);
  return new Stroke(mask, point, radius, value);
}

/** The next brush size up or down: steps grow with the size. @param {number} size @param {1 | -1} direction */
export function stepSize(size, direction) {
  const step = Math.max(1, Math.round(size * 0.15));
  return clampSize(size + direction * step);
}

/** @param {number} size */
export function clampSize(size) {
  return Math.min(2000, Math.max(1, Math.round(size)));
}
