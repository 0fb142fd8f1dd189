"""Watches UNets in torch while they run: how large inputs become, and what E4M3 does to the output.

Imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dreammix_trt.core.calibration import Layer, weight_of_step
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.float8 import LARGEST
from dreammix_trt.core.networks import KINDS
from dreammix_trt.core.slots import Slot
from dreammix_trt.export.torch_backend.engine_set import TorchEngineSet

Arrays = dict[str, NDArray[Any]]
#: the networks that are calibrated
UNETS = tuple(kind.name for kind in KINDS if kind.call == "step")


class Watched:
    """Networks (`core/seam.py`) that record the largest inputs of the UNets' linears and convolutions.

    calls: what the UNets were given, where `keep` is set.
    """

    def __init__(self, networks: TorchEngineSet) -> None:
        self._networks = networks
        self._peaks: dict[str, dict[str, Tensor]] = {}
        self.calls: list[tuple[str, Arrays]] = []
        self.keep = False

    def __contains__(self, name: str) -> bool:
        return name in self._networks

    def slots(self, name: str) -> tuple[Slot, ...]:
        return self._networks.slots(name)

    def weights(self, name: str) -> Mapping[str, NDArray[Any]]:
        return self._networks.weights(name)

    def run(self, name: str, **arrays: NDArray[Any]) -> Arrays:
        """Run a network; watch it, if it is a UNet."""
        if name not in UNETS:
            return self._networks.run(name, **arrays)
        if self.keep:
            self.calls.append((name, arrays))
        with watch_inputs(self._networks.module(name).network, self._peaks.setdefault(name, {})):
            return self._networks.run(name, **arrays)

    def take(self) -> dict[str, dict[str, Layer]]:
        """What was seen since the last call: UNet -> layer -> its magnitudes. Raises `FileFormatError` for NaN."""
        found: dict[str, dict[str, Layer]] = {}
        for name, peaks in self._peaks.items():
            layers = list_layers(self._networks.module(name).network)
            found[name] = {}
            for layer, peak in peaks.items():
                largest = float(peak)
                if not np.isfinite(largest):
                    raise FileFormatError(
                        f"{name}: {layer} is given values that are not finite in float32: the checkpoint is damaged"
                    )
                found[name][layer] = Layer(largest, float(layers[layer].weight.detach().abs().max()))
        self._peaks = {}
        return found

    def measure_errors(
        self, name: str, calls: Sequence[Arrays], scales: Mapping[str, tuple[float, float]], layers: Iterable[str]
    ) -> Iterator[float]:
        """What E4M3 in one layer alone does to a UNet's output: `Layer.error`.

        calls: what the UNet is given.
        scales: of every one of the layers, see `emulate_float8`.

        Returns one number for every layer; a mean over the calls.
        """
        weights = [weight_of_step(float(call["timestep"][0])) for call in calls]
        truths = [self._networks.run(name, **call)["eps"] for call in calls]
        network = self._networks.module(name).network
        for layer in layers:
            with emulate_float8(network, {layer: scales[layer]}):
                found = [self._networks.run(name, **call)["eps"] for call in calls]
            errors = [compare(eps, truth) for eps, truth in zip(found, truths, strict=True)]
            yield float(np.mean([weight * error for weight, error in zip(weights, errors, strict=True)]))


def compare(found: NDArray[Any], truth: NDArray[Any]) -> float:
    """The mean square of the difference, as a share of the truth's."""
    return float(np.mean((found - truth) ** 2) / np.mean(truth**2))


def list_layers(network: nn.Module) -> dict[str, Any]:
    """The linears and convolutions of a network by name."""
    return {name: part for name, part in network.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}


@contextmanager
def watch_inputs(network: nn.Module, peaks: dict[str, Tensor]) -> Iterator[None]:
    """Record in the block the largest magnitude of every layer's input.

    peaks: layer -> a tensor of one number; raised.
    """

    def watcher(name: str) -> Any:
        def see(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            low, high = inputs[0].aminmax()
            largest = torch.maximum(-low, high)
            peaks[name] = torch.maximum(peaks[name], largest) if name in peaks else largest

        return see

    with ExitStack() as hooks:
        for name, layer in list_layers(network).items():
            hooks.callback(layer.register_forward_pre_hook(watcher(name)).remove)
        yield


@contextmanager
def emulate_float8(network: nn.Module, scales: Mapping[str, tuple[float, float]]) -> Iterator[None]:
    """Let layers of a float32 network compute in E4M3 in the block: the same numbers as the quantised graph.

    scales: layer -> scales of its input and of its weight.
    """
    layers = list_layers(network)
    with ExitStack() as undo:
        for name, (of_input, of_weight) in scales.items():
            layer = layers[name]
            undo.callback(setattr, layer, "weight", layer.weight)
            layer.weight = nn.Parameter(round_to_e4m3(layer.weight, of_weight), requires_grad=False)
            undo.callback(layer.register_forward_pre_hook(_rounder(of_input)).remove)
        yield


def _rounder(scale: float) -> Any:
    return lambda _module, inputs: (round_to_e4m3(inputs[0], scale), *inputs[1:])


def round_to_e4m3(values: Tensor, scale: float) -> Tensor:
    """Values rounded to E4M3 times a scale, and back."""
    return (values / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(values.dtype) * scale
