"""ASUKA's configurations: to and from JSON, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.asuka import AsukaConfig, DecoderConfig, PriorConfig, blend_condition
from dreammix_trt.core.errors import FileFormatError


def test_a_configuration_survives_json() -> None:
    config = AsukaConfig(PriorConfig(side=64, patch=4), DecoderConfig(block_out_channels=(8, 8, 16, 16)))
    assert AsukaConfig.of_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_default_is_for_sdxl() -> None:
    config = AsukaConfig()
    assert (config.prior.tokens, config.prior.context_width, config.prior.pooled_width) == (256, 2048, 1280)
    assert config.decoder == DecoderConfig.of_vae({"latent_channels": 4, "scaling_factor": 0.13025})


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("prior", {"patch": 15}, "side is 256, which is no multiple of patch 15"),
        ("prior", {"width": 774, "heads": 9}, "width is 774, expected a multiple of 4"),
        ("prior", {"feature_layer": 9}, "feature_layer is 9, but the decoder has 8 layers"),
        ("prior", {"layers": 0}, "layers is 0, expected a whole number from 1 on"),
        ("prior", {"depth": 3}, "'depth' is unknown"),
        ("decoder", {"block_out_channels": [8, 8]}, "block_out_channels has 2 entries, expected 4"),
        ("decoder", {"block_out_channels": "wide"}, "block_out_channels is 'wide', expected a list"),
        ("decoder", {"use_post_quant_conv": 1}, "use_post_quant_conv is 1, expected true or false"),
    ],
)
def test_a_field_that_cannot_be_is_named(part: str, change: dict[str, Any], message: str) -> None:
    values = AsukaConfig().to_dict()
    values[part] |= change
    with pytest.raises(FileFormatError, match=message):
        AsukaConfig.of_dict(values)


@pytest.mark.parametrize("values", [{}, {"schema": 2}, {"schema": 1, "prior": 3}, {"schema": 1, "prior": {}}])
def test_what_is_no_configuration_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(FileFormatError, match=r"config\.json of an ASUKA folder"):
        AsukaConfig.of_dict(values)


def test_strength_0_is_the_empty_prompt_and_1_the_prior() -> None:
    rng = np.random.default_rng(0)
    empty, prior = rng.standard_normal((1, 77, 8), np.float32), rng.standard_normal((1, 256, 8), np.float32)
    assert blend_condition(empty, prior, 0) is empty and blend_condition(empty, prior, 1) is prior
    half = blend_condition(empty, prior, 0.5)
    np.testing.assert_allclose(half[:, 80], (empty[:, 3] + prior[:, 80]) / 2, rtol=1e-5, atol=1e-6)
    pooled = blend_condition(empty[:, 0], prior[:, 0], 0.25)
    np.testing.assert_allclose(pooled, 0.75 * empty[:, 0] + 0.25 * prior[:, 0], rtol=1e-5, atol=1e-6)
