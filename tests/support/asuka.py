"""A small ASUKA folder with random weights for a base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.asuka import AsukaConfig, DecoderConfig, PriorConfig
from dreammix_trt.core.asuka_folder import AsukaFolder, Part, write_asuka
from dreammix_trt.core.checkpoint import BaseFiles

Floats = NDArray[np.float32]
Change = Callable[[Floats], Floats]


def small_config(base: BaseFiles) -> AsukaConfig:
    prior = PriorConfig(
        **{"side": 16, "patch": 4, "width": 24, "layers": 2, "heads": 3, "decoder_width": 16, "decoder_layers": 3},
        **{"decoder_heads": 2, "feature_layer": 2, "align_width": 16, "align_layers": 2, "align_head": 8},
        context_width=int(base.configs["unet"]["cross_attention_dim"]),
        pooled_width=int(base.configs["text_encoder_2"]["projection_dim"]),
    )
    own = DecoderConfig.of_vae(base.configs["vae"])
    return AsukaConfig(prior, replace(own, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=2))


def make_states(config: AsukaConfig, seed: int = 0) -> dict[Part, dict[str, Floats]]:
    """Random weights of both networks, as torch begins with them; the mask token and alpha are not 0 and 1."""
    import torch

    from dreammix_trt.core.torch_modules.asuka_decoder import AsukaDecoder
    from dreammix_trt.core.torch_modules.asuka_prior import AsukaPrior

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        prior, decoder = AsukaPrior(config.prior), AsukaDecoder(config.decoder)
        prior.mae.mask_token.normal_()
        prior.mae.alpha.fill_(0.25)
    return {
        "prior": {name: value.numpy() for name, value in prior.state_dict().items()},
        "decoder": {name: value.numpy() for name, value in decoder.state_dict().items()},
    }


def write_small_asuka(
    folder: Path, base: BaseFiles, seed: int = 0, changes: Mapping[str, Change] | None = None
) -> AsukaFolder:
    """Write the folder.

    changes: of weights of either network, by name.
    """
    config = small_config(base)
    states = make_states(config, seed)
    for state in states.values():
        state |= {name: change(state[name]) for name, change in (changes or {}).items() if name in state}
    write_asuka(folder, config, states, "float32")
    return AsukaFolder.open(folder)
