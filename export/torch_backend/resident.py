"""A network's weights in torch on a device: described, made there one tensor at a time, sent to the host and back."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.networks import Network
from dreammix_trt.export.torch_module import torch_module

Shapes = Mapping[str, tuple[int, ...]]
#: of a network whose parameters have these shapes, each parameter's values by name, float32, wherever they lie
Values = Callable[[Network, Shapes], Callable[[str], Tensor]]
#: held by a pass while it is enqueued, as a module's LoRA inputs and torch's cuBLAS workspaces are one for all threads,
#: and by what gives memory back: while any thread allocates in a pool, torch frees nothing, or ends the process over it
turn = threading.Lock()
_LARGEST = 65504.0
_ALWAYS_FLOAT32 = ("timestep", "time_ids")  # 8 bits cannot count to 1000


class Resident:
    """A network's module, without weights until `load`; after that they are on the device (`loaded`) or on the host.

    dtype: of its arithmetic; a network of float32 arrays in bfloat16 converts them itself.
    """

    def __init__(self, network: Network, values: Values, dtype: torch.dtype, device: torch.device) -> None:
        self.name, self.device, self.loaded = network.name, device, False
        self.module: Any = torch_module(network)
        stays = _widen(self.module, network, dtype)
        if dtype == torch.bfloat16:
            _convert_inputs(self.module, network)
        self._shapes = {name: tuple(each.shape) for name, each in self.module.network.named_parameters()}
        self._dtypes = {name: torch.float32 if name in stays else dtype for name in self._shapes}
        self._network, self._values = network, values
        self._parameters: list[nn.Parameter] = []
        self._host: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Memory that the weights take on the device, loaded or not."""
        return sum(math.prod(shape) * self._dtypes[name].itemsize for name, shape in self._shapes.items())

    def run(self, *given: Tensor) -> tuple[Tensor, ...]:
        """The network on tensors of its arrays' types."""
        result = self.module(*given)
        return result if isinstance(result, tuple) else (result,)

    def unload(self) -> None:
        """Weights to pinned host memory, where they stay from the first time on. Nothing under way may use them."""
        if not self.loaded or self.device.type == "meta":
            return
        if not self._host:
            pinned = self.device.type == "cuda"
            host = [torch.empty_like(each, device="cpu", pin_memory=pinned) for each in self._parameters]
            for place, each in zip(host, self._parameters, strict=True):
                place.copy_(each, non_blocking=True)
            self._settle()
            self._host = host
        self._move(self._host)
        self.loaded = False
        give_back(self.device)

    def load(self) -> None:
        """Make the weights, or bring them back; waits. Where it fails, nothing has changed.

        Raises FileFormatError for weights beyond float16's range.
        """
        if self.loaded:
            return
        if self._host:
            back = [torch.empty_like(host, device=self.device) for host in self._host]
            for place, host in zip(back, self._host, strict=True):
                place.copy_(host, non_blocking=True)
            self._move(back)
        else:
            self._make()
        self._settle()
        self.loaded = True

    def close(self) -> None:
        """Give everything back."""
        self.module, self._parameters, self._host, self.loaded = None, [], [], False

    def _make(self) -> None:
        value_of = self._values(self._network, self._shapes)
        made = {
            name: nn.Parameter(_place(value_of(name), dtype, self.device, f"{self.name}: {name}"), requires_grad=False)
            for name, dtype in self._dtypes.items()
        }
        for name, parameter in made.items():
            place, _, part = name.rpartition(".")
            setattr(self.module.network.get_submodule(place), part, parameter)
        self._parameters = [*made.values()]

    def _move(self, places: Sequence[Tensor]) -> None:
        for parameter, place in zip(self._parameters, places, strict=True):
            parameter.data = place

    def _settle(self) -> None:
        """Wait, as streams that torch does not know use the weights.

        All that touches them here is work of this thread's current stream, so it is enough to wait for that one. To
        wait for the whole device would be an error while another thread captures a graph, and break its capture.
        """
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def give_back(device: torch.device) -> None:
    """Let the device have the memory that torch keeps unused."""
    if device.type == "cuda":
        with turn:
            torch.cuda.empty_cache()


def draw_weight(what: tuple[object, ...], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Random values, float32, decided by `what`, whose end is a parameter's name: matrices of gain 1, norms about 1,
    biases and embeddings about 0."""
    name, mean, spread = str(what[-1]), 0.0, 0.02
    if len(shape) == 1 and not name.endswith("bias"):
        mean, spread = 1.0, 0.05
    elif len(shape) > 1 and not name.endswith("_embedding.weight"):
        spread = 1 / math.sqrt(math.prod(shape[1:]))
    value = torch.empty(shape, dtype=torch.float32, device=device)
    if device.type == "meta":
        return value
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    source = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return value.normal_(mean, spread, generator=source)


def _place(value: Tensor, dtype: torch.dtype, device: torch.device, what: str) -> Tensor:
    """A weight on the device; those of convolutions as tensor cores want them, channels last."""
    if dtype == torch.float16 and value.device.type != "meta" and not bool((value.abs() <= _LARGEST).all()):
        raise FileFormatError(f"{what} has values beyond float16; take bfloat16 or float32")
    value = value.to(device, dtype)
    last = value.ndim == 4 and device.type == "cuda"
    return value.contiguous(memory_format=torch.channels_last) if last else value


def _convert_inputs(module: nn.Module, network: Network) -> None:
    wide = [spec.dtype != "float32" or spec.name in _ALWAYS_FLOAT32 for spec in network.inputs]

    def convert(_module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x if keep else x.to(torch.bfloat16) for x, keep in zip(given, wide, strict=True))

    module.register_forward_pre_hook(convert)


def _widen(module: Any, network: Network, dtype: torch.dtype) -> set[str]:
    """Let a float16 VAE's wide units compute in float32; the names of their parameters."""
    if not network.wide:
        return set()
    from dreammix_trt.export.modules import vae_units

    units = vae_units(network.graph, module.network)
    chosen = [unit for name, unit in units.items() if name in network.wide]
    chosen[0].register_forward_pre_hook(lambda _unit, given: (given[0].float(), *given[1:]))
    chosen[-1].register_forward_hook(lambda _unit, _given, out: out.to(dtype))
    inside = {id(parameter) for unit in chosen for parameter in unit.parameters()}
    return {name for name, parameter in module.network.named_parameters() if id(parameter) in inside}
