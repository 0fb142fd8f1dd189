"""SDXL in a single file: sgm names become those of diffusers and transformers, configs are derived from the shapes.

A single file has no config.json. What the shapes do not show is taken from SDXL: heads of 64 channels, 32 groups,
SDXL's activations and scaling.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dreammix_trt.core import clip_names, keymap
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.recognise import prediction_of, recognise_file
from dreammix_trt.core.stored import Array, View
from dreammix_trt.core.tensors import Weights, open_tensors

log = logging.getLogger(__name__)

Config = dict[str, Any]
HEAD_SIZE = 64  # of the UNet
TEXT_HEAD_SIZE = 64
GROUPS = 32
SDXL_SCALING = 0.13025

_PREFIXES = {
    "unet": "model.diffusion_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
    "vae": "first_stage_model.",
}
_VAE_LAYER = ("encoder.down.{}.block.{}.conv1.weight", "encoder.down_blocks.{}.resnets.{}.conv1.weight")
_FIRST_TEXT = ("text_model.", "embeddings.", "encoder.", "final_layer_norm.")  # transformers 5 omits text_model.
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def read_single_file(path: Path, *, vae: bool = True) -> dict[str, tuple[Config, Weights]]:
    """Open a single file. Reads only its header.

    vae: whether to include its VAE.

    Returns component -> (config, weights under the classic names of diffusers and transformers). The UNet's
    `in_channels` is that of the file. A component "scheduler" has the prediction type. Raises `FileFormatError` for
    another model, naming it, and for missing or unknown tensors.
    """
    weights = open_tensors(path)
    kind = recognise_file(weights)
    if kind:
        raise FileFormatError(f"{path}: this is {kind}")
    parts = {name: weights.strip_prefix(prefix) for name, prefix in _PREFIXES.items()}
    rest = [key for key in weights if not key.startswith(tuple(_PREFIXES.values()))]
    if rest:
        log.info("%s: %d tensors are not used (%s, ...)", path, len(rest), ", ".join(sorted(rest)[:3]))
    try:
        second = _read_second_text_encoder(parts["text_encoder_2"])
        found = {
            "text_encoder": _read_first_text_encoder(parts["text_encoder"]),
            "text_encoder_2": second,
            "unet": _read_unet(parts["unet"], int(second[0]["projection_dim"])),
            "scheduler": ({"prediction_type": prediction_of(weights, weights.metadata)}, Weights({})),
        }
        if vae:
            found["vae"] = read_vae(parts["vae"])
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error
    except (IndexError, ValueError) as error:
        raise explain_odd_tensors(path, error) from error
    return found


def explain_odd_tensors(path: Path, error: Exception) -> FileFormatError:
    """The error for a file whose tensors have the right names but too few sides, or have duplicates."""
    return FileFormatError(
        f"{path}: it has tensors with shapes or names that SDXL does not have ({error}); is it damaged?"
    )


def read_vae(weights: Weights) -> tuple[Config, Weights]:
    """Open a VAE and derive its config.

    weights: under sgm or diffusers names, with or without `first_stage_model.`.

    Returns (config, weights under diffusers names). Raises `FileFormatError` when there is no VAE or parts of it are
    missing.
    """
    weights = weights.rename(lambda name: None if name.startswith("loss.") else name.removeprefix("first_stage_model."))
    spelling = next((spelling for spelling in _VAE_LAYER if spelling.format(0, 0) in weights), None)
    if spelling is None or "decoder.conv_in.weight" not in weights:
        raise FileFormatError("it has no VAE (first_stage_model.*, or encoder.* and decoder.*); give one as vae")
    blocks, layers = _count(weights, spelling, 0), _count(weights, spelling.replace("{}", "0", 1))
    channels = [weights.shape(spelling.format(block, 0))[0] for block in range(blocks)]
    config = {
        "_class_name": "AutoencoderKL",
        "in_channels": weights.shape("encoder.conv_in.weight")[1],
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "block_out_channels": channels,
        "layers_per_block": layers,
        "act_fn": "silu",
        "norm_num_groups": GROUPS,
        "latent_channels": weights.shape("decoder.conv_in.weight")[1],
        "sample_size": 1024,
        "scaling_factor": SDXL_SCALING,
        "force_upcast": True,
    }
    _check_groups("VAE", channels)
    names = keymap.vae_to_diffusers(config)
    modern = modernise_vae(weights if spelling == _VAE_LAYER[1] else _translate(weights, names, "VAE"))
    _require(modern, names.values(), "VAE")
    return config, modern


def modernise_vae(weights: Weights) -> Weights:
    """Give the attention of a VAE under diffusers names its new names and turn its 1x1 convolutions into matrices."""
    plan: dict[str, tuple[str, View | None]] = {}
    for name in weights:
        new = name
        for old, modern in _OLD_ATTENTION.items():
            new = new.replace(old, modern) if ".attentions." in name else new
        conv = ".attentions." in name and weights.shape(name)[2:] == (1, 1)
        plan[new] = (name, _make_matrix if conv else None)
    return weights.arrange(plan)


def _read_unet(weights: Weights, pooled: int) -> tuple[Config, Weights]:
    config = _derive_unet_config(weights, pooled)
    names = keymap.sgm_to_diffusers(config)
    bare = {key.removeprefix(keymap.PREFIX): name for key, name in names.items()}
    extra = [key for key in weights if key not in bare]
    if extra:
        raise FileFormatError(f"the UNet has {len(extra)} tensors that SDXL's does not have: {_join_first(extra)}")
    return config, _translate(weights, bare, "UNet")


def _derive_unet_config(weights: Weights, pooled: int) -> Config:
    blocks = _measure_unet_blocks(weights)
    channels = [layers[0][0] for layers in blocks]
    depths = [layers[0][1] for layers in blocks]
    if any(layer != block[0] for block in blocks for layer in block) or len({len(block) for block in blocks}) != 1:
        raise FileFormatError(
            "the UNet's blocks have layers of different widths or transformer depths (a distilled SDXL?), "
            "which a single file cannot describe; give its diffusers folder"
        )
    attention = next((key for key in weights if key.endswith("attn2.to_k.weight")), None)
    if (
        attention is None
        or "label_emb.0.0.weight" not in weights
        or not all(f"{key}.weight" in weights for key in ("input_blocks.0.0", "out.2"))
    ):
        raise FileFormatError("the UNet is not SDXL's (no label_emb or no attention to the text), or incomplete")
    for width, depth in zip(channels, depths, strict=True):
        if depth and width % HEAD_SIZE:
            raise FileFormatError(
                f"the UNet's attention is {width} wide, not a multiple of SDXL's head size {HEAD_SIZE}; a single "
                "file does not say what its heads are, give its diffusers folder"
            )
    _check_groups("UNet", channels)
    additions = weights.shape("label_emb.0.0.weight")[1]
    if additions <= pooled or (additions - pooled) % 6:
        raise FileFormatError(
            f"the UNet takes {additions} added numbers, not six sizes beside the second text encoder's {pooled}"
        )
    kinds = [f"{'CrossAttn' if depth else ''}{{}}Block2D" for depth in depths]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128,
        "in_channels": weights.shape("input_blocks.0.0.weight")[1],
        "out_channels": weights.shape("out.2.weight")[0],
        "block_out_channels": channels,
        "layers_per_block": len(blocks[0]),
        "down_block_types": [kind.format("Down") for kind in kinds],
        "up_block_types": [kind.format("Up") for kind in reversed(kinds)],
        "transformer_layers_per_block": [max(1, depth) for depth in depths],
        "attention_head_dim": [max(1, width // HEAD_SIZE) for width in channels],
        "use_linear_projection": True,
        "cross_attention_dim": weights.shape(attention)[1],
        "norm_num_groups": GROUPS,
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (additions - pooled) // 6,
        "projection_class_embeddings_input_dim": additions,
    }


def _measure_unet_blocks(weights: Weights) -> list[list[tuple[int, int]]]:
    """Measure the down blocks: for each block, for each layer, (channels, transformer depth)."""
    blocks: list[list[tuple[int, int]]] = [[]]
    entry = 1
    while True:
        resnet, here = f"input_blocks.{entry}.0.in_layers.2.weight", f"input_blocks.{entry}.1.transformer_blocks"
        if resnet in weights:
            depth = _count(weights, f"{here}.{{}}.norm1.weight")
            blocks[-1].append((weights.shape(resnet)[0], depth))
        elif f"input_blocks.{entry}.0.op.weight" in weights:
            blocks.append([])
        else:
            break
        entry += 1
    if not all(blocks):
        raise FileFormatError("the UNet is incomplete: its input_blocks.* are not those of SDXL")
    return blocks


def _read_first_text_encoder(weights: Weights) -> tuple[Config, Weights]:
    weights = weights.rename(lambda name: name if name.startswith(_FIRST_TEXT) else None)
    weights = weights.rename(clip_names.classic_text_name)
    layers = _count(weights, "text_model.encoder.layers.{}.mlp.fc1.weight")
    names = clip_names.text_encoder_names(layers)
    _require(weights, [*names, "text_model.encoder.layers.0.mlp.fc1.weight"], "first text encoder")
    config = _derive_text_config(weights, layers, "quick_gelu")
    return {**config, "architectures": ["CLIPTextModel"], "projection_dim": config["hidden_size"]}, weights


def _read_second_text_encoder(weights: Weights) -> tuple[Config, Weights]:
    layers = _count(weights, "transformer.resblocks.{}.mlp.c_fc.weight")
    linear = "text_projection.weight" in weights and "text_projection" not in weights
    plan = clip_names.from_open_clip(layers, "text_projection.weight" if linear else "text_projection")
    _require(
        weights,
        [*(name for name, _ in plan.values()), "transformer.resblocks.0.mlp.c_fc.weight"],
        "second text encoder",
    )
    arranged = weights.arrange(plan)
    facts = {
        "architectures": ["CLIPTextModelWithProjection"],
        "projection_dim": arranged.shape("text_projection.weight")[0],
    }
    return {**_derive_text_config(arranged, layers, "gelu"), **facts}, arranged


def _derive_text_config(weights: Weights, layers: int, activation: str) -> Config:
    vocabulary, width = weights.shape("text_model.embeddings.token_embedding.weight")
    if width % TEXT_HEAD_SIZE:
        raise FileFormatError(f"a text encoder is {width} wide, not a multiple of CLIP's head size {TEXT_HEAD_SIZE}")
    return {
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // TEXT_HEAD_SIZE,
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
        "intermediate_size": weights.shape("text_model.encoder.layers.0.mlp.fc1.weight")[0],
        "max_position_embeddings": weights.shape("text_model.embeddings.position_embedding.weight")[0],
        # as in SDXL's own files: to transformers, 2 means "the end mark is the largest id"
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _translate(weights: Weights, names: Mapping[str, str], part: str) -> Weights:
    _require(weights, names, part)
    return weights.arrange({ours: (theirs, None) for theirs, ours in names.items()})


def _require(weights: Weights, names: Iterable[str], part: str) -> None:
    wanted = list(names)
    absent = [name for name in wanted if name not in weights]
    if absent:
        raise FileFormatError(f"the {part} lacks {len(absent)} of its {len(wanted)} tensors: {_join_first(absent)}")


def _check_groups(part: str, channels: list[int]) -> None:
    odd = [width for width in channels if width % GROUPS]
    if odd:
        raise FileFormatError(
            f"the {part} has blocks of {odd[0]} channels, not a multiple of SDXL's {GROUPS} groups; a single file "
            "does not say what its groups are, give its diffusers folder"
        )


def _count(weights: Weights, spelling: str, *rest: int) -> int:
    """Count the names that exist when `{}` counts up from 0."""
    number = 0
    while spelling.format(number, *rest) in weights:
        number += 1
    return number


def _make_matrix(weight: Array) -> Array:
    return weight.reshape(weight.shape[:2])


def _join_first(names: Iterable[str], most: int = 4) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
