"""The procedural world the embedded model is trained on: one object on a table, rendered from signed distances.

Everything is numpy (Pillow only resizes); nothing here imports torch. Conventions, used by every function:

* images are ``uint8 (height, width, 3)`` RGB; masks and alphas are ``float32 (height, width)`` in 0..1;
* a box is ``(x0, y0, x1, y1)`` in pixels, ends exclusive;
* an object lives in its own coordinates ``u`` (right) and ``v`` (down), where its longer side is about 1; a signed
  distance is negative inside, in the same unit, so ``0.5 - distance * size_px`` clipped to 0..1 is its coverage.

The world is made to be *learnable* by a small latent model: saturated distinct colours, patterns whose period follows
the object's size and whose phase is fixed to the object, calm backgrounds in muted colours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]
Picture = NDArray[np.uint8]
Box = tuple[int, int, int, int]

SHAPES: Final = ("mug", "teapot", "bottle", "bowl", "ball", "star", "heart", "house")
PATTERNS: Final = ("plain", "striped", "dotted", "checkered")
COLOUR_RGB: Final[dict[str, tuple[int, int, int]]] = {
    "red": (214, 32, 38),
    "orange": (246, 132, 18),
    "yellow": (250, 214, 30),
    "green": (34, 150, 62),
    "blue": (32, 86, 212),
    "purple": (124, 44, 172),
    "pink": (244, 96, 166),
    "black": (36, 36, 42),
}
COLOURS: Final = tuple(COLOUR_RGB)
_SECOND_TONE: Final[dict[str, tuple[int, int, int]]] = {"yellow": (92, 58, 24)}
_WHITE: Final = (250, 248, 242)

_WALLS: Final = ((206, 214, 222), (224, 216, 200), (202, 216, 204), (222, 206, 206), (214, 208, 224), (228, 228, 224))
_TABLES: Final = ((168, 134, 102), (142, 112, 88), (188, 164, 136), (150, 150, 154), (196, 190, 180), (120, 108, 100))
_CLUTTER: Final = ((176, 184, 190), (190, 178, 160), (164, 176, 166), (182, 166, 168), (238, 236, 230), (140, 140, 146))


@dataclass(frozen=True)
class Attributes:
    """What a caption can say of an object: one of SHAPES, one of COLOURS, one of PATTERNS."""

    shape: str
    colour: str
    pattern: str


@dataclass(frozen=True)
class Scene:
    """One rendered picture and all that is known of it.

    image: the picture; background: the same without the object and its shadow; alpha: the object's coverage;
    box: the object's bounding box (coverage above one half); attributes: what the object is;
    sharp_side: the side in pixels at which the picture was rendered before it was scaled up (equal to the short side
    of `image` when it was not), which is what SDXL calls the original size.
    """

    image: Picture
    background: Picture
    alpha: Array
    box: Box
    attributes: Attributes
    sharp_side: int


# -- signed distances, object coordinates ---------------------------------------------------------------------------


def _circle(u: Array, v: Array, x: float, y: float, radius: float) -> Array:
    return np.asarray(np.hypot(u - np.float32(x), v - np.float32(y)) - np.float32(radius), np.float32)


def _ellipse(u: Array, v: Array, x: float, y: float, a: float, b: float) -> Array:
    """First-order distance to an ellipse: exact on the outline, good enough one pixel beside it."""
    p, q = (u - np.float32(x)) / np.float32(a), (v - np.float32(y)) / np.float32(b)
    length = np.hypot(p, q) + np.float32(1e-6)
    slope = np.hypot(p / np.float32(a), q / np.float32(b)) / length + np.float32(1e-6)
    return np.asarray((length - 1) / slope, np.float32)


def _rounded_box(u: Array, v: Array, x: float, y: float, half_w: float, half_h: float, radius: float) -> Array:
    p = np.abs(u - np.float32(x)) - np.float32(half_w - radius)
    q = np.abs(v - np.float32(y)) - np.float32(half_h - radius)
    outside = np.hypot(np.maximum(p, 0), np.maximum(q, 0))
    return np.asarray(outside + np.minimum(np.maximum(p, q), 0) - np.float32(radius), np.float32)


def _segment(u: Array, v: Array, a: tuple[float, float], b: tuple[float, float], wide: float, narrow: float) -> Array:
    """A stroke from a to b whose half width runs from `wide` to `narrow`."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    along = (u - np.float32(a[0])) * np.float32(dx) + (v - np.float32(a[1])) * np.float32(dy)
    along = np.clip(along / np.float32(dx * dx + dy * dy), 0, 1)
    distance = np.hypot(u - np.float32(a[0]) - along * np.float32(dx), v - np.float32(a[1]) - along * np.float32(dy))
    return np.asarray(distance - (np.float32(wide) + np.float32(narrow - wide) * along), np.float32)


