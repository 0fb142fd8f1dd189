"""The kernels in numpy and Pillow: they run without the C++ extension, and tests compare the extension with them.

Names, arguments and results are those of `dreammix_trt._cpp`. Documentation and argument checks are in `kernels`, which
calls both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from dreammix_trt.core import noise as _noise
from dreammix_trt.core.merging import merge_slot
from dreammix_trt.core.slots import Slot

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
Box = tuple[int, int, int, int]

#: (radius, repeats) of the box blurs of `fill` for a native side of 1024 (docs/algorithm.md, 3.6).
CASCADE: tuple[tuple[int, int], ...] = ((512, 2), (256, 2), (128, 4), (64, 4), (33, 8), (15, 8), (5, 16), (3, 16))

_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
_REACH = 6  # of the bilateral window: 13 x 13


def resize(image: U8, out_h: int, out_w: int, filter: str = "lanczos", box: Box | None = None) -> U8:
    r0, r1, c0, c1 = box or (0, image.shape[0], 0, image.shape[1])
    planes = image[r0:r1, c0:c1].reshape(r1 - r0, c1 - c0, -1)
    resized = [_resize_plane(planes[:, :, c], out_h, out_w, filter) for c in range(planes.shape[2])]
    return np.stack(resized, axis=-1).reshape(out_h, out_w, *image.shape[2:])


def _resize_plane(plane: U8, out_h: int, out_w: int, filter: str) -> U8:
    """One axis at a time, in the order of Pillow 13, so that the result does not depend on the installed Pillow."""
    picture = Image.fromarray(np.ascontiguousarray(plane))
    h, w = plane.shape
    vertically_first = out_h < h and h - out_h > 2 * (w - out_w)
    between = (w, out_h) if vertically_first else (out_w, h)
    return np.asarray(picture.resize(between, _FILTERS[filter]).resize((out_w, out_h), _FILTERS[filter]))


def fill(image: U8, mask: U8, cascade: Sequence[tuple[int, int]] = CASCADE) -> U8:
    original = Image.fromarray(image)
    known = Image.fromarray(np.where(mask < 127, np.uint8(255), np.uint8(0)))
    picture = original.copy()
    for radius, repeats in cascade:
        for _ in range(repeats):
            picture = picture.filter(ImageFilter.BoxBlur(radius))
            picture.paste(original, (0, 0), known)
    return np.array(picture)


def latent_mask(mask: U8, factor: int = 8) -> F32:
    h, w = mask.shape[0] // factor, mask.shape[1] // factor
    touched: npt.NDArray[np.bool_] = mask.reshape(h, factor, w, factor).max(axis=(1, 3)) >= 128
    return touched.astype(np.float32)


def feather(mask: U8, width: int = 32) -> U8:
    reached = mask > 127
    out = np.where(reached, np.uint8(255), np.uint8(0))
    for distance in range(1, width):
        if reached.all():
            break
        grown = _dilate(reached)
        out[grown & ~reached] = min(255, 256 * (width - distance) // width)
        reached = grown
    return out


def _dilate(region: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The region grown by one pixel to all eight sides."""
    rows = region.copy()
    rows[1:] |= region[:-1]
    rows[:-1] |= region[1:]
    grown = rows.copy()
    grown[:, 1:] |= rows[:, :-1]
    grown[:, :-1] |= rows[:, 1:]
    return grown


def blend_scale(x: F32, z_bg: F32, mask: F32, noise: F32, sigma: float) -> tuple[F32, F32]:
    level = np.float32(sigma)
    x_in = x * mask + (z_bg + level * noise) * (np.float32(1) - mask)
    return x_in, np.repeat(x_in / np.sqrt(level * level + np.float32(1)), 2, axis=0)


def guided_step(
    x_in: F32,
    eps: F32,
    x0_prev: F32 | None,
    noise: F32,
    *,
    sigma: float,
    guidance_scale: float,
    blur_alpha: float,
    c_x: float,
    c_x0: float,
    c_dx0: float,
    c_noise: float,
    guidance_rescale: float = 0.0,
    rows_per_picture: int = 2,
) -> tuple[F32, F32]:
    level = np.float32(sigma)
    positive_x0 = x_in - level * eps[rows_per_picture - 1 :: rows_per_picture]
    positive = x_in - positive_x0
    if blur_alpha > 0:
        share = np.float32(blur_alpha)
        smooth = bilateral(positive, positive_x0)
        positive = x_in - (x_in - (share * smooth + (np.float32(1) - share) * positive))
    e = positive
    if rows_per_picture == 2:
        negative = x_in - (x_in - level * eps[0::2])
        e = negative + np.float32(guidance_scale) * (positive - negative)
        if guidance_rescale > 0:
            e = _rescale(positive, e, np.float32(guidance_rescale))
    x0 = x_in - e
    change = np.zeros_like(x0) if x0_prev is None else x0 - x0_prev
    terms = zip((c_x, c_x0, c_dx0, c_noise), (x_in, x0, change, noise), strict=True)
    x_out = np.zeros_like(x_in)
    for coefficient, term in terms:
        x_out += np.float32(coefficient) * term
    return x_out, x0


