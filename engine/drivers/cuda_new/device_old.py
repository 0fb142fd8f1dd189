"""The real device: an NVIDIA GPU through cuda-python (`cuda.bindings`), loaded when a `CudaDevice` is made.

Memory is plain `cudaMalloc`, not a stream-ordered pool: an engine set takes one arena and keeps it, so there is nothing
a pool could use again, while its hidden reserve would be missing from what `memory` tells and from the networks' own
allocators. It is aligned to 256 bytes (CUDA C++ Programming Guide, device memory accesses).

The device is used through its primary context, which torch, ONNX Runtime and TensorRT share; nothing resets it.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import DeviceError, MissingExtraError, OutOfMemoryError
from dreammix_trt.core.files import size_text
from dreammix_trt.core.seam import Array, Stream
from dreammix_trt.engine.drivers.device import Graph, Mark
from dreammix_trt.engine.hardware import (
    CUDA_NEEDED,
    DRIVER_NEEDED,
    LEAST_CAPABILITY,
    cuda_text,
    why_kernels_do_not_fit,
)

_LOG = logging.getLogger(__name__)

# Errors after which every call in this process fails (driver_types.h: "This leaves the process in an inconsistent
# state and any further CUDA work will return the same error").
_LOSING: Final = frozenset({
    "cudaErrorECCUncorrectable", "cudaErrorNvlinkUncorrectable", "cudaErrorContained", "cudaErrorIllegalAddress",
    "cudaErrorLaunchTimeout", "cudaErrorContextIsDestroyed", "cudaErrorAssert", "cudaErrorHardwareStackError",
    "cudaErrorIllegalInstruction", "cudaErrorMisalignedAddress", "cudaErrorInvalidAddressSpace", "cudaErrorInvalidPc",
    "cudaErrorLaunchFailure", "cudaErrorTensorMemoryLeak", "cudaErrorExternalDevice", "cudaErrorMpsClientTerminated",
    "cudaErrorUnknown",
})  # fmt: skip


class Bindings:
    """cuda-python's modules `cuda.bindings.runtime` and `.driver`, and what their error codes mean.

    lost: why nothing works on the device any more, once an error was of that kind.
    """

    def __init__(self, runtime: Any, driver: Any) -> None:
        self.runtime, self.driver = runtime, driver
        self.lost: str | None = None

    @classmethod
    def load(cls) -> Bindings:
        """Import the package. Raises MissingExtraError, or DeviceError for one that does not load."""
        try:
            return cls(import_module("cuda.bindings.runtime"), import_module("cuda.bindings.driver"))
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                "cuda-python is not installed, a GPU needs it: `pip install 'dreammix-trt[cuda]'`"
            ) from error
        except (ImportError, OSError, RuntimeError) as error:
            raise DeviceError(
                f"cuda-python is installed but does not load ({error}); "
                "`pip install --force-reinstall 'cuda-python>=13,<14'`"
            ) from error

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a runtime function gives besides its error code. Raises DeviceError or OutOfMemoryError."""
        if self.lost:
            raise _lost(self.lost)
        error, *results = function(*arguments)
        if error != self.runtime.cudaError_t.cudaSuccess:
            raise self.failure(function.__name__, error)
        return results[0] if len(results) == 1 else tuple(results)

    def failure(self, what: str, error: Any) -> DeviceError:
        """The exception for an error code; remembers when the device is lost with it."""
        text = f"{what}: {self.runtime.cudaGetErrorString(error)[1].decode()} (CUDA error {int(error)})"
        self.runtime.cudaGetLastError()  # a later look at the last error must not find this one
        if error.name in _LOSING:
            self.lost = f"{text}; the device's context is lost and nothing runs in it any more: start the program again"
            return _lost(self.lost)
        if error == self.runtime.cudaError_t.cudaErrorMemoryAllocation:
            return OutOfMemoryError(f"{text}; close what else uses the GPU, or ask for less")
        return DeviceError(text)


