// @ts-check
/** Where the picture lies on the stage: screen = picture * scale + offset. Screen units are CSS pixels. */

const LEAST_SIDE = 48; // so much of the picture stays on the stage
const MOST_SCALE = 32;
/** Where the tools are, and a margin elsewhere: a fitted picture keeps clear of them. */
const ROOM = { left: 84, right: 24, top: 24, bottom: 80 };
const ROOM_OF_PHONES = { left: 12, right: 12, top: 72, bottom: 76 }; // the tools are above
const PHONE = 620; // CSS pixels, as in style.css

export class View {
  constructor() {
    this.scale = 1;
    this.x = 0;
    this.y = 0;
    this.fitted = true;
    this.picture = { width: 1, height: 1 };
    this.stage = { width: 1, height: 1 };
  }

  /** @param {{width: number, height: number}} picture */
  setPicture({ width, height }) {
    this.picture = { width, height };
    this.fit();
  }

  /** @param {number} width @param {number} height */
  setStage(width, height) {
    this.stage = { width, height };
    if (this.fitted) this.fit();
    else this._keepInSight();
  }

  /** Show the whole picture, in the middle of what is free, enlarged up to four times. */
  fit() {
    const room = this.stage.width > PHONE ? ROOM : ROOM_OF_PHONES;
    const across = Math.max(1, this.stage.width - room.left - room.right);
    const down = Math.max(1, this.stage.height - room.top - room.bottom);
    this.scale = Math.min(across / this.picture.width, down / this.picture.height, 4);
    this.x = room.left + (across - this.picture.width * this.scale) / 2;
    this.y = room.top + (down - this.picture.height * this.scale) / 2;
    this.fitted = true;
  }

  /**
   * Zoom so that the point of the picture under a point of the stage stays there.
   * @param {number} factor @param {{x: number, y: number}} [at] the stage's middle where absent
   */
  zoom(factor, at = { x: this.stage.width / 2, y: this.stage.height / 2 }) {
    const still = this.toPicture(at);
    const least = Math.min(0.02, LEAST_SIDE / Math.max(this.picture.width, this.picture.height));
    this.scale = Math.min(MOST_SCALE, Math.max(least, this.scale * factor));
    this.x = at.x - still.x * this.scale;
    this.y = at.y - still.y * this.scale;
    this.fitted = false;
    this._keepInSight();
  }

  /** @param {number} dx @param {number} dy */
  pan(dx, dy) {
    this.x += dx;
    this.y += dy;
    this.fitted = false;
    this._keepInSight();
  }

  /** @param {{x: number, y: number}} point */
  toPicture({ x, y }) {
    return { x: (x - this.x) / this.scale, y: (y - this.y) / this.scale };
  }

  /** @param {{x: number, y: number}} point */
  toStage({ x, y }) {
    return { x: x * this.scale + this.x, y: y * this.scale + this.y };
  }

  _keepInSight() {
    const { width, height } = this.picture;
    this.x = Math.min(this.stage.width - LEAST_SIDE, Math.max(LEAST_SIDE - width * this.scale, this.x));
    this.y = Math.min(this.stage.height - LEAST_SIDE, Math.max(LEAST_SIDE - height * this.scale, this.y));
  }
}
