"""What ASUKA's prior is shown of a picture: its known pixels at the prior's own side."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dreammix_trt.core.stored import Floats

U8 = NDArray[np.uint8]


def shrink_for_prior(picture: U8, mask: NDArray[np.generic], side: int) -> tuple[Floats, Floats]:
    """Resize a picture and its mask, squashed to a square, for `asuka_prior`.

    Each small pixel is the mean of the pixels in its place, and is of the hole where any of these is. So what the hole
    hides never reaches a known pixel. (The authors resize the picture first and mask it then, and their nearest mask
    misses thin strokes.)

    picture: (H, W, 3).
    mask: (H, W); what is not 0 is hole.

    Returns image (1, 3, side, side) in [-1, 1] and mask (1, 1, side, side), 0 or 1.
    """
    small = Image.fromarray(picture).resize((side, side), Image.Resampling.BOX)
    touched = Image.fromarray((np.asarray(mask) != 0).astype(np.float32)).resize((side, side), Image.Resampling.BOX)
    image = np.asarray(small, np.float32).transpose(2, 0, 1)[None] / np.float32(127.5) - 1
    hole = (np.asarray(touched) > 0).astype(np.float32)[None, None]
    return np.ascontiguousarray(image), hole