def _ring(u: Array, v: Array, x: float, y: float, radius: float, half_width: float) -> Array:
    return np.abs(_circle(u, v, x, y, radius)) - np.float32(half_width)


def _convex(u: Array, v: Array, corners: tuple[tuple[float, float], ...]) -> Array:
    """A convex polygon as the largest of its half-plane distances; corners run clockwise on screen."""
    best: Array | None = None
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = float(np.hypot(x1 - x0, y1 - y0))
        normal = np.float32((y1 - y0) / length), np.float32((x1 - x0) / length)
        plane = (u - np.float32(x0)) * normal[0] - (v - np.float32(y0)) * normal[1]
        best = plane if best is None else np.maximum(best, plane)
    assert best is not None
    return best


def _star(u: Array, v: Array, x: float, y: float, outer: float, inner: float) -> Array:
    """A five-pointed star: fold the plane into one half point, then one straight edge."""
    p, q = u - np.float32(x), v - np.float32(y)
    step = np.float32(np.pi / 5)
    angle = np.arctan2(p, -q)
    folded = np.abs(np.mod(angle + step, 2 * step) - step)
    length = np.hypot(p, q)
    fx, fy = length * np.sin(folded), length * np.cos(folded)
    ex, ey = inner * np.sin(np.pi / 5), inner * np.cos(np.pi / 5) - outer
    norm = float(np.hypot(ex, ey))
    return np.asarray(-(fx * np.float32(ey) - (fy - np.float32(outer)) * np.float32(ex)) / np.float32(norm), np.float32)


def _heart(u: Array, v: Array, x: float, y: float, side: float) -> Array:
    """A square on its corner with a disc on each of its two upper sides."""
    p, q = (u - np.float32(x)), (v - np.float32(y))
    root = np.float32(np.sqrt(0.5))
    a, b = (p + q) * root, (q - p) * root
    half = side / 2
    square = _rounded_box(a, b, 0, 0, half, half, 0.02)
    return np.minimum(square, np.minimum(_circle(a, b, -half, 0, half), _circle(a, b, 0, -half, half)))


# A shape is a list of parts painted in order: (role, distance). Roles: "body" carries the pattern, "plain" the colour
# alone, "dark" a darker tone of the colour, "hollow" the inside seen through an opening.
Parts = list[tuple[str, Array]]


def _mug(u: Array, v: Array) -> Parts:
    return [
        ("plain", _ring(u, v, 0.25, 0.03, 0.17, 0.05)),
        ("body", _rounded_box(u, v, -0.09, 0.03, 0.31, 0.42, 0.08)),
        ("hollow", _ellipse(u, v, -0.09, -0.345, 0.265, 0.065)),
    ]


def _teapot(u: Array, v: Array) -> Parts:
    return [
        ("plain", _ring(u, v, -0.31, 0.06, 0.145, 0.038)),
        ("plain", _segment(u, v, (0.2, 0.16), (0.45, -0.12), 0.1, 0.04)),
        ("dark", _circle(u, v, 0, -0.27, 0.055)),
        ("body", _ellipse(u, v, 0, 0.09, 0.325, 0.29)),
        ("dark", _ellipse(u, v, 0, -0.185, 0.16, 0.055)),
    ]


def _bottle(u: Array, v: Array) -> Parts:
    body = _rounded_box(u, v, 0, 0.16, 0.2, 0.34, 0.09)
    neck = _rounded_box(u, v, 0, -0.26, 0.075, 0.2, 0.02)
    blend = np.clip(0.5 + 0.5 * (neck - body) / np.float32(0.12), 0, 1).astype(np.float32)
    joined = neck + (body - neck) * blend - np.float32(0.12) * blend * (1 - blend)
    return [("body", joined), ("dark", _rounded_box(u, v, 0, -0.44, 0.1, 0.06, 0.02))]


