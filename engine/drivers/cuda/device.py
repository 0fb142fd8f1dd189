"""The CUDA device: carries out what the runtime needs from a device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy.typing as npt

from dreammix_trt.core.errors import DeviceError, OutOfMemoryError
from dreammix_trt.core.files import size_text
from dreammix_trt.core.seam import Array, Stream
from dreammix_trt.engine.drivers.cuda.bindings import Bindings
from dreammix_trt.engine.drivers.cuda.checks import check_device, check_driver, check_kernels
from dreammix_trt.engine.drivers.cuda.context import Context, handle_of
from dreammix_trt.engine.drivers.cuda.graphs import CudaGraph, capture
from dreammix_trt.engine.drivers.cuda.marks import CudaMark, Marks
from dreammix_trt.engine.drivers.cuda.resources import Belongings, CudaMemory, CudaPinned, CudaStream, describe_array


class CudaDevice:
    """See `Device`. A context manager. `close` frees what its owners did not free, and logs it.

    transferred: bytes copied so far between host and device by `upload` and `download` ("uploaded", "downloaded").

    Calls may come from any thread; one capture at a time in each.
    """

    def __init__(self, index: int = 0, *, bindings: Bindings | None = None, extension: Any = None) -> None:
        """Open the index-th GPU.

        bindings: in place of cuda-python, for tests.
        extension: in place of `dreammix_trt._cpp`, for tests.

        Raises MissingExtraError without cuda-python; DeviceError without a driver or device, or where either is too
        old.
        """
        bindings = bindings or Bindings.load()
        self._cuda = check_driver(bindings)
        self.name, self.capability = check_device(bindings, index)
        self.transferred = {"uploaded": 0, "downloaded": 0}
        self._extension, self._kernels = extension, None
        self._lock = threading.Lock()
        self._context = Context(bindings, index, self.name)
        self._belongings, self._marks = Belongings(self._context), Marks(self._context)
        self.memory()  # starts the context: errors belong here

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes on the device."""
        free, total = self._context.call("cudaMemGetInfo")
        return int(free), int(total)

    def allocate(self, nbytes: int) -> CudaMemory:
        """Allocate memory aligned to 256 bytes, not initialised. Raises OutOfMemoryError; never during a capture."""
        self._context.check_outside_capture("allocating")
        if nbytes < 0:
            raise ValueError(f"{nbytes} bytes")
        try:
            pointer = self._context.call("cudaMalloc", max(nbytes, 1))
        except OutOfMemoryError as error:
            free, total = self.memory()
            raise OutOfMemoryError(
                f"{size_text(nbytes)} of device memory do not fit: {size_text(free)} of {size_text(total)} are free on "
                f"the {self.name}; close what else uses it, or ask for less"
            ) from error
        return CudaMemory(self._belongings, int(pointer), nbytes)

    def allocate_pinned(self, nbytes: int) -> CudaPinned:
        """Allocate page-locked host memory. Raises OutOfMemoryError; never during a capture."""
        self._context.check_outside_capture("allocating")
        if nbytes < 0:
            raise ValueError(f"{nbytes} bytes")
        flags = self._context.runtime.cudaHostAllocPortable
        return CudaPinned(self._belongings, int(self._context.call("cudaHostAlloc", max(nbytes, 1), flags)), nbytes)

    def make_stream(self) -> CudaStream:
        """Make a new stream."""
        flags = self._context.runtime.cudaStreamNonBlocking
        return CudaStream(self._belongings, self._context.call("cudaStreamCreateWithFlags", flags))

    def upload(self, to: Array, source: npt.NDArray[Any], stream: Stream) -> None:
        """Copy contiguous host memory of `to`'s size to the device. Pinned memory must stay unchanged until then."""
        self._context.check_outside_capture("copying from the host")
        pointer = self._check_host(source, to)
        self._copy(to.pointer, pointer, to.nbytes, self._kinds.cudaMemcpyHostToDevice, stream)
        self._count("uploaded", to.nbytes)

    def download(self, to: npt.NDArray[Any], source: Array, stream: Stream) -> None:
        """Copy from the device to host memory; `to` is filled once the stream reaches the copy."""
        self._context.check_outside_capture("copying to the host")
        if not to.flags.writeable:
            raise ValueError("the host array is read-only")
        pointer = self._check_host(to, source)
        self._copy(pointer, source.pointer, source.nbytes, self._kinds.cudaMemcpyDeviceToHost, stream)
        self._count("downloaded", source.nbytes)

    def copy(self, to: Array, source: Array, stream: Stream) -> None:
        """Copy within the device; both arrays have the same size in bytes."""
        if to.nbytes != source.nbytes:
            raise ValueError(f"{describe_array(source)} does not have the size of {describe_array(to)}")
        self._belongings.check_bounds(to)
        self._belongings.check_bounds(source)
        self._copy(to.pointer, source.pointer, to.nbytes, self._kinds.cudaMemcpyDeviceToDevice, stream)

    def clear(self, to: Array, stream: Stream) -> None:
        """Set all bytes to zero."""
        self._belongings.check_bounds(to)
        if to.nbytes:
            self._context.call("cudaMemsetAsync", to.pointer, 0, to.nbytes, handle_of(stream))

    def launch_kernel(self, name: str, stream: Stream, **arguments: Any) -> None:
        """Enqueue a kernel of `dreammix_trt._cpp.gpu`.

        arguments: an Array stands for its pointer, None for no pointer.

        Raises ValueError for arguments that the kernel refuses, DeviceError for an unknown kernel.
        """
        function = getattr(self.require_kernels(), name, None)
        if function is None:
            raise DeviceError(f"the C++ extension has no kernel {name!r}; install dreammix-trt again")
        handle = handle_of(stream)
        self._context.make_current()
        try:
            function(**{key: _pointer(value) for key, value in arguments.items()}, stream=handle)
        except RuntimeError as error:
            raise self._context.bindings.explain_kernel_failure(name, error) from error

    def enqueue_work(self, label: str, stream: Stream, run: Callable[[], None]) -> None:
        """Let a network enqueue its own work, now."""
        self._context.make_current()
        run()

    def capture(self, stream: Stream, record: Callable[[], None]) -> CudaGraph:
        """Capture what `record` enqueues in `stream` as a graph. None of it runs now.

        When `record` raises, nothing of the capture remains and the exception goes on. Other threads may use other
        streams meanwhile, and may allocate (the capture's mode is thread-local).
        """
        return capture(self._belongings, stream, record)

    def mark(self, stream: Stream, *, timed: bool = False) -> CudaMark:
        """Mark a point in a stream.

        timed: whether the time between marks can be measured; such marks cost a little more.
        """
        return self._marks.make(stream, timed)

    def synchronize(self, stream: Stream) -> None:
        """Wait for everything in the stream. An error of that work is raised here. Never during a capture."""
        self._context.check_outside_capture("waiting")
        self._context.call("cudaStreamSynchronize", handle_of(stream))

    def require_kernels(self) -> Any:
        """`dreammix_trt._cpp.gpu`, checked once. Raises DeviceError where its kernels do not run here."""
        if self._kernels is None:
            self._kernels = check_kernels(self._extension, self.name, self.capability, self._cuda)
        return self._kernels

    def close(self) -> None:
        """Wait for the remaining streams and free everything. Again does nothing."""
        if self._context.closed:
            return
        self._context.check_outside_capture("closing the device")
        self._belongings.release_all()
        self._marks.close()
        self._context.closed = True

    def __enter__(self) -> CudaDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _kinds(self) -> Any:
        return self._context.runtime.cudaMemcpyKind

    def _check_host(self, array: npt.NDArray[Any], other: Array) -> int:
        """The address of a host array that is copied from or to `other`."""
        if not array.flags.c_contiguous or array.nbytes != other.nbytes:
            raise ValueError(
                f"a host array {array.shape} {array.dtype} must be contiguous, of the size of {describe_array(other)}"
            )
        self._belongings.check_bounds(other)
        return int(array.ctypes.data)

    def _copy(self, to: int, source: int, nbytes: int, kind: Any, stream: Stream) -> None:
        if nbytes:
            self._context.call("cudaMemcpyAsync", to, source, nbytes, kind, handle_of(stream))

    def _count(self, way: str, nbytes: int) -> None:
        with self._lock:
            self.transferred[way] += nbytes


def _pointer(value: Any) -> Any:
    if value is None:
        return 0
    return value.pointer if isinstance(value, Array) else value
