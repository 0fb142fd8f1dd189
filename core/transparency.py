"""What transparency hides is neither seen by networks nor lost: colours for it, and the way back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

#: Where nothing at all is visible: half of white.
_NEUTRAL = 127.5

#: Longest side in pixels of the small picture in which colours are spread.
_SIDE = 512


def composite(rgb: U8, ground: U8, alpha: U8) -> U8:
    """A picture over a ground, all uint8 of one size: (H, W, 3), (H, W, 3) and (H, W)."""
    over, under, share = (Image.fromarray(array) for array in (rgb, ground, alpha))
    return np.asarray(Image.composite(over, under, share))


def spread_colours(rgb: U8, alpha: U8) -> U8:
    """Colours everywhere, uint8 (H, W, 3), from the visible ones: what is near counts most.

    rgb: uint8 (H, W, 3).
    alpha: uint8 (H, W), what is visible; colours under 0 have no influence.

    Pull and push (Gortler et al., The Lumigraph, 1996, 3.4): averages over squares of ever twice the side, and each
    gap takes what the next larger square knows. Done in a small copy, as the ground needs no detail.
    """
    height, width = alpha.shape
    factor = -(-max(height, width) // _SIDE)
    whole = Image.fromarray(np.dstack([rgb, alpha])).convert("RGBa").reduce(factor)  # colours times alpha
    small = np.asarray(whole, np.float32)
    colours, weight = small[..., :3], small[..., 3:] / np.float32(255)
    spread = Image.fromarray(np.clip(np.rint(_pull_push(colours, weight)), 0, 255).astype(np.uint8))
    return np.asarray(spread.resize((width, height), Image.Resampling.BILINEAR))


def uncover(painted: U8, weight: U8, rgb: U8, alpha: U8, ground: U8) -> tuple[U8, U8]:
    """Colours and alpha of a picture with transparency that was painted on its ground.

    painted: uint8 (H, W, 3), what became of the picture over its ground.
    weight: uint8 (H, W), how far each pixel was repainted.
    rgb, alpha, ground: of the picture, uint8.

    Alpha becomes 1 - (1 - alpha)(1 - weight): what was painted is visible. The ground's share of each colour is taken
    out again (Porter and Duff 1984, "over"). Pixels of weight 0 stay as they were.
    """
    rgb, alpha = rgb.copy(), alpha.copy()
    rows, columns = (np.nonzero(weight.any(axis))[0] for axis in (1, 0))
    if not len(rows):
        return rgb, alpha
    part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    through = (np.float32(255) - alpha[part]) * (np.float32(255) - weight[part]) / np.float32(65025)
    solid = np.maximum(1 - through, np.float32(1 / 255))[..., None]
    colours = np.clip(np.rint((painted[part] - through[..., None] * ground[part]) / solid), 0, 255).astype(np.uint8)
    touched = weight[part] > 0
    rgb[part][touched] = colours[touched]
    alpha[part] = np.rint(255 * (1 - through)).astype(np.uint8)
    return rgb, alpha


def _pull_push(colours: F32, weight: F32) -> F32:
    """colours (h, w, 3), already times weight (h, w, 1) in [0, 1] -> colours (h, w, 3) without gaps."""
    height, width = weight.shape[:2]
    if max(height, width) == 1:
        return np.where(weight > 0, colours / np.maximum(weight, 1e-6), np.float32(_NEUTRAL))
    more = ((0, height % 2), (0, width % 2), (0, 0))
    tall, wide = (height + 1) // 2, (width + 1) // 2
    both = np.pad(np.concatenate([colours, weight], 2), more).reshape(tall, 2, wide, 2, 4).sum((1, 3))
    full = np.minimum(both[..., 3:], 1)  # a square that holds one visible pixel is known
    both *= full / np.maximum(both[..., 3:], np.float32(1e-6))
    larger = _pull_push(both[..., :3], full)
    channels = [
        Image.fromarray(np.ascontiguousarray(larger[..., n])).resize((width, height), Image.Resampling.BILINEAR)
        for n in range(3)
    ]
    return np.asarray(colours + (1 - weight) * np.dstack([np.asarray(each) for each in channels]), np.float32)
