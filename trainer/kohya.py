"""The LoRA in kohya's format, which ComfyUI, A1111 and Fooocus read: names of sgm's modules, `.alpha`, `ss_*` metadata.

Names as in kohya-ss/sd-scripts, networks/lora.py (a module of the UNet by its sgm name, dots as underscores, below
`lora_unet_`); metadata as in its train_network.py and in Stability's ModelSpec 1.0.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dreammix_trt.core.lora_names import kohya_names

if TYPE_CHECKING:
    from torch import Tensor

    from dreammix_trt.trainer.folder import TrainRecord


def kohya_file_name(token: str, class_name: str) -> str:
    """The file's name: users call a LoRA by it ("<lora:sks_mug:1>") and keep many in one folder."""
    return re.sub(r"(?:[^\w-]|_)+", "_", f"{token}_{class_name}").strip("_") + ".safetensors"


def kohya_tensors(
    factors: Mapping[str, tuple[Tensor, Tensor]], rank: int, unet_config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors of the file.

    factors: module of the UNet by its diffusers name -> (down (rank, in), up (out, rank)), float32.
    rank: their rank; alpha is the same, as in diffusers.
    unet_config: the base's diffusers `unet/config.json`.
    """
    import torch

    names, tensors = kohya_names(unet_config), {}
    for module, (down, up) in factors.items():
        tensors[f"{names[module]}.lora_down.weight"] = down
        tensors[f"{names[module]}.lora_up.weight"] = up
        tensors[f"{names[module]}.alpha"] = torch.tensor(float(rank))
    return tensors


def kohya_metadata(record: TrainRecord, side: int, tensors_sha256: str) -> dict[str, str]:
    """The metadata of the file.

    side: in pixels, of the pictures that the base was trained on.
    tensors_sha256: of the file's bytes behind its header, by which other programs know a LoRA again.
    """
    phrase, count = f"{record.token} {record.class_name}", len(record.photographs)
    name = kohya_file_name(record.token, record.class_name).removesuffix(".safetensors")
    return {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(record.rank),
        "ss_network_alpha": str(float(record.rank)),
        "ss_output_name": name,
        "ss_sd_model_name": record.base,
        "ss_new_sd_model_hash": _base_hash(record.base_hashes),
        "ss_learning_rate": str(record.learning_rate),
        "ss_max_train_steps": str(record.steps),
        "ss_seed": str(record.seed),
        "ss_resolution": f"({side}, {side})",
        "ss_num_train_images": str(count),
        "ss_tag_frequency": json.dumps({f"1_{phrase}": {phrase: count}}),
        "ss_training_comment": "DreamMix: trained on the inpainting-patched UNet, for inpainting",
        "sshs_model_hash": tensors_sha256,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": name,
        "modelspec.trigger_phrase": phrase,
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.hash_sha256": f"0x{tensors_sha256}",
    }


def _base_hash(hashes: Mapping[str, str]) -> str:
    """The sha256 of the base's single file; of a folder, that of its UNet's weights (the first shard's)."""
    unet = sorted(file for file in hashes if file.startswith("unet/") and not file.endswith(".json"))
    return hashes["base"] if "base" in hashes else hashes[unet[0]] if unet else ""
