"""The seam between the device runtime and what runs networks there: TensorRT-RTX, TensorRT, ONNX Runtime, torch.

A back end binds a network to arrays of fixed shapes and addresses once; after that, running it is one call that only
enqueues. Precision, weights and kernels are the back end's affair; guidance, blending and solver stand outside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dreammix_trt.core.subject import Slot
from dreammix_trt.engine.canvas.geometry import FACTOR, Size
from dreammix_trt.engine.drivers.device import Array, Shape, Stream


@dataclass(frozen=True)
class Tensor:
    """An input or output as `network.json` has it: numpy dtype, and sides as numbers or as "rows", "pictures", "h",
    "w" (latent cells), "H", "W" (pixels)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Tensor:
        """From `network.json`."""
        return cls(str(entry["name"]), str(entry["dtype"]), tuple(entry["shape"]))


@dataclass(frozen=True)
class Sides:
    """The dynamic sides of one call: rows of the UNet or prompts, pictures, and the latent's height and width."""

    rows: int
    pictures: int
    height: int
    width: int

    def shape(self, tensor: Tensor) -> Shape:
        """A tensor's shape at these sides."""
        named = {
            "rows": self.rows, "pictures": self.pictures, "h": self.height, "w": self.width,
            "H": FACTOR * self.height, "W": FACTOR * self.width,
        }  # fmt: skip
        return tuple(named[side] if isinstance(side, str) else side for side in tensor.shape)


class Bound(Protocol):
    """A network with its shapes and addresses fixed. Closing it never frees the arrays."""

    @property
    def capturable(self) -> bool:
        """Whether `enqueue` may stand inside a captured graph (after one call outside)."""
        ...

    def enqueue(self, stream: Stream) -> None:
        """Run once, in the stream; allocates nothing on the device and waits for nothing."""
        ...

    def close(self) -> None: ...


class DeviceNetworks(Protocol):
    """A base's networks on a device, by the names of docs/architecture.md.

    A network that may leave float16's range can have a twin `NAME_float32`, which the runtime takes after it did.
    """

    @property
    def facts(self) -> Any:
        """Of the base: `dreammix_trt.engine.backends.onnxruntime.engine_set.BaseFacts`."""
        ...

    def __contains__(self, name: str) -> bool: ...
    def slots(self, name: str) -> tuple[Slot, ...]: ...
    def inputs(self, name: str) -> tuple[Tensor, ...]:
        """LoRA factors are one packed `lora` (pictures, P), or inputs of their own (`Slot.factors`) in packed order."""
        ...

    def outputs(self, name: str) -> tuple[Tensor, ...]: ...

    def frames(self) -> tuple[Size, ...] | None:
        """The frame sizes (height, width in pixels) that every network takes; None: any."""
        ...

    @property
    def most_pictures(self) -> int | None:
        """The largest batch; None: any."""
        ...

    def weight_bytes(self, name: str) -> int:
        """Device memory a network's weights take while loaded."""
        ...

    def workspace_bytes(self, name: str, sides: Sides) -> int:
        """Scratch memory to hand to `bind`; 0 where the back end allocates its own."""
        ...

    def bind(self, name: str, sides: Sides, arrays: Mapping[str, Array], workspace: Array | None = None) -> Bound:
        """Fix shapes and addresses. Raises EngineError for sides the network was not built for."""
        ...

    @property
    def loaded(self) -> tuple[str, ...]:
        """The networks whose weights are on the device now."""
        ...

    def unload(self, name: str) -> None:
        """Give the weights' memory back; what is bound stays bound and must not be enqueued until `load`."""
        ...

    def load(self, name: str) -> None:
        """Bring the weights; does nothing when they are there."""
        ...

    def close(self) -> None: ...