def _bowl(u: Array, v: Array) -> Parts:
    half_disc = np.maximum(_ellipse(u, v, 0, -0.16, 0.5, 0.46), np.float32(-0.16) - v)
    return [
        ("dark", _rounded_box(u, v, 0, 0.3, 0.2, 0.05, 0.02)),
        ("body", half_disc),
        ("plain", _ellipse(u, v, 0, -0.16, 0.5, 0.1)),
        ("hollow", _ellipse(u, v, 0, -0.16, 0.44, 0.065)),
    ]


def _ball(u: Array, v: Array) -> Parts:
    return [("body", _circle(u, v, 0, 0.03, 0.47))]


def _star_shape(u: Array, v: Array) -> Parts:
    return [("body", _star(u, v, 0, 0.05, 0.56, 0.265))]


def _heart_shape(u: Array, v: Array) -> Parts:
    return [("body", _heart(u, v, 0, 0.06, 0.56))]


def _house(u: Array, v: Array) -> Parts:
    return [
        ("body", _rounded_box(u, v, 0, 0.2, 0.36, 0.3, 0.01)),
        ("dark", _convex(u, v, ((0.0, -0.48), (0.5, -0.06), (-0.5, -0.06)))),
        ("hollow", _rounded_box(u, v, 0, 0.36, 0.085, 0.14, 0.01)),
    ]


_PARTS: Final[dict[str, Callable[[Array, Array], Parts]]] = {
    "mug": _mug,
    "teapot": _teapot,
    "bottle": _bottle,
    "bowl": _bowl,
    "ball": _ball,
    "star": _star_shape,
    "heart": _heart_shape,
    "house": _house,
}
_FOOT: Final[dict[str, float]] = {
    "mug": 0.45, "teapot": 0.38, "bottle": 0.5, "bowl": 0.35, "ball": 0.5, "star": 0.5, "heart": 0.46, "house": 0.5,
}  # fmt: skip


# -- patterns ---------------------------------------------------------------------------------------------------------


def _bands(x: Array, period: float) -> Array:
    """Signed distance to alternate bands of half a period each; 0 is the middle of a positive (outside) band."""
    phase = np.mod(x / np.float32(period) + np.float32(0.5), 1) - np.float32(0.5)
    return np.asarray((np.float32(0.25) - np.abs(phase)) * np.float32(period), np.float32)


def _pattern_distance(pattern: str, u: Array, v: Array) -> Array | None:
    """Signed distance to the second tone's area (negative inside it), or None for a plain object."""
    if pattern == "striped":
        return _bands(v, 0.28)
    if pattern == "checkered":
        a, b = _bands(u + np.float32(0.1), 0.4), _bands(v + np.float32(0.1), 0.4)
        return np.maximum(np.minimum(a, b), -np.maximum(a, b))
    if pattern == "dotted":
        step = np.float32(0.27)
        row = np.round(v / step)
        shift = np.mod(row, 2) * np.float32(0.5)
        du = np.mod(u / step - shift + np.float32(0.5), 1) - np.float32(0.5)
        return np.asarray(np.hypot(du * step, v - row * step) - np.float32(0.088), np.float32)
    return None


# -- painting ---------------------------------------------------------------------------------------------------------


def _cover(distance: Array, size: float) -> Array:
    return np.asarray(np.clip(np.float32(0.5) - distance * np.float32(size), 0, 1), np.float32)


def _mix(canvas: Array, colour: Array, alpha: Array) -> Array:
    return np.asarray(canvas + (colour - canvas) * alpha[..., None], np.float32)


Paint = Callable[[str, Array, Array, float], Array]


def _attribute_paint(attributes: Attributes) -> Paint:
    base = np.asarray(COLOUR_RGB[attributes.colour], np.float32)
    second = np.asarray(_SECOND_TONE.get(attributes.colour, _WHITE), np.float32)
    dark = base * np.float32(0.62) if attributes.colour != "black" else base + np.float32(34)
    hollow = base * np.float32(0.42) if attributes.colour != "black" else base + np.float32(58)

    def paint(role: str, u: Array, v: Array, size: float) -> Array:
        flat = {"body": base, "plain": base, "dark": dark, "hollow": hollow}[role]
        colour = np.broadcast_to(flat, (*u.shape, 3)).astype(np.float32)
        if role == "body":
            distance = _pattern_distance(attributes.pattern, u, v)
            if distance is not None:
                colour = _mix(colour, second, _cover(distance, size))
        return colour

    return paint


