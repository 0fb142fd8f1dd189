"""What ASUKA's prior sees of a frame: the known pixels at the prior's own side."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]


def shrink_known(picture: U8, mask: U8, side: int) -> tuple[F32, F32]:
    """Average the known pixels of each cell of a side x side grid; the hole leaves no trace in them.

    The authors shrink the picture first and mask it then, so that the hole's colours reach the cells at its rim; what
    is to be taken out must not.

    picture: uint8 (h, w, 3), of any aspect.
    mask: uint8 (h, w); above 127 is the hole.

    Returns float32 (1, 3, side, side) in [-1, 1], 0 where nothing is known; float32 (1, 1, side, side), 1 where any
    pixel of the cell is in the hole.
    """
    known = (mask <= 127).astype(np.float32)
    planes = np.concatenate([picture * known[..., None], known[..., None]], axis=2, dtype=np.float32)
    down, across = _average(planes.shape[0], side), _average(planes.shape[1], side)
    means = np.tensordot(down, np.tensordot(across, planes, (1, 1)), (1, 1))  # (side, side, 4)
    share = means[..., 3:]
    colours = np.divide(means[..., :3], share, out=np.full_like(means[..., :3], 127.5), where=share > 1e-6)
    image = (colours / np.float32(127.5) - np.float32(1)).transpose(2, 0, 1)[None]
    hole = (share[..., 0] < 1 - 1e-4).astype(np.float32)[None, None]
    return np.ascontiguousarray(image, np.float32), hole


@lru_cache(maxsize=16)
def _average(length: int, side: int) -> F32:
    """Row i averages the pixels, whole and in part, that the i-th of `side` equal cells covers: (side, length)."""
    ends = np.arange(side + 1) * (length / side)
    begins, pixels = ends[:-1, None], np.arange(length)
    covered = np.minimum(ends[1:, None], pixels + 1) - np.maximum(begins, pixels)
    weights = np.clip(covered, 0, None)
    return np.asarray(weights / weights.sum(1, keepdims=True), np.float32)
