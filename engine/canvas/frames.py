"""From the user's picture to the frames that the networks work on, and back.

Geometry is in pixels: boxes are (row0, row1, col0, col1) with ends exclusive, sizes (height, width). What the reference
ties to 1024 (frame, size class, snap, fill radii) scales with the base's native side. The feather scales with the
picture's short side.

`native` mode keeps the user's resolution and aspect. `reference` mode stretches the picture to native x native and
follows the authors' arithmetic to the byte (docs/algorithm.md, 1 to 4, 8, 9).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.axes import FACTOR
from dreammix_trt.core.errors import InputError
from dreammix_trt.engine import kernels
from dreammix_trt.engine.canvas.geometry import (
    Size,
    crop_box,
    feather_width,
    fill_cascade,
    fit_box,
    floor_to_cells,
    grow_box,
    initial_box,
    join_boxes,
    mask_bounds,
    profile_sizes,
    reference_work_size,
    scale_of,
    work_size,
)
from dreammix_trt.engine.kernels import Box

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
Mode = Literal["native", "reference"]


# ------------------------------------------------------------------------------------------------ values


def to_latent_range(picture: U8) -> F32:
    """uint8 (h, w, 3) -> float32 (1, 3, h, w) in [-1, 1]: what the VAE encoder takes."""
    values = picture.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(np.float32(2) * values - np.float32(1))


def from_decoded(decoded: F32) -> U8:
    """The VAE decoder's float32 (1, 3, h, w) -> uint8 (h, w, 3): round(255 clamp(y/2 + 0.5))."""
    values = np.clip(decoded[0] / np.float32(2) + np.float32(0.5), 0, 1).transpose(1, 2, 0)
    return np.ascontiguousarray(np.rint(values * np.float32(255)).astype(np.uint8))


def dilate_mask(mask: U8, pixels: int) -> U8:
    """Grow the mask's region (above 127) by `pixels` to all sides; 0 leaves it unchanged."""
    while pixels > 0:
        reach = min(pixels, 250)  # the feather distinguishes at most 255 distances
        mask = np.where(kernels.feather(mask, reach + 1) > 0, np.uint8(255), np.uint8(0))
        pixels -= reach
    return mask


def seam_weight(mask: U8, width: int) -> U8:
    """The share of the global stage in the seam, uint8 (H, W): 255 outside the mask and at its edge, 0 deep inside.

    width: pixels over which it falls. In a mask thinner than that, it falls to 0 at the deepest pixel.
    """
    share = np.full(mask.shape, 255, np.uint8)
    r0, r1, c0, c1 = mask_bounds(mask)
    # The nearest pixel outside the mask is never farther away than the ring around its bounds.
    near = np.s_[max(r0 - 1, 0) : r1 + 1, max(c0 - 1, 0) : c1 + 1]
    rim = kernels.feather(np.where(mask[near] > 127, np.uint8(0), np.uint8(255)), width)
    deepest = int(rim.min())
    if deepest < 255:
        levels = np.rint((np.arange(256) - deepest) * (255 / (255 - deepest))).clip(0, 255).astype(np.uint8)
        share[near] = levels[rim]
    return share


# ------------------------------------------------------------------------------------------------ frames


