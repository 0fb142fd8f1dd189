"""Checks of every component's config.json: one table of the values that can be used, including those SDXL fixes.

The fields are those of diffusers (UNet2DConditionModel, AutoencoderKL, schedulers) and transformers (CLIPTextConfig).
A field that is not `required` may be absent; then the library's default applies. Fields not listed here have no effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreammix_trt.core.errors import FileFormatError

Config = Mapping[str, Any]
TOKENS = 77  # the length of a CLIP text encoder's input
MOST_TOKENS = 48  # that are selected of a subject's picture; any smaller number of them is a prefix


@dataclass(frozen=True)
class _Field:
    """fits: whether a value can be used; expected: the values that can, in words."""

    fits: Callable[[Any], bool]
    expected: str
    required: bool = False


def check_fields(component: str, config: Config, place: Path) -> None:
    """Raise `FileFormatError` for the first field of a component's config that SDXL cannot have.

    component: "unet", "vae", "text_encoder", "text_encoder_2" or "scheduler".
    place: the file, for the message.
    """
    for name, field in _FIELDS[component].items():
        if name not in config:
            if field.required:
                raise FileFormatError(f"{place}: {name} is missing, expected {field.expected}; {_REMEDY}")
        elif not field.fits(config[name]):
            raise _refuse(place, name, config[name], field.expected)
    if component in _RELATIONS:
        _RELATIONS[component](config, place)


def check_together(configs: Mapping[str, Config], place: Path) -> None:
    """Raise `FileFormatError` when the UNet's added inputs are not the second text encoder's output and six sizes."""
    unet = configs["unet"]
    pooled = configs["text_encoder_2"]["projection_dim"] + 6 * unet["addition_time_embed_dim"]
    if unet["projection_class_embeddings_input_dim"] != pooled:
        raise _refuse(
            place,
            "projection_class_embeddings_input_dim",
            unet["projection_class_embeddings_input_dim"],
            f"{pooled}: text_encoder_2's projection_dim and six times addition_time_embed_dim",
        )


_REMEDY = "take the config.json that came with these weights"


def _refuse(place: Path, name: str, value: Any, expected: str) -> FileFormatError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return FileFormatError(f"{place}: {name} is {shown}, expected {expected}; {_REMEDY}")


def _is_whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e9


def _whole(most: int = 1 << 20, *, required: bool = False) -> _Field:
    return _Field(lambda value: _is_whole(value, most), f"a whole number from 1 to {most}", required)


def _token(*, null: bool = False) -> _Field:
    return _Field(
        lambda value: (null and value is None) or _is_whole(value, 1 << 31) or (value == 0 and value is not False),
        "a token's id",
    )


def _only(*values: Any, required: bool = False) -> _Field:
    """One of a few values; False does not equal 0 here, but 1 equals 1.0."""
    words = [repr(value).replace("None", "null").replace("True", "true").replace("False", "false") for value in values]
    return _Field(
        lambda value: any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values),
        " or ".join(words),
        required,
    )


def _close(wanted: float) -> _Field:
    return _Field(lambda value: _is_number(value) and math.isclose(value, wanted, rel_tol=1e-6), f"SDXL's {wanted}")


def _list_of(fits: Callable[[Any], bool], expected: str) -> _Field:
    return _Field(
        lambda value: _is_list(value) and 0 < len(value) <= _MOST_BLOCKS and all(map(fits, value)),
        f"a list of {expected}, one a block",
        required=True,
    )


def _per_block(most: int, *, null: bool = False) -> _Field:
    """A number for all blocks, or a list with one per block."""
    return _Field(
        lambda value: (null and value is None) or all(_is_whole(one, most) for one in _as_list(value)),
        f"a whole number from 1 to {most}, or a list of them with one a block",
    )


def _depths(*, null: bool = False) -> _Field:
    """Transformer layers: like `_per_block`, or a list with one per layer for a block; 0 means no attention."""

    def fits(value: Any) -> bool:
        return all(one == 0 or _is_whole(one, _MOST_LAYERS) for entry in _as_list(value) for one in _as_list(entry))

    if null:  # only lists have another order in the up blocks
        return _Field(lambda value: value is None or (_is_list(value) and fits(value)), "null or a list, one a block")
    return _Field(fits, f"a whole number up to {_MOST_LAYERS}, or a list of them with one a block")


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _as_list(value: Any) -> list[Any]:
    return list(value) if _is_list(value) else [value]


_MOST_BLOCKS, _MOST_LAYERS = 16, 100
_WIDTHS = _list_of(lambda value: _is_whole(value, 1 << 16), "whole numbers above 0")
_POSITIVE = _Field(lambda value: _is_number(value) and value > 0, "a number above 0")
_FLAG = _only(True, False)
_OFF = _only(False, None)


def _names(*known: str) -> _Field:
    said = "names of blocks" if not known else repr(known[0])
    return _list_of(lambda value: isinstance(value, str) and (not known or value in known), said)


_TEXT = {
    "hidden_size": _whole(1 << 16, required=True),
    "intermediate_size": _whole(required=True),
    "num_hidden_layers": _whole(_MOST_LAYERS, required=True),
    "num_attention_heads": _whole(1 << 16, required=True),
    "vocab_size": _whole(1 << 24, required=True),
    "max_position_embeddings": _only(TOKENS, required=True),
    "hidden_act": _only("quick_gelu", "gelu", required=True),
    "layer_norm_eps": _POSITIVE,
    "projection_dim": _whole(1 << 16),
    "eos_token_id": _token(),
    "bos_token_id": _token(null=True),
    "pad_token_id": _token(null=True),
}
_FIELDS: dict[str, dict[str, _Field]] = {
    "unet": {
        "sample_size": _whole(1 << 12, required=True),
        "out_channels": _only(4),
        "block_out_channels": _WIDTHS,
        "down_block_types": _names(),
        "up_block_types": _names(),
        "cross_attention_dim": _whole(1 << 16, required=True),
        "addition_time_embed_dim": _whole(1 << 16, required=True),
        "projection_class_embeddings_input_dim": _whole(required=True),
        "layers_per_block": _per_block(_MOST_LAYERS),
        "transformer_layers_per_block": _depths(),
        "reverse_transformer_layers_per_block": _depths(null=True),
        "attention_head_dim": _per_block(1 << 12),
        "num_attention_heads": _per_block(1 << 12, null=True),
        "norm_num_groups": _whole(1 << 16),
        "norm_eps": _POSITIVE,
        "act_fn": _only("silu", "swish"),
        "use_linear_projection": _FLAG,
        "flip_sin_to_cos": _FLAG,
        "freq_shift": _Field(_is_number, "a number"),
        "upcast_attention": _only(True, False, None),
        "dropout": _Field(lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
        "downsample_padding": _only(1),
        "mid_block_scale_factor": _POSITIVE,
        "resnet_out_scale_factor": _POSITIVE,
        "conv_in_kernel": _only(3),
        "conv_out_kernel": _only(3),
        "time_embedding_type": _only("positional"),
        "time_embedding_dim": _Field(lambda value: value is None or _is_whole(value, 1 << 20), "null or a width"),
        "resnet_time_scale_shift": _only("default"),
        "attention_type": _only("default"),
        "center_input_sample": _OFF,
        "only_cross_attention": _OFF,
        "mid_block_only_cross_attention": _OFF,
        "dual_cross_attention": _OFF,
        "resnet_skip_time_act": _OFF,
        "class_embeddings_concat": _OFF,
        **dict.fromkeys(
            (
                "class_embed_type",
                "num_class_embeds",
                "encoder_hid_dim",
                "encoder_hid_dim_type",
                "cross_attention_norm",
                "time_cond_proj_dim",
                "time_embedding_act_fn",
                "timestep_post_act",
            ),
            _only(None),
        ),
    },
    "vae": {
        "in_channels": _only(3),
        "out_channels": _only(3),
        "block_out_channels": _WIDTHS,
        "down_block_types": _names("DownEncoderBlock2D"),
        "up_block_types": _names("UpDecoderBlock2D"),
        "layers_per_block": _whole(_MOST_LAYERS),
        "norm_num_groups": _whole(1 << 16),
        "act_fn": _only("silu", "swish"),
        "scaling_factor": _POSITIVE,
        "use_quant_conv": _FLAG,
        "use_post_quant_conv": _FLAG,
        "mid_block_add_attention": _only(True),
    },
    "text_encoder": _TEXT,
    "text_encoder_2": {**_TEXT, "projection_dim": _whole(1 << 16, required=True)},
    # The schedule is our own, for the noise that SDXL was trained with (core/schedule.py).
    "scheduler": {
        "_class_name": _Field(
            lambda value: isinstance(value, str) and not value.startswith(("EDM", "FlowMatch")),
            "a scheduler of an epsilon-predicting model",
        ),
        "beta_schedule": _only("scaled_linear"),
        "beta_start": _close(0.00085),
        "beta_end": _close(0.012),
        "num_train_timesteps": _only(1000),
        "rescale_betas_zero_snr": _OFF,
        "trained_betas": _only(None),
    },
}


def _check_unet(config: Config, place: Path) -> None:
    widths, blocks = list(config["block_out_channels"]), len(config["block_out_channels"])
    for name in (
        "down_block_types",
        "up_block_types",
        "layers_per_block",
        "transformer_layers_per_block",
        "reverse_transformer_layers_per_block",
        "attention_head_dim",
        "num_attention_heads",
    ):
        value: Any = config.get(name)
        if _is_list(value) and len(value) != blocks:
            raise _refuse(place, name, value, f"{blocks} entries, one for each of block_out_channels")
    _check_layers(config, place)
    _check_groups(config, place)
    side = 2 ** (blocks - 1)
    if config["sample_size"] % side:
        raise _refuse(place, "sample_size", config["sample_size"], f"a multiple of {side}, as {blocks} blocks need it")
    told = "attention_head_dim" if config.get("num_attention_heads") is None else "num_attention_heads"
    heads = config.get(told, 8)
    for width, count in zip(widths, _each(heads, blocks), strict=True):
        if width % count:
            raise _refuse(place, told, heads, f"numbers of heads that divide block_out_channels {widths}")


def _check_layers(config: Config, place: Path) -> None:
    """Check that transformer depths given per layer have one entry for each layer of the block."""
    down, up = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    layers = _each(config.get("layers_per_block", 2), len(config["block_out_channels"]))
    for name, counts in ((down, layers), (up, [count + 1 for count in reversed(layers)])):
        entries = _each(config.get(name), len(counts))
        if any(_is_list(entry) and len(entry) != count for entry, count in zip(entries, counts, strict=True)):
            raise _refuse(place, name, config[name], f"lists of {counts} entries, one for each layer of a block")
    if any(map(_is_list, _as_list(config.get(down)))) and config.get(up) is None:  # an up block has one more layer
        raise _refuse(place, up, None, f"a list, as {down} gives the depth of each layer")


def _each(value: Any, blocks: int) -> list[Any]:
    return list(value) if _is_list(value) else [value] * blocks


def _check_vae(config: Config, place: Path) -> None:
    # A latent is an eighth of the picture: three halvings, so four blocks.
    for name in ("block_out_channels", "down_block_types", "up_block_types"):
        if len(config[name]) != 4:
            raise _refuse(place, name, config[name], "4 entries, one a block of SDXL's VAE")
    _check_groups(config, place)


def _check_groups(config: Config, place: Path) -> None:
    groups = config.get("norm_num_groups", 32)
    if any(width % groups for width in config["block_out_channels"]):
        raise _refuse(
            place, "norm_num_groups", groups, f"a divisor of block_out_channels {config['block_out_channels']}"
        )


def _check_text(config: Config, place: Path) -> None:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads:
        raise _refuse(place, "num_attention_heads", heads, f"a divisor of hidden_size {width}")
    if config.get("eos_token_id", 2) >= config["vocab_size"]:
        raise _refuse(place, "eos_token_id", config["eos_token_id"], f"less than vocab_size {config['vocab_size']}")


_RELATIONS: dict[str, Callable[[Config, Path], None]] = {
    "unet": _check_unet,
    "vae": _check_vae,
    "text_encoder": _check_text,
    "text_encoder_2": _check_text,
}
