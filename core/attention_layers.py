"""The attention layers of a base's networks: which linear layers can be LoRA slots, what they attend to, as tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from dreammix_trt.core.axes import Tensor
from dreammix_trt.core.keymap import sgm_to_diffusers
from dreammix_trt.core.slots import Slot

KEY, VALUE = ".key", ".value"  # what a cross-attention layer attends to; the endings of their names
_ATTENTION_LINEARS: Final = (".to_q", ".to_k", ".to_v", ".to_out.0")
FROM_TEXT: Final = (".attn2.to_k", ".attn2.to_v")


def list_attention_linears(config: Mapping[str, Any]) -> Iterator[Slot]:
    """List the attention projections in the order of the sgm names: down, middle, up."""
    channels, context = list(config["block_out_channels"]), int(config["cross_attention_dim"])
    for name in sgm_to_diffusers(config).values():
        module = name.removesuffix(".weight")
        if not module.endswith(_ATTENTION_LINEARS):
            continue
        place = module.split(".")
        by_block = {"down_blocks": channels, "up_blocks": channels[::-1]}.get(place[0])
        width = by_block[int(place[1])] if by_block else channels[-1]
        yield Slot.of(module, context if module.endswith(FROM_TEXT) else width, width)


def describe_keys_and_values(linears: Sequence[Slot]) -> Iterator[Tensor]:
    """Keys and values of every cross-attention layer, in the order of the layers."""
    for slot in linears:
        if slot.module.endswith(FROM_TEXT):
            layer, _, part = slot.module.rpartition(".")
            yield Tensor(layer + {"to_k": KEY, "to_v": VALUE}[part], "float32", ("rows", "context", slot.outputs))


def describe_weights(slots: Sequence[Slot]) -> Iterator[Tensor]:
    """The inputs that hold the slots' weights."""
    for slot in slots:
        yield Tensor(slot.weight, "float32", (slot.inputs, slot.outputs))


def reads_text(name: str) -> bool:
    """Whether a weight of a UNet makes keys or values of the text."""
    return name.removesuffix(".weight").endswith(FROM_TEXT)
