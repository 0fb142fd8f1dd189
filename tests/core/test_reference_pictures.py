"""A reference on white: the object alone, as large as it can be, nothing of what was around it."""

from __future__ import annotations

import numpy as np
import pytest

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.reference_pictures import place_on_white


def draw_scene(around: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """A blue box, 30 wide and 20 high, in a picture of 90 x 70."""
    picture, mask = np.full((70, 90, 3), around, np.uint8), np.zeros((70, 90), np.uint8)
    picture[10:30, 40:70], mask[10:30, 40:70] = (0, 0, 255), 255
    return picture, mask


def test_the_object_stands_on_white_in_the_middle() -> None:
    image, mask = place_on_white(*draw_scene((9, 99, 9)), side=64)
    assert image.shape == (3, 64, 64) and mask.shape == (64, 64) and image.dtype == mask.dtype == np.float32
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    assert (columns[0], columns[-1] + 1) == (4, 60), "a sixteenth is free on each side"
    assert abs(int(rows[0] + rows[-1] + 1) - 64) <= 1 and abs(len(rows) - 56 * 2 / 3) <= 1
    np.testing.assert_allclose(image[:, 32, 32], [-1, -1, 1], atol=1e-6)
    assert (image[:, mask == 0] == 1).all()


def test_what_is_around_the_object_has_no_effect() -> None:
    picture, mask = draw_scene((9, 99, 9))
    mask[12:18, 44:52] = 0  # a handle's hole
    other = picture.copy()
    other[mask == 0] = (200, 0, 40)
    for side in (16, 64, 160):
        for one, two in zip(place_on_white(picture, mask, side), place_on_white(other, mask, side), strict=True):
            np.testing.assert_array_equal(one, two)


def test_an_object_that_fills_the_picture_and_one_of_a_pixel_are_placed_too() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (33, 21, 3), dtype=np.uint8)
    _, whole = place_on_white(picture, np.ones((33, 21)), 64)
    assert whole.sum() == 56 * 36
    one = np.zeros((33, 21), bool)
    one[5, 7] = True
    image, mask = place_on_white(picture, one, 64)
    assert mask.sum() == 56 * 56 and np.isfinite(image).all()


def test_masks_that_cannot_be_are_refused() -> None:
    picture, mask = draw_scene((0, 0, 0))
    with pytest.raises(InputError, match="the reference's mask is empty; mark the object in it"):
        place_on_white(picture, 0 * mask, 64)
    with pytest.raises(InputError, match=r"the reference is 90x70, its mask \(90, 69\)"):
        place_on_white(picture, mask[:69], 64)
