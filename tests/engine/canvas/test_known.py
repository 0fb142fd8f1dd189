"""The known pixels at the prior's side, against averages by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dreammix_trt.engine.canvas.known import shrink_known


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_without_a_hole_cells_are_plain_means() -> None:
    image = picture(32, 64)
    small, hole = shrink_known(image, np.zeros((32, 64), np.uint8), 16)
    means = image.reshape(16, 2, 16, 4, 3).mean((1, 3)) / 127.5 - 1
    np.testing.assert_allclose(small[0].transpose(1, 2, 0), means, atol=1e-5)
    assert small.shape == (1, 3, 16, 16) and hole.shape == (1, 1, 16, 16) and not hole.any()


@pytest.mark.parametrize("size", [(48, 80), (16, 16), (9, 21), (100, 37)])
def test_the_hole_leaves_no_trace(size: tuple[int, int]) -> None:
    image, mask = picture(*size), np.zeros(size, np.uint8)
    mask[2:7, 3:15] = 255
    other = np.where(mask[..., None] > 127, np.uint8(7), image)
    small, hole = shrink_known(image, mask, 16)
    again, _ = shrink_known(other, mask, 16)
    np.testing.assert_array_equal(small, again)
    assert np.abs(small).max() <= 1 + 1e-5 and 0 < hole.sum() < hole.size


def test_any_pixel_of_the_hole_marks_its_cell() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[33, 5] = 128
    small, hole = shrink_known(np.full((64, 64, 3), 255, np.uint8), mask, 16)
    assert list(zip(*np.nonzero(hole[0, 0]), strict=True)) == [(8, 1)]
    np.testing.assert_allclose(small, 1, atol=1e-5)


def test_cells_that_share_pixels_weigh_them_by_area() -> None:
    row = np.array([0, 120, 240], np.uint8)
    image = np.repeat(np.broadcast_to(row, (3, 3))[..., None], 3, axis=2)
    small, _ = shrink_known(image, np.zeros((3, 3), np.uint8), 2)
    np.testing.assert_allclose((small[0, 0, 0] + 1) * 127.5, [(0 + 60) / 1.5, (60 + 240) / 1.5], atol=1e-3)


def test_where_nothing_is_known_the_picture_is_grey() -> None:
    small, hole = shrink_known(picture(32, 32), np.full((32, 32), 255, np.uint8), 8)
    assert not small.any() and hole.all()
