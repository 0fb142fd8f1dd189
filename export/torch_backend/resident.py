"""A network's weights in torch on a device: made there one tensor at a time, moved to the host and back."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.networks import Network
from dreammix_trt.core.slots import gather_weight, names_of_weights
from dreammix_trt.export.torch_module import make_torch_module

Shapes = Mapping[str, tuple[int, ...]]
#: (network, shapes of its parameters) -> a function that gives a parameter's values by name, float32, on any device
Values = Callable[[Network, Shapes], Callable[[str], Tensor]]
#: held while a pass is enqueued, because all threads share a module's slot weights and torch's cuBLAS workspaces, and
#: while memory is given back: as long as a thread allocates in a pool, torch frees nothing or aborts the process
turn = threading.Lock()
_LARGEST = 65504.0
_ALWAYS_FLOAT32 = ("timestep", "time_ids")  # bfloat16's 8 bits cannot represent all times up to 1000


class Resident:
    """A network's module. It has no weights before `load`; then they are on the device (`loaded`) or on the host."""

    def __init__(self, network: Network, values: Values, dtype: torch.dtype, device: torch.device) -> None:
        """network: its description.

        values: gives the weights.
        dtype: of the arithmetic. With bfloat16 the network converts its float32 inputs itself.
        device: of the weights.
        """
        self.name, self.device, self.loaded = network.name, device, False
        self.module: Any = make_torch_module(network)
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
        """The memory that the weights need on the device, loaded or not."""
        return sum(math.prod(shape) * self._dtypes[name].itemsize for name, shape in self._shapes.items())

    @cached_property
    def slot_weights(self) -> dict[str, npt.NDArray[Any]]:
        """The base's own weights of the slots, as the inputs take them. Raises FileFormatError as `load`."""
        wanted, value_of, found = set(names_of_weights(self._network.slots)), self._open_values(), {}
        for tensor in self._network.inputs:
            if tensor.name in wanted:
                used = [slot for slot in self._network.slots if slot.weight == tensor.name]
                held = {f"{slot.module}.weight": value_of(f"{slot.module}.weight").cpu().numpy() for slot in used}
                shape = tuple(int(side) for side in tensor.shape)
                found[tensor.name] = _round(
                    f"{self.name}: {tensor.name}", gather_weight(tensor.name, shape, used, held), tensor.dtype
                )
        return found

    def _open_values(self) -> Callable[[str], Tensor]:
        """A function that gives each weight, those of slots as well."""
        slots = {f"{slot.module}.weight": (slot.outputs, slot.inputs) for slot in self._network.slots}
        return self._values(self._network, {**self._shapes, **slots})

    def run(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Run the network on tensors that have the dtypes of its arrays."""
        result = self.module(*given)
        return result if isinstance(result, tuple) else (result,)

    def unload(self) -> None:
        """Move the weights to pinned host memory; a copy stays there. Nothing that is running may use them."""
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
        """Make the weights, or bring them back. Waits until they are there.

        Raises FileFormatError for weights beyond float16's range. After an error nothing has changed.
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
        """Free everything."""
        self.module, self._parameters, self._host, self.loaded = None, [], [], False

    def _make(self) -> None:
        value_of = self._open_values()
        made = {}
        for name, dtype in self._dtypes.items():
            weight = _put_weight(value_of(name), dtype, self.device, f"{self.name}: {name}")
            made[name] = nn.Parameter(weight, requires_grad=False)
        for name, parameter in made.items():
            place, _, part = name.rpartition(".")
            setattr(self.module.network.get_submodule(place), part, parameter)
        self._parameters = [*made.values()]

    def _move(self, places: Sequence[Tensor]) -> None:
        for parameter, place in zip(self._parameters, places, strict=True):
            parameter.data = place

    def _settle(self) -> None:
        """Wait for this thread's current stream, because streams that torch does not know use the weights.

        Only work of this stream touches the weights here, so waiting for it is enough. Waiting for the whole device
        would be an error while another thread captures a graph, and would break the capture.
        """
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def give_back(device: torch.device) -> None:
    """Give the memory that torch keeps unused back to the device."""
    if device.type == "cuda":
        with turn:
            torch.cuda.empty_cache()


def draw_weight(what: tuple[object, ...], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Draw random weights, float32: matrices of gain 1, norms about 1, biases and embeddings about 0.

    what: decides the values; its last entry is the parameter's name.
    """
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


def _round(what: str, values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    if dtype == "float16" and not (np.abs(values) <= _LARGEST).all():
        raise FileFormatError(f"{what} has values beyond float16; use bfloat16 or float32")
    return values.astype(dtype)


def _put_weight(value: Tensor, dtype: torch.dtype, device: torch.device, what: str) -> Tensor:
    """Put a weight on the device. Weights of convolutions become channels last, as tensor cores want them."""
    if dtype == torch.float16 and value.device.type != "meta" and not bool((value.abs() <= _LARGEST).all()):
        raise FileFormatError(f"{what} has values beyond float16; use bfloat16 or float32")
    value = value.to(device, dtype)
    last = value.ndim == 4 and device.type == "cuda"
    return value.contiguous(memory_format=torch.channels_last) if last else value


def _convert_inputs(module: nn.Module, network: Network) -> None:
    wide = [spec.dtype != "float32" or spec.name in _ALWAYS_FLOAT32 for spec in network.inputs]

    def convert(_module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x if keep else x.to(torch.bfloat16) for x, keep in zip(given, wide, strict=True))

    module.register_forward_pre_hook(convert)


def _widen(module: Any, network: Network, dtype: torch.dtype) -> set[str]:
    """Let the wide units of a float16 VAE compute in float32. Returns the names of their parameters."""
    if not network.wide:
        return set()
    from dreammix_trt.export.units import convert_units, vae_units

    units = vae_units(network.graph, module.network)
    convert_units(units, network.wide, lambda x: x.float(), lambda x: x.to(dtype))
    chosen = [unit for name, unit in units.items() if name in network.wide]
    inside = {id(parameter) for unit in chosen for parameter in unit.parameters()}
    return {name for name, parameter in module.network.named_parameters() if id(parameter) in inside}