class _Owned:
    """A resource of a device: given back once, by its owner or when the device closes."""

    kind = "resource"

    def __init__(self, device: CudaDevice, handle: Any) -> None:
        self._device, self._held = device, handle
        device._own(self)

    @property
    def _live(self) -> Any:
        if self._held is None:
            raise DeviceError(f"the {self.kind} is used after it was given back")
        return self._held

    def _give_back(self) -> None:
        if self._held is None:
            return
        self._device._outside_capture(f"giving back a {self.kind}")
        handle, self._held = self._held, None
        self._device._release(self, handle)

    def _destroy(self, runtime: Any, handle: Any) -> Any:
        """Call what destroys it; its result."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()


class CudaMemory(_Owned):
    """Device memory; any use of its arrays after `free` is the owner's fault."""

    kind = "memory"

    def __init__(self, device: CudaDevice, pointer: int, nbytes: int) -> None:
        self.nbytes = nbytes
        super().__init__(device, pointer)

    @property
    def pointer(self) -> int:
        return int(self._live)

    def free(self) -> None:
        """Give it back, after the work that is under way on the device; again does nothing."""
        self._give_back()

    def _destroy(self, runtime: Any, handle: Any) -> Any:
        return runtime.cudaFree(handle)


class CudaPinned(_Owned):
    """Page-locked host memory. Views of `array` must not outlive it."""

    kind = "pinned memory"

    def __init__(self, device: CudaDevice, pointer: int, nbytes: int) -> None:
        self.nbytes = nbytes
        super().__init__(device, pointer)

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """uint8 (nbytes,) over it."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.nbytes).from_address(int(self._live)))

    def free(self) -> None:
        """Give it back; again does nothing. No copy from or to it may be under way."""
        self._give_back()

    def _destroy(self, runtime: Any, handle: Any) -> Any:
        return runtime.cudaFreeHost(handle)


class CudaStream(_Owned):
    """A stream that does not wait for CUDA's default stream."""

    kind = "stream"

    @property
    def handle(self) -> int:
        return int(self._live)

    def close(self) -> None:
        """Give it back; work that is in it still runs to its end."""
        self._give_back()

    def _destroy(self, runtime: Any, handle: Any) -> Any:
        return runtime.cudaStreamDestroy(handle)


class CudaGraph(_Owned):
    """An instantiated graph, already on the device."""

    kind = "graph"

    def launch(self, stream: Stream) -> None:
        """Enqueue all of it."""
        self._device._call("cudaGraphLaunch", self._live, _handle(stream))

    def close(self) -> None:
        """Give it back; a launch that is under way must have ended."""
        self._give_back()

    def _destroy(self, runtime: Any, handle: Any) -> Any:
        return runtime.cudaGraphExecDestroy(handle)


class CudaMark:
    """A recorded event; it goes back to the device's spare ones when nobody holds the mark any more."""

    def __init__(self, device: CudaDevice, event: Any, timed: bool) -> None:
        self._device, self._event, self._timed = device, event, timed

    def passed(self) -> bool:
        """Whether the work before it is done; an error of that work is raised."""
        return self._device._passed(self._event)

    def seconds_since(self, earlier: Mark) -> float:
        """Device time between two passed marks that were made with timed=True; resolution about half a microsecond."""
        if not (isinstance(earlier, CudaMark) and earlier._timed and self._timed):
            raise ValueError("time lies between two marks made with timed=True")
        if not (self.passed() and earlier.passed()):
            raise ValueError("time lies between two marks that have passed; synchronize first")
        milliseconds: float = self._device._call("cudaEventElapsedTime", earlier._event, self._event)
        return milliseconds / 1000

    def __del__(self) -> None:
        self._device._spare[self._timed].append(self._event)  # no call: this may run in any thread, within a capture


