"""What is hidden is not seen; what is painted is; everything else stays as it was."""

from __future__ import annotations

import numpy as np
from PIL import Image

from dreammix_trt.core.pictures import read_image
from dreammix_trt.core.transparency import spread_colours

RNG = np.random.default_rng(5)
SIZE = (48, 64)
GREEN = np.full((*SIZE, 3), (20, 180, 60), np.uint8)


def read(rgb: np.ndarray, alpha: np.ndarray):  # type: ignore[no-untyped-def]
    return read_image(Image.fromarray(np.dstack([rgb, alpha])))


def test_hidden_colours_have_no_influence_on_what_is_seen() -> None:
    alpha = np.full(SIZE, 255, np.uint8)
    alpha[10:30, 20:40] = 0
    first, second = GREEN.copy(), GREEN.copy()
    first[alpha == 0], second[alpha == 0] = (255, 0, 255), RNG.integers(0, 256, (400, 3))
    np.testing.assert_array_equal(read(first, alpha).seen, read(second, alpha).seen)
    assert np.abs(read(first, alpha).seen.astype(int) - GREEN).max() <= 2


def test_colours_spread_from_what_is_near() -> None:
    rgb, alpha = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    rgb[:, :8], rgb[:, -8:] = (200, 0, 0), (0, 0, 200)
    alpha[:, :8] = alpha[:, -8:] = 255
    ground = spread_colours(rgb, alpha)
    assert ground[32, 12, 0] > 3 * ground[32, 12, 2] and ground[32, 51, 2] > 3 * ground[32, 51, 0]
    assert (np.abs(spread_colours(rgb, alpha * 0).astype(int) - 128) <= 1).all()  # nothing is visible: mid grey


def test_colours_spread_in_pictures_of_any_size() -> None:
    for size in ((1, 1), (1, 700), (701, 3), (1100, 513)):
        alpha = np.zeros(size, np.uint8)
        alpha[0, 0] = 255
        ground = spread_colours(np.full((*size, 3), 77, np.uint8), alpha)
        assert ground.shape == (*size, 3) and np.abs(ground.astype(int) - 77).max() <= 5  # one pixel of a million knows


def test_faint_colours_give_way_to_their_surroundings() -> None:
    alpha = np.full(SIZE, 255, np.uint8)
    rgb = GREEN.copy()
    rgb[20, 30], alpha[20, 30] = (255, 0, 255), 12
    assert np.abs(read(rgb, alpha).seen[20, 30].astype(int) - GREEN[0, 0]).max() <= 24


def test_what_is_painted_becomes_visible_with_the_feather() -> None:
    alpha = RNG.integers(0, 256, SIZE, np.uint8)
    alpha[:, :30] = 0
    rgb = RNG.integers(0, 256, (*SIZE, 3), np.uint8)
    picture = read(rgb, alpha)
    weight = np.zeros(SIZE, np.uint8)
    weight[10:30, 10:50] = 255
    weight[9, 10:50], weight[8, 10:50] = 170, 85
    share = weight[..., None] / 255
    red = np.array([250, 10, 10])
    pasted = np.rint(share * red + (1 - share) * picture.seen).astype(np.uint8)
    out = np.asarray(picture.with_pixels(pasted, weight))
    inside, outside = weight == 255, weight == 0
    assert (out[inside] == [250, 10, 10, 255]).all()
    np.testing.assert_array_equal(out[outside], np.dstack([rgb, alpha])[outside])  # hidden colours, too
    assert (out[9, 10:30, 3] == 170).all() and (out[8, 10:30, 3] == 85).all()
    assert np.abs(out[8, 10:30, :3].astype(int) - red).max() <= 4  # the ground is taken out of a thin layer
    assert (out[8:10, 30:50, 3] >= alpha[8:10, 30:50]).all()


def test_without_weights_the_picture_comes_back_as_it_was() -> None:
    alpha, rgb = RNG.integers(0, 256, SIZE, np.uint8), RNG.integers(0, 256, (*SIZE, 3), np.uint8)
    picture = read(rgb, alpha)
    untouched = picture.with_pixels(picture.seen, np.zeros(SIZE, np.uint8))
    np.testing.assert_array_equal(np.asarray(untouched), np.dstack([rgb, alpha]))


def test_grey_with_alpha_stays_grey() -> None:
    level, alpha = RNG.integers(0, 256, SIZE, np.uint8), RNG.integers(0, 256, SIZE, np.uint8)
    image = Image.fromarray(level)
    image.putalpha(Image.fromarray(alpha))
    picture, weight = read_image(image), np.zeros(SIZE, np.uint8)
    weight[5:9, 5:9] = 255
    out = picture.with_pixels(np.where(weight[..., None] > 0, np.uint8(200), picture.seen), weight)
    assert out.mode == "LA"
    values = np.asarray(out)
    assert (values[5:9, 5:9] == [200, 255]).all()
    np.testing.assert_array_equal(values[weight == 0], np.asarray(image)[weight == 0])