def _subject_paint(role: str, u: Array, v: Array, size: float) -> Array:
    """The demo's subject: a mug, blue above and cream below, an orange star on its belly. Not in the training world."""
    tones = (34, 92, 205), (248, 240, 222), (244, 124, 24)
    upper, lower, decal = (np.asarray(tone, np.float32) for tone in tones)
    if role == "hollow":
        return np.broadcast_to(upper * np.float32(0.45), (*u.shape, 3)).astype(np.float32)
    colour = np.broadcast_to(upper, (*u.shape, 3)).astype(np.float32)
    if role == "body":
        colour = _mix(colour, lower, _cover(np.float32(0.08) - v, size))
        colour = _mix(colour, decal, _cover(_star(u, v, -0.09, 0.09, 0.22, 0.11), size))
    return colour


def _place(
    canvas: Array, shape: str, paint: Paint, centre: tuple[float, float], size: float, tilt: float, flip: bool
) -> tuple[Array, Array]:
    """Paint an object over `canvas`, float32 (H, W, 3) in 0..255; return (new canvas, coverage (H, W))."""
    height, width = canvas.shape[:2]
    cx, cy = centre
    reach = 0.66 * size + 2
    x0, x1 = max(0, int(cx - reach)), min(width, int(cx + reach) + 1)
    y0, y1 = max(0, int(cy - reach)), min(height, int(cy + reach) + 1)
    coverage = np.zeros((height, width), np.float32)
    canvas = canvas.copy()
    if x0 >= x1 or y0 >= y1:
        return canvas, coverage
    x = (np.arange(x0, x1, dtype=np.float32) + np.float32(0.5 - cx)) / np.float32(size)
    y = (np.arange(y0, y1, dtype=np.float32) + np.float32(0.5 - cy)) / np.float32(size)
    c, s = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
    u, v = x[None, :] * c + y[:, None] * s, y[:, None] * c - x[None, :] * s
    if flip:
        u = -u
    window = canvas[y0:y1, x0:x1]
    total = coverage[y0:y1, x0:x1]
    light = np.clip(1.05 - 0.16 * (x[None, :] + 0.5 * y[:, None] + 0.3), 0.82, 1.1).astype(np.float32)[..., None]
    for role, distance in _PARTS[shape](u, v):
        alpha = _cover(distance, size)
        window = _mix(window, paint(role, u, v, size) * light, alpha)
        total = total + alpha * (1 - total)
    gloss = np.exp(-(((x[None, :] + 0.14) / 0.11) ** 2 + ((y[:, None] + 0.2) / 0.13) ** 2)).astype(np.float32)
    window = _mix(window, np.full(3, 255, np.float32), total * gloss * np.float32(0.22))
    canvas[y0:y1, x0:x1] = window
    coverage[y0:y1, x0:x1] = total
    return canvas, coverage


def _smooth_step(x: Array, width: float) -> Array:
    return np.asarray(np.clip(x / np.float32(width) + np.float32(0.5), 0, 1), np.float32)


def _room(rng: np.random.Generator, height: int, width: int, horizon: float, zoom: float) -> Array:
    """Wall, table and a little clutter: float32 (H, W, 3) in 0..255."""
    y = (np.arange(height, dtype=np.float32) + np.float32(0.5))[:, None]
    x = (np.arange(width, dtype=np.float32) + np.float32(0.5))[None, :]
    wall = np.asarray(_WALLS[rng.integers(len(_WALLS))], np.float32) + rng.uniform(-8, 8, 3).astype(np.float32)
    table = np.asarray(_TABLES[rng.integers(len(_TABLES))], np.float32) + rng.uniform(-8, 8, 3).astype(np.float32)
    shade_x, shade_y = rng.uniform(-0.08, 0.08, 2)
    light = (1 + shade_x * (x / width - 0.5) + shade_y * (y / height - 0.5)).astype(np.float32)[..., None]
    room = np.broadcast_to(wall, (height, width, 3)).astype(np.float32)
    if rng.random() < 0.4:  # a picture frame or a shelf edge on the wall
        half = rng.uniform(9, 20) * zoom, rng.uniform(9, 20) * zoom
        at = rng.uniform(0, width), horizon - half[1] - rng.uniform(3, 30) * zoom
        outer = _rounded_box(x + 0 * y, y + 0 * x, at[0], at[1], half[0], half[1], 1.0)
        tone = np.asarray(_CLUTTER[rng.integers(len(_CLUTTER))], np.float32)
        room = _mix(room, tone * np.float32(0.82), _cover(outer, 1))
        room = _mix(room, tone, _cover(outer + np.float32(2.5 * zoom), 1))
    edge = _smooth_step(y - np.float32(horizon), 1.2)
    front = table * (1 + np.float32(0.10) * np.clip((y - np.float32(horizon)) / height, 0, 1)[..., None])
    room = _mix(
        room, np.broadcast_to(front, (height, width, 3)).astype(np.float32), np.broadcast_to(edge, (height, width))
    )
    lip = np.exp(-(((y - np.float32(horizon) - 1.5) / np.float32(1.4)) ** 2)) * np.float32(0.18)
    room = _mix(room, table * np.float32(0.6), np.broadcast_to(lip, (height, width)).astype(np.float32))
    for _ in range(int(rng.integers(0, 3))):  # books, plates, boxes in muted colours
        tone = np.asarray(_CLUTTER[rng.integers(len(_CLUTTER))], np.float32)
        at = rng.uniform(0, width), horizon + rng.uniform(2, 26) * zoom
        half = rng.uniform(5, 14) * zoom, rng.uniform(2.5, 7) * zoom
        item = (
            _ellipse(x + 0 * y, y + 0 * x, at[0], at[1], 1.3 * half[0], 0.6 * half[1])
            if rng.random() < 0.4
            else _rounded_box(x + 0 * y, y + 0 * x, at[0], at[1], half[0], half[1], 1.0)
        )
        room = _mix(room, tone, _cover(item, 1))
    return np.asarray(room * light, np.float32)


