"""What is taken from a GPU and freed again: memory, pinned memory, streams."""

from __future__ import annotations

import ctypes
import logging
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import DeviceError
from dreammix_trt.core.files import size_text
from dreammix_trt.core.seam import Array
from dreammix_trt.engine.drivers.cuda.context import Context

_LOG = logging.getLogger(__name__)


class Belongings:
    """What was taken from a device and is not freed yet."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._lock = threading.Lock()
        self._owned: dict[int, Owned] = {}

    def add(self, owned: Owned) -> None:
        """Note that somebody has taken it."""
        with self._lock:
            self._owned[id(owned)] = owned

    def release(self, owned: Owned, handle: Any) -> None:
        """Free what its owner no longer needs. An error is logged."""
        with self._lock:
            del self._owned[id(owned)]
        bindings = self.context.bindings
        if bindings.lost:  # then nothing can be freed; the system frees all at the end
            return
        self.context.make_current()
        error, *_ = owned._destroy(bindings.runtime, handle)
        if error != bindings.runtime.cudaError_t.cudaSuccess:
            # most likely an error of earlier work, which is also raised where that work is waited for
            _LOG.warning("freeing a %s: %s", owned.kind, bindings.explain_failure("CUDA", error))

    def release_all(self) -> None:
        """Wait for the remaining streams, free everything, and log that it remained."""
        left = list(self._owned.values())
        for stream in (owned for owned in left if isinstance(owned, CudaStream)):
            self.context.call_quietly("cudaStreamSynchronize", stream.handle)
        if left:
            _LOG.warning("the %s was closed with %s not freed", self.context.name, _list_owned(left))
        for owned in sorted(left, key=lambda owned: isinstance(owned, CudaStream)):
            owned._give_back()

    def check_bounds(self, array: Array) -> None:
        """Raise ValueError for an array that begins in memory of this device and ends beyond it.

        Other memory (a network's own) is its owner's concern.
        """
        if array.pointer == 0 and array.nbytes:
            raise ValueError(f"{describe_array(array)} has no memory")
        with self._lock:
            memories = [owned for owned in self._owned.values() if isinstance(owned, CudaMemory)]
        for memory in memories:
            beyond = array.pointer + array.nbytes - memory.pointer - memory.nbytes
            if memory.pointer <= array.pointer < memory.pointer + memory.nbytes and beyond > 0:
                raise ValueError(f"{describe_array(array)} reaches {beyond} bytes beyond its memory")


class Owned:
    """A resource of a device. It is freed once, by its owner or when the device closes."""

    kind = "resource"

    def __init__(self, belongings: Belongings, handle: Any) -> None:
        self._belongings, self._held = belongings, handle
        belongings.add(self)

    @property
    def _live(self) -> Any:
        if self._held is None:
            raise DeviceError(f"the {self.kind} is used after it was freed")
        return self._held

    def _give_back(self) -> None:
        if self._held is None:
            return
        self._belongings.context.check_outside_capture(f"freeing a {self.kind}")
        handle, self._held = self._held, None
        self._belongings.release(self, handle)

    def _destroy(self, runtime: Any, handle: Any) -> Any:
        """Call the function that destroys it, and return its result."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()


class CudaMemory(Owned):
    """Device memory. Its arrays must not be used after `free`."""

    kind = "memory"

    def __init__(self, belongings: Belongings, pointer: int, nbytes: int) -> None:
        self.nbytes = nbytes
        super().__init__(belongings, pointer)

    @property
    def pointer(self) -> int:
        return int(self._live)

    def free(self) -> None:
        """Free it, after the work under way on the device. Again does nothing."""
        self._give_back()

    def _destroy(self, runtime: Any, handle: Any) -> Any:
        return runtime.cudaFree(handle)


class CudaPinned(Owned):
    """Page-locked host memory. Views of `array` must not outlive it."""

    kind = "pinned memory"

    def __init__(self, belongings: Belongings, pointer: int, nbytes: int) -> None:
        self.nbytes = nbytes
        super().__init__(belongings, pointer)

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """uint8 (nbytes,) over it."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.nbytes).from_address(int(self._live)))

    def free(self) -> None:
        """Free it. Again does nothing. No copy from or to it may be under way."""
        self._give_back()

    def _destroy(self, runtime: Any, handle: Any) -> Any:
        return runtime.cudaFreeHost(handle)


class CudaStream(Owned):
    """A stream that does not wait for CUDA's default stream."""

    kind = "stream"

    @property
    def handle(self) -> int:
        return int(self._live)

    def close(self) -> None:
        """Free it. Work in it still runs to its end."""
        self._give_back()

    def _destroy(self, runtime: Any, handle: Any) -> Any:
        return runtime.cudaStreamDestroy(handle)


def describe_array(array: Array) -> str:
    return f"an array {array.shape} {array.dtype} ({array.nbytes} bytes)"


def _list_owned(owned: list[Owned]) -> str:
    kinds = [each.kind for each in owned]
    sizes = sum(each.nbytes for each in owned if isinstance(each, CudaMemory))
    counts = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    return f"{counts} ({size_text(sizes)} of device memory)"
