"""The world's things: what a caption can say of one, how it is built, and how it is painted.

A thing lives in coordinates ``u`` (right) and ``v`` (down) where its longer side is about 1. Most are bodies of
revolution seen from a little above: a pixel is carried back to the height ``along`` and the arc ``across`` of the
surface it shows, so that feet, bands, patterns and decals bend around the body as they do on a real one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from dreammix_trt.trainer.micro.distances import (
    Array,
    circle,
    convex,
    cover,
    decal,
    ellipse,
    rounded_box,
    segment,
)

SHAPES: Final = ("mug", "teapot", "bottle", "bowl", "vase", "jar", "ball", "house")
PATTERNS: Final = ("plain", "striped", "dotted", "checkered")
FINISHES: Final = ("matte", "shiny", "glass")
DECALS: Final = ("star", "heart", "circle", "square")  # those the captions have words for
UNNAMED_DECALS: Final = ("moon", "bolt", "clover")  # never in the training world; a subject may have one
COLOUR_RGB: Final[dict[str, tuple[int, int, int]]] = {
    "red": (214, 32, 38),
    "orange": (246, 132, 18),
    "yellow": (250, 214, 30),
    "green": (34, 150, 62),
    "blue": (32, 86, 212),
    "purple": (124, 44, 172),
    "pink": (248, 120, 182),
    "black": (40, 40, 46),
    "white": (246, 243, 232),
}
COLOURS: Final = tuple(COLOUR_RGB)
TOPS: Final = {
    "mug": "rim", "teapot": "lid", "bottle": "cap", "bowl": "rim", "vase": "rim", "jar": "lid", "ball": "cap",
    "house": "roof",
}  # fmt: skip
# Colours of one group never meet in one thing: at a few latent cells they could not be told apart.
_ALIKE: Final = (
    {"blue", "purple", "black"}, {"orange", "yellow"}, {"red", "orange", "pink"}, {"pink", "purple"},
)  # fmt: skip
_F = np.float32
_RING_DETAIL: Final = 0.5  # feet, bands and rims are larger than decals


@dataclass(frozen=True)
class Attributes:
    """All that a caption can say of a thing; colours are of COLOURS, None stands for a part that is not there.

    shape: one of SHAPES. colour: of the body. pattern: one of PATTERNS. foot, band, top: colours of these parts
    (without a top of its own the rim, lid, cap or roof has the body's colour). decal: one of DECALS, "blot" or one of
    UNNAMED_DECALS. decal_colour: None where there is no decal. finish: one of FINISHES.
    """

    shape: str
    colour: str
    pattern: str = "plain"
    foot: str | None = None
    band: str | None = None
    top: str | None = None
    decal: str | None = None
    decal_colour: str | None = None
    finish: str = "matte"

    @property
    def colours(self) -> tuple[str, ...]:
        """Every colour on the thing."""
        found = (self.colour, self.foot, self.band, self.top, self.decal_colour)
        return tuple(name for name in found if name is not None)


@dataclass(frozen=True)
class Build:
    """Traits of one thing that no word names. Shares are of the body's height, radii in the thing's own unit."""

    foot: float = 0.19
    band: float = 0.1
    band_width: float = 0.055
    decal: float = 0.165
    decal_height: float = 0.5
    width: float = 1.0
    form: int = 0


@dataclass(frozen=True)
class View:
    """From where the thing is seen. pitch: height of a level circle's outline over its width; yaw: turn in radians;
    tilt: roll in radians; side: +1 or -1, where handle, spout or side wall are; light: unit vector towards it (right,
    down, to the viewer)."""

    pitch: float = 0.18
    yaw: float = 0.0
    tilt: float = 0.0
    side: int = 1
    light: tuple[float, float, float] = (-0.45, -0.55, 0.7)


def look_alike(one: str, other: str) -> bool:
    """Whether two colours are the same or too close to meet in one thing."""
    return one == other or any({one, other} <= group for group in _ALIKE)


# -- surfaces ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Surface:
    """A visible surface: where it is, and for each pixel which point of it is seen.

    distance: signed, to its outline. across: arc length from the front, along: height from the top (0) to the bottom
    (1), down: the same height in units. normal: (right, down, to the viewer), unit length.
    """

    distance: Array
    across: Array
    along: Array
    down: Array
    normal: tuple[Array, Array, Array]


@dataclass(frozen=True)
class Lathe:
    """A body of revolution: (height, half width) from the top to the bottom, joined by a smooth curve."""

    points: tuple[tuple[float, float], ...]

    @property
    def top(self) -> float:
        return self.points[0][0]

    @property
    def bottom(self) -> float:
        return self.points[-1][0]

    @property
    def mouth(self) -> float:
        """Half width of the top."""
        return self.points[0][1]

    def surface(self, u: Array, v: Array, pitch: float, width: float) -> Surface:
        heights, radii = _curve(self.points)
        radii = radii * _F(width)
        slopes = np.clip(np.gradient(radii, heights), -3, 3).astype(np.float32)

        def at(values: Array, height: Array) -> Array:
            return np.asarray(np.interp(height, heights, values), np.float32)

        height = np.clip(v, _F(self.top), _F(self.bottom)).astype(np.float32)
        for _ in range(7):  # the front of a level circle bulges down by pitch * depth
            radius = at(radii, height)
            depth = np.sqrt(np.maximum(radius * radius - u * u, 0))
            height = _F(0.5) * (height + np.clip(v - _F(pitch) * depth, _F(self.top), _F(self.bottom)))
        radius, level = at(radii, height), at(radii, v)
        slope = at(slopes, height)
        side = (np.abs(u) - np.where(v > _F(self.bottom), radii[-1], level)) / np.sqrt(1 + at(slopes, v) ** 2)
        end = np.sqrt(np.maximum(radii[-1] ** 2 - u * u, 0)) * _F(pitch)
        body = np.maximum(side, np.maximum(_F(self.top) - v, v - _F(self.bottom) - end))
        distance = np.minimum(body, ellipse(u, v, 0, self.top, radii[0], max(1e-3, pitch * radii[0])))
        s = np.clip(u / np.maximum(radius, _F(1e-4)), -1, 1)
        nx, ny, nz = s, -slope, np.sqrt(1 - s * s)
        length = np.sqrt(nx * nx + ny * ny + nz * nz)
        along = (height - _F(self.top)) / _F(self.bottom - self.top)
        widest = float(radii.max())
        return Surface(distance, _F(widest) * np.arcsin(s), along, height, (nx / length, ny / length, nz / length))


@lru_cache(maxsize=64)
def _curve(points: tuple[tuple[float, float], ...]) -> tuple[Array, Array]:
    """Catmull-Rom through the points: (heights, half widths), 24 a span."""
    p = np.asarray([points[0], *points, points[-1]], np.float64)
    t = np.linspace(0, 1, 24, endpoint=False)[:, None]
    spans = []
    for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False):
        m0, m1 = (c - a) / 2, (d - b) / 2
        spans.append(
            (2 * t**3 - 3 * t**2 + 1) * b + (t**3 - 2 * t**2 + t) * m0 + (-2 * t**3 + 3 * t**2) * c + (t**3 - t**2) * m1
        )
    curve = np.concatenate([*spans, p[-1:]])
    heights = np.maximum.accumulate(curve[:, 0]) + np.arange(len(curve)) * 1e-6
    return heights.astype(np.float32), np.maximum(curve[:, 1], 0.004).astype(np.float32)


def _ball(u: Array, v: Array, pitch: float) -> Surface:
    radius = _F(0.46)
    nx, ny = u / radius, (v - _F(0.02)) / radius
    nz = np.sqrt(np.maximum(1 - nx * nx - ny * ny, 0))
    tilt = _F(np.arcsin(pitch))
    height = np.clip(ny * np.cos(tilt) - nz * np.sin(tilt), -1, 1)
    depth = np.maximum(nz * np.cos(tilt) + ny * np.sin(tilt), _F(1e-4))
    return Surface(
        circle(u, v, 0, 0.02, float(radius)),
        radius * np.arctan2(nx, depth),
        (height + 1) / 2,
        height * radius,
        (nx, ny, nz),
    )


def _wall(distance: Array, across: Array, v: Array, top: float, bottom: float, normal: tuple[float, ...]) -> Surface:
    flat = np.zeros_like(distance)
    nx, ny, nz = (flat + _F(part) for part in normal)
    nx = nx + _F(0.8) * across - _F(0.25) * v  # a little hollow, so that a shine is a streak and not the whole wall
    length = np.sqrt(nx * nx + ny * ny + nz * nz)
    nx, ny, nz = nx / length, ny / length, nz / length
    return Surface(distance, across, (v - _F(top)) / _F(bottom - top), v + flat, (nx, ny, nz))


def _tube(distance: Array, half_width: float) -> Surface:
    """A handle or a spout: round across its width, as far as light can tell."""
    depth = np.clip(-distance / _F(half_width), 0, 1)
    slope_y, slope_x = np.gradient(distance)
    length = np.hypot(slope_x, slope_y) + _F(1e-6)
    lean = 1 - depth
    nx, ny = slope_x / length * lean, slope_y / length * lean
    nz = np.sqrt(np.maximum(1 - nx * nx - ny * ny, 0))
    flat = np.zeros_like(distance)
    return Surface(distance, flat, flat + _F(0.5), flat, (nx, ny, nz))


_LATHES: Final[dict[str, Lathe]] = {
    "mug": Lathe(((-0.36, 0.325), (-0.2, 0.32), (0.1, 0.31), (0.3, 0.295), (0.37, 0.27), (0.39, 0.235))),
    "bowl": Lathe(
        ((-0.2, 0.5), (-0.1, 0.488), (0.03, 0.435), (0.13, 0.345), (0.19, 0.245), (0.22, 0.205), (0.3, 0.225))
    ),
    "vase": Lathe(
        ((-0.45, 0.2), (-0.41, 0.165), (-0.32, 0.125), (-0.23, 0.15), (-0.08, 0.28), (0.06, 0.335), (0.2, 0.305),
         (0.34, 0.205), (0.41, 0.18), (0.45, 0.19))
    ),
    "jar": Lathe(((-0.25, 0.29), (-0.2, 0.335), (-0.05, 0.355), (0.22, 0.35), (0.35, 0.325), (0.4, 0.28))),
    "teapot": Lathe(
        ((-0.2, 0.155), (-0.16, 0.225), (-0.06, 0.315), (0.07, 0.35), (0.19, 0.315), (0.27, 0.235), (0.3, 0.2),
         (0.345, 0.205))
    ),
    "bottle": Lathe(
        ((-0.49, 0.085), (-0.36, 0.085), (-0.27, 0.095), (-0.18, 0.15), (-0.1, 0.215), (0.0, 0.245), (0.14, 0.25),
         (0.36, 0.25), (0.42, 0.235), (0.445, 0.2))
    ),
}  # fmt: skip
_COVERS: Final[dict[str, tuple[Lathe, tuple[float, float] | None]]] = {  # lids and caps: body, knob (height, radius)
    "jar": (Lathe(((-0.4, 0.03), (-0.39, 0.17), (-0.355, 0.3), (-0.32, 0.345), (-0.25, 0.345))), (-0.425, 0.06)),
    "teapot": (Lathe(((-0.31, 0.03), (-0.3, 0.08), (-0.26, 0.14), (-0.2, 0.175))), (-0.345, 0.052)),
    "bottle": (Lathe(((-0.5, 0.1), (-0.49, 0.112), (-0.36, 0.112))), None),
}
_OPEN: Final = {"mug": 0.86, "bowl": 0.9, "vase": 0.76}  # the opening's share of the mouth
_RIM: Final = {"mug": 0.15, "bowl": 0.17, "vase": 0.12, "ball": 0.22}  # share of the height the top part takes
_CLEAR: Final = {
    "mug": 0.15,
    "bowl": 0.15,
    "vase": 0.3,
    "ball": 0.2,
    "bottle": 0.38,
    "teapot": 0.1,
    "jar": 0.12,
    "house": 0.02,
}  # above a decal
_FOOT_SCALE: Final = {"bowl": 1.25, "ball": 1.1, "bottle": 0.85, "vase": 0.85, "teapot": 0.85}
_DECAL_SCALE: Final = {"bowl": 0.82, "bottle": 0.95, "house": 0.9, "ball": 1.2, "teapot": 1.05, "jar": 1.1, "mug": 1.12}
GROUND: Final = {  # where the thing stands: (height of its lowest level circle, half width there)
    "mug": (0.39, 0.235), "teapot": (0.345, 0.205), "bottle": (0.445, 0.2), "bowl": (0.3, 0.225), "vase": (0.45, 0.19),
    "jar": (0.4, 0.28), "ball": (0.46, 0.16), "house": (0.423, 0.36),
}  # fmt: skip
REACH: Final = {  # half extents (left and right, up, down) that hold the thing from every view
    "mug": (0.5, 0.46, 0.46), "teapot": (0.58, 0.43, 0.42), "bottle": (0.27, 0.54, 0.5), "bowl": (0.52, 0.36, 0.37),
    "vase": (0.36, 0.52, 0.5), "jar": (0.38, 0.51, 0.48), "ball": (0.47, 0.45, 0.49), "house": (0.54, 0.6, 0.46),
}  # fmt: skip


# -- painting ---------------------------------------------------------------------------------------------------------


def _bands(x: Array, period: float) -> Array:
    """Signed distance to alternate bands of half a period each; 0 is the middle of a positive (outside) band."""
    phase = np.mod(x / _F(period) + _F(0.5), 1) - _F(0.5)
    return np.asarray((_F(0.25) - np.abs(phase)) * _F(period), np.float32)


def _pattern_distance(pattern: str, across: Array, down: Array) -> Array | None:
    """Signed distance to the second tone's area (negative inside it), or None for a plain body."""
    if pattern == "striped":
        return _bands(down + _F(0.02), 0.2)
    if pattern == "checkered":
        a, b = _bands(across + _F(0.06), 0.27), _bands(down + _F(0.06), 0.27)
        return np.maximum(np.minimum(a, b), -np.maximum(a, b))
    if pattern == "dotted":
        step = _F(0.17)
        row = np.round(down / step)
        shift = np.mod(row, 2) * _F(0.5)
        du = np.mod(across / step - shift + _F(0.5), 1) - _F(0.5)
        return np.asarray(np.hypot(du * step, down - row * step) - _F(0.055), np.float32)
    return None


def _tone(name: str) -> Array:
    return np.asarray(COLOUR_RGB[name], np.float32)


def _second_tone(colour: str) -> Array:
    """A pattern's other tone."""
    return np.asarray({"yellow": (120, 78, 30), "white": (120, 128, 140)}.get(colour, (250, 248, 242)), np.float32)


class _Brush:
    """Paints surfaces over a window of the canvas (H, W, 3) float32 0..255.

    coverage: where the thing is, 0..1. detail: where small parts are seen, 0..1.
    """

    def __init__(self, window: Array, pixels: float, view: View, finish: str) -> None:
        self.window, self.pixels, self.view, self.finish = window, pixels, view, finish
        self.behind = window.copy()
        self.coverage = np.zeros(window.shape[:2], np.float32)
        self.detail = np.zeros(window.shape[:2], np.float32)

    def lay(
        self, surface: Surface, colour: Array, within: Array | None = None, solid: bool = True, detail: float = 0.0
    ) -> None:
        """colour: (3,) or (H, W, 3). within: coverage to stay in. solid: whether the finish leaves it opaque.
        detail: what `self.detail` is to be there."""
        alpha = cover(surface.distance, self.pixels)
        if within is not None:
            alpha = alpha * within
        nx, ny, nz = surface.normal
        lx, ly, lz = (_F(part) for part in self.view.light)
        lit = np.maximum(nx * lx + ny * ly + nz * lz, 0)
        shade = (_F(0.66) + _F(0.42) * lit)[..., None]
        painted = np.broadcast_to(colour, self.window.shape) * shade
        if self.finish != "matte":
            bright = np.maximum(nx * lx + ny * (ly - _F(0.1)) + nz * (lz + 1), 0) / _F(
                np.hypot(np.hypot(lx, ly), lz + 1)
            )
            gloss = (bright**90 * _F(0.8) + bright**16 * _F(0.16))[..., None]
            painted = painted + (255 - painted) * np.minimum(gloss, 1)
        if self.finish == "glass" and not solid:
            edge = np.clip(1 - nz, 0, 1) ** 2
            clear = (_F(0.52) * (1 - edge))[..., None]
            through = self.behind * (_F(0.55) + _F(0.45) * np.broadcast_to(colour, self.window.shape) / 255)
            painted = painted + (through * _F(1.04) - painted) * np.clip(clear, 0, 1)
        self.window += (painted - self.window) * alpha[..., None]
        self.coverage += alpha * (1 - self.coverage)
        self.detail += (_F(detail) - self.detail) * alpha


def _body_colour(what: Attributes, build: Build, surface: Surface, pixels: float) -> Array:
    """The body with its pattern; (H, W, 3)."""
    colour = np.broadcast_to(_tone(what.colour), (*surface.distance.shape, 3))
    distance = _pattern_distance(what.pattern, surface.across, surface.down)
    if distance is None:
        return colour
    return np.asarray(colour + (_second_tone(what.colour) - colour) * cover(distance, pixels)[..., None], np.float32)


def _paint_body(brush: _Brush, what: Attributes, build: Build, surface: Surface, height: float, front: float) -> None:
    """Body, foot, band, rim and decal on one surface. height: of the body, in units; front: arc where the decal is."""
    pixels, shape = brush.pixels, what.shape
    inside = cover(surface.distance, pixels)
    brush.lay(surface, _body_colour(what, build, surface, pixels), solid=False)

    def ring(distance: Array, colour: str) -> None:
        brush.lay(surface, _tone(colour), within=cover(distance * _F(height), pixels), detail=_RING_DETAIL)

    foot = build.foot * _FOOT_SCALE.get(shape, 1.0)
    clear = _CLEAR[shape]
    if what.band:
        ring(np.abs(surface.along - _F(clear + build.band)) - _F(build.band_width), what.band)
    if what.foot:
        ring(_F(1 - foot) - surface.along, what.foot)
    if what.top and shape in _RIM:
        ring(surface.along - _F(_RIM[shape]), what.top)
    if what.decal and what.decal_colour:
        free = clear + (build.band + build.band_width if what.band else 0), 1 - foot
        place = free[0] + build.decal_height * (free[1] - free[0])
        centre = (surface.along - _F(place)) * _F(height)
        radius = build.decal * _DECAL_SCALE.get(shape, 1.0)
        outline = decal(what.decal, surface.across - _F(front), centre, radius, build.form)
        brush.lay(surface, _tone(what.decal_colour), within=cover(outline, pixels) * inside, detail=1.0)


def _paint_lathe(brush: _Brush, what: Attributes, build: Build, view: View, u: Array, v: Array) -> None:
    shape, body = what.shape, _LATHES[what.shape]
    surface = body.surface(u, v, view.pitch, build.width)
    turn = float(np.cos(view.yaw))
    tone = _tone(what.colour)
    if shape == "mug":
        reach = 0.2 * turn
        x = view.side * (0.3 * build.width + 0.02 * turn)
        outer, inner = ellipse(u, v, x, 0.02, reach, 0.215), ellipse(u, v, x, 0.02, reach * 0.52, 0.125)
        brush.lay(_tube(np.maximum(outer, -inner), 0.045), tone, solid=False)
    if shape == "teapot":
        x = -view.side * 0.29 * build.width
        outer, inner = ellipse(u, v, x, 0.05, 0.235 * turn, 0.19), ellipse(u, v, x, 0.05, 0.155 * turn, 0.115)
        brush.lay(_tube(np.maximum(outer, -inner), 0.036), tone, solid=False)
        root, tip = (view.side * 0.22 * build.width, 0.17), (view.side * (0.3 * build.width + 0.24 * turn), -0.13)
        brush.lay(_tube(segment(u, v, root, tip, 0.105, 0.042), 0.07), tone, solid=False)
    _paint_body(brush, what, build, surface, body.bottom - body.top, _front(view, shape, build))
    if shape in _OPEN:
        mouth = body.mouth * build.width
        lip = _level(ellipse(u, v, 0, body.top, mouth, max(1e-3, mouth * view.pitch)))
        brush.lay(lip, _tone(what.top or what.colour) * _F(0.96))
        hole = mouth * _OPEN[shape]
        opening = ellipse(u, v, 0, body.top + 0.004, hole, max(1e-3, hole * view.pitch * 0.97))
        depth = np.clip((v - _F(body.top)) / _F(max(0.02, view.pitch * hole)), -1, 1)[..., None]
        brush.lay(_level(opening), tone * (_F(0.5) + _F(0.12) * depth))
    if shape in _COVERS:
        lid, knob = _COVERS[shape]
        colour = _tone(what.top) if what.top else tone * _F(0.8 if what.colour != "black" else 1.5)
        shadow = lid.surface(u, v - _F(0.022), view.pitch, build.width)
        brush.lay(shadow, tone * _F(0.55), within=cover(surface.distance, brush.pixels))
        brush.lay(lid.surface(u, v, view.pitch, build.width), colour)
        if knob:
            brush.lay(_tube(circle(u, v, 0, knob[0], knob[1]), knob[1]), colour)


def _front(view: View, shape: str, build: Build) -> float:
    """Arc at which the decal sits: the thing's front, turned by yaw, a little away from a mug's handle."""
    return float(np.sin(view.yaw)) * 0.2 * build.width - (0.02 * view.side if shape == "mug" else 0.0)


def _level(distance: Array) -> Surface:
    """A level disc seen from above."""
    flat = np.zeros_like(distance)
    return Surface(distance, flat, flat, flat, (flat, flat - _F(0.75), flat + _F(0.66)))


def _paint_house(brush: _Brush, what: Attributes, build: Build, view: View, u: Array, v: Array) -> None:
    side, shrink = view.side, 0.9
    u, v = u * _F(side / shrink), v / _F(shrink)  # drawn with the side wall on the right, a little too large
    brush.pixels *= shrink
    depth = 0.2 + 0.12 * float(np.sin(view.yaw + 0.4))
    rise, left, right, top, bottom = 0.5 * view.pitch * depth / 0.25, -0.45, 0.45 - depth, -0.13, 0.47
    middle, apex, eave = (left + right) / 2, -0.47, 0.075
    front_normal, side_normal = (-0.25 * side, -0.05, 0.97), (0.85 * side, -0.05, 0.5)
    gable = convex(u, v, ((middle, apex), (right, top), (right, bottom), (left, bottom), (left, top)))
    flank = convex(u, v, ((right, top), (right + depth, top - rise), (right + depth, bottom - rise), (right, bottom)))
    slope = rise / depth
    lean = np.clip(u - _F(right), 0, None) * _F(slope)
    wall = _wall(flank, u, v + lean, top, bottom, side_normal)
    brush.lay(wall, _body_colour(what, build, wall, brush.pixels), solid=False)
    height = bottom - top
    if what.foot:
        brush.lay(wall, _tone(what.foot), within=cover((_F(1 - build.foot) - wall.along) * _F(height), brush.pixels))
    if what.band:
        strip = np.abs(wall.along - _F(_CLEAR["house"] + build.band)) - _F(build.band_width)
        brush.lay(wall, _tone(what.band), within=cover(strip * _F(height), brush.pixels))
    door = rounded_box(u - _F(right + 0.5 * depth), v + lean, 0, 0.21, 0.26 * depth, 0.11)
    brush.lay(_wall(door, u, v, top, bottom, side_normal), np.asarray((92, 78, 66), np.float32))
    front = _wall(gable, (u - _F(middle)) * _F(side), v, top, bottom, front_normal)
    _paint_body(brush, what, build, front, height, 0.0)
    roof = _tone(what.top) if what.top else _tone(what.colour) * _F(0.72 if what.colour != "black" else 1.6)
    back = (
        (middle, apex - 0.05),
        (middle + depth, apex - 0.05 - rise),
        (right + depth + eave, top - rise + 0.05),
        (right + eave, top + 0.05),
    )
    brush.lay(_wall(convex(u, v, back), u, v, top, bottom, (0.55 * side, -0.62, 0.55)), roof)
    for a, b in (
        ((middle, apex - 0.03), (left - eave, top + 0.04)),
        ((middle, apex - 0.03), (right + eave, top + 0.04)),
    ):
        brush.lay(_wall(segment(u, v, a, b, 0.036, 0.036), u, v, top, bottom, (-0.1 * side, -0.55, 0.8)), roof)


def paint(
    canvas: Array, what: Attributes, build: Build, view: View, centre: tuple[float, float], size: float
) -> tuple[Array, Array, Array]:
    """Paint a thing over `canvas`, float32 (H, W, 3) in 0..255.

    Returns (new canvas, coverage (H, W) in 0..1, detail (H, W): 1 on a decal, one half on foot, band and rim, else 0).

    centre: pixels of the thing's origin; size: pixels of one unit.
    """
    height, width = canvas.shape[:2]
    cx, cy = centre
    reach = 0.68 * size + 2
    x0, x1 = max(0, int(cx - reach)), min(width, int(cx + reach) + 1)
    y0, y1 = max(0, int(cy - reach)), min(height, int(cy + reach) + 1)
    canvas, coverage = canvas.copy(), np.zeros((height, width), np.float32)
    detail = coverage.copy()
    if x0 >= x1 or y0 >= y1:
        return canvas, coverage, detail
    x = (np.arange(x0, x1, dtype=np.float32) + _F(0.5 - cx)) / _F(size)
    y = (np.arange(y0, y1, dtype=np.float32) + _F(0.5 - cy)) / _F(size)
    c, s = _F(np.cos(view.tilt)), _F(np.sin(view.tilt))
    u, v = x[None, :] * c + y[:, None] * s, y[:, None] * c - x[None, :] * s
    brush = _Brush(canvas[y0:y1, x0:x1], size, view, what.finish)
    if what.shape == "house":
        _paint_house(brush, what, build, view, u, v)
    elif what.shape == "ball":
        surface = _ball(u, v, view.pitch)
        _paint_body(brush, what, build, surface, 0.92, _front(view, what.shape, build))
    else:
        _paint_lathe(brush, what, build, view, u, v)
    coverage[y0:y1, x0:x1], detail[y0:y1, x0:x1] = brush.coverage, brush.detail
    return canvas, coverage, detail