def _rescale(positive: F32, e: F32, share: np.float32) -> F32:
    """Bring the guided noise back, in part, to the spread of the positive row (Lin et al. 2305.08891, section 3.4)."""
    _, wanted = _mean_and_deviation(positive)
    _, spread = _mean_and_deviation(e)
    ratio = np.divide(wanted, spread, out=np.ones_like(wanted), where=spread > 0)
    return share * (e * ratio) + (np.float32(1) - share) * e


def _mean_and_deviation(pictures: F32) -> tuple[F32, F32]:
    """Mean and unbiased standard deviation of each picture of (N, C, h, w), as (N, 1, 1, 1)."""
    mean = pictures.mean(axis=(1, 2, 3), keepdims=True, dtype=np.float64)
    count = max(math.prod(pictures.shape[1:]) - 1, 1)
    deviation = np.sqrt(((pictures - mean) ** 2).sum(axis=(1, 2, 3), keepdims=True) / count)
    return mean.astype(np.float32), deviation.astype(np.float32)


def bilateral(e: F32, guide: F32) -> F32:
    mean, deviation = _mean_and_deviation(guide)
    centre = (guide - mean) / (deviation + np.float32(1e-5))
    margin = ((0, 0), (0, 0), (_REACH, _REACH), (_REACH, _REACH))
    guides, values = np.pad(centre, margin, mode="reflect"), np.pad(e, margin, mode="reflect")
    h, w = e.shape[2:]
    total, weights = np.zeros_like(e), np.zeros_like(e[:, :1])
    for dy in range(2 * _REACH + 1):
        for dx in range(2 * _REACH + 1):
            window = (..., slice(dy, dy + h), slice(dx, dx + w))
            distance = np.abs(guides[window] - centre).sum(axis=1, keepdims=True)
            plane = np.float32((dy - _REACH) ** 2 + (dx - _REACH) ** 2)
            weight = np.exp((distance * distance + plane) * np.float32(-1 / 18))
            total += weight * values[window]
            weights += weight
    return total / weights


def tas_project(tokens: F32, remove: F32, positions: npt.NDArray[np.int64]) -> F32:
    out = tokens.copy()
    for row in remove.astype(np.float64):
        length2 = float(row @ row)
        if length2 > 0:
            for position in positions:
                token = out[position].astype(np.float64)
                out[position] = token - (token @ row) / length2 * row
    return out


def paste(original: U8, content: U8, box: Box, weight: U8, alpha: F32 | None = None) -> U8:
    r0, r1, c0, c1 = box
    pasted = original.copy()
    inner = original[r0:r1, c0:c1]
    pasted[r0:r1, c0:c1] = content if alpha is None else _mix(content, inner, alpha)
    return _mix(pasted, original, weight.astype(np.float32) / np.float32(255))


def _mix(top: U8, bottom: U8, share: F32) -> U8:
    """`top` over `bottom` by `share`, truncated to 8 bit, in the reference's single precision."""
    shares = share[:, :, None]
    value = top.astype(np.float32) * shares + bottom.astype(np.float32) * (np.float32(1) - shares)
    return value.clip(0, 255).astype(np.uint8)


def soft_alpha(height: int, width: int) -> F32:
    deviation = min(height, width) / 4
    rows = np.arange(height)[:, None] - height // 2
    columns = np.arange(width)[None, :] - width // 2
    gauss = np.exp(-(rows**2 + columns**2) / (2 * deviation**2))
    return np.float32(0.1) + np.float32(0.9) * gauss.astype(np.float32)


def merge_weight(
    pristine: npt.NDArray[Any], out: npt.NDArray[Any], at: int, stride: int, left: F32, right: F32
) -> None:
    rows, columns = len(left), right.shape[1]
    slot = Slot("", rows, columns, "", at, stride)
    merge_slot(pristine, out, slot, left, right)


def normals(seed: int, draw: int, step: int, shape: Sequence[int]) -> F32:
    return _noise.normals(seed, draw, step, shape)


def set_threads(count: int) -> None:
    """Does nothing: the element-wise loops of numpy and Pillow use one thread."""
