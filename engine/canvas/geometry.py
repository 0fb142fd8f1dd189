"""Boxes, sizes and widths of the canvas: plain numbers; of pictures only the mask's bounds.

Boxes are (row0, row1, col0, col1) in pixels with ends exclusive, sizes (height, width). The module has the reference's
rules and those of the native mode. docs/algorithm.md, 2 and 3, gives the reference's to the digit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.axes import FACTOR
from dreammix_trt.core.errors import InputError
from dreammix_trt.engine.kernels import Box
from dreammix_trt.engine.numpy_kernels import CASCADE

U8 = npt.NDArray[np.uint8]
Size = tuple[int, int]

FEATHER = 32  # pixels, in a picture whose short side is 1024
_LEAST, _MOST = 88 / 128, 168 / 128  # sides of a frame, in native sides: the profile of the engines


def mask_bounds(mask: U8, threshold: int = 127) -> Box:
    """The smallest box around mask > threshold. Raises InputError for a mask without such a pixel."""
    above = mask > threshold
    rows, cols = np.flatnonzero(above.any(axis=1)), np.flatnonzero(above.any(axis=0))
    if rows.size == 0:
        raise InputError(f"mask_image has no value above {threshold}: paint the region to repaint white (255)")
    return int(rows[0]), int(rows[-1]) + 1, int(cols[0]), int(cols[-1]) + 1


def initial_box(bounds: Box, frame: Size) -> Box:
    """A square 15 % larger than `bounds`, clipped to the frame (docs/algorithm.md, 2.2).

    Its rounding may omit the last row or column of very small bounds, as in the reference.
    """
    first_row, last_row, first_col, last_col = bounds[0], bounds[1] - 1, bounds[2], bounds[3] - 1
    row, col = (first_row + last_row) // 2, (first_col + last_col) // 2
    half = int(1.15 * max((last_row - first_row) // 2, (last_col - first_col) // 2))
    return _clip((row - half, row + half + 1, col - half, col + half + 1), frame)


def grow_box(box: Box, field: float, frame: Size) -> Box:
    """Grow `box`, shorter side first, until it spans `field` of the frame in both directions (docs/algorithm.md, 2.3).

    field: 0 leaves the box unchanged, 1 gives the whole frame.
    """
    height, width = frame
    if field == 1:
        return 0, height, 0, width
    r0, r1, c0, c1 = box
    while r1 - r0 < field * height or c1 - c0 < field * width:
        taller = r1 - r0 < c1 - c0
        grow_rows = taller or c1 - c0 == width
        grow_cols = not taller or r1 - r0 == height
        r0, r1, c0, c1 = _clip((r0 - grow_rows, r1 + grow_rows, c0 - grow_cols, c1 + grow_cols), frame)
    return r0, r1, c0, c1


def crop_box(mask: U8, field: float, *, threshold: int = 127) -> Box:
    """The reference's crop box of a mask (docs/algorithm.md, 2); the reference's threshold is 0."""
    frame: Size = (mask.shape[0], mask.shape[1])
    return grow_box(initial_box(mask_bounds(mask, threshold), frame), field, frame)


def size_class(size: Size, snap: int = 64) -> int:
    """The side of the square of the same area, rounded up to a multiple of `snap`."""
    return math.ceil(math.sqrt(size[0] * size[1]) / snap) * snap


def reference_work_size(size: Size, native: int = 1024, snap: int = 64) -> Size:
    """The size to which the reference resizes a crop (docs/algorithm.md, 3.1): about native^2 pixels, sides of `snap`.

    A crop whose class already is `native` keeps its size, so its sides need not be multiples of anything. Crops longer
    than those of a square frame (about 1 : 2) may not settle, and end near native^2.
    """
    height, width = size
    for _ in range(16):  # one or two rounds do
        scale = native / size_class((height, width), snap)
        if scale == 1:
            break
        height = max(1, round(height * scale / snap)) * snap
        width = max(1, round(width * scale / snap)) * snap
    return height, width


def floor_to_cells(size: Size) -> Size:
    """The sides floored to whole latent cells."""
    return max(size[0] // FACTOR, 1) * FACTOR, max(size[1] // FACTOR, 1) * FACTOR


def profile_sizes(native: int = 1024, snap: int = 64) -> list[Size]:
    """All frame sizes of the native mode: sides of `snap` within 88/128 .. 168/128 of native, area <= native^2."""
    first, last = math.ceil(_LEAST * native / snap), math.floor(_MOST * native / snap)
    sides = [k * snap for k in range(first, last + 1)]
    return [(h, w) for h in sides for w in sides if h * w <= native * native]


def work_size(size: Size, native: int = 1024, snap: int = 64, sizes: Sequence[Size] | None = None) -> Size:
    """The frame size of the native mode for a crop: least change of aspect, then as near to native^2 as possible.

    sizes: the choices; None: `profile_sizes`.

    A tenth of aspect weighs as much as four tenths of area.
    """

    def cost(candidate: Size) -> float:
        stretch = abs(math.log(candidate[0] * size[1] / (candidate[1] * size[0])))
        return stretch + 0.25 * math.log(native * native / (candidate[0] * candidate[1]))

    return min(profile_sizes(native, snap) if sizes is None else sizes, key=cost)


def scale_of(box: Box, size: Size) -> float:
    """Canvas pixels per pixel of a frame of this size, as a length: above 1 the frame is coarser than the canvas."""
    return math.sqrt((box[1] - box[0]) * (box[3] - box[2]) / (size[0] * size[1]))


def fit_box(box: Box, bounds: Box, frame: Size, sizes: Sequence[Size]) -> Box:
    """Give `box` an aspect between those of `sizes`, by cutting it around `bounds` and never into them.

    Where `bounds` itself is longer, the short side grows as far as the frame allows. A box that is still too long is
    squeezed when it is resized.
    """
    height, width = box[1] - box[0], box[3] - box[2]
    widest, tallest = max(w / h for h, w in sizes), max(h / w for h, w in sizes)
    if width > height * widest:
        cols = _cut(box[2:], bounds[2:], int(height * widest))
        rows = _stretch(box[:2], math.ceil((cols[1] - cols[0]) / widest), frame[0])
    elif height > width * tallest:
        rows = _cut(box[:2], bounds[:2], int(width * tallest))
        cols = _stretch(box[2:], math.ceil((rows[1] - rows[0]) / tallest), frame[1])
    else:
        return box
    return *rows, *cols


def _cut(span: tuple[int, int], inner: tuple[int, int], length: int) -> tuple[int, int]:
    """`span` shortened to `length`, but not into `inner`, and centred on `inner` as far as possible."""
    length = max(length, inner[1] - inner[0], 1)
    start = (inner[0] + inner[1] - length) // 2
    start = min(max(start, span[0]), span[1] - length)
    return start, start + length


def _stretch(span: tuple[int, int], length: int, limit: int) -> tuple[int, int]:
    """`span` lengthened to `length` where it is shorter, within 0..limit."""
    length = min(max(length, span[1] - span[0]), limit)
    start = min(max((span[0] + span[1] - length) // 2, 0), limit - length)
    return start, start + length


def _clip(box: Box, frame: Size) -> Box:
    return max(box[0], 0), min(box[1], frame[0]), max(box[2], 0), min(box[3], frame[1])


def join_boxes(a: Box, b: Box) -> Box:
    """The smallest box around both."""
    return min(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), max(a[3], b[3])


def fill_cascade(native: int = 1024) -> list[tuple[int, int]]:
    """The (radius, repeats) of the fill, scaled from the reference's 1024; no radius falls below one pixel."""
    return [(max(1, round(radius * native / 1024)), repeats) for radius, repeats in CASCADE]


def feather_width(size: Size) -> int:
    """How far, in pixels of a picture of this size, a paste reaches beyond the mask: 32 at a short side of 1024."""
    return min(max(2, round(FEATHER * min(size) / 1024)), 32767)
