"""The procedural world the embedded model is trained on: one thing in a room, rendered from signed distances.

Everything is numpy (Pillow only resizes); nothing here imports torch. Conventions, used by every function:

* images are ``uint8 (height, width, 3)`` RGB; masks and alphas are ``float32 (height, width)`` in 0..1;
* a box is ``(x0, y0, x1, y1)`` in pixels, ends exclusive;
* sizes of things are pixels of the finished picture's longer side of the thing.

The world is compositional: a thing is a shape with a body colour, a pattern, parts in colours of their own, a decal and
a finish (``objects.Attributes``), so that what was never seen is a new *combination* of known parts. One combination in
eight is held out by a rule (``is_held_out``), and all subjects and evaluations come from those.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dreammix_trt.trainer.micro import objects
from dreammix_trt.trainer.micro.distances import Array
from dreammix_trt.trainer.micro.objects import (
    COLOURS,
    DECALS,
    FINISHES,
    PATTERNS,
    SHAPES,
    UNNAMED_DECALS,
    Attributes,
    Build,
    View,
    look_alike,
)
from dreammix_trt.trainer.micro.rooms import cast_shadow, paint_room

__all__ = [
    "COLOURS", "DECALS", "FINISHES", "PATTERNS", "SHAPES", "UNNAMED_DECALS", "Attributes", "Box", "Build", "Picture",
    "Scene", "Thing", "draw_mask", "draw_object_size", "held_out_scenes", "held_out_subjects", "is_held_out",
    "look_alike", "random_attributes", "random_box", "random_build", "random_view", "render_photos", "render_portraits",
    "render_scene", "resize", "show_mask", "write_photos",
]  # fmt: skip

Picture = NDArray[np.uint8]
Box = tuple[int, int, int, int]

_HELD_OUT_ONE_IN: Final = 8


@dataclass(frozen=True)
class Scene:
    """One rendered picture and all that is known of it.

    image: the picture; background: the same without the thing and its shadow; alpha: the thing's coverage; detail:
    where its small parts are (1 on a decal, one half on foot, band and rim); box: the thing's bounding box (coverage
    above one half); attributes: what the thing is; surface: what it stands on, one of rooms.SURFACES; sharp_side: the
    side in pixels at which the picture was rendered before it was scaled up (equal to the short side of `image` when
    it was not), which is what SDXL calls the original size; view: from where the thing is seen, and its light.
    """

    image: Picture
    background: Picture
    alpha: Array
    detail: Array
    box: Box
    attributes: Attributes
    surface: str
    sharp_side: int
    view: View


@dataclass(frozen=True)
class Thing:
    """One particular thing: what it is and the traits that no word names."""

    attributes: Attributes
    build: Build


# -- what there is ----------------------------------------------------------------------------------------------------


def is_held_out(what: Attributes) -> bool:
    """Whether this combination of shape, body, parts and decal is kept out of the training pictures."""
    parts = (what.shape, what.colour, what.foot, what.top, what.decal, what.decal_colour)
    digest = hashlib.sha256("/".join(part or "-" for part in parts).encode()).digest()
    return digest[0] % _HELD_OUT_ONE_IN == 0


def random_attributes(rng: np.random.Generator, held_out: bool = False, shape: str | None = None) -> Attributes:
    """A thing of the training world, or with held_out one of those never shown there."""
    while True:
        what = _draw_attributes(rng, shape or SHAPES[rng.integers(len(SHAPES))])
        if is_held_out(what) == held_out:
            return what


def _draw_attributes(rng: np.random.Generator, shape: str) -> Attributes:
    pattern = "plain" if rng.random() < 0.6 else PATTERNS[rng.integers(1, len(PATTERNS))]
    finish = FINISHES[rng.choice(3, p=(0.5, 0.36, 0.14))] if pattern == "plain" else FINISHES[rng.integers(2)]
    used = [COLOURS[rng.integers(len(COLOURS))]]
    if pattern != "plain":
        used.append("white")  # the second tone of most patterns

    def accent() -> str:
        """A colour unlike all others on the thing; sometimes one that is already on another part."""
        if len(used) > 2 and rng.random() < 0.3:
            return used[-1]
        free = [name for name in COLOURS if not any(look_alike(name, other) for other in used)]
        used.append(free[rng.integers(len(free))] if free else used[-1])
        return used[-1]

    foot = accent() if rng.random() < 0.72 else None
    top = accent() if rng.random() < 0.74 else None
    band = accent() if rng.random() < (0.14 if foot else 0.3) else None
    free = [name for name in COLOURS if not any(look_alike(name, other) for other in used)]
    if not free or rng.random() > (0.78 if pattern == "plain" else 0.35):
        return Attributes(shape, used[0], pattern, foot, band, top, None, None, finish)
    kind = "blot" if rng.random() < 0.1 else DECALS[rng.integers(len(DECALS))]
    return Attributes(shape, used[0], pattern, foot, band, top, kind, free[rng.integers(len(free))], finish)


def random_build(rng: np.random.Generator) -> Build:
    """Traits that no word names."""
    return Build(
        foot=float(rng.uniform(0.15, 0.24)),
        band=float(rng.uniform(0.06, 0.13)),
        band_width=float(rng.uniform(0.04, 0.065)),
        decal=float(rng.uniform(0.14, 0.2)),
        decal_height=float(rng.uniform(0.42, 0.58)),
        width=float(rng.uniform(0.92, 1.06)),
        form=int(rng.integers(1_000_000)),
    )


def random_view(rng: np.random.Generator, light: tuple[float, float, float]) -> View:
    """From a little lower or higher, the thing turned within limits."""
    return View(
        pitch=float(rng.uniform(0.1, 0.27)),
        yaw=float(rng.uniform(-0.6, 0.6)),
        tilt=float(np.clip(rng.normal(0, 0.02), -0.05, 0.05)),
        side=1 if rng.random() < 0.6 else -1,
        light=light,
    )


# -- pictures ---------------------------------------------------------------------------------------------------------


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


def _resize_share(share: Array, width: int, height: int) -> Array:
    """Like `resize`, of values in 0..1."""
    return np.asarray(resize(_to_picture(share * 255), width, height), np.float32) / np.float32(255)


def render_scene(
    rng: np.random.Generator,
    attributes: Attributes | None = None,
    size: int | tuple[int, int] = 256,
    object_size: float | None = None,
    sharp_side: int | None = None,
    build: Build | None = None,
    pose: View | None = None,
) -> Scene:
    """Render one scene.

    rng: the only source of chance. attributes: what stands there (None: drawn, never a held-out combination). size:
    side or (height, width) of the picture. object_size: the thing's longer side in pixels of the finished picture
    (None: log-uniform 0.16..0.81 of the short side, biased to large). sharp_side: render at this short side and scale
    up (None: render at full size). build: the thing's unnamed traits (None: drawn). pose: from where the thing is seen,
    in the room's own light (None: drawn); it changes nothing else that is drawn.
    """
    height, width = (size, size) if isinstance(size, int) else size
    short = min(height, width)
    what = attributes or random_attributes(rng)
    build = build or random_build(rng)
    if object_size is None:
        object_size = draw_object_size(rng) * short
    scale = 1.0 if sharp_side is None else sharp_side / short
    h, w = round(height * scale), round(width * scale)
    extent = object_size * scale
    light = _draw_light(rng)
    drawn = random_view(rng, light)
    view = replace(pose, light=light) if pose else drawn
    side, up, down = (part * extent for part in objects.REACH[what.shape])
    cx = rng.uniform(side, w - side) if w > 2 * side else w / 2
    low, high = 1.04 * up, h - 1.06 * down
    cy = rng.uniform(low + 0.3 * max(0.0, high - low), high) if high > low else (low + high) / 2
    level, half = objects.GROUND[what.shape]
    ground = cy + level * extent
    rise = extent * (0.06 + 1.9 * drawn.pitch * rng.uniform(0.6, 1.5)) + h * rng.uniform(0, 0.08)
    horizon = float(np.clip(ground - rise, 0.1 * h, ground - 0.04 * extent))
    room = paint_room(rng, h, w, horizon, max(0.3, extent / 62), light)
    canvas = cast_shadow(room.canvas, (cx, ground), half * build.width * extent, extent, view.pitch, light)
    canvas, alpha, detail = objects.paint(canvas, what, build, view, (cx, cy), extent)
    image, background = _to_picture(canvas), _to_picture(room.canvas)
    if scale != 1.0:
        image, background = resize(image, width, height), resize(background, width, height)
        alpha, detail = (_resize_share(share, width, height) for share in (alpha, detail))
    sharp = short if sharp_side is None else sharp_side
    return Scene(image, background, alpha, detail, _find_box(alpha), what, room.surface, sharp, view)


def _draw_light(rng: np.random.Generator) -> tuple[float, float, float]:
    """Mostly from the upper left or right."""
    towards = np.asarray([rng.choice([-1, 1]) * rng.uniform(0.1, 0.75), rng.uniform(-0.75, -0.4), 0.75])
    x, y, z = towards / np.linalg.norm(towards)
    return float(x), float(y), float(z)


def draw_object_size(rng: np.random.Generator) -> float:
    """Share of the frame's short side: log-uniform 0.16..0.81, the larger of two draws half of the time."""
    low, high = np.log(0.16), np.log(0.81)
    draw = rng.uniform(low, high)
    if rng.random() < 0.5:
        draw = max(draw, rng.uniform(low, high))
    return float(np.exp(draw))


