"""Rooms for the world's things: walls, surfaces, light and clutter, in muted colours, drawn at any size.

A room is painted without its thing; whatever stands in it lies behind the thing and beside it, and hides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

from dreammix_trt.trainer.micro.distances import Array, cover, ellipse, rounded_box

SURFACES: Final = ("wooden table", "stone table", "white shelf", "table", "tiled floor")
_WALLS: Final = (
    (206, 214, 222), (224, 216, 200), (202, 216, 204), (222, 206, 206), (214, 208, 224), (228, 228, 224),
    (186, 196, 206), (208, 196, 178), (176, 190, 180), (236, 230, 220),
)  # fmt: skip
_WOODS: Final = ((168, 134, 102), (142, 112, 88), (188, 158, 124), (120, 96, 78), (176, 146, 118))
_STONES: Final = ((150, 150, 154), (176, 172, 168), (128, 130, 136), (190, 186, 180))
_CLOTHS: Final = ((196, 190, 180), (168, 176, 184), (180, 168, 160), (150, 158, 150))
_CLUTTER: Final = (
    (176, 184, 190), (190, 178, 160), (164, 176, 166), (182, 166, 168), (226, 222, 214), (140, 140, 146),
    (150, 132, 118), (128, 142, 150),
)  # fmt: skip
_F = np.float32


@dataclass(frozen=True)
class Interior:
    """A painted room. canvas: float32 (H, W, 3) in 0..255; surface: one of SURFACES, what the thing stands on."""

    canvas: Array
    surface: str


def mix(canvas: Array, colour: Array, alpha: Array) -> Array:
    """canvas (H, W, 3) towards colour (3,) or (H, W, 3) by alpha (H, W)."""
    return np.asarray(canvas + (colour - canvas) * alpha[..., None], np.float32)


def _noise(rng: np.random.Generator, height: int, width: int, cells_y: float, cells_x: float) -> Array:
    """Smooth noise of unit scale: normal numbers on a coarse grid, scaled up."""
    grid = rng.normal(0, 1, (max(2, round(cells_y)), max(2, round(cells_x)))).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC), np.float32)


def _pick(rng: np.random.Generator, tones: tuple[tuple[int, int, int], ...], spread: float = 8) -> Array:
    tone = np.asarray(tones[rng.integers(len(tones))], np.float32)
    return np.asarray(tone + rng.uniform(-spread, spread) + rng.uniform(-3, 3, 3), np.float32)


class _Easel:
    """A canvas with its pixel coordinates."""

    def __init__(self, height: int, width: int, horizon: float, zoom: float) -> None:
        self.height, self.width, self.horizon, self.zoom = height, width, horizon, zoom
        self.y = np.broadcast_to((np.arange(height, dtype=np.float32) + _F(0.5))[:, None], (height, width))
        self.x = np.broadcast_to((np.arange(width, dtype=np.float32) + _F(0.5))[None, :], (height, width))
        self.canvas = np.zeros((height, width, 3), np.float32)

    def fill(self, colour: Array, alpha: Array) -> None:
        self.canvas = mix(self.canvas, colour, alpha)

    def box(self, x: float, y: float, half_w: float, half_h: float, colour: Array, radius: float = 1.0) -> None:
        self.fill(colour, cover(rounded_box(self.x, self.y, x, y, half_w, half_h, radius), 1))

    def oval(self, x: float, y: float, half_w: float, half_h: float, colour: Array) -> None:
        self.fill(colour, cover(ellipse(self.x, self.y, x, y, half_w, half_h), 1))

    def shade(self, x: float, y: float, half_w: float, half_h: float) -> None:
        """A soft contact shadow."""
        far = ((self.x - _F(x)) / _F(half_w)) ** 2 + ((self.y - _F(y)) / _F(half_h)) ** 2
        self.canvas = self.canvas * (1 - _F(0.34) * np.exp(-far))[..., None]


def paint_room(
    rng: np.random.Generator, height: int, width: int, horizon: float, zoom: float, light: tuple[float, float, float]
) -> Interior:
    """horizon: row where the surface begins; zoom: pixels of one unit, a thing's 60th; light: as in objects.View."""
    easel = _Easel(height, width, horizon, zoom)
    _paint_wall(rng, easel, light)
    surface = SURFACES[rng.choice(len(SURFACES), p=(0.34, 0.2, 0.16, 0.18, 0.12))]
    _paint_surface(rng, easel, surface)
    _paint_clutter(rng, easel)
    bright = 1 + 0.07 * light[0] * (easel.x / width - 0.5) * 2 + 0.05 * light[1] * (easel.y / height - 0.5) * 2
    return Interior(np.asarray(easel.canvas * bright[..., None], np.float32), surface)


