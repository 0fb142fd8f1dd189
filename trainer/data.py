"""The training views drawn from a subject's photographs; numpy and Pillow only.

Conventions: pictures are uint8 (H, W, 3) RGB, masks bool (H, W), boxes (x0, y0, x1, y1) in pixels with exclusive ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Picture = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Box = tuple[int, int, int, int]

CROP_SHARE = 0.6  # of views: crops as LCG makes them; the others show the whole photograph, as the reference trains


@dataclass(frozen=True)
class Photograph:
    """One photograph: image uint8 (H, W, 3), subject bool (H, W) with at least one True, and its file name."""

    image: Picture
    subject: Mask
    name: str

    @property
    def box(self) -> Box:
        """The subject's bounding box."""
        return box_of(self.subject)


@dataclass(frozen=True)
class TrainingView:
    """A square training picture: image uint8 (S, S, 3); hole bool (S, S), the region to repaint, over the subject.

    sharp_side: the side in pixels of the piece of photograph it was made from (SDXL's original size).
    """

    image: Picture
    hole: Mask
    sharp_side: int


def box_of(mask: Mask) -> Box:
    """The bounding box of a mask that is not empty."""
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def draw_view(
    rng: np.random.Generator, photograph: Photograph, side: int, crop_share: float = CROP_SHARE
) -> TrainingView:
    """A random square of the photograph around its subject, scaled to `side`, with a random hole over the subject.

    With the chance `crop_share` it is a crop 1.2 to 2.2 times the subject, as the local stage of the loop will make
    them; the others show as much of the photograph as a square can hold. The square moves about but never cuts the
    subject; where it leaves the photograph the border is repeated. Nothing is mirrored: a subject's left and right are
    part of it.
    """
    height, width = photograph.subject.shape
    x0, y0, x1, y1 = photograph.box
    subject = max(x1 - x0, y1 - y0)
    if rng.random() < 1 - crop_share:
        extent = max(min(height, width) * rng.uniform(0.9, 1.0), subject * 1.05)
    else:
        extent = min(subject * rng.uniform(1.2, 2.2), max(height, width))
    extent = max(extent, subject + 2.0)
    left, top = (_place(rng, low, high, extent, length) for low, high, length in ((x0, x1, width), (y0, y1, height)))
    piece = max(2, round(extent))
    image = _square(photograph.image, left, top, piece, side, Image.Resampling.LANCZOS)
    inside = np.where(photograph.subject, 255, 0).astype(np.uint8)
    # beyond the photograph there is no subject, so the mask is padded with nothing
    shown = _square(inside, left, top, piece, side, Image.Resampling.BILINEAR, repeat=False) > 127
    if not shown.any():  # smaller than a pixel here: at least its place
        shown = np.zeros((side, side), bool)
        shown[side // 2, side // 2] = True
    return TrainingView(image, random_hole(rng, shown), piece)


def _place(rng: np.random.Generator, low: int, high: int, extent: float, length: int) -> int:
    """Where a window of `extent` begins so that it shows low..high, and stays within 0..length if it can."""
    first, last = high - extent, float(low)
    if extent <= length:
        first, last = max(first, 0.0), min(last, length - extent)
    else:
        first = last = (length - extent) / 2
    return round(rng.uniform(min(first, last), max(first, last)))


def _square(
    array: Picture, left: int, top: int, piece: int, side: int, method: Image.Resampling, repeat: bool = True
) -> Picture:
    """The `piece` x `piece` window at (left, top), which may reach over the edge, scaled to `side`."""
    rows, columns = np.arange(top, top + piece), np.arange(left, left + piece)
    height, width = array.shape[:2]
    window = array[np.clip(rows, 0, height - 1)][:, np.clip(columns, 0, width - 1)]
    if not repeat:
        window = window * np.outer((rows >= 0) & (rows < height), (columns >= 0) & (columns < width))
    return np.asarray(Image.fromarray(window.astype(np.uint8)).resize((side, side), method))


def random_hole(rng: np.random.Generator, subject: Mask) -> Mask:
    """A random training mask (docs/algorithm.md, 13.2): the subject's box, extended and bulged.

    The box grows by 0.1 to 1.0 of its size (log-uniform, so that close masks, which people draw, come as often as wide
    ones), its corners move by up to 20/1024 of the frame, and each edge becomes a quadratic Bezier curve that bulges
    outwards. The subject stays covered. subject: bool (S, S); returns bool of the same shape.
    """
    height, width = subject.shape
    x0, y0, x1, y1 = box_of(subject)
    grow = 0.1 * 10 ** rng.uniform(0, 1)
    half_w, half_h = (x1 - x0) / 2 * (1 + grow), (y1 - y0) / 2 * (1 + grow)
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * np.array([half_w, half_h]) + np.array([cx, cy])
    jitter = rng.uniform(1, 20) / 1024 * max(height, width)
    corners = corners + rng.uniform(-jitter, jitter, (4, 2))
    outline: list[tuple[float, float]] = []
    along = np.linspace(0, 1, 9)[:-1, None]
    for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        dx, dy = end - start
        middle = (start + end) / 2 + rng.uniform(0, 0.3) * np.array([dy, -dx])  # outwards on a clockwise outline
        curve = (1 - along) ** 2 * start + 2 * along * (1 - along) * middle + along**2 * end
        outline += [(float(x), float(y)) for x, y in curve]
    drawing = Image.new("1", (width, height))
    ImageDraw.Draw(drawing).polygon(outline, fill=1)
    return np.asarray(drawing, bool) | subject


def latent_mask(hole: Mask, factor: int = 8) -> NDArray[np.float32]:
    """bool (H, W) -> float32 (H/factor, W/factor) in {0, 1}: any masked pixel makes its cell count.

    docs/algorithm.md, 4.2.
    """
    height, width = hole.shape
    cells = hole.reshape(height // factor, factor, width // factor, factor).any((1, 3))
    return np.asarray(cells, np.float32)
