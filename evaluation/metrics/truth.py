"""Measures on pixels where the truth of the hole is known (`Sample.truth`), as ASUKA's evaluation defines them, and the
colour of the ring along the mask's edge. The picture is the truth with the painted hole in it."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.evaluation.metrics.canny import find_edges, find_gradient
from dreammix_trt.evaluation.metrics.metric import Metric, Sample

Plane = NDArray[np.float64]
_LEAST: Final = 1e-7  # what keeps the logarithm finite: equal pictures have 70 dB
_WINDOW: Final = 7  # of SSIM, pixels
_GREY: Final = np.array([0.2989, 0.587, 0.114])  # torchvision's
_RING: Final = 64  # the ring is this part of the short side wide


class PsnrAsuka(Metric):
    """-10 log10(mse + 1e-7) of values in 0..1, over the whole picture."""

    name, unit = "psnr_asuka", "dB"
    about = "peak signal-to-noise ratio of the whole picture as ASUKA has it; equal pictures have 70 dB"

    def add(self, sample: Sample) -> float | None:
        if sample.truth is None:
            return None
        apart = (sample.image.astype(np.float64) - sample.truth) / 255
        return float(-10 * np.log10((apart * apart).mean() + _LEAST))


class SsimAsuka(Metric):
    """Structural similarity of the grey pictures: windows of 7x7, all alike, sample covariances (scikit-image's
    defaults)."""

    name = "ssim_asuka"
    about = "structural similarity of the whole grey picture, 7x7 windows, as ASUKA has it"

    def add(self, sample: Sample) -> float | None:
        if sample.truth is None or min(sample.mask.shape) < _WINDOW:
            return None
        x, y = (each.astype(np.float64) @ _GREY / 255 for each in (sample.image, sample.truth))
        mean_x, mean_y = _average(x), _average(y)
        unbiased = _WINDOW**2 / (_WINDOW**2 - 1)
        spread = (_average(x * x) - mean_x**2 + _average(y * y) - mean_y**2) * unbiased
        together = (_average(x * y) - mean_x * mean_y) * unbiased
        low, high = 0.01**2, 0.03**2
        alike = (2 * mean_x * mean_y + low) * (2 * together + high)
        return float((alike / ((mean_x**2 + mean_y**2 + low) * (spread + high))).mean())


class Grad(Metric):
    """Size of the difference of both pictures' 3x3 Sobel gradients on the mask's Canny edge (100, 200), mean of its
    pixels and of the channels."""

    name, unit, better = "grad", "levels", "lower"
    about = "difference of Sobel gradients from the truth along the mask's edge: seams, as ASUKA has it"

    def add(self, sample: Sample) -> float | None:
        edge = find_edges(np.where(sample.mask, np.uint8(255), np.uint8(0)), 100, 200)
        if sample.truth is None or not edge.any():
            return None
        apart = sample.image.astype(np.float64) - sample.truth
        across, down = (find_gradient(apart, axis, "reflect")[edge] for axis in (1, 0))
        return float(np.hypot(across, down).mean())


class RingColour(Metric):
    """How far the colour drifts in a ring along the mask's edge: inside it where the truth is known, else outside.

    Differences of pixels are averaged over the ring's part within its own width first, so that texture cancels, and
    opposite drifts at opposite sides do not. The mean of their lengths in RGB.
    """

    name, unit, better = "ring_colour", "levels", "lower"
    about = "drift of the mean colour in a ring along the mask's edge: inside it where the truth is known, else outside"

    def add(self, sample: Sample) -> float | None:
        width = max(2, min(sample.mask.shape) // _RING)
        side = ~sample.mask if sample.truth is None else sample.mask
        ring = side & (sum_boxes(np.where(side, 0.0, 1.0), width) > 0.5)
        if not ring.any():
            return None
        apart = sample.image.astype(np.float64) - (sample.target if sample.truth is None else sample.truth)
        sums, counts = (sum_boxes(each, width)[ring] for each in (apart * ring[..., None], ring.astype(np.float64)))
        return float(np.linalg.norm(sums / counts[:, None], axis=1).mean())


TRUTHFUL: Final[tuple[type[Metric], ...]] = (PsnrAsuka, SsimAsuka, Grad, RingColour)


def sum_boxes(plane: Plane, reach: int) -> Plane:
    """The sum of every square of 2 reach + 1 pixels, cut at the rim: (H, W, ...) -> the same shape."""
    for axis in (0, 1):
        pad = [(0, 0)] * plane.ndim
        pad[axis] = (reach + 1, reach)
        sums = np.pad(plane, pad).cumsum(axis)
        length = plane.shape[axis]
        plane = np.take(sums, range(2 * reach + 1, 2 * reach + 1 + length), axis) - np.take(sums, range(length), axis)
    return plane


def _average(plane: Plane) -> Plane:
    """The mean of every 7x7 window that lies within the plane."""
    reach = _WINDOW // 2
    return sum_boxes(plane, reach)[reach:-reach, reach:-reach] / _WINDOW**2