def _shadow(canvas: Array, centre_x: float, ground: float, size: float, width: float) -> Array:
    y = (np.arange(canvas.shape[0], dtype=np.float32) + np.float32(0.5))[:, None]
    x = (np.arange(canvas.shape[1], dtype=np.float32) + np.float32(0.5))[None, :]
    spread = ((x - np.float32(centre_x + 0.05 * size)) / np.float32(width * size)) ** 2
    depth = ((y - np.float32(ground)) / np.float32(0.07 * size)) ** 2
    return np.asarray(canvas * (1 - np.float32(0.42) * np.exp(-(spread + depth)))[..., None], np.float32)


_SHADOW_WIDTH: Final[dict[str, float]] = {
    "mug": 0.38, "teapot": 0.36, "bottle": 0.24, "bowl": 0.3, "ball": 0.3, "star": 0.4, "heart": 0.2, "house": 0.42,
}  # fmt: skip


def _to_picture(canvas: Array) -> Picture:
    return np.asarray(np.clip(canvas + np.float32(0.5), 0, 255), np.uint8)


def _find_box(alpha: Array) -> Box:
    rows, columns = np.nonzero(alpha.max(1) > 0.5)[0], np.nonzero(alpha.max(0) > 0.5)[0]
    if not len(rows) or not len(columns):
        return (0, 0, 1, 1)
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def resize(image: Picture, width: int, height: int) -> Picture:
    """Lanczos through Pillow; uint8 (h, w, 3) or (h, w) in, the same kind out."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def random_attributes(rng: np.random.Generator) -> Attributes:
    """Every combination equally likely."""
    return Attributes(
        SHAPES[rng.integers(len(SHAPES))], COLOURS[rng.integers(len(COLOURS))], PATTERNS[rng.integers(len(PATTERNS))]
    )


def render_scene(
    rng: np.random.Generator,
    attributes: Attributes | None = None,
    size: int | tuple[int, int] = 128,
    object_size: float | None = None,
    sharp_side: int | None = None,
    paint: Paint | None = None,
) -> Scene:
    """Render one scene.

    rng: the only source of chance. attributes: what stands there (None: drawn). size: side or (height, width) of the
    picture. object_size: the object's longer side in pixels of the finished picture (None: log-uniform 20..100 of 128,
    biased to large). sharp_side: render at this short side and scale up (None: render at full size). paint: overrides
    the attributes' paint (the demo's subject).
    """
    height, width = (size, size) if isinstance(size, int) else size
    short = min(height, width)
    attributes = attributes or random_attributes(rng)
    if object_size is None:
        object_size = draw_object_size(rng) * short / 128
    scale = 1.0 if sharp_side is None else sharp_side / short
    h, w = round(height * scale), round(width * scale)
    extent = object_size * scale
    foot = _FOOT[attributes.shape]
    zoom = max(0.35, object_size / 60) * scale * short / 128
    margin_x, margin_top, margin_bottom = 0.52 * extent, 0.5 * extent, (foot + 0.06) * extent
    cx = rng.uniform(margin_x, w - margin_x) if w > 2 * margin_x else w / 2
    low, high = margin_top, h - margin_bottom
    cy = rng.uniform(low + 0.25 * max(0.0, high - low), high) if high > low else (low + high) / 2
    ground = cy + foot * extent
    horizon = float(np.clip(ground - extent * rng.uniform(0.12, 0.75) - h * rng.uniform(0, 0.12), 0.12 * h, ground))
    tilt = float(np.clip(rng.normal(0, 0.035), -0.1, 0.1))
    room = _room(rng, h, w, horizon, zoom)
    canvas = _shadow(room, cx, ground, extent, _SHADOW_WIDTH[attributes.shape])
    flip = bool(rng.random() < 0.3)
    canvas, alpha = _place(
        canvas, attributes.shape, paint or _attribute_paint(attributes), (cx, cy), extent, tilt, flip
    )
    image, background = _to_picture(canvas), _to_picture(room)
    if scale != 1.0:
        image, background = resize(image, width, height), resize(background, width, height)
        alpha = np.asarray(resize(_to_picture(alpha * 255), width, height), np.float32) / np.float32(255)
    return Scene(image, background, alpha, _find_box(alpha), attributes, short if sharp_side is None else sharp_side)


def draw_object_size(rng: np.random.Generator) -> float:
    """Pixels of a 128 view: log-uniform 20..104, the larger of two draws half of the time."""
    low, high = np.log(20.0), np.log(104.0)
    draw = rng.uniform(low, high)
    if rng.random() < 0.5:
        draw = max(draw, rng.uniform(low, high))
    return float(np.exp(draw))


def draw_mask(rng: np.random.Generator, box: Box, height: int, width: int) -> NDArray[np.bool_]:
    """A user's mask around `box`: a rectangle or a superellipse, 2 px and 4..25 % larger; bool (height, width)."""
    x0, y0, x1, y1 = box
    grow = rng.uniform(0.04, 0.25)
    half_w, half_h = (x1 - x0) / 2 * (1 + grow) + 2, (y1 - y0) / 2 * (1 + grow) + 2
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    x = np.abs(np.arange(width) + 0.5 - cx) / half_w
    y = np.abs(np.arange(height) + 0.5 - cy) / half_h
    if rng.random() < 0.6:
        return np.asarray((x[None, :] <= 1) & (y[:, None] <= 1))
    power = rng.uniform(2.6, 5.0)
    room = 2 ** (1 / power)  # so that the box's corners stay inside
    return np.asarray((x[None, :] / room) ** power + (y[:, None] / room) ** power <= 1)


