"""A small token adapter with random weights for a base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.attention_layers import list_attention_linears
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.lora import Factors
from dreammix_trt.core.subject_tokens import TokenConfig
from dreammix_trt.core.token_adapter import Card, TokenAdapter
from dreammix_trt.core.token_factors import write_adapter

Floats = NDArray[np.float32]


def make_projection(config: TokenConfig, seed: int = 0) -> dict[str, Floats]:
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"norm.weight": (config.width,), "norm.bias": (config.width,)}
    shapes |= {"linear.weight": (config.context_width, config.width), "linear.bias": (config.context_width,)}
    return {name: rng.standard_normal(shape).astype(np.float32) / 8 for name, shape in shapes.items()}


def make_factors(base: BaseFiles, rank: int = 2, seed: int = 0) -> Factors:
    """Of every attention layer, the same for both UNets."""
    rng = np.random.default_rng(seed)
    pairs = {
        slot.module: tuple(
            rng.standard_normal(shape).astype(np.float32) / 16 for shape in ((slot.inputs, rank), (rank, slot.outputs))
        )
        for slot in list_attention_linears(base.configs["unet"])
    }
    return {"unet": pairs, "unet_raw": pairs}  # type: ignore[dict-item]


def write_small_adapter(
    path: Path, base: BaseFiles, seed: int = 0, block: int = 1, told: Mapping[str, Any] | None = None
) -> TokenAdapter:
    """Write the file. told: further fields of its card."""
    config = TokenConfig.of_base(base.configs, block)
    card = Card(config, **{"trained_on": "nothing", **(told or {})})
    write_adapter(path, card, make_projection(config, seed), make_factors(base, seed=seed), "float32")
    return TokenAdapter.open(path)
