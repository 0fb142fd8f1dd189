"""A base's networks in eager torch with the interface of an engine set: the reference for comparisons of engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.network_weights import weights_of
from dreammix_trt.core.networks import describe_networks, kind_of
from dreammix_trt.core.slots import Slot, gather_weight
from dreammix_trt.export.parity import Arrays, run_torch
from dreammix_trt.export.torch_module import make_torch_module


class TorchEngineSet:
    """`run(name, **arrays) -> dict` for every network of a base. Weights are read at a network's first use."""

    def __init__(self, base: BaseFiles, *, slots: bool = True, device: str = "cpu", one_unet: bool = False) -> None:
        """device: "cpu" or "cuda". one_unet: read a UNet again when it is needed, so that one alone is in memory."""
        self.base, self._device, self._one_unet = base, device, one_unet
        self._networks = {network.name: network for network in describe_networks(base, slots)}
        self._modules: dict[str, Any] = {}
        self._weights: dict[str, Arrays] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._networks

    def slots(self, name: str) -> tuple[Slot, ...]:
        """The LoRA slots of a network."""
        return self._networks[name].slots

    def module(self, name: str) -> Any:
        """The torch module of a network, its weights read."""
        if name not in self._modules:
            if self._one_unet and kind_of(name).call == "step":
                self._modules = {other: made for other, made in self._modules.items() if kind_of(other).call != "step"}
            self._modules[name] = make_torch_module(self._networks[name], weights_of(self.base, name)).to(self._device)
        return self._modules[name]

    def weights(self, name: str) -> Mapping[str, NDArray[Any]]:
        """The base's own weights of the slots; see `core.seam.Networks`."""
        if name not in self._weights:
            network, held = self._networks[name], weights_of(self.base, name)
            shapes = network.shapes_of_weights()
            self._weights[name] = {
                each: gather_weight(each, shape, network.slots, held) for each, shape in shapes.items()
            }
        return self._weights[name]

    def run(self, name: str, **arrays: NDArray[Any]) -> Arrays:
        """Run a network.

        arrays: its inputs by name (core/networks.py). Weights of slots that are not given are the base's own.

        Returns outputs by name, float32.
        """
        return run_torch(self.module(name), self._networks[name], {**self.weights(name), **arrays}, self._device)
