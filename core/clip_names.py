"""The two naming schemes of text encoders: transformers' and OpenCLIP's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from dreammix_trt.core.stored import Array, View

_OUTER = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def classic_text_name(name: str) -> str | None:
    """The name with a leading `text_model.`, which transformers 5 sometimes omits; None for a buffer."""
    if name.endswith("position_ids") or name == "logit_scale":
        return None
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def text_encoder_names(layers: int) -> list[str]:
    """The names of all tensors of a CLIP text encoder without projection, as transformers classically has them."""
    return [name for name, _, _ in _from_open_clip(layers)]


def from_open_clip(layers: int, projection: str = "text_projection") -> dict[str, tuple[str, View | None]]:
    """All tensors of a text encoder with projection: transformers' name -> (OpenCLIP's name, view of that tensor).

    projection: OpenCLIP's parameter `text_projection` is (D, P), the transpose of transformers' weight; the
        `text_projection.weight` that some tools write is a linear layer's, (P, D) as transformers' is.

    OpenCLIP stacks the projections of queries, keys and values as (3D, D).
    """
    plan = {name: (theirs, view) for name, theirs, view in _from_open_clip(layers)}
    return {**plan, "text_projection.weight": (projection, None if projection.endswith(".weight") else _transpose)}


def _from_open_clip(layers: int) -> Iterator[tuple[str, str, View | None]]:
    for ours, theirs in _OUTER.items():
        yield f"text_model.{ours}", theirs, None
    for layer in range(layers):
        here, there = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for part in ("weight", "bias"):
            for third, name in enumerate("qkv"):
                take = partial(_take_third, third)
                yield f"{here}.self_attn.{name}_proj.{part}", f"{there}.attn.in_proj_{part}", take
            for ours, theirs in _LAYER.items():
                yield f"{here}.{ours}.{part}", f"{there}.{theirs}.{part}", None


def _take_third(number: int, stacked: Array) -> Array:
    height = stacked.shape[0] // 3
    return stacked[number * height : (number + 1) * height]


def _transpose(matrix: Array) -> Array:
    return matrix.T
