"""A subject's photograph as its features are made of: the object alone, on white, in the middle of a square."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.stored import Floats

U8 = NDArray[np.uint8]
_MARGIN = 1 / 16  # of the square, left free on each side of the object's longer sides


def place_on_white(picture: U8, mask: NDArray[np.generic], side: int) -> tuple[Floats, Floats]:
    """Cut the object out and place it on white.

    picture: (H, W, 3).
    mask: (H, W); what is not 0 is object.
    side: of the square, in pixels.

    Returns image (3, side, side) in [-1, 1] and mask (side, side), the object's share of each pixel, 0 to 1.
    Raises InputError for a mask without any pixel, or of another size.
    """
    object_ = np.asarray(mask) != 0
    if object_.shape != picture.shape[:2]:
        raise InputError(f"the reference is {picture.shape[1]}x{picture.shape[0]}, its mask {object_.shape[::-1]}")
    if not object_.any():
        raise InputError("the reference's mask is empty; mark the object in it")
    rows, columns = (np.flatnonzero(object_.any(axis)) for axis in (1, 0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    inner = max(1, round(side * (1 - 2 * _MARGIN)))
    scale = inner / max(bottom - top, right - left)
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    cut = picture[top:bottom, left:right].astype(np.float32)
    share = object_[top:bottom, left:right].astype(np.float32)
    corner = ((side - size[1]) // 2, (side - size[0]) // 2)
    place = (slice(corner[0], corner[0] + size[1]), slice(corner[1], corner[1] + size[0]))
    image, seen = np.ones((3, side, side), np.float32), np.zeros((side, side), np.float32)
    seen[place] = np.clip(_resize(share, size), 0, 1)
    for channel in range(3):  # on white before it is resized, so that nothing beside the object shows through
        white = cut[..., channel] * share + 255 * (1 - share)
        image[channel][place] = np.clip(_resize(white, size), 0, 255) / np.float32(127.5) - 1
    return image, seen


def _resize(values: Floats, size: tuple[int, int]) -> Floats:
    """Of one channel; means of pixels where it shrinks."""
    resized = Image.fromarray(values).resize(
        size, Image.Resampling.BICUBIC if size[0] > values.shape[1] else Image.Resampling.BOX
    )
    return np.asarray(resized, np.float32)
