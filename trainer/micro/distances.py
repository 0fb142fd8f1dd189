"""Signed distances of plain figures: negative inside, in the unit of the coordinates that come in.

``u`` runs right and ``v`` down; arrays are float32 and broadcast against each other. ``cover`` turns a distance into
antialiased coverage.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
_F = np.float32


def cover(distance: Array, pixels: float) -> Array:
    """Coverage in 0..1 of the area where `distance` is negative; pixels: how many pixels one unit spans."""
    return np.asarray(np.clip(_F(0.5) - distance * _F(pixels), 0, 1), np.float32)


def circle(u: Array, v: Array, x: float, y: float, radius: float) -> Array:
    return np.asarray(np.hypot(u - _F(x), v - _F(y)) - _F(radius), np.float32)


def ellipse(u: Array, v: Array, x: float, y: float, a: float, b: float) -> Array:
    """First order: exact on the outline, good enough a pixel beside it."""
    p, q = (u - _F(x)) / _F(a), (v - _F(y)) / _F(b)
    length = np.hypot(p, q) + _F(1e-6)
    slope = np.hypot(p / _F(a), q / _F(b)) / length + _F(1e-6)
    return np.asarray((length - 1) / slope, np.float32)


def rounded_box(u: Array, v: Array, x: float, y: float, half_w: float, half_h: float, radius: float = 0.0) -> Array:
    p = np.abs(u - _F(x)) - _F(half_w - radius)
    q = np.abs(v - _F(y)) - _F(half_h - radius)
    outside = np.hypot(np.maximum(p, 0), np.maximum(q, 0))
    return np.asarray(outside + np.minimum(np.maximum(p, q), 0) - _F(radius), np.float32)


def segment(u: Array, v: Array, a: tuple[float, float], b: tuple[float, float], wide: float, narrow: float) -> Array:
    """A stroke from a to b whose half width runs from `wide` to `narrow`."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    along = (u - _F(a[0])) * _F(dx) + (v - _F(a[1])) * _F(dy)
    along = np.clip(along / _F(dx * dx + dy * dy), 0, 1)
    distance = np.hypot(u - _F(a[0]) - along * _F(dx), v - _F(a[1]) - along * _F(dy))
    return np.asarray(distance - (_F(wide) + _F(narrow - wide) * along), np.float32)


def convex(u: Array, v: Array, corners: tuple[tuple[float, float], ...]) -> Array:
    """A convex polygon as the largest of its half-plane distances; corners run clockwise on screen."""
    best: Array | None = None
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = float(np.hypot(x1 - x0, y1 - y0))
        normal = _F((y1 - y0) / length), _F((x1 - x0) / length)
        plane = (u - _F(x0)) * normal[0] - (v - _F(y0)) * normal[1]
        best = plane if best is None else np.maximum(best, plane)
    assert best is not None
    return np.asarray(best, np.float32)


def star(u: Array, v: Array, outer: float, inner: float) -> Array:
    """A five-pointed star around the origin: fold the plane into half a point, then one straight edge."""
    step = _F(np.pi / 5)
    folded = np.abs(np.mod(np.arctan2(u, -v) + step, 2 * step) - step)
    length = np.hypot(u, v)
    fx, fy = length * np.sin(folded), length * np.cos(folded)
    ex, ey = inner * np.sin(np.pi / 5), inner * np.cos(np.pi / 5) - outer
    norm = float(np.hypot(ex, ey))
    return np.asarray(-(fx * _F(ey) - (fy - _F(outer)) * _F(ex)) / _F(norm), np.float32)


def heart(u: Array, v: Array, side: float) -> Array:
    """A square on its corner with a disc on each of its two upper sides."""
    root = _F(np.sqrt(0.5))
    a, b = (u + v) * root, (v - u) * root
    half = side / 2
    square = rounded_box(a, b, 0, 0, half, half, 0.1 * side)
    return np.minimum(square, np.minimum(circle(a, b, -half, 0, half), circle(a, b, 0, -half, half)))


# -- decals: (u, v, radius) -> distance, all of about the same area ------------------------------------------------


def _decal_star(u: Array, v: Array, radius: float) -> Array:
    return star(u, v - _F(0.05 * radius), 1.22 * radius, 0.54 * radius)


def _decal_heart(u: Array, v: Array, radius: float) -> Array:
    return heart(u, v - _F(0.1 * radius), 1.16 * radius)


def _decal_circle(u: Array, v: Array, radius: float) -> Array:
    return circle(u, v, 0, 0, 0.96 * radius)


def _decal_square(u: Array, v: Array, radius: float) -> Array:
    return rounded_box(u, v, 0, 0, 0.86 * radius, 0.86 * radius, 0.04 * radius)


def _decal_moon(u: Array, v: Array, radius: float) -> Array:
    return np.maximum(
        circle(u, v, -0.05 * radius, 0, 1.08 * radius), -circle(u, v, 0.5 * radius, -0.16 * radius, 0.86 * radius)
    )


def _decal_bolt(u: Array, v: Array, radius: float) -> Array:
    r = radius
    upper = convex(u, v, ((0.3 * r, -1.25 * r), (0.12 * r, 0.2 * r), (-0.75 * r, 0.2 * r)))
    lower = convex(u, v, ((-0.12 * r, -0.2 * r), (0.75 * r, -0.2 * r), (-0.3 * r, 1.25 * r)))
    return np.minimum(upper, lower)


def _decal_clover(u: Array, v: Array, radius: float) -> Array:
    r = 0.52 * radius
    leaves = [circle(u, v, x * r, y * r, r) for x, y in ((0, -1.05), (0.95, 0.0), (-0.95, 0.0))]
    stem = segment(u, v, (0, 0), (0.25 * r, 2.1 * r), 0.22 * r, 0.22 * r)
    return np.minimum(np.minimum(leaves[0], np.minimum(leaves[1], leaves[2])), stem)


_FIXED_DECALS: Final = {
    "star": _decal_star,
    "heart": _decal_heart,
    "circle": _decal_circle,
    "square": _decal_square,
    "moon": _decal_moon,
    "bolt": _decal_bolt,
    "clover": _decal_clover,
}


def decal(kind: str, u: Array, v: Array, radius: float, form: int = 0) -> Array:
    """A decal around the origin. "blot" is a random smooth outline that `form` decides."""
    if kind != "blot":
        return _FIXED_DECALS[kind](u, v, radius)
    rng = np.random.default_rng([31, form])
    angle = np.arctan2(v, u)
    outline = np.zeros_like(angle)
    for wave in range(2, 6):
        outline = outline + _F(rng.normal(0, 0.3 / wave**0.7)) * np.cos(wave * angle + _F(rng.uniform(0, 2 * np.pi)))
    return np.asarray((np.hypot(u, v) - _F(radius) * np.clip(1 + outline, 0.45, 1.4)) * _F(0.8), np.float32)
