"""A base's networks in eager torch, with the engine set's interface: the oracle engines are compared with."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.network_weights import weights_of
from dreammix_trt.core.networks import SLOT_RANK, describe_networks
from dreammix_trt.core.slots import Slot
from dreammix_trt.export.parity import Arrays, run_torch
from dreammix_trt.export.torch_module import torch_module


class TorchEngineSet:
    """`run(name, **arrays) -> dict` over every network of a base; a network's weights are read at its first use."""

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
        """Run a network on numpy inputs (docs/architecture.md's table); outputs by name, float32."""
        network = self._networks[name]
        if name not in self._modules:
            self._modules[name] = torch_module(network, weights_of(self.base, name))
        return run_torch(self._modules[name], network, arrays)
