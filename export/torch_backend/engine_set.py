"""A base's networks in eager torch with the interface of an engine set: the reference for comparisons of engines."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.network_weights import weights_of
from dreammix_trt.core.networks import SLOT_RANK, describe_networks
from dreammix_trt.core.slots import Slot
from dreammix_trt.export.parity import Arrays, run_torch
from dreammix_trt.export.torch_module import make_torch_module


class TorchEngineSet:
    """`run(name, **arrays) -> dict` for every network of a base. Weights are read at a network's first use."""

    def __init__(self, base: BaseFiles, *, slot_rank: int = SLOT_RANK) -> None:
        self.base = base
        self._networks = {network.name: network for network in describe_networks(base, slot_rank)}
        self._modules: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._networks

    def slots(self, name: str) -> tuple[Slot, ...]:
        """The LoRA slots of a network, in packed order."""
        return self._networks[name].slots

    def run(self, name: str, **arrays: NDArray[Any]) -> Arrays:
        """Run a network.

        arrays: its inputs by name (core/networks.py).

        Returns outputs by name, float32.
        """
        network = self._networks[name]
        if name not in self._modules:
            self._modules[name] = make_torch_module(network, weights_of(self.base, name))
        return run_torch(self._modules[name], network, arrays)
