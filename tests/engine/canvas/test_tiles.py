"""Tiles of the VAE: they cover every element once in all, are of one size, and join what they cut."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreammix_trt.engine.canvas import tiles
from dreammix_trt.engine.canvas.tiles import Tiling, needs_tiles, run_tiled, tiles_of

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


def add_weights(tiling: Tiling, height: int, width: int, factor: int) -> np.ndarray:
    """The sum of all tiles' weights at every element, in float64."""
    total = np.zeros((factor * height, factor * width))
    for tile in tiling.tiles(factor):
        rows, cols = len(tile.ramp_rows), len(tile.ramp_cols)
        weight = np.outer(tile.ramp_rows.astype(np.float64), tile.ramp_cols)
        total[tile.row : tile.row + rows, tile.col : tile.col + cols] += weight
    return total


@SETTINGS
@given(st.integers(1, 90), st.integers(1, 90), st.integers(4, 40), st.floats(0, 1), st.sampled_from([1, 8]))
def test_weights_sum_to_one_everywhere(height: int, width: int, side: int, share: float, factor: int) -> None:
    overlap = 1 + int(share * (side - 2))
    tiling = tiles_of(height, width, side=side, overlap=overlap)
    assert np.abs(add_weights(tiling, height, width, factor) - 1).max() <= 1e-6
    assert (tiling.height, tiling.width) == (min(side, height), min(side, width))
    for length, extent, starts in ((height, tiling.height, tiling.rows), (width, tiling.width, tiling.cols)):
        assert starts[0] == 0 and starts[-1] + extent == length
        assert all(before + extent - start >= overlap for before, start in pairwise(starts))
        assert len(starts) == 1 or extent + (len(starts) - 2) * (extent - overlap) < length, "not one tile too many"
    for tile in tiling.tiles(factor):
        assert tile.ramp_rows.shape == (factor * tiling.height,) and tile.ramp_cols.shape == (factor * tiling.width,)
        for ramp in (tile.ramp_rows, tile.ramp_cols):
            assert ramp.dtype == np.float32 and ramp.min() >= 0 and ramp.max() <= 1


def test_ramps_are_straight_between_neighbours_and_1_at_the_border() -> None:
    """Two tiles of 6 over 8 cells share 4: eighths, at the cells' middles."""
    first, second = tiles_of(4, 8, side=6, overlap=2).tiles()
    np.testing.assert_array_equal(first.ramp_cols, [1, 1, 7 / 8, 5 / 8, 3 / 8, 1 / 8])
    np.testing.assert_array_equal(second.ramp_cols, [1 / 8, 3 / 8, 5 / 8, 7 / 8, 1, 1])
    np.testing.assert_array_equal(first.ramp_rows, np.ones(4))
    assert [(tile.row, tile.col) for tile in (first, second)] == [(0, 0), (0, 2)]
    assert [(tile.row, tile.col) for tile in tiles_of(4, 8, side=6, overlap=2).tiles(8)] == [(0, 0), (0, 16)]


@pytest.mark.parametrize(
    ("size", "rows", "cols"),
    [
        ((192, 256), (0, 64), (0, 64, 128)), ((128, 240), (0,), (0, 56, 112)), ((110, 210), (0,), (0, 82)),
        ((128, 128), (0,), (0,)), ((256, 256), (0, 64, 128), (0, 64, 128)),
    ],
)  # fmt: skip
def test_where_the_tiles_of_large_frames_lie(
    size: tuple[int, int], rows: tuple[int, ...], cols: tuple[int, ...]
) -> None:
    tiling = tiles_of(*size)
    assert (tiling.rows, tiling.cols) == (rows, cols)
    assert (tiling.height, tiling.width) == (min(size[0], 128), min(size[1], 128))
    assert tiles.OVERLAP >= 16


@pytest.mark.parametrize(
    ("size", "tiled"), [((1024, 1024), False), ((1536, 1536), False), ((1544, 64), True), ((64, 1544), True)]
)
def test_frames_above_the_threshold_are_tiled(size: tuple[int, int], tiled: bool) -> None:
    assert needs_tiles(*size) is tiled


def enlarge(latent: np.ndarray) -> dict[str, np.ndarray]:
    return {"image": np.repeat(np.repeat(latent[:, :3], 8, 2), 8, 3)}


def shrink(image: np.ndarray) -> dict[str, np.ndarray]:
    n, c, h, w = image.shape
    mean = image.reshape(n, c, h // 8, 8, w // 8, 8).mean((3, 5), dtype=np.float32)
    return {"mean": mean, "std": np.abs(mean)}


def test_a_network_that_looks_at_single_cells_gives_what_it_gives_whole() -> None:
    """Both ways, two pictures at a time, every output; and each tile comes contiguous and of one size."""
    rng = np.random.default_rng(3)
    tiling = tiles_of(13, 21, side=8, overlap=3)
    seen = []

    def note(array: np.ndarray) -> np.ndarray:
        assert array.flags.c_contiguous and array.dtype == np.float32
        seen.append(array.shape)
        return array

    latent = rng.standard_normal((2, 4, 13, 21), np.float32)
    image = run_tiled(lambda tile: enlarge(note(tile["latent"])), {"latent": latent}, tiling)
    assert set(seen) == {(2, 4, 8, 8)} and len(seen) == 2 * 4
    np.testing.assert_allclose(image["image"], enlarge(latent)["image"], atol=1e-5)
    seen.clear()
    picture = rng.uniform(-1, 1, (2, 3, 104, 168)).astype(np.float32)
    moments = run_tiled(lambda tile: shrink(note(tile["image"])), {"image": picture}, tiling)
    assert set(seen) == {(2, 3, 64, 64)} and moments.keys() == {"mean", "std"}
    for name, value in shrink(picture).items():
        assert moments[name].dtype == np.float32
        np.testing.assert_allclose(moments[name], value, atol=1e-6)


def test_tiles_that_differ_fade_into_each_other() -> None:
    """A network that gives each tile its number: the joined picture goes from one to the next without a jump."""
    numbers = iter(range(3))

    def number_tile(tile: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        height, width = tile["latent"].shape[2:]
        return {"image": np.full((1, 1, 8 * height, 8 * width), next(numbers), np.float32)}

    tiling = tiles_of(4, 32, side=16, overlap=8)
    image = run_tiled(number_tile, {"latent": np.zeros((1, 4, 4, 32), np.float32)}, tiling)["image"][0, 0]
    assert image[:, 0].tolist() == [0] * 32 and image[:, -1].tolist() == [2] * 32
    steps = np.diff(image[0])
    assert steps.min() >= 0 and steps.max() == pytest.approx(1 / 64, rel=1e-4)