def _paint_wall(rng: np.random.Generator, easel: _Easel, light: tuple[float, float, float]) -> None:
    height, width, zoom, horizon = easel.height, easel.width, easel.zoom, easel.horizon
    wall = _pick(rng, _WALLS)
    easel.canvas[:] = wall
    kind = rng.random()
    if kind < 0.28:  # two walls meet
        corner, darker = rng.uniform(0.12, 0.88) * width, rng.uniform(0.82, 0.93)
        left = np.clip(_F(corner) - easel.x + _F(0.5), 0, 1)
        easel.fill(wall * _F(darker), left if light[0] < 0 else 1 - left)
        easel.fill(wall * _F(darker * 0.94), np.exp(-(((easel.x - _F(corner)) / _F(1.5 * zoom)) ** 2)) * _F(0.5))
    elif kind < 0.4:  # wainscot: the lower wall in another tone, with a ledge
        edge = horizon - rng.uniform(14, 40) * zoom
        easel.fill(_pick(rng, _WALLS), np.clip(easel.y - _F(edge) + _F(0.5), 0, 1))
        easel.box(width / 2, edge, width, 1.2 * zoom, wall * _F(1.05))
    elif kind < 0.5:  # boards
        period = rng.uniform(18, 34) * zoom
        line = np.abs(np.mod(easel.x / _F(period), 1) - _F(0.5)) * _F(period)
        easel.fill(wall * _F(0.88), np.clip(_F(0.9 * max(zoom, 0.6)) - line, 0, 1) * _F(0.7))
    if rng.random() < 0.3:  # a frame
        half = rng.uniform(9, 20) * zoom, rng.uniform(9, 20) * zoom
        at = rng.uniform(0, width), horizon - half[1] - rng.uniform(6, 34) * zoom
        tone = _pick(rng, _CLUTTER)
        easel.box(at[0], at[1], half[0], half[1], tone * _F(0.8))
        easel.box(at[0], at[1], half[0] - 2.2 * zoom, half[1] - 2.2 * zoom, tone * _F(1.12))
    if rng.random() < 0.2:  # a window's light on the wall, slanted
        x0, slant = rng.uniform(0.1, 0.9) * width, rng.uniform(-0.5, 0.5)
        inside = np.abs(easel.x - _F(x0) - _F(slant) * (easel.y - _F(horizon))) - _F(rng.uniform(10, 26) * zoom)
        easel.fill(np.minimum(wall * _F(1.1), 255), np.clip(-inside / _F(3 * zoom), 0, 1) * _F(0.6))
    if rng.random() < 0.25:  # a board on the wall with small things on it
        y = horizon - rng.uniform(26, 52) * zoom
        left, right = sorted(rng.uniform(-0.1, 1.1, 2) * width)
        wood = _pick(rng, _WOODS)
        for _ in range(int(rng.integers(1, 5))):
            x, w, h = rng.uniform(left, right), rng.uniform(2, 6) * zoom, rng.uniform(4, 11) * zoom
            easel.box(x, y - h, w, h, _pick(rng, _CLUTTER))
        easel.box((left + right) / 2, y, max(1.0, (right - left) / 2), 1.6 * zoom, wood)
        easel.box((left + right) / 2, y + 2.4 * zoom, max(1.0, (right - left) / 2), 0.9 * zoom, wood * _F(0.75), 0.0)
    easel.canvas = easel.canvas * (1 + _F(0.02) * _noise(rng, height, width, 3, 3))[..., None]


def _paint_surface(rng: np.random.Generator, easel: _Easel, surface: str) -> None:
    height, width, zoom, horizon = easel.height, easel.width, easel.zoom, easel.horizon
    depth = np.clip((easel.y - _F(horizon)) / _F(max(8.0, height - horizon)), 0, 1)
    if surface == "wooden table":
        tone = _pick(rng, _WOODS)
        grain = _noise(rng, height, width, height / (2.2 * zoom), max(2.0, width / (70 * zoom)))
        broad = _noise(rng, height, width, height / (9 * zoom), max(2.0, width / (160 * zoom)))
        fine = _noise(rng, height, width, height / (1.1 * zoom), max(2.0, width / (40 * zoom)))
        texture = 1 + _F(0.04) * grain + _F(0.04) * broad + _F(0.022) * fine
        if rng.random() < 0.5:  # planks
            period = rng.uniform(14, 26) * zoom
            warped = (depth ** _F(1.4)) * _F(height - horizon) / _F(period)
            line = np.abs(np.mod(warped, 1) - _F(0.5)) * _F(period)
            texture = texture * (1 - _F(0.2) * np.clip(_F(0.8 * max(zoom, 0.7)) - line, 0, 1))
        top = tone * texture[..., None]
    elif surface == "stone table":
        tone = _pick(rng, _STONES)
        texture = 1 + _F(0.035) * _noise(rng, height, width, height / (8 * zoom), width / (8 * zoom))
        texture = texture + _F(0.02) * _noise(rng, height, width, height / (2.5 * zoom), width / (2.5 * zoom))
        top = tone * texture[..., None]
    elif surface == "white shelf":
        top = np.broadcast_to(np.minimum(_pick(rng, ((232, 230, 226),)), 244), (height, width, 3))
    elif surface == "tiled floor":
        tone = _pick(rng, _STONES)
        rows = np.log1p(depth * _F(3)) * _F(rng.uniform(4, 6))
        columns = (easel.x - _F(width / 2)) / ((_F(0.45) + depth) * _F(rng.uniform(34, 52) * zoom))
        joint = np.minimum(np.abs(np.mod(rows, 1) - _F(0.5)), np.abs(np.mod(columns, 1) - _F(0.5)))
        top = tone * (1 - _F(0.14) * np.clip(1 - joint * _F(22), 0, 1))[..., None]
    else:
        top = np.broadcast_to(_pick(rng, _CLOTHS), (height, width, 3))
    edge = np.clip((easel.y - _F(horizon)) / _F(1.2) + _F(0.5), 0, 1)
    easel.fill(np.asarray(top * (1 + _F(0.10) * depth[..., None]), np.float32), edge)
    lip = np.exp(-(((easel.y - _F(horizon) - _F(1.2 * zoom)) / _F(1.3 * max(zoom, 0.5))) ** 2)) * _F(0.2)
    easel.fill(easel.canvas * _F(0.6), lip)


