"""Measures on pixels against their definitions, written out by hand, and against scikit-image where it is installed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dreammix_trt.evaluation.metrics.metric import Sample, crop_thing
from dreammix_trt.evaluation.metrics.pixels import EQUAL, Psnr, SeamGradient, Ssim

SUBJECT: Any = None


def make_sample(image: Any, scene: Any, mask: Any = None, reference: Any = None) -> Sample:
    if mask is None:
        mask = np.zeros(image.shape[:2], bool)
    return Sample(image, scene, mask, SUBJECT, "a mug", "identity", {}, reference)


def noisy_pair(height: int = 30, width: int = 34) -> tuple[Any, Any]:
    rng = np.random.default_rng(3)
    one = rng.integers(0, 256, (height, width, 3), np.uint8)
    return one, np.clip(one + rng.normal(0, 25, one.shape), 0, 255).astype(np.uint8)


def ssim_by_hand(one: Any, other: Any) -> Any:
    """Equation 13 of Wang et al., window by window."""
    weights = np.array([[math.exp(-(x * x + y * y) / (2 * 1.5**2)) for x in range(-5, 6)] for y in range(-5, 6)])
    weights /= weights.sum()
    out = np.zeros((one.shape[0] - 10, one.shape[1] - 10))
    for i, j in np.ndindex(out.shape):
        x, y = (each[i : i + 11, j : j + 11].astype(float) for each in (one, other))
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy, vxy = (
            (weights * (a - m) * (b - n)).sum() for a, b, m, n in ((x, x, mx, mx), (y, y, my, my), (x, y, mx, my))
        )
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        out[i, j] = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return out


def test_psnr_is_that_of_the_mean_squared_error() -> None:
    scene = np.full((4, 5, 3), 100, np.uint8)
    image = scene.copy()
    image[0, 0] = (110, 100, 97)  # squared: 100 + 0 + 9, of 60 values
    assert Psnr().add(make_sample(image, scene)) == pytest.approx(10 * math.log10(255**2 / (109 / 60)))
    assert Psnr().add(make_sample(scene, scene)) == EQUAL


def test_ssim_is_the_papers() -> None:
    one, other = noisy_pair(14, 16)
    wanted = np.mean([ssim_by_hand(one[..., k], other[..., k]).mean() for k in range(3)])
    assert Ssim().add(make_sample(other, one)) == pytest.approx(wanted, abs=1e-12)
    assert Ssim().add(make_sample(one, one)) == pytest.approx(1, abs=1e-12)
    assert Ssim().add(make_sample(one[:8], one[:8])) is None


def test_both_agree_with_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    one, other = noisy_pair()
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    wanted = metrics.structural_similarity(one, other, channel_axis=2, **options)
    assert Ssim().add(make_sample(other, one)) == pytest.approx(wanted, abs=1e-12)
    assert Psnr().add(make_sample(other, one)) == pytest.approx(metrics.peak_signal_noise_ratio(one, other))


def test_what_was_painted_counts_nowhere_but_against_a_reference() -> None:
    one, other = noisy_pair()
    mask = np.zeros(one.shape[:2], bool)
    mask[8:20, 10:25] = True
    painted = np.where(mask[..., None], 255 - other, other)
    for metric in (Psnr(), Ssim()):
        inside_left_alone = np.where(mask[..., None], one, other)
        assert metric.add(make_sample(painted, one, mask)) == metric.add(make_sample(inside_left_alone, one, mask))
        whole = metric.add(make_sample(painted, one, mask, reference=one))
        assert whole == metric.add(make_sample(painted, one)) != metric.add(make_sample(painted, one, mask))
        assert metric.add(make_sample(painted, one, np.ones_like(mask))) is None


def test_a_seam_is_a_jump_that_its_surroundings_do_not_have() -> None:
    ramp = np.repeat(np.arange(0, 120, 4, dtype=np.uint8)[None, :, None], 20, 0).repeat(3, 2)
    mask = np.zeros((20, 30), bool)
    mask[6:14, 10:20] = True
    assert SeamGradient().add(make_sample(ramp, ramp, mask)) == pytest.approx(0)
    shifted = np.where(mask[..., None], ramp + np.uint8(10), ramp)
    # rows cross the edge twice on 8 lines: |4 + 10| - 4 and |4 - 10| - 4; columns on 2 x 10 lines: 10 - 0
    assert SeamGradient().add(make_sample(shifted, ramp, mask)) == pytest.approx((8 * 10 + 8 * 2 + 20 * 10) / 36)
    assert SeamGradient().add(make_sample(ramp, ramp)) is None


def test_flip_is_its_authors() -> None:
    flip = pytest.importorskip("flip_evaluator")
    from dreammix_trt.evaluation.metrics.pixels import Flip

    one, other = noisy_pair()
    target, picture = (each.astype(np.float32) / 255 for each in (one, other))
    _, mean, _ = flip.evaluate(target, picture, "LDR")
    assert Flip().add(make_sample(other, one)) == pytest.approx(mean, abs=1e-5)
    assert Flip().add(make_sample(one, one)) == 0


def test_a_crop_is_the_masks_square_within_the_picture() -> None:
    image = np.arange(40 * 60, dtype=np.int64).reshape(40, 60).astype(np.uint8)[..., None].repeat(3, 2)
    mask = np.zeros((40, 60), bool)
    mask[10:20, 20:24] = True
    assert np.array_equal(crop_thing(image, mask), image[10:20, 17:27])
    mask[:] = False
    mask[0:4, 40:60] = True  # moved down into the picture
    assert np.array_equal(crop_thing(image, mask), image[0:20, 40:60])
    mask[:] = False
    mask[3:6, 0:50] = True  # larger than the height
    assert crop_thing(image, mask).shape == (40, 51, 3)
