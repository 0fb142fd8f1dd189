"""The arithmetic between the networks: canvas work on 8-bit pictures, one sampling step on float32 latents.

Each function runs in C++ (`dreammix_trt._cpp`, vectorised, threaded, without the GIL). Where the extension is not
installed, it runs in numpy (`engine/numpy_kernels.py`): 8-bit results and masks are equal bit for bit, float32 results
agree within 2e-6 of the array's maximum. After all steps such last bits may round otherwise: a few pixels of a picture
differ by one level of 256 (74 in the pictures of the demo). So a seed gives the same bytes only where the same one of
the two runs. DREAMMIX_KERNELS=numpy in the environment forces numpy.

Pictures are uint8 arrays (H, W) or (H, W, C), latents float32 (N, C, h, w), boxes (row0, row1, col0, col1) with ends
exclusive. Arrays of another layout in memory are copied first. Another dtype or shape raises ValueError.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.slots import Slot
from dreammix_trt.engine import numpy_kernels
from dreammix_trt.engine.numpy_kernels import CASCADE

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
Weight = npt.NDArray[Any]
Box = tuple[int, int, int, int]

_FILTERS = ("lanczos", "bicubic", "bilinear")


def _choose() -> Any:
    """The C++ extension, or its numpy twin when numpy is forced or the extension is missing (logged once, here)."""
    if os.environ.get("DREAMMIX_KERNELS") != "numpy":
        try:
            return importlib.import_module("dreammix_trt._cpp")
        except ImportError as error:
            logging.getLogger(__name__).warning(
                "the C++ extension is missing (%s): numpy does its work, slower, and a few pixels may differ by one "
                "level of 256; install a wheel for this platform, or a C++ compiler before installing from source",
                error,
            )
    return numpy_kernels


if TYPE_CHECKING:
    _impl = numpy_kernels  # the extension has the same functions
else:
    _impl = _choose()

#: "cpp" or "numpy": what the functions of this module run on.
BACKEND = "numpy" if _impl is numpy_kernels else "cpp"


def set_threads(count: int) -> None:
    """Use at most `count` threads per call from now on, in this process. 0: as many as the machine has."""
    _require(count >= 0, f"threads is {count}; it must be >= 0")
    _impl.set_threads(count)


def resize(image: U8, out_h: int, out_w: int, filter: str = "lanczos", box: Box | None = None) -> U8:
    """Crop to `box`, then resample to (out_h, out_w): bit-equal to `Image.crop(...).resize(...)` of Pillow 13.

    image: uint8 (H, W) or (H, W, 1..4); channels are independent of one another (no premultiplied alpha).
    filter: "lanczos", "bicubic" or "bilinear".
    box: None: the whole image.

    Returns uint8 (out_h, out_w[, C]).
    """
    image = _check_array(image, np.uint8, "image")
    _require(image.ndim == 2 or (image.ndim == 3 and 1 <= image.shape[2] <= 4), f"image has shape {image.shape}")
    _require(out_h > 0 and out_w > 0, f"output size {out_h} x {out_w} is empty")
    _require(filter in _FILTERS, f"filter {filter!r} is not one of {', '.join(_FILTERS)}")
    checked = _check_box(box if box is not None else (0, image.shape[0], 0, image.shape[1]), image)
    return _impl.resize(image, int(out_h), int(out_w), filter, checked)


def fill(image: U8, mask: U8, cascade: Sequence[tuple[int, int]] = CASCADE) -> U8:
    """Fill the hole (mask >= 127) with box blurs from coarse to fine; after each blur the known pixels are restored.

    image: uint8 (H, W, 3).
    mask: uint8 (H, W).
    cascade: (radius 0..65535, repeats >= 0) in pixels.

    Bit-equal to the cascade in Pillow's BoxBlur (docs/algorithm.md, 3.6). Known pixels stay as they are.
    """
    image, mask = _check_rgb(image, "image"), _check_array(mask, np.uint8, "mask")
    _require(mask.shape == image.shape[:2], f"mask has shape {mask.shape}, image {image.shape}")
    pairs = [(int(radius), int(repeats)) for radius, repeats in cascade]
    _require(
        all(0 <= radius <= 65535 and repeats >= 0 for radius, repeats in pairs), f"cascade {pairs} is out of range"
    )
    return _impl.fill(image, mask, pairs)


def latent_mask(mask: U8, factor: int = 8) -> F32:
    """Reduce a mask to latent cells: 1 where any pixel of a factor x factor block is hole (mask >= 128), else 0.

    mask: uint8 (H, W); its sides are multiples of `factor` (docs/algorithm.md, 4.2).

    Returns float32 (H/factor, W/factor).
    """
    mask = _check_plane(mask, "mask")
    _require(
        factor > 0 and all(side % factor == 0 for side in mask.shape), f"{mask.shape} is not a multiple of {factor}"
    )
    return _impl.latent_mask(mask, int(factor))


def feather(mask: U8, width: int = 32) -> U8:
    """The weight of pasted content: 255 where mask > 127, floor(256 (1 - d/width)) at Chebyshev distance d from there.

    mask: uint8 (H, W).
    width: the distance in pixels, 1..32767, from which on the weight is 0. At 32 equal to the reference's 32-fold
        `max(v, maxfilter3x3(v) - 8)` (docs/algorithm.md, 9.1).

    Returns uint8 (H, W).
    """
    _require(1 <= width <= 32767, f"width is {width}; it must be in 1..32767")
    return _impl.feather(_check_plane(mask, "mask"), int(width))


def blend_scale(x: F32, z_bg: F32, mask: F32, noise: F32, sigma: float) -> tuple[F32, F32]:
    """The network's input of one step: `x_in = x m + (z_bg + sigma noise)(1 - m)`, scaled by 1/sqrt(sigma^2 + 1).

    x, z_bg, noise: (N, C, h, w).
    mask: (N, 1, h, w) in 0..1.

    Returns x_in (N, C, h, w), and it scaled and doubled to rows [neg0, pos0, neg1, pos1, ...] (2N, C, h, w).
    docs/algorithm.md, 7.1 and 7.2.
    """
    x, z_bg, noise = _check_latents(x, z_bg, noise)
    mask = _check_array(mask, np.float32, "mask")
    expected = (x.shape[0], 1, *x.shape[2:])
    _require(mask.shape == expected, f"mask has shape {mask.shape}, expected {expected}")
    return _impl.blend_scale(x, z_bg, mask, noise, float(sigma))


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
    """From the network's output to the next latent: blur guidance, classifier-free guidance, solver step.

    With e = sigma eps: `e_pos = a B(e_pos; x_in - e_pos) + (1 - a) e_pos` for a = blur_alpha > 0 (B: `bilateral`),
    `x0 = x_in - (e_neg + guidance_scale (e_pos - e_neg))`, and
    `x_out = c_x x_in + c_x0 x0 + c_dx0 (x0 - x0_prev) + c_noise noise` (docs/algorithm.md, 7.3 to 7.7). Where sigma
    falls to 0 the caller gives c_x = 0, c_x0 = 1, c_noise = 0.

    x_in, noise: (N, C, h, w).
    eps: rows [neg0, pos0, ...] (2N, C, h, w), or with rows_per_picture = 1 only positive ones (N, C, h, w).
    x0_prev: (N, C, h, w); None where the solver has no history.
    guidance_rescale: 0..1; brings the guided noise back to the spread of the positive row (Lin et al. 2305.08891).
    rows_per_picture: 2, or 1, which switches classifier-free guidance off.

    Returns (x_out, x0), both (N, C, h, w).
    """
    x_in, noise = _check_latents(x_in, noise)
    eps = _check_array(eps, np.float32, "eps")
    _require(rows_per_picture in (1, 2), f"rows_per_picture is {rows_per_picture}; it must be 1 or 2")
    expected = (x_in.shape[0] * rows_per_picture, *x_in.shape[1:])
    _require(eps.shape == expected, f"eps has shape {eps.shape}, expected {expected}")
    if x0_prev is not None:
        x_in, x0_prev = _check_latents(x_in, x0_prev)
    return _impl.guided_step(
        x_in,
        eps,
        x0_prev,
        noise,
        sigma=float(sigma),
        guidance_scale=float(guidance_scale),
        blur_alpha=float(blur_alpha),
        c_x=float(c_x),
        c_x0=float(c_x0),
        c_dx0=float(c_dx0),
        c_noise=float(c_noise),
        guidance_rescale=float(guidance_rescale),
        rows_per_picture=rows_per_picture,
    )


def bilateral(e: F32, guide: F32) -> F32:
    """The 13x13 joint bilateral filter B(e; guide) of blur guidance, per picture of (N, C, h, w).

    The guide is standardised over C, h, w of its picture (unbiased deviation + 1e-5). Weights are exp(-d^2/18)
    exp(-(dy^2 + dx^2)/18) with d the channel-summed absolute guide difference. Edges are reflected. docs/algorithm.md,
    7.4.
    """
    e, guide = _check_latents(e, guide)
    return _impl.bilateral(e, guide)


def tas_project(tokens: F32, remove: F32, positions: npt.ArrayLike) -> F32:
    """Remove the directions `remove` from the tokens at `positions`, one direction after the other.

    tokens: float32 (L, D).
    remove: float32 (K, D).
    positions: row numbers of `tokens`.

    For each row e of `remove` in order and each position: t -= (t . e)/|e|^2 e, accumulated in double. A row of zeros
    removes nothing. DreamMix section 3.4 (docs/algorithm.md, 5.4).

    Returns a new (L, D).
    """
    tokens, remove = _check_array(tokens, np.float32, "tokens"), _check_array(remove, np.float32, "remove")
    _require(tokens.ndim == 2 and remove.ndim == 2, f"tokens {tokens.shape} and remove {remove.shape} must be 2-D")
    _require(tokens.shape[1] == remove.shape[1], f"tokens are {tokens.shape[1]} wide, remove {remove.shape[1]}")
    rows = np.ascontiguousarray(positions, np.int64).reshape(-1)
    _require(bool(np.all((rows >= 0) & (rows < len(tokens)))), f"a position is outside 0..{len(tokens) - 1}")
    return _impl.tas_project(tokens, remove, rows)


def paste(original: U8, content: U8, box: Box, weight: U8, alpha: F32 | None = None) -> U8:
    """Put `content` into `box` of `original`, then compose: `y = pasted w + original (1 - w)`, w = weight/255.

    original: uint8 (H, W, 3).
    content: uint8 (h, w, 3) of the box's size.
    weight: uint8 (H, W), see `feather`; pixels of weight 0 are those of `original`.
    alpha: float32 (h, w) in 0..1; softens the content first, see `soft_alpha`.

    Single precision, truncated to 8 bit: equal to the reference byte for byte (docs/algorithm.md, 9.2).
    """
    original, content = _check_rgb(original, "original"), _check_rgb(content, "content")
    box, weight = _check_box(box, original), _check_array(weight, np.uint8, "weight")
    size = (box[1] - box[0], box[3] - box[2])
    _require(content.shape[:2] == size, f"content has size {content.shape[:2]}, box {size}")
    _require(weight.shape == original.shape[:2], f"weight has shape {weight.shape}, original {original.shape}")
    if alpha is not None:
        alpha = _check_array(alpha, np.float32, "alpha")
        _require(alpha.shape == size, f"alpha has shape {alpha.shape}, box {size}")
    return _impl.paste(original, content, box, weight, alpha)


def soft_alpha(height: int, width: int) -> F32:
    """The soft paste's share of content, float32 (height, width): 0.1 + 0.9 G/max G with G = exp(-d^2/(2 s^2)).

    d is the distance to (height//2, width//2) in pixels, s = min(height, width)/4. docs/algorithm.md, 8.3.
    """
    _require(height > 0 and width > 0, f"size {height} x {width} is empty")
    return _impl.soft_alpha(int(height), int(width))


def merge_weight(pristine: Weight, out: Weight, slot: Slot, a: F32, b: F32) -> None:
    """Write W + A B into a slot's part of `out`: in float32, summed in the order of the ranks, rounded once.

    pristine, out: the whole input that the slot lies in, float32 or float16 both, in C order; `out` is written.
    a: float32 (inputs, rank).
    b: float32 (rank, outputs).

    numpy gives the same bits (docs/algorithm.md, 12.6).
    """
    for name, array in (("pristine", pristine), ("out", out)):
        fits = isinstance(array, np.ndarray) and array.dtype in (np.float32, np.float16) and array.flags.c_contiguous
        _require(fits, f"{name} must be a contiguous float32 or float16 array")
    _require(out.dtype == pristine.dtype and out.shape == pristine.shape, "out is not like pristine")
    a, b = _check_array(a, np.float32, "a"), _check_array(b, np.float32, "b")
    fits = a.ndim == b.ndim == 2 and a.shape == (slot.inputs, len(b)) and b.shape[1] == slot.outputs
    _require(fits, f"a {a.shape} and b {b.shape} are not the factors of {slot.inputs} -> {slot.outputs}")
    left, right = (b.T, a.T) if slot.flipped else (a, b)
    _require(slot.stride >= right.shape[1], f"rows of {right.shape[1]} numbers are {slot.stride} apart")
    last = slot.at + (len(left) - 1) * slot.stride + right.shape[1]
    _require(slot.at >= 0 and last <= pristine.size, f"{slot.module} is not in {pristine.shape}")
    _impl.merge_weight(
        pristine.reshape(-1),
        out.reshape(-1),
        slot.at,
        slot.stride,
        np.ascontiguousarray(left),
        np.ascontiguousarray(right),
    )


def normals(seed: int, draw: int, step: int, shape: Sequence[int]) -> F32:
    """Like `dreammix_trt.core.noise.normals`, but faster: float32 unit normals of (seed, draw, step, element)."""
    _require(0 <= seed < 1 << 64, f"seed is {seed}; it must be in 0 .. 2^64-1")
    _require(0 <= draw < 1 << 32 and 0 <= step < 1 << 32, f"draw {draw} or step {step} is outside 0 .. 2^32-1")
    return _impl.normals(seed, draw, step, [int(side) for side in shape])


def _require(fits: bool, message: str) -> None:
    if not fits:
        raise ValueError(message)


def _check_array(array: Any, dtype: Any, name: str) -> Any:
    """`array` in C order. Raises ValueError for another dtype: values are never converted silently."""
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        raise ValueError(f"{name} must be a {np.dtype(dtype)} array")
    return np.ascontiguousarray(array)


def _check_plane(array: U8, name: str) -> U8:
    checked: U8 = _check_array(array, np.uint8, name)
    _require(checked.ndim == 2 and checked.size > 0, f"{name} has shape {checked.shape}, expected (H, W)")
    return checked


def _check_rgb(array: U8, name: str) -> U8:
    checked: U8 = _check_array(array, np.uint8, name)
    _require(checked.ndim == 3 and checked.shape[2] == 3, f"{name} has shape {checked.shape}, expected (H, W, 3)")
    return checked


def _check_latents(*arrays: F32) -> tuple[Any, ...]:
    checked = tuple(_check_array(array, np.float32, "a latent") for array in arrays)
    shapes = {array.shape for array in checked}
    _require(len(shapes) == 1 and checked[0].ndim == 4, f"latents have shapes {shapes}, expected one (N, C, h, w)")
    return checked


def _check_box(box: Box, picture: U8) -> Box:
    r0, r1, c0, c1 = (int(value) for value in box)
    inside = 0 <= r0 < r1 <= picture.shape[0] and 0 <= c0 < c1 <= picture.shape[1]
    _require(inside, f"box (row0, row1, col0, col1) = {(r0, r1, c0, c1)} is empty or outside {picture.shape[:2]}")
    return r0, r1, c0, c1