def random_box(rng: np.random.Generator, height: int, width: int) -> Box:
    """A box with nothing particular in it, a sixth to three quarters of the frame's side."""
    w, h = (rng.uniform(0.16, 0.75) * side for side in (width, height))
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return (int(x), int(y), int(x + w), int(y + h))


def held_out_scenes(
    count: int, seed: int = 90_000, size: int | tuple[int, int] = 128, object_size: tuple[float, float] = (64.0, 96.0)
) -> list[tuple[Scene, NDArray[np.bool_]]]:
    """Evaluation scenes with their masks: attributes run through all combinations in a shuffled order.

    object_size: range of the object's longer side in pixels. The training data never uses these seeds.
    """
    rng = np.random.default_rng([77, seed])
    combinations = [Attributes(s, c, p) for s in SHAPES for c in COLOURS for p in PATTERNS]
    order = rng.permutation(len(combinations))
    scenes = []
    for index in range(count):
        scene = render_scene(
            rng, combinations[order[index % len(order)]], size, object_size=float(rng.uniform(*object_size))
        )
        height, width = scene.image.shape[:2]
        scenes.append((scene, draw_mask(rng, scene.box, height, width)))
    return scenes


def render_subject_photos(n: int = 5, seed: int = 0, size: int = 128) -> list[tuple[Picture, Picture]]:
    """Photographs of the demo's subject, a two-tone mug with a star decal, in n different rooms.

    Returns [(image uint8 (size, size, 3), mask uint8 (size, size) 0 or 255)], the mask being the object's silhouette.
    """
    rng = np.random.default_rng([4242, seed])
    photos = []
    for _ in range(n):
        scene = render_scene(
            rng, Attributes("mug", "blue", "plain"), size, float(rng.uniform(0.55, 0.78)) * size, paint=_subject_paint
        )
        photos.append((scene.image, np.asarray(np.where(scene.alpha > 0.5, 255, 0), np.uint8)))
    return photos
