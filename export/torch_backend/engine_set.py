"""A base's networks in eager torch with the interface of an engine set: the reference for comparisons of engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.network_weights import weights_of
from dreammix_trt.core.networks import describe_networks
from dreammix_trt.core.slots import Slot, gather_weight
from dreammix_trt.export.parity import Arrays, run_torch
from dreammix_trt.export.torch_module import make_torch_module


class TorchEngineSet:
    """`run(name, **arrays) -> dict` for every network of a base. Weights are read at a network's first use."""

    def __init__(self, base: BaseFiles, *, slots: bool = True) -> None:
        self.base = base
        self._networks = {network.name: network for network in describe_networks(base, slots)}
        self._modules: dict[str, Any] = {}
        self._weights: dict[str, Arrays] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._networks

    def slots(self, name: str) -> tuple[Slot, ...]:
        """The LoRA slots of a network."""
        return self._networks[name].slots

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
        network = self._networks[name]
        if name not in self._modules:
            self._modules[name] = make_torch_module(network, weights_of(self.base, name))
        return run_torch(self._modules[name], network, {**self.weights(name), **arrays})
