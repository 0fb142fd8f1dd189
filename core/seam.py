"""The protocols between the runtime and the back ends that run networks: on the host, and on a device.

On the host a network is a function of arrays. On a device a back end binds a network once to arrays of fixed shapes and
addresses; then running it is one call that only enqueues. The back end decides precision, weights and kernels.
Guidance, blending and the solver are not its concern.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.axes import Sides, Tensor
from dreammix_trt.core.slots import Slot

Shape = tuple[int, ...]
Size = tuple[int, int]


@dataclass(frozen=True)
class BaseFacts:
    """What the runtime must know about a base (base.json).

    native_side: side in pixels of the pictures that it was trained on.
    divisor: picture sides must be multiples of this many pixels.
    scaling_factor: of the VAE's latents.
    feature_channels: of the inpaint head.
    defaults: fields of a request that suit the base.
    unet: the blocks of its UNet (`keymap.blocks_of`), by which the names in a LoRA file are understood; None: SDXL's.
    prior_side: of the pictures that `asuka_prior` takes, in pixels; None: the base has no prior.
    """

    native_side: int
    divisor: int
    scaling_factor: float
    feature_channels: int
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unet: Mapping[str, Any] | None = field(default=None, compare=False)
    prior_side: int | None = None


class Networks(Protocol):
    """Named networks on the host."""

    def __contains__(self, name: str) -> bool: ...
    def run(self, name: str, **arrays: Any) -> dict[str, npt.NDArray[Any]]:
        """Run a network.

        arrays: inputs by name; floats are float32. Weights of slots that are not given are the base's own.

        Returns outputs by name; floats are float32.
        """
        ...

    def slots(self, name: str) -> tuple[Slot, ...]:
        """The LoRA slots of a network; none for a network that is not there."""
        ...

    def weights(self, name: str) -> Mapping[str, npt.NDArray[Any]]:
        """The base's own weights of the slots: input name -> array of the input's shape and dtype, not to be written.

        A slot whose layer has no effect has no such input.
        """
        ...


# -- on a device ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Array:
    """Memory on a device, in C order.

    pointer: its address.
    dtype: of numpy ("float16", "uint8", ...).
    """

    pointer: int
    shape: Shape
    dtype: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * np.dtype(self.dtype).itemsize

    @property
    def half(self) -> bool:
        """Whether kernels must read and write it as float16."""
        return self.dtype == "float16"

    def __getitem__(self, index: int) -> Array:
        """Entry `index` of the first axis."""
        return self.part(index, 1).reshape(self.shape[1:])

    def part(self, start: int, count: int) -> Array:
        """`count` entries of the first axis, from `start` on."""
        if not 0 <= start <= start + count <= self.shape[0]:
            raise ValueError(f"entries {start} to {start + count} of {self.shape}")
        each = math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize
        return replace(self, pointer=self.pointer + start * each, shape=(count, *self.shape[1:]))

    def reshape(self, shape: Shape, dtype: str | None = None) -> Array:
        """The same memory, or its beginning, with another shape (and dtype)."""
        seen = Array(self.pointer, tuple(shape), dtype or self.dtype)
        if seen.nbytes > self.nbytes:
            raise ValueError(f"{seen.shape} {seen.dtype} is larger than {self.shape} {self.dtype}")
        return seen


class Stream(Protocol):
    """A queue of work that runs in order.

    handle: CUDA's cudaStream_t as an int; None on the simulated device.
    """

    @property
    def handle(self) -> int | None: ...
    def close(self) -> None: ...


class Bound(Protocol):
    """A network with its shapes and addresses fixed. Closing it never frees the arrays."""

    @property
    def capturable(self) -> bool:
        """Whether `enqueue` may be called during a graph capture (after one call outside)."""
        ...

    def enqueue(self, stream: Stream) -> None:
        """Run once in the stream. Allocates nothing on the device and does not wait."""
        ...

    def close(self) -> None: ...


class DeviceNetworks(Protocol):
    """A base's networks on a device, by the names of the list (core/networks.py).

    A network that may leave float16's range can have a float32 twin. The runtime uses the twin after an overflow.
    """

    @property
    def facts(self) -> Any:
        """The `BaseFacts` of the base."""
        ...

    def __contains__(self, name: str) -> bool: ...
    def slots(self, name: str) -> tuple[Slot, ...]: ...
    def weights(self, name: str) -> Mapping[str, npt.NDArray[Any]]:
        """The base's own weights of the slots, as for `Networks`, in host memory or in a mapped file."""
        ...

    def inputs(self, name: str) -> tuple[Tensor, ...]:
        """The inputs; the weights of slots are the last ones."""
        ...

    def outputs(self, name: str) -> tuple[Tensor, ...]: ...

    def frames(self) -> tuple[Size, ...] | None:
        """The frame sizes (height, width) in pixels that all networks take; None: any."""
        ...

    def contexts(self) -> tuple[int, ...] | None:
        """The lengths of the text condition that the UNets take; None: any."""
        ...

    @property
    def most_pictures(self) -> int | None:
        """The largest batch; None: any."""
        ...

    @property
    def captures(self) -> bool:
        """Whether the back end lets graphs be captured at all; `Bound.capturable` says it of one network, now."""
        ...

    def weight_bytes(self, name: str) -> int:
        """The device memory that a network's own weights take while loaded; those of slots are not its own."""
        ...

    def workspace_bytes(self, name: str, sides: Sides) -> int:
        """The scratch memory that `bind` needs; 0 when the back end allocates its own."""
        ...

    def bind(self, name: str, sides: Sides, arrays: Mapping[str, Array], workspace: Array | None = None) -> Bound:
        """Fix shapes and addresses.

        sides: of the named axes.
        arrays: inputs and outputs by name.
        workspace: scratch memory of `workspace_bytes`.

        Raises ProfileError for sides that the network was not built for.
        """
        ...

    @property
    def loaded(self) -> tuple[str, ...]:
        """The networks whose weights are on the device now."""
        ...

    def unload(self, name: str) -> None:
        """Free the memory of the weights. What is bound stays bound, but must not be enqueued before `load`."""
        ...

    def load(self, name: str) -> None:
        """Put the weights on the device. Does nothing when they are there."""
        ...

    def close(self) -> None: ...