def draw_mask(rng: np.random.Generator, box: Box, height: int, width: int) -> NDArray[np.bool_]:
    """A user's mask around `box`: a rectangle or a superellipse, 1 % of the frame and 4..25 % larger; bool (height,
    width)."""
    x0, y0, x1, y1 = box
    grow, margin = rng.uniform(0.04, 0.25), 0.014 * min(height, width)
    half_w, half_h = (x1 - x0) / 2 * (1 + grow) + margin, (y1 - y0) / 2 * (1 + grow) + margin
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    x = np.abs(np.arange(width) + 0.5 - cx) / half_w
    y = np.abs(np.arange(height) + 0.5 - cy) / half_h
    if rng.random() < 0.6:
        return np.asarray((x[None, :] <= 1) & (y[:, None] <= 1))
    power = rng.uniform(2.6, 5.0)
    room = 2 ** (1 / power)  # so that the box's corners stay inside
    return np.asarray((x[None, :] / room) ** power + (y[:, None] / room) ** power <= 1)


def show_mask(mask: NDArray[np.bool_]) -> Image.Image:
    """A mask as people hand it over: an L picture, white where it is repainted."""
    return Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0)))


def random_box(rng: np.random.Generator, height: int, width: int) -> Box:
    """A box with nothing particular in it, a sixth to three quarters of the frame's side."""
    w, h = (rng.uniform(0.16, 0.75) * side for side in (width, height))
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return (int(x), int(y), int(x + w), int(y + h))


