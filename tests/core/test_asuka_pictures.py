"""The prior's view of a picture: nothing of the hole leaks, no stroke is lost."""

from __future__ import annotations

import numpy as np
import pytest

from dreammix_trt.core.asuka_pictures import shrink_for_prior


@pytest.mark.parametrize("size", [(64, 64), (90, 130), (40, 512), (10, 12)])
def test_known_pixels_do_not_depend_on_the_hole(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (*size, 3), np.uint8)
    mask = np.zeros(size, bool)
    mask[size[0] // 3 : size[0] // 2, size[1] // 5 : size[1] // 2] = True
    other = np.where(mask[..., None], rng.integers(0, 256, (*size, 3), np.uint8), picture)
    image, hole = shrink_for_prior(picture, mask, 16)
    again, _ = shrink_for_prior(other, mask, 16)
    assert image.shape == (1, 3, 16, 16) and hole.shape == (1, 1, 16, 16) and image.dtype == hole.dtype == np.float32
    assert set(np.unique(hole)) == {0, 1}
    known = np.broadcast_to(hole == 0, image.shape)
    np.testing.assert_array_equal(image[known], again[known])


def test_a_single_pixel_of_a_large_mask_counts() -> None:
    mask = np.zeros((2048, 2048), np.uint8)
    mask[1000, 37] = 1
    _, hole = shrink_for_prior(np.zeros((2048, 2048, 3), np.uint8), mask, 16)
    assert hole.sum() == 1 and hole[0, 0, 7, 0] == 1


def test_values_are_means_from_minus_one_to_one() -> None:
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:16, :, 0], picture[::2, :, 1] = 255, 200
    image, hole = shrink_for_prior(picture, np.zeros((32, 32)), 16)
    np.testing.assert_allclose(image[0, 0, :8], 1)
    np.testing.assert_allclose(image[0, 0, 8:], -1)
    np.testing.assert_allclose(image[0, 1], 100 / 127.5 - 1, atol=1e-6)
    assert not hole.any()
