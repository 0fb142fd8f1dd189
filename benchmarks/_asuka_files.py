"""An ASUKA folder with random weights for the checkpoints of `_sdxl_files.py`, at any width."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _sdxl_files import FileTensor, draw, write_safetensors

from dreammix_trt.core.asuka import AsukaConfig, DecoderConfig, PriorConfig
from dreammix_trt.core.asuka_folder import CONFIG
from dreammix_trt.core.files import write_json


def asuka_config(configs: Mapping[str, Mapping[str, Any]], width: float = 1.0) -> AsukaConfig:
    """SDXL's at width 1; below, for a base of these configs, the same depths and fewer heads."""
    decoder = DecoderConfig.of_vae(configs["vae"])
    if width == 1:
        return AsukaConfig(PriorConfig(), decoder)
    heads = {name: max(1, round(count * width)) for name, count in (("encoder", 12), ("decoder", 16), ("align", 32))}
    prior = PriorConfig(
        **{"width": 64 * heads["encoder"], "heads": heads["encoder"]},
        **{"decoder_width": 32 * heads["decoder"], "decoder_heads": heads["decoder"]},
        align_width=64 * heads["align"],
        context_width=int(configs["unet"]["cross_attention_dim"]),
        pooled_width=int(configs["text_encoder_2"]["projection_dim"]),
    )
    return AsukaConfig(prior, decoder)


def write_asuka_folder(folder: Path, config: AsukaConfig, seed: int = 0) -> Path:
    """Write config.json and both networks' weights, float16, one tensor at a time. Needs torch for the shapes."""
    import torch

    from dreammix_trt.core.torch_modules.asuka_decoder import AsukaDecoder
    from dreammix_trt.core.torch_modules.asuka_prior import AsukaPrior

    with torch.device("meta"):
        modules = {"prior": AsukaPrior(config.prior), "decoder": AsukaDecoder(config.decoder)}
    folder.mkdir(parents=True, exist_ok=True)
    for part, module in modules.items():
        shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        tensors = {name: _tensor(seed, f"asuka_{part}", name, shape) for name, shape in shapes.items()}
        write_safetensors(folder / f"{part}.safetensors", tensors, {"format": "pt"})
    write_json(folder / CONFIG, config.to_dict())
    return folder


def _tensor(seed: int, component: str, name: str, shape: tuple[int, ...]) -> FileTensor:
    return FileTensor("float16", shape, lambda: draw(seed, component, name, shape))