# -- for evaluation ---------------------------------------------------------------------------------------------------


def held_out_scenes(
    count: int, seed: int = 90_000, size: int | tuple[int, int] = 256, object_share: tuple[float, float] = (0.5, 0.75)
) -> list[tuple[Scene, NDArray[np.bool_]]]:
    """Scenes of held-out combinations with their masks; shapes take turns.

    object_share: range of the thing's longer side as a share of the short side. The training data never uses these
    seeds.
    """
    rng = np.random.default_rng([77, seed])
    short = size if isinstance(size, int) else min(size)
    scenes = []
    for index in range(count):
        what = random_attributes(rng, held_out=True, shape=SHAPES[index % len(SHAPES)])
        scene = render_scene(rng, what, size, object_size=float(rng.uniform(*object_share)) * short)
        scenes.append((scene, draw_mask(rng, scene.box, *scene.image.shape[:2])))
    return scenes


def held_out_subjects(count: int, seed: int = 0) -> list[Thing]:
    """Subjects the base has never seen: plain bodies with a foot, a coloured top and a decal; shapes take turns.

    Every fourth has a decal that the captions have no word for.
    """
    rng = np.random.default_rng([4242, seed])
    subjects: list[Thing] = []
    while len(subjects) < count:
        what = random_attributes(rng, held_out=True, shape=SHAPES[len(subjects) % len(SHAPES)])
        if what.pattern != "plain" or not (what.foot and what.top and what.decal in DECALS) or what.band:
            continue
        if what.finish == "glass":
            continue
        if len(subjects) % 4 == 3:
            what = replace(what, decal=UNNAMED_DECALS[(len(subjects) // 4) % len(UNNAMED_DECALS)])
        subjects.append(Thing(what, random_build(rng)))
    return subjects


def render_photos(subject: Thing, count: int = 5, seed: int = 0, size: int = 256) -> list[tuple[Picture, Picture]]:
    """Photographs of a subject in `count` different rooms.

    Returns [(image uint8 (size, size, 3), mask uint8 (size, size) 0 or 255)], the mask being the thing's silhouette.
    """
    scenes = render_portraits(subject, count, seed, size)
    return [(scene.image, np.asarray(np.where(scene.alpha > 0.5, 255, 0), np.uint8)) for scene in scenes]


def render_portraits(subject: Thing, count: int = 5, seed: int = 0, size: int = 256) -> list[Scene]:
    """The scenes of `render_photos`, with all that is known of them."""
    rng = np.random.default_rng([4243, seed])
    scenes = []
    for _ in range(count):
        extent = float(rng.uniform(0.55, 0.78)) * size
        scenes.append(render_scene(rng, subject.attributes, size, extent, build=subject.build))
    return scenes


def write_photos(folder: Path, subject: Thing, count: int = 5, seed: int = 0, size: int = 256) -> list[Image.Image]:
    """Render a subject's photographs (`render_photos`) in the trainer's layout: image/NN.png, mask/NN.png.

    Returns the photographs.
    """
    photos = render_photos(subject, count, seed, size)
    for part, kind in enumerate(("image", "mask")):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for number, photo in enumerate(photos):
            Image.fromarray(photo[part]).save(folder / kind / f"{number:02d}.png")
    return [Image.fromarray(image) for image, _ in photos]
