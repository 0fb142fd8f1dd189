"""Recognise whether a file or folder given as a base is an SDXL model, and say in one line what else it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dreammix_trt.core import keymap
from dreammix_trt.core.config_fields import check_fields, check_together
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.stored import FLOATS
from dreammix_trt.core.tensors import Weights

_SDXL = ("model.diffusion_model.", "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
_OTHER_MODEL = "only SDXL bases can be used"
#: a tensor name (a regular expression) -> what a file with such a tensor is; the first match applies
_KINDS = {
    r"lora_(down|up|A|B)\b|\.lora\.|_lora\.|\.hada_w|\.lokr_w": "a LoRA; give it as a LoRA on top of a base",
    r"(^|\.)double_blocks\.\d+\.img_attn|(^|\.)single_transformer_blocks\.": f"a Flux model; {_OTHER_MODEL}",
    r"(^|\.)joint_blocks\.\d+|^transformer_blocks\.0\.attn\.add_q_proj": f"a Stable Diffusion 3 model; {_OTHER_MODEL}",
    r"^control_model\.|input_hint_block|controlnet_cond_embedding": f"a ControlNet; {_OTHER_MODEL}",
    r"^cond_stage_model\.transformer\.": f"a Stable Diffusion 1.x model; {_OTHER_MODEL}",
    r"^cond_stage_model\.model\.": f"a Stable Diffusion 2.x model; {_OTHER_MODEL}",
    r"^conditioner\.embedders\.0\.model\.": "an SDXL refiner; give the SDXL base model",
    r"^model\.diffusion_model\.|^(diffusion_model\.)?input_blocks\.|^down_blocks\.\d+\.resnets\.": (
        "a UNet without text encoders; give a whole SDXL checkpoint or a diffusers folder"
    ),
    r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|conv_out|mid|down|up)": (
        "a VAE; give it as the VAE override next to a base"
    ),
    r"^(text_model|conditioner|transformer\.resblocks)\.": (
        "a text encoder alone; give a whole SDXL checkpoint or a diffusers folder"
    ),
    r"^head$": "an inpaint head; give it as the head, next to a base and its patch",
}
#: tensors that training tools add to mark a model that does not predict epsilon
_MARKERS = {"v_pred": "v_prediction", "ztsnr": "v_prediction", "edm_vpred.sigma_max": "EDM", "edm_mean": "EDM"}
_PIPELINES = {
    "StableDiffusion3": "Stable Diffusion 3",
    "Flux": "Flux",
    "StableDiffusionPipeline": "Stable Diffusion 1.x or 2.x",
    "StableDiffusionInpaint": "Stable Diffusion 1.x or 2.x",
    "StableDiffusionImg2Img": "Stable Diffusion 1.x or 2.x",
    "LatentConsistency": "Stable Diffusion 1.x",
}


def recognise_file(names: Iterable[str]) -> str | None:
    """Say what a file with tensors of these names is; None for an SDXL checkpoint with its text encoders."""
    names = list(names)
    if not names:
        return "a file without named tensors (a Fooocus patch?); give a whole SDXL checkpoint"
    if all(any(name.startswith(prefix) for name in names) for prefix in _SDXL):
        return None
    for pattern, kind in _KINDS.items():
        if any(re.search(pattern, name) for name in names):
            return kind
    return f"not a model known here (its tensors are named {', '.join(sorted(names)[:3])}, ...); {_OTHER_MODEL}"


def recognise_folder(model_index: Mapping[str, Any]) -> str | None:
    """Say what a diffusers folder is by its model_index.json; None for an SDXL pipeline."""
    pipeline = str(model_index.get("_class_name", "StableDiffusionXLPipeline"))
    if "StableDiffusionXL" not in pipeline:
        kind = next((kind for start, kind in _PIPELINES.items() if pipeline.startswith(start)), None)
        return f"a {kind or pipeline} model ({pipeline}); {_OTHER_MODEL}"
    if model_index.get("text_encoder", True) in ([None, None], None):
        return "an SDXL refiner (it has one text encoder); give the SDXL base model"
    return None


def prediction_of(names: Iterable[str], metadata: Mapping[str, str]) -> str:
    """The prediction type of a single file: "epsilon" unless a marker tensor or its metadata say otherwise.

    names: of its tensors.
    metadata: of the file.
    """
    marked = next((kind for name, kind in _MARKERS.items() if name in set(names)), None)
    stated = metadata.get("modelspec.prediction_type", "epsilon")
    return marked or ("v_prediction" if stated == "v" else stated)


def check_sdxl(folder: Path, configs: Mapping[str, Mapping[str, Any]], vae_place: Path | None = None) -> None:
    """Raise `FileFormatError` when the configs are not those of an epsilon-predicting SDXL, or cannot be used.

    folder: the base's folder or single file.
    configs: component -> its config.
    vae_place: the folder or file of a VAE used instead of the base's own.
    """
    _check_kind(folder, configs)
    places = {name: _config_file(folder, name) for name in configs}
    if vae_place is not None:
        places["vae"] = vae_place / "config.json" if vae_place.is_dir() else vae_place
    for name, config in configs.items():
        check_fields(name, config, places[name])
    width = sum(int(configs[name]["hidden_size"]) for name in ("text_encoder", "text_encoder_2"))
    if configs["unet"]["cross_attention_dim"] != width:
        raise FileFormatError(
            f"{folder}: the UNet's cross_attention_dim is {configs['unet']['cross_attention_dim']}, but both text "
            f"encoders together give {width} (an SDXL refiner, or mixed components?)"
        )
    check_together(configs, places["unet"])
    keymap.attention_depths(configs["unet"])


def _config_file(folder: Path, component: str) -> Path:
    """The file of a component's config; for a single file, which has no configs, the file itself."""
    if not folder.is_dir():
        return folder
    return folder / component / ("scheduler_config.json" if component == "scheduler" else "config.json")


