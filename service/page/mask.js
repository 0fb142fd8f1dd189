// @ts-check
/**
 * The mask at the picture's resolution: 255 is repainted, 0 stays. Nothing here knows of a screen.
 *
 * A pixel belongs to a shape when its centre does. Shapes may reach beyond the picture: what lies outside is left out,
 * and what lies inside stays as it is.
 *
 * @typedef {{x: number, y: number}} Point
 * @typedef {{x0: number, y0: number, x1: number, y1: number}} Rect  ends are exclusive
 */

/** Undo keeps at most so many bytes; the oldest changes are forgotten first. */
const MOST_UNDO_BYTES = 64 << 20;

export class Mask {
  /** @param {number} width @param {number} height @param {Uint8Array} [data] */
  constructor(width, height, data) {
    this.width = width;
    this.height = height;
    this.data = data ?? new Uint8Array(width * height);
    /** Called with the rectangle whose pixels may have changed. @type {(area: Rect) => void} */
    this.onpaint = () => {};
    /** Called after a change is kept, undone or done again. */
    this.onchange = () => {};
    /** @type {Uint8Array | null} */
    this._before = null;
    /** @type {Rect | null} */
    this._touched = null;
    /** @type {Patch[]} */
    this._undo = [];
    /** @type {Patch[]} */
    this._redo = [];
  }

  get whole() {
    return { x0: 0, y0: 0, x1: this.width, y1: this.height };
  }

  get isEmpty() {
    return !this.data.includes(255);
  }

  get canUndo() {
    return this._undo.length > 0;
  }

  get canRedo() {
    return this._redo.length > 0;
  }

  /** Begin a change: all that is painted until `commit` is one step of undo. */
  begin() {
    this._before = this.data.slice();
    this._touched = null;
  }

  /** Keep the change. */
  commit() {
    const before = this._before;
    const area = this._touched;
    this._before = null;
    if (!before || !area) return;
    const patch = takePatch(before, this.width, area);
    if (samePatch(patch, takePatch(this.data, this.width, area))) return;
    this._undo.push(patch);
    this._redo = [];
    let bytes = this._undo.reduce((sum, each) => sum + each.runs.byteLength, 0);
    while (bytes > MOST_UNDO_BYTES && this._undo.length > 1) {
      bytes -= /** @type {Patch} */ (this._undo.shift()).runs.byteLength;
    }
    this.onchange();
  }

  /** Forget the change: the mask is as it was at `begin`. */
  cancel() {
    const before = this._before;
    const area = this._touched;
    this._before = null;
    if (!before || !area) return;
    this.data.set(before);
    this.onpaint(area);
  }

  undo() {
    this._swap(this._undo, this._redo);
  }

  redo() {
    this._swap(this._redo, this._undo);
  }

  /** @param {Patch[]} from @param {Patch[]} to */
  _swap(from, to) {
    if (this._before) this.cancel();
    const patch = from.pop();
    if (!patch) return;
    to.push(takePatch(this.data, this.width, patch.area));
    putPatch(this.data, this.width, patch);
    this.onpaint(patch.area);
    this.onchange();
  }

  /**
   * Paint what a round brush covers on its way from a to b.
   * @param {Point} a @param {Point} b @param {number} radius in pixels @param {number} value
   */
  fillStroke(a, b, radius, value) {
    const r = Math.max(radius, Math.SQRT1_2); // a brush of one pixel always covers one centre
    const y0 = Math.max(0, Math.floor(Math.min(a.y, b.y) - r));
    const y1 = Math.min(this.height, Math.ceil(Math.max(a.y, b.y) + r) + 1);
    for (let y = y0; y < y1; y++) {
      const span = strokeSpan(a, b, r, y + 0.5);
      if (span) this._fillRow(y, span[0], span[1], value);
    }
    this._touch({
      x0: Math.floor(Math.min(a.x, b.x) - r),
      y0,
      x1: Math.ceil(Math.max(a.x, b.x) + r) + 1,
      y1,
    });
  }

  /** @param {Point} a @param {Point} b opposite corners, in any order @param {number} value */
  fillRect(a, b, value) {
    const [left, right] = [Math.min(a.x, b.x), Math.max(a.x, b.x)];
    const [top, bottom] = [Math.min(a.y, b.y), Math.max(a.y, b.y)];
    const y0 = Math.max(0, Math.ceil(top - 0.5));
    const y1 = Math.min(this.height, Math.floor(bottom - 0.5) + 1);
    for (let y = y0; y < y1; y++) this._fillRow(y, left, right, value);
    this._touch({ x0: Math.floor(left), y0, x1: Math.ceil(right), y1 });
  }

  /**
   * Paint what a closed line goes around; where it crosses itself, all that it goes around counts.
   * @param {Point[]} points @param {number} value
   */
  fillPolygon(points, value) {
    if (points.length < 3) return;
    const xs = points.map((p) => p.x);
    const ys = points.map((p) => p.y);
    const y0 = Math.max(0, Math.floor(Math.min(...ys)));
    const y1 = Math.min(this.height, Math.ceil(Math.max(...ys)));
    for (let y = y0; y < y1; y++) {
      let winding = 0;
      let start = 0;
      for (const { x, turn } of crossings(points, y + 0.5)) {
        if (winding === 0) start = x;
        winding += turn;
        if (winding === 0) this._fillRow(y, start, x, value);
      }
    }
    this._touch({ x0: Math.floor(Math.min(...xs)), y0, x1: Math.ceil(Math.max(...xs)), y1 });
  }