@dataclass(frozen=True)
class Frame:
    """What one stage works on: a box of the canvas at the size of the networks.

    box: in canvas pixels.
    image: uint8 (h, w, 3). In reference mode h and w may not be multiples of 8; `size` always is.
    mask: uint8 (h, w), 0 or 255.
    fill: the image with its hole filled; None where the plain image is the background.
    """

    box: Box
    image: U8
    mask: U8
    fill: U8 | None = None

    @property
    def size(self) -> Size:
        """(height, width) in pixels of what the VAE takes."""
        return floor_to_cells((self.image.shape[0], self.image.shape[1]))

    @property
    def latent_size(self) -> Size:
        return self.size[0] // FACTOR, self.size[1] // FACTOR

    @property
    def scale(self) -> float:
        """Canvas pixels per frame pixel, as a length: above 1 the frame is coarser than the canvas."""
        return scale_of(self.box, self.size)

    @cached_property
    def network_mask(self) -> U8:
        """The mask at `size`, 0 or 255."""
        return _to_binary(_resize(self.mask, self.size))

    @cached_property
    def latent_mask(self) -> F32:
        """float32 (1, 1, h/8, w/8): 1 where any pixel is repainted."""
        return kernels.latent_mask(self.network_mask, FACTOR)[None, None]

    def network_input(self, picture: U8) -> F32:
        """Convert a picture of the frame's size to float32 (1, 3, H, W) in [-1, 1] with the sides of `size`."""
        return to_latent_range(_resize(picture, self.size))

    @property
    def background(self) -> F32:
        """The VAE's input for the background latent: the fill, else the plain image."""
        return self.network_input(self.image if self.fill is None else self.fill)

    @property
    def masked(self) -> F32:
        """The VAE's input for the head: the image with its hole at 0, which is mid grey."""
        return self.network_input(self.image) * (self.network_mask < 128)


class Framed(Protocol):
    """Where a stage's picture lies: a `Frame`, or a frame without pixels.

    box: in canvas pixels.
    size: (height, width) in pixels of what the VAE takes.
    """

    @property
    def box(self) -> Box: ...
    @property
    def size(self) -> Size: ...