class CudaDevice:
    """See `Device`. A context manager; `close` gives back what its owners did not, and logs it.

    Calls may come from any thread; one capture at a time in each. transferred: bytes copied so far between host and
    device by `upload` and `download` ("uploaded", "downloaded"). bindings, extension: instead of cuda-python and
    `dreammix_trt._cpp`, for tests.
    """

    def __init__(self, index: int = 0, *, bindings: Bindings | None = None, extension: Any = None) -> None:
        """Open the index-th GPU. Raises MissingExtraError without cuda-python; DeviceError where there is no driver,
        one too old, no such device or one too old."""
        self._bindings = bindings or Bindings.load()
        self._extension, self._kernels = extension, None
        self._index, self._closed = index, False
        self._cuda = _check_driver(self._bindings)
        self.name, self.capability = _check_device(self._bindings, index)
        self.transferred = {"uploaded": 0, "downloaded": 0}
        self._lock, self._thread = threading.Lock(), threading.local()
        self._owned: dict[int, _Owned] = {}
        self._events: list[Any] = []
        self._spare: dict[bool, list[Any]] = {False: [], True: []}
        self.memory()  # starts the context: errors belong here

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes on the device."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def allocate(self, nbytes: int) -> CudaMemory:
        """Memory aligned to 256 bytes, its content undefined. Raises OutOfMemoryError; never during a capture."""
        self._outside_capture("allocating")
        if nbytes < 0:
            raise ValueError(f"{nbytes} bytes")
        try:
            pointer = self._call("cudaMalloc", max(nbytes, 1))
        except OutOfMemoryError as error:
            free, total = self.memory()
            raise OutOfMemoryError(
                f"{size_text(nbytes)} of device memory do not fit: {size_text(free)} of {size_text(total)} are free on "
                f"the {self.name}; close what else uses it, or ask for less"
            ) from error
        return CudaMemory(self, int(pointer), nbytes)

    def pinned(self, nbytes: int) -> CudaPinned:
        """Page-locked host memory. Raises OutOfMemoryError; never during a capture."""
        self._outside_capture("allocating")
        if nbytes < 0:
            raise ValueError(f"{nbytes} bytes")
        flags = self._bindings.runtime.cudaHostAllocPortable
        return CudaPinned(self, int(self._call("cudaHostAlloc", max(nbytes, 1), flags)), nbytes)

    def stream(self) -> CudaStream:
        """A new stream."""
        flags = self._bindings.runtime.cudaStreamNonBlocking
        return CudaStream(self, self._call("cudaStreamCreateWithFlags", flags))

    def upload(self, to: Array, source: npt.NDArray[Any], stream: Stream) -> None:
        """Copy contiguous host memory of `to`'s size to the device; pinned memory must stay as it is until then."""
        self._outside_capture("copying from the host")
        pointer = self._host(source, to)
        self._copy(to.pointer, pointer, to.nbytes, self._kinds.cudaMemcpyHostToDevice, stream)
        self._count("uploaded", to.nbytes)

    def download(self, to: npt.NDArray[Any], source: Array, stream: Stream) -> None:
        """The other way; `to` is filled when the stream has got there."""
        self._outside_capture("copying to the host")
        if not to.flags.writeable:
            raise ValueError("the host array is read-only")
        pointer = self._host(to, source)
        self._copy(pointer, source.pointer, source.nbytes, self._kinds.cudaMemcpyDeviceToHost, stream)
        self._count("downloaded", source.nbytes)

    def copy(self, to: Array, source: Array, stream: Stream) -> None:
        """Within the device; both of the same size in bytes."""
        if to.nbytes != source.nbytes:
            raise ValueError(f"{_told(source)} does not have the size of {_told(to)}")
        self._check_bounds(to)
        self._check_bounds(source)
        self._copy(to.pointer, source.pointer, to.nbytes, self._kinds.cudaMemcpyDeviceToDevice, stream)

    def clear(self, to: Array, stream: Stream) -> None:
        """Set all bytes to zero."""
        self._check_bounds(to)
        if to.nbytes:
            self._call("cudaMemsetAsync", to.pointer, 0, to.nbytes, _handle(stream))

    def kernel(self, name: str, stream: Stream, **arguments: Any) -> None:
        """Enqueue a kernel of `dreammix_trt._cpp.gpu`; an Array stands for its pointer, None for no pointer.

        Raises ValueError for arguments that the kernel refuses, DeviceError where there is no such kernel.
        """
        function = getattr(self.require_kernels(), name, None)
        if function is None:
            raise DeviceError(f"the C++ extension has no kernel {name!r}; install dreammix-trt again")
        handle = _handle(stream)
        self._make_current()
        try:
            function(**{key: _pointer(value) for key, value in arguments.items()}, stream=handle)
        except RuntimeError as error:
            raise self._kernel_failure(name, error) from error

    def work(self, label: str, stream: Stream, run: Callable[[], None]) -> None:
        """A network enqueues its own work, now."""
        self._make_current()
        run()

    def capture(self, stream: Stream, record: Callable[[], None]) -> Graph:
        """What `record` enqueues in `stream`, as a graph; none of it runs now.

        When `record` raises, nothing is left of the capture and the exception goes on. Other threads may go on with
        other streams meanwhile, allocations included (the capture's mode is thread-local).
        """
        self._outside_capture("another capture")
        handle, runtime = _handle(stream), self._bindings.runtime
        self._call("cudaStreamBeginCapture", handle, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        self._thread.capturing = True
        try:
            record()
        except BaseException:
            self._discard(handle)
            raise
        finally:
            self._thread.capturing = False
        template = self._call("cudaStreamEndCapture", handle)
        try:
            graph = CudaGraph(self, self._call("cudaGraphInstantiate", template, 0))
        finally:
            runtime.cudaGraphDestroy(template)
        try:
            self._call("cudaGraphUpload", graph._live, handle)
        except BaseException:
            graph.close()
            raise
        return graph

    def mark(self, stream: Stream, *, timed: bool = False) -> CudaMark:
        """A point in a stream; timed marks tell the time between them and cost a little more."""
        self._outside_capture("a mark")
        handle = _handle(stream)
        try:
            event = self._spare[timed].pop()
        except IndexError:
            runtime = self._bindings.runtime
            flags = runtime.cudaEventDefault if timed else runtime.cudaEventDisableTiming
            event = self._call("cudaEventCreateWithFlags", flags)
            with self._lock:
                self._events.append(event)
        mark = CudaMark(self, event, timed)
        self._call("cudaEventRecord", event, handle)
        return mark

    def synchronize(self, stream: Stream) -> None:
        """Wait for everything in the stream; an error of that work is raised here. Never during a capture."""
        self._outside_capture("waiting")
        self._call("cudaStreamSynchronize", _handle(stream))

    def require_kernels(self) -> Any:
        """`dreammix_trt._cpp.gpu`, after a look whether its kernels run here; raises DeviceError otherwise."""
        if self._kernels is None:
            self._kernels = _check_kernels(self._extension, self.name, self.capability, self._cuda)
        return self._kernels

    def close(self) -> None:
        """Wait for the streams that are left, give everything back; again does nothing."""
        if self._closed:
            return
        self._outside_capture("closing the device")
        left = list(self._owned.values())
        for stream in (owned for owned in left if isinstance(owned, CudaStream)):
            self._quietly("cudaStreamSynchronize", stream.handle)
        if left:
            _LOG.warning("the %s was closed with %s not given back", self.name, _listed(left))
        for owned in sorted(left, key=lambda owned: isinstance(owned, CudaStream)):
            owned._give_back()
        for event in self._events:
            self._quietly("cudaEventDestroy", event)
        self._closed = True

    def __enter__(self) -> CudaDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _kinds(self) -> Any:
        return self._bindings.runtime.cudaMemcpyKind

    def _make_current(self) -> None:
        """Calls may come from any thread, and others in this process may have chosen another device in it."""
        if self._closed:
            raise DeviceError(f"the {self.name} is used after it was closed")
        self._bindings.call(self._bindings.runtime.cudaSetDevice, self._index)

    def _call(self, name: str, *arguments: Any) -> Any:
        self._make_current()
        return self._bindings.call(getattr(self._bindings.runtime, name), *arguments)

    def _quietly(self, name: str, *arguments: Any) -> None:
        """A call on the way out: what goes wrong is logged."""
        try:
            self._call(name, *arguments)
        except DeviceError as error:
            _LOG.warning("closing the %s: %s", self.name, error)

    def _own(self, owned: _Owned) -> None:
        with self._lock:
            self._owned[id(owned)] = owned

    def _release(self, owned: _Owned, handle: Any) -> None:
        with self._lock:
            del self._owned[id(owned)]
        if self._bindings.lost:  # then nothing can be given back, and the system takes it all at the end
            return
        self._make_current()
        error, *_ = owned._destroy(self._bindings.runtime, handle)
        if error != self._bindings.runtime.cudaError_t.cudaSuccess:
            # most likely an error of earlier work, which whoever waits for that work is told as well
            _LOG.warning("giving back a %s: %s", owned.kind, self._bindings.failure("CUDA", error))

    def _outside_capture(self, what: str) -> None:
        if getattr(self._thread, "capturing", False):
            raise DeviceError(f"{what} is not allowed within a capture")

    def _discard(self, handle: int) -> None:
        """End a capture that failed."""
        runtime = self._bindings.runtime
        error, template = runtime.cudaStreamEndCapture(handle)
        if error == runtime.cudaError_t.cudaSuccess and template is not None:
            runtime.cudaGraphDestroy(template)
        runtime.cudaGetLastError()

    def _passed(self, event: Any) -> bool:
        self._outside_capture("asking for a mark")
        self._make_current()
        runtime = self._bindings.runtime
        (error,) = runtime.cudaEventQuery(event)
        if error == runtime.cudaError_t.cudaErrorNotReady:
            return False
        if error != runtime.cudaError_t.cudaSuccess:
            raise self._bindings.failure("cudaEventQuery", error)
        return True

    def _host(self, array: npt.NDArray[Any], other: Array) -> int:
        """Where a host array starts that is copied from or to `other`."""
        if not array.flags.c_contiguous or array.nbytes != other.nbytes:
            raise ValueError(
                f"a host array {array.shape} {array.dtype} must be contiguous and have the size of {_told(other)}"
            )
        self._check_bounds(other)
        return int(array.ctypes.data)

    def _copy(self, to: int, source: int, nbytes: int, kind: Any, stream: Stream) -> None:
        if nbytes:
            self._call("cudaMemcpyAsync", to, source, nbytes, kind, _handle(stream))

    def _check_bounds(self, array: Array) -> None:
        """What begins in memory of this device ends in it; memory of others (a network's own) is their affair."""
        if array.pointer == 0 and array.nbytes:
            raise ValueError(f"{_told(array)} has no memory")
        with self._lock:
            memories = [owned for owned in self._owned.values() if isinstance(owned, CudaMemory)]
        for memory in memories:
            beyond = array.pointer + array.nbytes - memory.pointer - memory.nbytes
            if memory.pointer <= array.pointer < memory.pointer + memory.nbytes and beyond > 0:
                raise ValueError(f"{_told(array)} reaches {beyond} bytes beyond its memory")

    def _count(self, way: str, nbytes: int) -> None:
        with self._lock:
            self.transferred[way] += nbytes

    def _kernel_failure(self, name: str, error: RuntimeError) -> DeviceError:
        """The extension has a CUDA runtime of its own, so its errors arrive as texts; whether all is lost is asked."""
        runtime = self._bindings.runtime
        state, *_ = runtime.cudaMemGetInfo()
        if state != runtime.cudaError_t.cudaSuccess and state.name in _LOSING:
            return self._bindings.failure(f"kernel {name}", state)
        if "out of memory" in str(error):
            return OutOfMemoryError(f"kernel {name}: {error}")
        return DeviceError(f"kernel {name}: {error}")


def _check_driver(bindings: Bindings) -> int:
    """The CUDA version that the driver serves, as 1000 major + 10 minor. Raises DeviceError where it is too old."""
    remedy = f"install an NVIDIA driver {DRIVER_NEEDED} or newer, or load with device='cpu' (`--device cpu`)"
    driver = bindings.driver
    try:
        (error,) = driver.cuInit(0)
    except RuntimeError as missing:  # cuda-python finds the driver's library at the first call
        raise DeviceError(f"there is no NVIDIA driver here; {remedy}") from missing
    if error != driver.CUresult.CUDA_SUCCESS:
        reason = {
            driver.CUresult.CUDA_ERROR_NO_DEVICE: "finds no device; is the GPU visible (CUDA_VISIBLE_DEVICES)?",
            driver.CUresult.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: "does not fit its library; restart the computer",
            driver.CUresult.CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE: f"does not fit this device; {remedy}",
        }.get(error, f"does not start; {remedy}")
        raise DeviceError(f"the NVIDIA driver {reason} (CUDA error {int(error)})")
    error, served = driver.cuDriverGetVersion()
    if error != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"the NVIDIA driver does not tell its version (CUDA error {int(error)}); {remedy}")
    # CUDA's minor versions are compatible: any driver of the same major version serves
    needed = max(CUDA_NEEDED, bindings.call(bindings.runtime.cudaRuntimeGetVersion) // 1000 * 1000)
    if served < needed:
        raise DeviceError(
            f"the NVIDIA driver serves CUDA {cuda_text(served)}, the installed cuda-python needs {cuda_text(needed)}; "
            f"{remedy}"
        )
    return int(served)


def _check_device(bindings: Bindings, index: int) -> tuple[str, str]:
    """(name, capability) of a device. Raises DeviceError when there is no such one or it is too old."""
    runtime = bindings.runtime
    count = bindings.call(runtime.cudaGetDeviceCount)
    properties = [bindings.call(runtime.cudaGetDeviceProperties, each) for each in range(count)]
    names = [entry.name.partition(b"\0")[0].decode(errors="replace") for entry in properties]
    if not 0 <= index < count:
        listed = ", ".join(f"{each}: {name}" for each, name in enumerate(names))
        raise DeviceError(f"there is no GPU {index} here, only {listed}")
    capability = (int(properties[index].major), int(properties[index].minor))
    if capability < LEAST_CAPABILITY:
        least = "sm_{}{}".format(*LEAST_CAPABILITY)
        raise DeviceError(
            f"the {names[index]} is an sm_{capability[0]}{capability[1]}, GPUs from {least} on (RTX 20, GTX 16) are "
            "needed; load with device='cpu'"
        )
    return names[index], f"sm_{capability[0]}{capability[1]}"


def _check_kernels(extension: Any, name: str, capability: str, driver: int) -> Any:
    """The extension's `gpu` module. Raises DeviceError when it is missing or its kernels do not run on this GPU."""
    if extension is None:
        try:
            extension = import_module("dreammix_trt._cpp")
        except ImportError:
            extension = object()
    info = extension.build_info() if hasattr(extension, "build_info") else {}
    why = why_kernels_do_not_fit(info.get("cuda"), capability, driver)
    if why:
        raise DeviceError(f"the {name} ({capability}) cannot be used: {why}")
    return extension.gpu


def _lost(why: str) -> DeviceError:
    """An error that says so: who serves requests must not try the next one on this device."""
    error = DeviceError(why)
    error.lost = True
    return error


def _handle(stream: Stream) -> int:
    handle = stream.handle
    if handle is None:
        raise DeviceError("the stream is none of a GPU")
    return handle


def _pointer(value: Any) -> Any:
    if value is None:
        return 0
    return value.pointer if isinstance(value, Array) else value


def _told(array: Array) -> str:
    return f"an array {array.shape} {array.dtype} ({array.nbytes} bytes)"


def _listed(owned: list[_Owned]) -> str:
    kinds = [each.kind for each in owned]
    sizes = sum(each.nbytes for each in owned if isinstance(each, CudaMemory))
    counts = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    return f"{counts} ({size_text(sizes)} of device memory)"