  invert() {
    this._change(() => {
      for (let i = 0; i < this.data.length; i++) this.data[i] = 255 - this.data[i];
    });
  }

  clear() {
    this._change(() => this.data.fill(0));
  }

  /** @param {() => void} paint */
  _change(paint) {
    if (this._before) this.commit();
    this.begin();
    paint();
    this._touch(this.whole);
    this.commit();
  }

  /** @param {number} y @param {number} left @param {number} right @param {number} value */
  _fillRow(y, left, right, value) {
    const x0 = Math.max(0, Math.ceil(left - 0.5));
    const x1 = Math.min(this.width, Math.floor(right - 0.5) + 1);
    if (x0 < x1) this.data.fill(value, y * this.width + x0, y * this.width + x1);
  }

  /** @param {Rect} area */
  _touch(area) {
    const clipped = {
      x0: Math.max(0, area.x0),
      y0: Math.max(0, area.y0),
      x1: Math.min(this.width, area.x1),
      y1: Math.min(this.height, area.y1),
    };
    if (clipped.x0 >= clipped.x1 || clipped.y0 >= clipped.y1) return;
    const old = this._touched ?? clipped;
    this._touched = {
      x0: Math.min(old.x0, clipped.x0),
      y0: Math.min(old.y0, clipped.y0),
      x1: Math.max(old.x1, clipped.x1),
      y1: Math.max(old.y1, clipped.y1),
    };
    this.onpaint(clipped);
  }

  /** The whole mask as run lengths, to be kept. @returns {Uint32Array} */
  pack() {
    return takePatch(this.data, this.width, this.whole).runs;
  }

  /** @param {number} width @param {number} height @param {Uint32Array} runs what `pack` gave */
  static unpack(width, height, runs) {
    const mask = new Mask(width, height);
    putPatch(mask.data, width, { area: mask.whole, runs });
    return mask;
  }
}

/**
 * Where a row's centre line lies in a round brush's way. The way is convex, so it is one span.
 * @param {Point} a @param {Point} b @param {number} r @param {number} y @returns {[number, number] | null}
 */
function strokeSpan(a, b, r, y) {
  let low = Infinity;
  let high = -Infinity;
  for (const end of [a, b]) {
    const rest = r * r - (y - end.y) ** 2;
    if (rest < 0) continue;
    low = Math.min(low, end.x - Math.sqrt(rest));
    high = Math.max(high, end.x + Math.sqrt(rest));
  }
  const [dx, dy] = [b.x - a.x, b.y - a.y];
  const length = Math.hypot(dx, dy);
  if (length > 0) {
    // Along the way from 0 to its length, and across it from -r to r: two bands that cut the row.
    const along = band(dx / length, ((y - a.y) * dy) / length, 0, length);
    const across = band(dy / length, (-(y - a.y) * dx) / length, -r, r);
    const left = Math.max(along[0], across[0]) + a.x;
    const right = Math.min(along[1], across[1]) + a.x;
    if (left <= right) {
      low = Math.min(low, left);
      high = Math.max(high, right);
    }
  }
  return low <= high ? [low, high] : null;
}

/**
 * The u with least <= slope * u + shift <= most.
 * @param {number} slope @param {number} shift @param {number} least @param {number} most @returns {[number, number]}
 */
function band(slope, shift, least, most) {
  if (Math.abs(slope) < 1e-12) return shift >= least && shift <= most ? [-Infinity, Infinity] : [1, -1];
  const ends = [(least - shift) / slope, (most - shift) / slope];
  return slope > 0 ? [ends[0], ends[1]] : [ends[1], ends[0]];
}

/**
 * Where a closed line crosses a row, from left to right.
 * @param {Point[]} points @param {number} y
 */
function crossings(points, y) {
  const found = [];
  for (let i = 0; i < points.length; i++) {
    const a = points[i];
    const b = points[(i + 1) % points.length];
    if (a.y <= y === b.y <= y) continue;
    found.push({ x: a.x + ((y - a.y) / (b.y - a.y)) * (b.x - a.x), turn: b.y > a.y ? 1 : -1 });
  }
  return found.sort((p, q) => p.x - q.x);
}

/**
 * @typedef {{area: Rect, runs: Uint32Array}} Patch  lengths of runs, row by row, the first one of zeros
 * @param {Uint8Array} data @param {number} width @param {Rect} area @returns {Patch}
 */
function takePatch(data, width, area) {
  const runs = [];
  let value = 0;
  let length = 0;
  for (let y = area.y0; y < area.y1; y++) {
    const end = y * width + area.x1;
    for (let i = y * width + area.x0; i < end; i++) {
      if (data[i] === value) {
        length++;
      } else {
        runs.push(length);
        value = data[i];
        length = 1;
      }
    }
  }
  runs.push(length);
  return { area, runs: Uint32Array.from(runs) };
}

/** @param {Uint8Array} data @param {number} width @param {Patch} patch */
function putPatch(data, width, { area, runs }) {
  const across = area.x1 - area.x0;
  let at = 0;
  runs.forEach((length, number) => {
    const value = number % 2 ? 255 : 0;
    for (const end = at + length; at < end; ) {
      const column = at % across;
      const step = Math.min(across - column, end - at);
      const start = (area.y0 + (at - column) / across) * width + area.x0 + column;
      data.fill(value, start, start + step);
      at += step;
    }
  });
}

/** @param {Patch} a @param {Patch} b */
function samePatch(a, b) {
  return a.runs.length === b.runs.length && a.runs.every((length, number) => length === b.runs[number]);
}