def _paint_clutter(rng: np.random.Generator, easel: _Easel) -> None:
    """Books, plates, boxes and pots, standing at the far edge or lying about."""
    zoom, horizon = easel.zoom, easel.horizon
    for _ in range(int(rng.integers(0, 4))):
        tone, x = _pick(rng, _CLUTTER), rng.uniform(0, easel.width)
        y, kind = horizon + rng.uniform(1, 16) * zoom, rng.random()
        easel.shade(x + 1.5 * zoom, y + 0.8 * zoom, rng.uniform(8, 12) * zoom, 2.6 * zoom)
        if kind < 0.3:  # a pile of books
            for _ in range(int(rng.integers(1, 4))):
                half = rng.uniform(7, 12) * zoom
                easel.box(x + rng.uniform(-2, 2) * zoom, y, half, 1.9 * zoom, tone)
                easel.box(x, y + 1.7 * zoom, half * 0.98, 0.4 * zoom, tone * _F(0.75), 0.0)
                y, tone = y - 4 * zoom, _pick(rng, _CLUTTER)
        elif kind < 0.55:  # a plate
            a = rng.uniform(8, 15) * zoom
            easel.oval(x, y, a, 0.3 * a, tone)
            easel.oval(x, y - 0.3 * zoom, 0.7 * a, 0.2 * a, tone * _F(0.93))
        elif kind < 0.8:  # a box
            w, h = rng.uniform(4, 10) * zoom, rng.uniform(4, 10) * zoom
            easel.box(x, y - h, w, h, tone)
            easel.box(x + w, y - h, 0.22 * w, h, tone * _F(0.8))
        else:  # a pot with leaves
            w = rng.uniform(4, 7) * zoom
            for _ in range(5):
                dx, dy = rng.uniform(-1.2, 1.2) * w, -rng.uniform(2.2, 4.2) * w
                leaf = np.asarray((112, 138, 112), np.float32) + _F(rng.uniform(-14, 14))
                easel.oval(x + dx, y + dy, 0.55 * w, 0.95 * w, leaf)
            easel.box(x, y - 1.1 * w, w, 1.1 * w, tone, 0.3 * w)


def cast_shadow(
    canvas: Array, foot: tuple[float, float], half_width: float, size: float, pitch: float, light: tuple[float, ...]
) -> Array:
    """Darken under and beside a thing that stands at `foot` (pixels), half_width of its base in pixels."""
    y = (np.arange(canvas.shape[0], dtype=np.float32) + _F(0.5))[:, None]
    x = (np.arange(canvas.shape[1], dtype=np.float32) + _F(0.5))[None, :]
    flat = max(0.12, pitch)
    contact = ((x - _F(foot[0])) / _F(1.12 * half_width)) ** 2 + ((y - _F(foot[1])) / _F(1.2 * half_width * flat)) ** 2
    lean = -light[0] * 0.55 * size
    cx, cy = foot[0] + 0.5 * lean, foot[1] + 0.06 * size
    wide, deep = half_width + 0.45 * abs(lean), (half_width * flat + 0.05 * size)
    tilt = (y - _F(cy)) - (x - _F(cx)) * _F(0.10 * np.sign(lean))
    fallen = ((x - _F(cx)) / _F(1.25 * wide)) ** 2 + (tilt / _F(1.3 * deep)) ** 2
    dark = _F(0.5) * np.exp(-_F(1.4) * contact**2) + _F(0.26) * np.exp(-fallen)
    return np.asarray(canvas * (1 - np.minimum(dark, _F(0.62)))[..., None], np.float32)
