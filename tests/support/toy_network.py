"""A network that the project does not know: what somebody adds from outside (tests/test_new_network.py)."""

from __future__ import annotations

import numpy as np

from dreammix_trt.core.axes import Tensor
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.networks import Network, NetworkKind
from dreammix_trt.core.tensors import Weights

GAIN = np.array([0.5, -1.0, 2.0, 1.5], np.float32)


def describe_toy(base: BaseFiles, _slots: bool) -> Network:
    latent = Tensor("latent", "float32", ("pictures", base.latent_channels, "h", "w"))
    changed = Tensor("changed", "float32", ("pictures", base.latent_channels, "h", "w"))
    configs = {"toy": {"channels": base.latent_channels}}
    return Network("toy", "toy", "tests.support.toy_module:Toy", (latent,), (changed,), (), configs)


TOY = NetworkKind(
    "toy", "picture", "frame", describe_toy, lambda _base: Weights.of({"gain": GAIN}), component="vae", required=False
)
