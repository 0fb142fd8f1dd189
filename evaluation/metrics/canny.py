"""Canny's edges of a mask, as OpenCV finds them: 3x3 Sobel, |dx| + |dy|, edges as thin as a pixel, hysteresis.

OpenCV's arithmetic is whole numbers, so the edges are the same pixels.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.evaluation.metrics.metric import Mask

Whole = NDArray[np.int64]
_SHIFT: Final = 15  # of fixed point
_TANGENT: Final = 13573  # of 22.5 degrees


def find_edges(picture: NDArray[np.uint8], low: int, high: int) -> Mask:
    """Edges of a picture, uint8 (H, W) -> bool (H, W).

    low, high: an edge begins where the gradient is above `high`, and goes on where it is above `low`.
    """
    dx, dy = (find_gradient(picture.astype(np.int64), axis, "edge") for axis in (1, 0))
    size = np.abs(dx) + np.abs(dy)
    weak = (size > low) & _is_crest(dx, dy, size)
    return _spread(weak & (size > high), weak)


def find_gradient(plane: NDArray[Any], axis: int, rim: Literal["edge", "reflect"]) -> NDArray[Any]:
    """The 3x3 Sobel derivative along an axis of (H, W, ...), of the plane's own kind of number.

    rim: what lies beyond the picture, a mode of `numpy.pad`.
    """
    padded = np.pad(plane, ((1, 1), (1, 1), *[(0, 0)] * (plane.ndim - 2)), mode=rim)
    across = 1 - axis
    ends = [np.take(padded, range(k, k + plane.shape[axis]), axis) for k in (0, 2)]
    slope = ends[1] - ends[0]
    parts = [np.take(slope, range(k, k + plane.shape[across]), across) for k in range(3)]
    return np.asarray(parts[0] + 2 * parts[1] + parts[2])


def _is_crest(dx: Whole, dy: Whole, size: Whole) -> Mask:
    """Where the gradient is larger than before it and not smaller than behind it, along its direction."""
    around = np.pad(size, 1)
    height, width = size.shape

    def at(down: int, right: int) -> Whole:
        return around[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    flat, steep = np.abs(dx), np.abs(dy) << _SHIFT
    level = steep < flat * _TANGENT
    upright = steep > flat * _TANGENT + (flat << (_SHIFT + 1))
    falling = (dx ^ dy) < 0
    slanted = np.where(falling, (size > at(-1, 1)) & (size > at(1, -1)), (size > at(-1, -1)) & (size > at(1, 1)))
    crest = np.where(upright, (size > at(-1, 0)) & (size >= at(1, 0)), slanted)
    return np.asarray(np.where(level, (size > at(0, -1)) & (size >= at(0, 1)), crest), bool)


def _spread(seeds: Mask, ground: Mask) -> Mask:
    """The seeds, and what of the ground hangs together with them, corners included."""
    found = seeds
    while True:
        wide = np.pad(found, 1)
        near = np.zeros_like(found)
        for down in range(3):
            for right in range(3):
                near |= wide[down : down + found.shape[0], right : right + found.shape[1]]
        grown = near & ground
        if np.array_equal(grown, found):
            return found
        found = grown
