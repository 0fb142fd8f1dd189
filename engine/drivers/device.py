"""What the runtime needs from a device: memory, streams, copies, kernels, captured graphs.

`CudaDevice` (engine/drivers/cuda) is the real one. `SimulatedDevice` (engine/drivers/simulated.py) runs the same work
on the host and records its order. Everything enqueued in a stream runs later, in order; only `synchronize` waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import DeviceError
from dreammix_trt.core.seam import Array, Stream


class Memory(Protocol):
    """One allocation on a device; a context manager that frees it."""

    @property
    def pointer(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def free(self) -> None:
        """Free it. Again does nothing."""
        ...

    def __enter__(self) -> Memory: ...
    def __exit__(self, *_: object) -> None: ...


class Pinned(Protocol):
    """Host memory that the device copies from and to beside other work.

    array: uint8 (nbytes,) over it.
    """

    @property
    def array(self) -> npt.NDArray[np.uint8]: ...
    def free(self) -> None: ...


class Mark(Protocol):
    """A point in a stream (an event)."""

    def has_passed(self) -> bool:
        """Whether the work before it is done. Never waits."""
        ...

    def seconds_since(self, earlier: Mark) -> float:
        """Device time since an earlier mark; both must have passed."""
        ...


class CapturedGraph(Protocol):
    """Captured work. `launch` enqueues all of it at once."""

    def launch(self, stream: Stream) -> None: ...
    def close(self) -> None: ...


class Device(Protocol):
    """A device. Methods that take a stream enqueue and return; arrays must outlive the work.

    name: as users know it.
    capability: such as "sm_89".
    """

    name: str
    capability: str  # "sm_89"

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes on the device."""
        ...

    def allocate(self, nbytes: int) -> Memory:
        """Allocate memory aligned to 256 bytes. Raises OutOfMemoryError; never during a capture."""
        ...

    def allocate_pinned(self, nbytes: int) -> Pinned: ...
    def make_stream(self) -> Stream: ...

    def upload(self, to: Array, source: npt.NDArray[Any], stream: Stream) -> None:
        """Copy contiguous host memory of `to`'s size to the device. Memory that is not pinned makes it wait."""
        ...

    def download(self, to: npt.NDArray[Any], source: Array, stream: Stream) -> None:
        """Copy from the device to host memory."""
        ...

    def copy(self, to: Array, source: Array, stream: Stream) -> None:
        """Copy within the device; both arrays have the same size in bytes."""
        ...

    def clear(self, to: Array, stream: Stream) -> None:
        """Set all bytes to zero."""
        ...

    def launch_kernel(self, name: str, stream: Stream, **arguments: Any) -> None:
        """Enqueue a kernel of `dreammix_trt._cpp.gpu`.

        arguments: an Array stands for its pointer, None for no pointer.
        """
        ...

    def enqueue_work(self, label: str, stream: Stream, run: Callable[[], None]) -> None:
        """Enqueue work of a network. On a GPU `run` enqueues it itself, now; the simulated device runs it in its turn.

        label: name of the work in the record.
        """
        ...

    def capture(self, stream: Stream, record: Callable[[], None]) -> CapturedGraph:
        """Capture what `record` enqueues in `stream` as a graph. None of it runs now."""
        ...

    def mark(self, stream: Stream, *, timed: bool = False) -> Mark: ...

    def synchronize(self, stream: Stream) -> None:
        """Wait for everything in the stream. An error of that work is raised here."""
        ...

    def close(self) -> None: ...


def put(device: Device, to: Array, values: npt.NDArray[Any], stream: Stream, wait: Callable[[], None]) -> None:
    """Copy values to a device through pinned memory.

    wait: waits for everything in the stream.

    A lost device may still read the pinned memory, and freeing it could wait without end. So then it is not freed.
    """
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    pinned = device.allocate_pinned(flat.nbytes)
    try:
        pinned.array[:] = flat
        device.upload(to.reshape((flat.nbytes,), "uint8"), pinned.array, stream)
        wait()
    except DeviceError as error:
        if not error.lost:
            pinned.free()
        raise
    pinned.free()
