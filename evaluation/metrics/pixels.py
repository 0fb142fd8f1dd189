"""Measures on pixels alone, without any weights.

PSNR, SSIM and FLIP compare with `Sample.target`: outside the mask with the scene, or everywhere with a reference.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.evaluation.metrics.metric import Mask, Metric, Sample

Plane = NDArray[np.float64]
EQUAL: Final = 100.0  # dB: what equal pictures count, so that a mean stays finite
_WINDOW: Final = 11  # of SSIM, pixels
_SIGMA: Final = 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_LUMA: Final = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


class Psnr(Metric):
    """Peak signal-to-noise ratio of 8-bit values, over all pixels and channels that are compared."""

    name, unit = "psnr", "dB"
    about = f"peak signal-to-noise ratio; equal pictures count {EQUAL:g} dB"

    def add(self, sample: Sample) -> float | None:
        if not sample.region.any():
            return None
        apart = sample.image[sample.region].astype(np.float64) - sample.target[sample.region]
        error = float((apart * apart).mean())
        return EQUAL if error == 0 else min(EQUAL, float(10 * np.log10(255**2 / error)))


class Ssim(Metric):
    """Structural similarity (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5, mean of the RGB channels.

    Only windows that lie within the picture count, and of these the ones whose centre is compared.
    """

    name = "ssim"
    about = "structural similarity, 11x11 Gaussian window, mean of the channels"

    def add(self, sample: Sample) -> float | None:
        rim = _WINDOW // 2
        where = sample.region[rim:-rim, rim:-rim]
        if not where.any():
            return None
        channels = [map_ssim(sample.compared[..., k], sample.target[..., k])[where].mean() for k in range(3)]
        return float(np.mean(channels))


def map_ssim(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> Plane:
    """SSIM of every 11x11 window: uint8 (H, W) twice -> float64 (H - 10, W - 10)."""
    x, y = one.astype(np.float64), other.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    spread = _blur(x * x) - mean_x**2 + _blur(y * y) - mean_y**2
    together = _blur(x * y) - mean_x * mean_y
    alike = (2 * mean_x * mean_y + _C1) * (2 * together + _C2)
    return np.asarray(alike / ((mean_x**2 + mean_y**2 + _C1) * (spread + _C2)))


def _blur(plane: Plane) -> Plane:
    """Gaussian mean of every window that lies within the plane."""
    at = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(at**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    height, width = plane.shape[0] - _WINDOW + 1, plane.shape[1] - _WINDOW + 1
    rows = sum(weight * plane[k : k + height] for k, weight in enumerate(weights))
    return np.asarray(sum(weight * rows[:, k : k + width] for k, weight in enumerate(weights)))


class SeamGradient(Metric):
    """How much more the picture jumps across the mask's edge than beside it.

    Of four neighbouring pixels in a row or column, two outside the mask and two inside: the jump across the edge, less
    the mean of the jumps on either side of it. Luminance; the mean over the whole edge. 0: no seam.
    """

    name, unit, better = "seam_gradient", "levels", "zero"
    about = "jump of luminance across the mask's edge, beyond the jumps beside it"

    def add(self, sample: Sample) -> float | None:
        plane = sample.image.astype(np.float64) @ _LUMA
        found = [_find_jumps(plane, sample.mask), _find_jumps(plane.T, sample.mask.T)]
        jumps = np.concatenate(found)
        return float(jumps.mean()) if len(jumps) else None


def _find_jumps(plane: Plane, mask: Mask) -> Plane:
    """The excess of every jump across an edge of the mask, along the rows."""
    if plane.shape[1] < 4:
        return np.zeros(0)
    steps = np.abs(np.diff(plane, axis=1))
    beside, across = (steps[:, :-2] + steps[:, 2:]) / 2, steps[:, 1:-1]
    a, b, c, d = (mask[:, k : mask.shape[1] - 3 + k] for k in range(4))
    return np.asarray((across - beside)[(a == b) & (c == d) & (b != c)])


class Flip(Metric):
    """NVIDIA's LDR-FLIP (Andersson et al. 2020) by its authors' package, 67 pixels a degree."""

    name, better = "flip", "lower"
    about = "perceived difference when two pictures alternate (LDR-FLIP, 67 pixels per degree), 0..1"

    def __init__(self) -> None:
        import flip_evaluator

        self._evaluate: Any = flip_evaluator.evaluate

    def add(self, sample: Sample) -> float | None:
        if not sample.region.any():
            return None
        target, picture = (np.asarray(each, np.float32) / 255 for each in (sample.target, sample.compared))
        errors, _, _ = self._evaluate(target, picture, "LDR", applyMagma=False, computeMeanError=False)
        return float(np.asarray(errors)[..., 0][sample.region].mean())
