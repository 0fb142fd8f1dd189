"""Random holes to train inpainting on: shapes of things, brush strokes, boxes, and the share of each (ASUKA, 3.2).

A hole is bool (S, S), true where a picture is unknown. Every draw takes a generator of random numbers and nothing else
of chance, so the same seed gives the same holes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dreammix_trt.trainer.data import Mask, box_of

Kind = Literal["shape", "shape and strokes", "strokes", "box"]
#: how often each kind is drawn: half of the shapes of things are joined by strokes
SHARES: dict[Kind, float] = {"shape": 0.25, "shape and strokes": 0.25, "strokes": 0.4, "box": 0.1}
LEAST_AREA = 0.1  # of the picture; the paper's range is lost, the holes of its predecessors begin here
#: a hole touches at most this share of the auto-encoder's patches: with more there is nothing to guess from
MOST_PATCHES = 0.75
PATCHES = 16  # along a side

_TRIES = 60  # of a kind, before an oval serves
_TURN = math.pi / 2


def draw_hole(rng: np.random.Generator, side: int, objects: Sequence[Mask] = (), *, patches: int = PATCHES) -> Mask:
    """A hole of a kind drawn by SHARES: bool (side, side).

    It covers LEAST_AREA of the picture or more, and touches at most MOST_PATCHES of patches x patches.

    objects: silhouettes, bool (h, w) of any size, each with something true; a hole in the shape of a thing is one of
        them, moved, turned and scaled. Without any it is a made-up outline.
    patches: along a side, of which `side` is a multiple.
    """
    kind = choose_kind(rng)
    for _ in range(_TRIES):
        hole = draw_kind(rng, kind, side, objects)
        if hole.mean() >= LEAST_AREA and touched_patches(hole, patches).mean() <= MOST_PATCHES:
            return hole
    return _draw_oval(side, LEAST_AREA)


def choose_kind(rng: np.random.Generator) -> Kind:
    """A kind of hole, by SHARES."""
    kinds = list(SHARES)
    return kinds[int(rng.choice(len(kinds), p=list(SHARES.values())))]


def draw_kind(rng: np.random.Generator, kind: Kind, side: int, objects: Sequence[Mask] = ()) -> Mask:
    """One hole of a kind, of whatever area; otherwise as `draw_hole`."""
    if kind == "strokes":
        return draw_strokes(rng, side)
    if kind == "box":
        return draw_box(rng, side)
    shape = place_object(rng, objects[int(rng.integers(len(objects)))], side) if objects else draw_outline(rng, side)
    return shape | draw_strokes(rng, side) if kind == "shape and strokes" else shape


# -- patches ----------------------------------------------------------------------------------------------------------


def touched_patches(hole: Mask, patches: int) -> Mask:
    """bool (S, S) -> bool (patches, patches): whether any pixel of a patch is in the hole."""
    size = len(hole) // patches
    return np.asarray(hole.reshape(patches, size, patches, size).any((1, 3)))


def top_up(rng: np.random.Generator, hole: Mask, *, patches: int = PATCHES, share: float = MOST_PATCHES) -> Mask:
    """The hole and random whole patches that it does not touch, so that exactly `share` of all patches is touched.

    Raises ValueError for a hole that touches more.
    """
    touched, wanted = touched_patches(hole, patches), round(share * patches * patches)
    missing = wanted - int(touched.sum())
    if missing < 0:
        raise ValueError(f"the hole touches {touched.sum()} of {touched.size} patches, more than {wanted}")
    added = np.zeros(touched.size, bool)
    added[rng.permutation(np.flatnonzero(~touched))[:missing]] = True
    size = len(hole) // patches
    return hole | np.kron(added.reshape(touched.shape), np.ones((size, size), bool))


# -- things -----------------------------------------------------------------------------------------------------------


def place_object(rng: np.random.Generator, silhouette: Mask, side: int) -> Mask:
    """A silhouette, mirrored half of the time, turned a little and scaled to a quarter to nine tenths of the side.

    Its centre lies within the picture, the rest may leave it. silhouette: bool (h, w) with something true.
    """
    x0, y0, x1, y1 = box_of(silhouette)
    cut = Image.fromarray(silhouette[y0:y1, x0:x1])
    if rng.random() < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    length = side * math.exp(rng.uniform(math.log(1 / 4), math.log(0.9)))
    scale = length / max(cut.size)
    width, height = (max(1, round(part * scale)) for part in cut.size)
    grey = cut.convert("L").resize((width, height), Image.Resampling.BILINEAR)
    turned = grey.rotate(rng.normal(0, 12), Image.Resampling.BILINEAR, expand=True)
    canvas = Image.new("L", (side, side))
    x, y = (int(part) for part in rng.integers(0, side, 2))
    canvas.paste(turned, (x - turned.width // 2, y - turned.height // 2))
    return np.asarray(canvas) > 127


def draw_outline(rng: np.random.Generator, side: int) -> Mask:
    """A made-up thing: a smooth blob, a polygon, or a body with two or three limbs."""
    draw: Callable[[], list[NDArray[np.float64]]] = (
        lambda: [_blob(rng)],
        lambda: [_polygon(rng)],
        lambda: _figure(rng),
    )[int(rng.choice(3, p=(0.4, 0.3, 0.3)))]
    radius, centre = side * rng.uniform(0.12, 0.4), rng.uniform(0.1, 0.9, 2) * side
    angle, stretch = rng.uniform(-_TURN, _TURN), rng.uniform(0.6, 1.0)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    canvas = Image.new("1", (side, side))
    pen = ImageDraw.Draw(canvas)
    for outline in draw():
        points = (outline * [1.0, stretch]) @ turn.T * radius + centre
        pen.polygon([(float(x), float(y)) for x, y in points], fill=1)
    return np.asarray(canvas, bool)


def _blob(rng: np.random.Generator) -> NDArray[np.float64]:
    """A closed curve around the origin, about of radius 1: (60, 2). Slow waves are the largest."""
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    radius = np.ones_like(angle)
    for wave in range(1, 6):
        radius += rng.normal(0, 0.22 / wave) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    return np.stack([np.cos(angle), np.sin(angle)], 1) * np.clip(radius, 0.3, 1.6)[:, None]


def _polygon(rng: np.random.Generator) -> NDArray[np.float64]:
    """4 to 9 corners in turn around the origin, at 0.5 to 1.2 from it."""
    count = int(rng.integers(4, 10))
    angle = (np.arange(count) + rng.uniform(0.1, 0.9, count)) * (2 * np.pi / count)
    return np.stack([np.cos(angle), np.sin(angle)], 1) * rng.uniform(0.5, 1.2, count)[:, None]


def _figure(rng: np.random.Generator) -> list[NDArray[np.float64]]:
    """A blob with two or three longer ones that begin within it."""
    parts = [_blob(rng) * 0.6]
    for _ in range(int(rng.integers(2, 4))):
        angle, reach, width = rng.uniform(0, 2 * np.pi), rng.uniform(0.4, 0.8), rng.uniform(0.15, 0.35)
        along = np.array([math.cos(angle), math.sin(angle)])
        across = np.array([-along[1], along[0]])
        limb = _blob(rng)
        parts.append((limb[:, :1] * reach + 0.4 + reach / 2) * along + limb[:, 1:] * width * across)
    return parts


def _draw_oval(side: int, area: float) -> Mask:
    """In the middle, a little more than `area` of the picture."""
    radius = math.sqrt(1.1 * area / math.pi)
    place = (np.arange(side) + 0.5) / side - 0.5
    return np.asarray(np.hypot(place[:, None], place[None, :]) <= radius)


# -- strokes and boxes ------------------------------------------------------------------------------------------------


def draw_strokes(rng: np.random.Generator, side: int) -> Mask:
    """One to six strokes of a brush, each of its own width, that wander: bool (side, side)."""
    canvas = Image.new("1", (side, side))
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(1, 7))):
        width = side * math.exp(rng.uniform(math.log(0.05), math.log(0.2)))
        place, heading = rng.uniform(0, side, 2), rng.uniform(0, 2 * np.pi)
        for _ in range(int(rng.integers(2, 9))):
            heading += rng.normal(0, 0.9) if rng.random() < 0.7 else rng.uniform(-np.pi, np.pi)
            step = side * rng.uniform(0.06, 0.3) * np.array([math.cos(heading), math.sin(heading)])
            end = np.clip(place + step, 0, side - 1)
            _draw_dab(pen, place, end, width)
            place = end
    return np.asarray(canvas, bool)


def _draw_dab(pen: ImageDraw.ImageDraw, start: NDArray[np.float64], end: NDArray[np.float64], width: float) -> None:
    """A line with round ends."""
    (x0, y0), (x1, y1), half = map(float, start), map(float, end), max(0.0, width - 1) / 2
    pen.line([(x0, y0), (x1, y1)], fill=1, width=max(1, round(width)))
    for x, y in ((x0, y0), (x1, y1)):
        pen.ellipse([x - half, y - half, x + half, y + half], fill=1)


def draw_box(rng: np.random.Generator, side: int) -> Mask:
    """A rectangle, or half of the time all but a rectangle: bool (side, side)."""
    outside = bool(rng.random() < 0.5)
    low, high = (0.5, 0.95) if outside else (0.2, 0.85)
    width, height = rng.uniform(low, high, 2) * side
    x, y = rng.uniform(0, side - width), rng.uniform(0, side - height)
    hole = np.zeros((side, side), bool)
    hole[int(y) : int(y + height), int(x) : int(x + width)] = True
    return ~hole if outside else hole
