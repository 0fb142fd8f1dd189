"""The torch module of the network in toy_network.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dreammix_trt.core.networks import Network


class Toy(nn.Module):  # type: ignore[misc]
    """Each channel of a latent times its gain."""

    @classmethod
    def of(cls, network: Network) -> Toy:
        return cls(network.configs["toy"]["channels"])

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.network: Any = nn.Module()
        self.network.gain = nn.Parameter(torch.ones(channels))

    def forward(self, latent: Tensor) -> Tensor:
        changed: Tensor = latent * self.network.gain[:, None, None]
        return changed
