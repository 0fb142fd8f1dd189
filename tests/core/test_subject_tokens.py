"""Which features of a reference are selected: the formula of the paper, its properties, and where tokens come from."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.subject_tokens import TokenConfig, is_in_stack, mark_cells, score_cells, select_tokens
from tests.support.mini_sdxl import mini_configs

Floats = NDArray[np.float32]


def draw(seed: int, cells: int = 80, width: int = 24) -> Floats:
    """Clusters of features, as the parts of a thing are."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((5, width))
    return (centres[rng.integers(5, size=cells)] + 0.3 * rng.standard_normal((cells, width))).astype(np.float32)


def test_the_formula_is_the_paper_s() -> None:
    features = draw(0).astype(np.float64)
    count = len(features)
    likeness = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in features] for a in features])
    shares = np.array([np.exp(row) / np.exp(row).sum() for row in likeness])  # p_i, without temperature
    scores = [sum(shares[j, i] for j in range(count)) for i in range(count)]
    np.testing.assert_allclose(score_cells(features), scores, rtol=1e-5)
    tokens, chosen = select_tokens(features, count=24)
    assert list(chosen) == list(np.argsort(scores)[:24])
    np.testing.assert_array_equal(tokens, features[chosen].astype(np.float32))


def test_planted_outliers_are_selected_first() -> None:
    """Ten directions that nothing else shares, among a thing's and a white background's cells."""
    rng = np.random.default_rng(1)
    common = np.abs(rng.standard_normal((90, 30))) + 1
    features = np.zeros((100, 40), np.float32)
    places = np.sort(rng.choice(100, 10, False))
    features[np.setdiff1d(np.arange(100), places), :30] = common
    features[places, 30 + np.arange(10)] = rng.uniform(0.1, 10, 10)
    assert sorted(select_tokens(features, count=10)[1]) == list(places)


@pytest.mark.parametrize("seed", range(3))
def test_a_smaller_number_is_a_prefix(seed: int) -> None:
    features, inside = draw(seed), np.random.default_rng(seed).integers(0, 2, 80)
    _, whole = select_tokens(features, inside, 48)
    for count in (1, 4, 8, 16, 24):
        np.testing.assert_array_equal(select_tokens(features, inside, count)[1], whole[:count])


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_cells_does_not_matter(seed: int) -> None:
    features, order = draw(seed), np.random.default_rng(seed).permutation(80)
    np.testing.assert_array_equal(order[select_tokens(features[order])[1]], select_tokens(features)[1])


def test_equal_scores_are_in_the_order_of_the_cells() -> None:
    features = np.zeros((9, 12), np.float32)  # pairwise orthogonal, so all scores are equal, to the bit
    features[np.arange(9), [3, 1, 4, 0, 5, 9, 2, 6, 8]] = 1
    assert list(select_tokens(features, count=4)[1]) == [0, 1, 2, 3]


def test_the_size_of_a_feature_does_not_matter_and_nothing_is_not_a_number() -> None:
    features = draw(0)
    scale = np.float32(2.0) ** np.random.default_rng(0).integers(-20, 20, (80, 1))
    np.testing.assert_array_equal(select_tokens(features * scale)[1], select_tokens(features)[1])
    assert np.isfinite(score_cells(np.zeros((4, 8), np.float32))).all()


def test_cells_without_the_object_come_last_and_count_in_the_scores() -> None:
    features, inside = draw(2), np.zeros(80)
    inside[::2] = 1
    _, chosen = select_tokens(features, inside, 80)
    scores = score_cells(features)
    assert list(chosen[:40]) == sorted(range(0, 80, 2), key=lambda cell: scores[cell])
    assert list(chosen[40:]) == sorted(range(1, 80, 2), key=lambda cell: scores[cell])
    lowest, highest = np.eye(2, 3, dtype=np.float32), np.array([[0, 0, 1]] * 4000, np.float32)
    assert score_cells(np.concatenate([lowest, highest])).max() < 8, "so that 8 is behind every score"


def test_fewer_cells_than_tokens_are_all_given() -> None:
    config = TokenConfig(side=64, width=24)
    assert (config.cell, config.grid, config.cells, config.tokens) == (16, 4, 16, 16)
    tokens, chosen = select_tokens(draw(0, cells=16))
    assert len(tokens) == 16 and sorted(chosen) == list(range(16))


def test_sdxl_is_the_default() -> None:
    config = TokenConfig()
    assert (config.cells, config.tokens) == (64 * 64, 48)
    unet = {"block_out_channels": [320, 640, 1280], "sample_size": 128, "cross_attention_dim": 2048}
    assert TokenConfig.of_base({"unet": unet}) == config == TokenConfig.of_dict(config.to_dict())


def test_cells_of_the_object_are_those_with_any_pixel_of_it() -> None:
    config = TokenConfig(side=64, width=24)
    mask = np.zeros((64, 64), np.uint8)
    mask[15, 16], mask[48:, 63] = 1, 255
    assert list(np.flatnonzero(mark_cells(mask, config))) == [1, 15]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"side": 100}, "side is 100, no multiple of 16"),
        ({"block": -1}, "block is -1, expected a whole number from 0 on"),
        ({"width": True}, "width is True"),
        ({"depth": 3}, "'depth' is unknown; this version knows side, block, width, context_width"),
        ([], r"the configuration is \[\]"),
    ],
)
def test_configurations_that_cannot_be_are_refused(values: object, message: str) -> None:
    if isinstance(values, dict) and "depth" in values:
        message = "'depth' is unknown"
    with pytest.raises(FileFormatError, match=message):
        TokenConfig.of_dict(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 640}, "width is 640, but this base has 64"),
        ({"context_width": 768}, "context_width is 768, but this base has"),
        ({"block": 3, "side": 128}, "block is 3, but this base's UNet has 3 down blocks"),
    ],
)
def test_another_bases_are_refused(change: dict[str, int], message: str) -> None:
    configs = mini_configs()
    own = TokenConfig.of_base(configs)
    own.check_fit(configs)
    with pytest.raises(FileFormatError, match=message):
        TokenConfig.of_dict({**own.to_dict(), **change}).check_fit(configs)


def test_the_stack_ends_before_the_block_s_downsampler() -> None:
    config = TokenConfig()
    kept = ["conv_in.bias", "time_embedding.linear_1.weight", "down_blocks.0.downsamplers.0.conv.weight"]
    kept += ["down_blocks.1.resnets.1.conv1.weight", "down_blocks.1.attentions.0.proj_in.weight"]
    left = ["down_blocks.1.downsamplers.0.conv.weight", "down_blocks.2.resnets.0.conv1.weight", "mid_block.x"]
    left += ["up_blocks.0.resnets.0.conv1.weight", "conv_out.weight", "conv_norm_out.weight"]
    assert [name for name in (*kept, *left) if is_in_stack(name, config)] == kept