@dataclass(frozen=True)
class Canvas:
    """One picture to inpaint. Make one with `Canvas.of`.

    image: uint8 (H, W, 3).
    mask: uint8 (H, W); values above 127 are repainted.
    native: native side of the base in pixels.
    snap: the sides of a native frame are multiples of this many pixels.
    sizes: the only frame sizes that the engines take, in pixels; None: all of `geometry.profile_sizes`, and any in
        reference mode.
    feather_pixels: as a request's `feather`; None: what suits the picture's size.
    """

    image: U8
    mask: U8
    mode: Mode
    native: int
    snap: int
    sizes: tuple[Size, ...] | None = None
    feather_pixels: int | None = None

    @classmethod
    def of(
        cls,
        image: U8,
        mask: U8,
        *,
        mode: Mode = "native",
        native: int = 1024,
        divisor: int = 32,
        sizes: Sequence[Size] | None = None,
        feather: int | None = None,
    ) -> Canvas:
        """Make the canvas (docs/algorithm.md, 1.4): the user's own pixels, or in reference mode native x native.

        native: native side of the base in pixels.
        divisor: the base's least multiple of a side in pixels, 8 * 2^(levels - 1).
        sizes: the frame sizes (height, width) in pixels that the engines take, where they do not take all. Native
            frames are chosen among them; other reference frames are refused (`work_size`).
        feather: pixels over which a paste fades into the picture; None: what suits its size.

        Raises InputError when the mask repaints nothing.
        """
        if mode == "reference":
            image = kernels.resize(image, native, native, "bicubic")
            mask = kernels.resize(mask, native, native, "bicubic")
        if not (mask > 127).any():
            raise InputError("mask_image repaints nothing (no value above 127 at the working size): enlarge the region")
        allowed = None if sizes is None else tuple(sizes)
        return cls(image, mask, mode, native, max(64 * native // 1024, divisor), allowed, feather)

    @property
    def size(self) -> Size:
        return self.image.shape[0], self.image.shape[1]

    @property
    def feather_width(self) -> int:
        """The distance from the mask, in pixels, from which on a paste changes nothing; at least 1."""
        return feather_width(self.size) if self.feather_pixels is None else max(1, self.feather_pixels)

    @cached_property
    def feather(self) -> U8:
        """The weight of pasted content, uint8 (H, W); 0 where pixels stay unchanged."""
        weight = np.zeros(self.size, np.uint8)
        weight[self._near] = kernels.feather(np.ascontiguousarray(self.mask[self._near]), self.feather_width)
        return weight

    @cached_property
    def _near(self) -> tuple[slice, slice]:
        """The part of the canvas that a paste can change: the mask and the feather around it."""
        r0, r1, c0, c1 = mask_bounds(self.mask)
        reach = self.feather_width
        return slice(max(r0 - reach, 0), r1 + reach), slice(max(c0 - reach, 0), c1 + reach)

    def box(self, field: float) -> Box:
        """The crop box of a stage. In native mode it contains the mask and has an aspect that the engines take.

        field: share of the canvas that the box spans, 0..1.
        """
        if self.mode == "reference":
            return crop_box(self.mask, field, threshold=0)
        bounds = mask_bounds(self.mask)
        box = grow_box(join_boxes(initial_box(bounds, self.size), bounds), field, self.size)
        return fit_box(box, bounds, self.size, self._choices)

    def measure_room(self, field: float) -> int:
        """The widest feather in pixels that ends within a stage's box; where that ends with the canvas, any does.

        field: as for `box`.
        """
        mask, box = mask_bounds(self.mask), self.box(field)
        ends = (0, self.size[0], 0, self.size[1])
        gaps = [abs(m - b) for m, b, end in zip(mask, box, ends, strict=True) if b != end]
        return 1 + min(gaps, default=max(self.size))

    def work_size(self, box: Box) -> Size:
        """(height, width) in pixels to which a crop box is resized.

        In reference mode these may not be whole latent cells. That mode has no choice: it raises InputError for a frame
        that is not in `sizes`.
        """
        crop = (box[1] - box[0], box[3] - box[2])
        if self.mode == "native":
            return work_size(crop, self.native, self.snap, self._choices)
        size = reference_work_size(crop, self.native, self.snap)
        whole = floor_to_cells(size)
        if self.sizes is not None and whole not in self.sizes:
            raise InputError(
                f"reference mode needs a frame of {_spell_size(whole)} pixels here, a request larger than any "
                f"profile: these engines take {_list_sizes(self.sizes)}; use native mode, or build engines of more "
                "sizes with `--shapes dynamic`"
            )
        return size

    @property
    def _choices(self) -> Sequence[Size]:
        return profile_sizes(self.native, self.snap) if self.sizes is None else self.sizes

    def first_frame(self, field: float, *, fill: bool = True, dilate: int = 0) -> Frame:
        """The local stage's frame (docs/algorithm.md, 2 and 3).

        field: share of the canvas that the frame spans, 0..1.
        fill: whether its hole is filled from its surroundings.
        dilate: enlarge the frame's mask by this many canvas pixels; this changes neither the box nor the paste.
        """
        frame = self._make_frame(field, dilate)
        if not fill:
            return frame
        return replace(frame, fill=kernels.fill(frame.image, frame.mask, fill_cascade(self.native)))

    def global_frame(self, field: float = 1.0) -> Frame:
        """The global stage's frame (GCH): the plain image.

        field: 1 is the whole canvas where its aspect allows.
        """
        return self._make_frame(field)

    def crop(self, picture: U8, frame: Frame) -> U8:
        """Cut and resize another picture of the canvas' size as `frame` was: the hand-over encodes it."""
        h, w = frame.image.shape[:2]
        return _resize(picture, (h, w), frame.box)

    def paste(self, frame: Framed, decoded: U8, *, soft: bool = False) -> U8:
        """Paste a stage's picture into its box, its rim blended (docs/algorithm.md, 9.2).

        decoded: uint8 (h, w, 3) of `frame.size`.
        soft: blend the content radially first (`soft_blending`).

        Returns uint8 (H, W, 3). Pixels farther from the mask than the feather are those of the canvas.
        """
        content = _to_box(decoded, frame.box)
        alpha = kernels.soft_alpha(content.shape[0], content.shape[1]) if soft else None
        return kernels.paste(self.image, content, frame.box, self.feather, alpha)

    def keeps_local(self, frame: Framed, local: Framed) -> bool:
        """Whether a global frame would blur what the local one rendered, being coarser than that frame and the canvas.

        Native mode only. The reference pastes the global result whatever its scale.
        """
        return self.keeps_scale(frame.box, frame.size, local.box, local.size)

    def keeps_scale(self, box: Box, size: Size, local_box: Box, local_size: Size) -> bool:
        """`keeps_local`, from the boxes and sizes of frames alone."""
        return self.mode == "native" and scale_of(box, size) > max(1.0, scale_of(local_box, local_size))

    def compose(self, frame: Framed, decoded: U8, *, local: tuple[Framed, U8] | None = None) -> U8:
        """Make the finished picture from the last stage's frame and picture (docs/algorithm.md, 9.3).

        decoded: uint8 (h, w, 3) of `frame.size`.
        local: the local stage's frame and finished picture, when a global stage followed. Where the global frame would
            blur it (`keeps_local`), the inside of the mask stays local and only the seam (`seam_weight`) is from the
            global picture.

        Returns uint8 (H, W, 3).
        """
        if local is None or not self.keeps_local(frame, local[0]):
            return self.paste(frame, decoded)
        around = np.ascontiguousarray(self.image[self._near])
        inside, seam = (self._place(*stage) for stage in (local, (frame, decoded)))
        part = (0, around.shape[0], 0, around.shape[1])
        mixed = kernels.paste(inside, seam, part, np.ascontiguousarray(self._seam[self._near]))
        out = self.image.copy()
        out[self._near] = kernels.paste(around, mixed, part, np.ascontiguousarray(self.feather[self._near]))
        return out

    def _place(self, frame: Framed, decoded: U8) -> U8:
        """The canvas around the mask (`_near`) with a stage's picture in its box."""
        tops, lefts = (part.indices(side)[:2] for part, side in zip(self._near, self.size, strict=True))
        r0, r1, c0, c1 = frame.box
        rows, cols = (max(r0, tops[0]), min(r1, tops[1])), (max(c0, lefts[0]), min(c1, lefts[1]))
        content = _to_box(decoded, frame.box)[rows[0] - r0 : rows[1] - r0, cols[0] - c0 : cols[1] - c0]
        out = self.image[self._near].copy()
        out[rows[0] - tops[0] : rows[1] - tops[0], cols[0] - lefts[0] : cols[1] - lefts[0]] = content
        return out

    @cached_property
    def _seam(self) -> U8:
        return seam_weight(self.mask, self.feather_width)

    def _make_frame(self, field: float, dilate: int = 0) -> Frame:
        box, user_mask = self.box(field), dilate_mask(self.mask, dilate)
        size = self.work_size(box)
        mask = _to_binary(_resize(user_mask, size, box))
        if not mask.any():  # resampling has lost a speck: keep it
            mask = _resize_nearest(user_mask, size, box)
        return Frame(box, _resize(self.image, size, box), mask)


def _resize(picture: U8, size: Size, box: Box | None = None) -> U8:
    """Crop and resize with Lanczos; a copy where the size stays."""
    r0, r1, c0, c1 = box if box is not None else (0, picture.shape[0], 0, picture.shape[1])
    if (r1 - r0, c1 - c0) == size:
        return np.ascontiguousarray(picture[r0:r1, c0:c1])
    return kernels.resize(picture, size[0], size[1], "lanczos", (r0, r1, c0, c1))


def _to_box(picture: U8, box: Box) -> U8:
    return _resize(picture, (box[1] - box[0], box[3] - box[2]))


def _spell_size(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _list_sizes(sizes: Sequence[Size]) -> str:
    names = [_spell_size(size) for size in sorted(sizes)]
    return ", ".join(names) if len(names) <= 6 else f"{names[0]} to {names[-1]} ({len(names)} sizes)"


def _to_binary(mask: U8) -> U8:
    return np.where(mask > 127, np.uint8(255), np.uint8(0))


def _resize_nearest(mask: U8, size: Size, box: Box) -> U8:
    """The mask at `size`: each frame pixel is set that contains a repainted pixel."""
    rows, cols = np.nonzero(mask[box[0] : box[1], box[2] : box[3]] > 127)
    out = np.zeros(size, np.uint8)
    out[rows * size[0] // (box[1] - box[0]), cols * size[1] // (box[3] - box[2])] = 255
    return out
