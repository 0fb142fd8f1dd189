"""Measures against a known truth: closed cases, definitions written out by hand, and values recorded with OpenCV 5.0
and scikit-image 0.26 as the authors' scripts call them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dreammix_trt.evaluation.metrics.canny import find_edges, find_gradient
from dreammix_trt.evaluation.metrics.metric import Sample
from dreammix_trt.evaluation.metrics.truth import TRUTHFUL, Grad, PsnrAsuka, RingColour, SsimAsuka, sum_boxes

SUBJECT: Any = None
#: cv2.Canny of `draw_disc` with 100, 200
DISC = """
...........
....###....
...#...#...
..#.....#..
..#.....#..
..#.....#..
...#...#...
....###....
...........
"""


def hold(image: Any, truth: Any, mask: Any) -> Sample:
    return Sample(image, truth, mask, SUBJECT, "", "removal", {}).hold_against_scene()


def draw_box(height: int = 24, width: int = 30) -> Any:
    mask = np.zeros((height, width), bool)
    mask[6:18, 8:20] = True
    return mask


def draw_disc(height: int = 9, width: int = 11, radius: float = 10) -> Any:
    rows, columns = np.mgrid[:height, :width]
    return (columns - width // 2) ** 2 + (rows - height // 2) ** 2 < radius


def noisy_pair(height: int, width: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 256, (height, width, 3), np.uint8)
    return np.clip(truth + rng.normal(0, 25, truth.shape) + 9, 0, 255).astype(np.uint8), truth


def test_what_lies_around_the_hole_is_the_truths() -> None:
    image, truth = noisy_pair(24, 30)
    mask = draw_box()
    spoilt = np.where(mask[..., None], image, 255 - image)
    for kind in TRUTHFUL:
        assert kind().add(hold(spoilt, truth, mask)) == kind().add(hold(image, truth, mask))
        assert kind().add(hold(truth, truth, mask)) == pytest.approx(
            {"psnr_asuka": 70, "ssim_asuka": 1}.get(kind.name, 0)
        )
        if kind is not RingColour:
            assert kind().add(Sample(image, truth, mask, SUBJECT, "", "editing", {})) is None, "nobody knows the truth"
    held = hold(image, truth, mask)
    assert held.region.all() and held.target is truth and held.truth is truth
    assert np.array_equal(held.image, np.where(mask[..., None], image, truth)) and held.compared is not truth


def test_psnr_has_the_authors_term() -> None:
    truth = np.full((10, 10, 3), 100, np.uint8)
    image, mask = truth.copy(), np.zeros((10, 10), bool)
    mask[0, 0] = True
    image[0, 0] = (151, 100, 100)  # 0.2 off in one of 300 values
    assert PsnrAsuka().add(hold(image, truth, mask)) == pytest.approx(-10 * math.log10(0.04 / 300 + 1e-7))


def test_ssim_and_grad_are_those_of_the_authors_libraries() -> None:
    image, truth = noisy_pair(40, 52)
    sample = hold(image, truth, np.hypot(*np.meshgrid(np.arange(52) - 25, np.arange(40) - 20)) ** 2 < 150)
    assert SsimAsuka().add(sample) == pytest.approx(0.9820115268611542, abs=1e-7)  # in float32 there
    assert PsnrAsuka().add(sample) == pytest.approx(26.50859, abs=1e-5)
    assert Grad().add(sample) == pytest.approx(75.30471602956077, abs=1e-9)


def test_ssim_by_hand() -> None:
    image, truth = noisy_pair(8, 9)
    x, y = ((each / 255) @ (0.2989, 0.587, 0.114) for each in (image, truth))
    found = []
    for i, j in np.ndindex(2, 3):
        a, b = (each[i : i + 7, j : j + 7].ravel() for each in (x, y))
        (vx, vxy), (_, vy) = np.cov(a, b)
        means = a.mean(), b.mean()
        top = (2 * means[0] * means[1] + 1e-4) * (2 * vxy + 9e-4)
        found.append(top / ((means[0] ** 2 + means[1] ** 2 + 1e-4) * (vx + vy + 9e-4)))
    assert SsimAsuka().add(hold(image, truth, np.ones((8, 9), bool))) == pytest.approx(np.mean(found), abs=1e-12)
    assert SsimAsuka().add(hold(image[:6], truth[:6], np.ones((6, 9), bool))) is None


def test_edges_are_those_of_opencv() -> None:
    disc = np.where(draw_disc(), 255, 0).astype(np.uint8)
    assert (
        "\n" + "\n".join("".join(".#"[k] for k in row) for row in find_edges(disc, 100, 200).astype(int)) + "\n" == DISC
    )
    soft = np.array([[0, 0, 60, 120, 180, 240, 255, 255]] * 5, np.uint8)  # one crest of several equal ones
    assert np.argwhere(find_edges(soft, 100, 200)[2]).ravel().tolist() == [2]
    assert not find_edges(np.full((5, 5), 255, np.uint8), 100, 200).any(), "a hole of everything has no edge"


def test_an_edge_goes_on_where_it_is_weak_and_does_not_begin_there() -> None:
    step = np.zeros((12, 10), np.uint8)
    step[:6, 5:], step[6:, 5:] = 80, 35  # gradients of 320 and 140
    assert find_edges(step, 100, 200)[7:, 4].all(), "diagonally around the kink"
    assert not find_edges(step[7:], 100, 200).any()


def test_grad_of_a_picture_made_by_hand() -> None:
    """A flat hole that is d levels too bright: the Sobel difference along its straight edge is 4 d."""
    truth, mask = np.full((20, 24, 3), 90, np.uint8), np.zeros((20, 24), bool)
    mask[:, 10:] = True  # one straight edge from rim to rim
    image = np.where(mask[..., None], truth + np.array([3, 6, 12], np.uint8), truth)
    assert Grad().add(hold(image, truth, mask)) == pytest.approx(4 * (3 + 6 + 12) / 3)
    assert Grad().add(hold(image, truth, np.ones_like(mask))) is None
    ramp = np.arange(24, dtype=float)[None, :, None] * np.ones((4, 1, 1))
    assert find_gradient(ramp, 1, "reflect")[:, 1:-1] == pytest.approx(8)
    assert find_gradient(ramp, 0, "reflect") == pytest.approx(0)


def test_ring_colour_is_a_drift_and_no_texture() -> None:
    truth, mask = np.full((128, 128, 3), 100, np.uint8), draw_disc(128, 128, 1600)
    shifted = truth + np.array([3, 0, 4], np.uint8)
    assert RingColour().add(hold(shifted, truth, mask)) == pytest.approx(5)
    board = np.where(np.indices((128, 128)).sum(0)[..., None] % 2, 110, 90).astype(np.uint8) + np.zeros_like(truth)
    assert (RingColour().add(hold(board, truth, mask)) or 0) < 2
    halves = np.where(np.arange(128)[None, :, None] < 64, 95, 105).astype(np.uint8) + np.zeros_like(truth)
    assert (RingColour().add(hold(halves, truth, mask)) or 0) > 8, "opposite drifts do not cancel: 5 sqrt 3 each"
    inner = truth.copy()
    inner[60:68, 60:68] = 255
    assert RingColour().add(hold(inner, truth, mask)) == 0, "what is far from the edge is no matter"
    outside = Sample(np.where(mask[..., None], 0, shifted).astype(np.uint8), truth, mask, SUBJECT, "", "identity", {})
    assert RingColour().add(outside) == pytest.approx(5), "without a truth the ring lies outside"
    assert RingColour().add(Sample(truth, truth, np.ones_like(mask), SUBJECT, "", "identity", {})) is None


def test_boxes_are_cut_at_the_rim() -> None:
    plane = np.arange(30, dtype=float).reshape(5, 6)
    for i, j in np.ndindex(5, 6):
        wanted = plane[max(0, i - 2) : i + 3, max(0, j - 2) : j + 3].sum()
        assert sum_boxes(plane, 2)[i, j] == pytest.approx(wanted)