def _check_kind(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Check the facts that distinguish SDXL from other models."""
    unet, vae = configs["unet"], configs["vae"]
    if unet.get("addition_embed_type") != "text_time":
        raise FileFormatError(
            f"{folder}: not an SDXL UNet (addition_embed_type is {unet.get('addition_embed_type')!r}, "
            "expected 'text_time'); SD 1.5 and 2.x bases cannot be used"
        )
    if unet.get("in_channels") not in (4, 9):
        raise FileFormatError(
            f"{folder}: the UNet takes {unet.get('in_channels')} input channels, expected 4 (text-to-image) "
            "or 9 (inpainting)"
        )
    prediction = configs.get("scheduler", {}).get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise FileFormatError(f"{folder}: its prediction_type is {prediction!r}; only epsilon models can be used")
    if vae.get("latent_channels") != 4 or vae.get("latents_mean") or vae.get("shift_factor"):
        raise FileFormatError(f"{folder}: its VAE is not SDXL's (4 latent channels, scaled but not shifted)")
    if not isinstance(vae.get("scaling_factor"), int | float):
        raise FileFormatError(
            f"{folder}: its VAE's config.json has no scaling_factor; SDXL's is 0.13025, write it there"
        )


def check_weights(base: Path, configs: Mapping[str, Mapping[str, Any]], weights: Mapping[str, Weights]) -> int:
    """Check the headers of every component.

    base: the base's folder or single file, for messages.
    configs: component -> its config.
    weights: component -> its weights; no tensor is read.

    Returns the number of the UNet's input channels. Raises `FileFormatError` for a dtype that cannot be read, and for a
    UNet or text encoder whose first and last layers do not fit its config.
    """
    for component, tensors in weights.items():
        odd = next((name for name in tensors if tensors.dtype(name) not in FLOATS), None)
        if odd is not None:
            raise FileFormatError(
                f"{base}: {component}: {odd} is stored as {tensors.dtype(odd)}; save the weights as fp16, bf16 or fp32"
            )
    unet, channels = weights["unet"], int(configs["unet"]["in_channels"])
    shape = unet.shape("conv_in.weight") if "conv_in.weight" in unet else ()
    if len(shape) != 4 or shape[1] != channels:
        raise FileFormatError(
            f"{base}: the UNet's conv_in.weight has shape {shape}, but its config says {channels} input channels; "
            "weights and config.json do not belong together"
        )
    _check_shape(base, "unet", unet, "conv_in.weight", (configs["unet"]["block_out_channels"][0], channels, 3, 3))
    for component in ("text_encoder", "text_encoder_2"):
        config, tensors = configs[component], weights[component]
        wide, width, last = config["intermediate_size"], config["hidden_size"], config["num_hidden_layers"] - 1
        words = (config["vocab_size"], width)
        _check_shape(base, component, tensors, "text_model.embeddings.token_embedding.weight", words)
        _check_shape(base, component, tensors, f"text_model.encoder.layers.{last}.mlp.fc1.weight", (wide, width))
    return channels


def _check_shape(base: Path, component: str, tensors: Weights, name: str, told: tuple[int, ...]) -> None:
    if name not in tensors:
        raise FileFormatError(f"{base}: {component}: {name} is missing; weights and config.json do not belong together")
    if tensors.shape(name) != told:
        raise FileFormatError(
            f"{base}: {component}: {name} has shape {tensors.shape(name)}, but its config.json says {told}; "
            "weights and config.json do not belong together"
        )
