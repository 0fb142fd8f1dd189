"""A token adapter as `train-tokens` writes one, for a base of any width, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

RANK = 16


def write_token_adapter(file: Path, configs: Mapping[str, Mapping[str, Any]], seed: int = 0) -> Path:
    """Write the projection and factors of every attention layer, the same for both UNets."""
    from dreammix_trt.core.attention_layers import list_attention_linears
    from dreammix_trt.core.subject_tokens import TokenConfig
    from dreammix_trt.core.token_adapter import Card
    from dreammix_trt.core.token_factors import write_adapter

    rng, config = np.random.default_rng(seed), TokenConfig.of_base(configs)

    def draw(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32) / np.float32(64)

    pairs = {
        slot.module: (draw(slot.inputs, RANK), draw(RANK, slot.outputs))
        for slot in list_attention_linears(configs["unet"])
    }
    projection = {
        "norm.weight": np.ones(config.width, np.float32),
        "norm.bias": np.zeros(config.width, np.float32),
        "linear.weight": draw(config.context_width, config.width),
        "linear.bias": draw(config.context_width),
    }
    write_adapter(file, Card(config, trained_on="nothing"), projection, {"unet": pairs, "unet_raw": pairs})
    return file
