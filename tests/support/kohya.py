"""LoRA files as kohya's sd-scripts write them for SDXL: sgm names with underscores, `.alpha`, `ss_*` metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.support.sgm import rename_unet

_BLOCKS = r"transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))|attentions\.\d+\.proj_(in|out)"
_TEXT = r"self_attn\.(q|k|v|out)_proj|mlp\.fc[12]"


def kohya_module(network: str, module: str, layers: int, attentions: set[str]) -> str:
    """The name that sd-scripts give a module; layers, attentions: of the UNet, see `tests.support.sgm`."""
    if network == "unet":
        name = rename_unet(f"{module}.weight", layers, attentions).removesuffix(".weight")
        return f"lora_unet_{name}".replace(".", "_")
    return f"lora_te{2 if network.endswith('2') else 1}_{module}".replace(".", "_")


def write_sd_scripts_lora(
    path: Path, configs: Mapping[str, Any], metadata: Mapping[str, str], *, every: bool = True, rank: int = 4
) -> Path:
    """Write a random LoRA of rank 4 and alpha 2.

    configs: of the embedded base.
    every: all layers that sd-scripts train by default, else the UNet's attention.
    """
    from dreammix_trt.core.checkpoint import BaseFiles

    rng, tensors = np.random.default_rng(4), dict[str, Any]()
    base = BaseFiles.open()
    states = {name: base.state(name) for name in (("unet", "text_encoder", "text_encoder_2") if every else ("unet",))}
    attentions = {name.split(".attentions")[0] for name in states["unet"] if ".attentions" in name}
    wanted = _BLOCKS if every else r"attn[12]\.to_(q|k|v|out\.0)"
    for network, state in states.items():
        for name in state:
            module, end, _ = name.rpartition(".weight")
            shape = state.shape(name)
            if not end or not re.search(f"({wanted if network == 'unet' else _TEXT})$", module) or len(shape) != 2:
                continue
            flat = kohya_module(network, module, configs["unet"]["layers_per_block"], attentions)
            tensors[f"{flat}.lora_down.weight"] = rng.normal(0, 1 / rank, (rank, shape[1])).astype(np.float32)
            tensors[f"{flat}.lora_up.weight"] = rng.normal(0, 0.02, (shape[0], rank)).astype(np.float32)
            tensors[f"{flat}.alpha"] = np.array(rank / 2, np.float32)
    save_file(tensors, path, {"ss_network_module": "networks.lora", **metadata})
    return path
