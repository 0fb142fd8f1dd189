"""The weights of a base's networks, with the base's own LoRAs added to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.lora import Lora, Target, check_weights, weight_changes
from dreammix_trt.core.networks import kind_of, unets_of
from dreammix_trt.core.tensors import Weights


@dataclass(frozen=True)
class BaseLora:
    """A LoRA that is merged into a base's weights: W + scale * (A B)^T.

    target: "patched", "raw" or "both" UNets. The text encoders always get their part.
    """

    lora: Lora
    scale: float = 1.0
    target: Target = "both"

    def touches(self, network: str) -> bool:
        """Whether the LoRA changes a network's weights."""
        kind = kind_of(network)
        if kind.factors is None:
            return False
        targeted = kind.factors != "unet" or (kind.factors_of or kind.name) in unets_of(self.target)
        return targeted and bool(self.lora.factors.get(kind.factors))


def weights_of(base: BaseFiles, network: str, loras: Sequence[BaseLora] = ()) -> Weights:
    """The weights of a network (or of its twin) by torch name, float32. Each is read when it is needed.

    network: its name.
    loras: merged into the weights in float32.

    Raises FileFormatError when a LoRA names modules that the base lacks or has in another shape.
    """
    holds = kind_of(network).holds
    weights = whole_weights_of(base, network, loras)
    return weights if holds is None else weights.rename(lambda name: name if holds(name) else None)


def whole_weights_of(base: BaseFiles, network: str, loras: Sequence[BaseLora] = ()) -> Weights:
    """As `weights_of`, with the weights of what the component's other networks compute: a UNet's keys and values."""
    weights = kind_of(network).weights(base)
    for each in loras:
        if each.touches(network):
            check_weights(each.lora, network, {name: weights.shape(name) for name in weights})
            weights = weights.change(weight_changes(each.lora, network, each.scale))
    return weights
