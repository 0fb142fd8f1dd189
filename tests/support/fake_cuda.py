"""A GPU that is not there: the parts of `cuda.bindings` that engine/gpu/cuda.py uses, by the real calling convention.

Every function returns (error, ...) with the real error numbers, device memory is host memory, and what a stream is
given runs when somebody waits for it, so that a copy that is read too early is seen. The rules are CUDA's: memory that
is given back twice, or used afterwards, is an error; so is waiting or allocating in a thread that captures, which
spoils the capture; after an illegal access everything fails.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class cudaError_t(enum.IntEnum):
    """driver_types.h"""

    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorInvalidDevice = 101
    cudaErrorInvalidResourceHandle = 400
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorUnknown = 999


class CUresult(enum.IntEnum):
    """cuda.h"""

    CUDA_SUCCESS = 0
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 803
    CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE = 804
    CUDA_ERROR_UNKNOWN = 999


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


E = cudaError_t
Task = Callable[[], None]


class Handle:
    """An opaque handle, an int for whoever asks."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __int__(self) -> int:
        return self.number


class Stream:
    def __init__(self) -> None:
        self.waiting: list[Task] = []
        self.capture: list[Task] | None = None
        self.owner = 0
        self.spoiled = False


class Event:
    def __init__(self, timed: bool) -> None:
        self.timed, self.time, self.recorded = timed, 0.0, False
        self.pending = 0


def _check_call(method: Callable[..., Any]) -> Callable[..., Any]:
    """What holds for every call: a lost device stays lost, and a failed call is remembered as the last error."""

    @functools.wraps(method)
    def call(self: FakeCuda, *arguments: Any) -> Any:
        self.calls.append(method.__name__)
        if self.lost and method.__name__ not in ("cudaGetErrorString", "cudaGetLastError"):
            return self._fail(E.cudaErrorIllegalAddress, method)
        result = method(self, *arguments)
        if result[0] not in (E.cudaSuccess, E.cudaErrorNotReady):
            self.last = result[0]
        return result

    return call


class FakeState:
    """What a fake CUDA holds: devices, memory, streams with their work, events and graphs; and what tests ask of it."""

    def __init__(
        self,
        *devices: tuple[str, int, int, int],
        served: int = 13020,
        runtime: int = 13040,
        starts: CUresult | Exception = CUresult.CUDA_SUCCESS,
    ) -> None:
        self.devices = devices or (("Fake RTX", 8, 9, 1 << 20),)
        self.served, self.version, self.starts = served, runtime, starts
        self.current, self.lost, self.last = threading.local(), False, E.cudaSuccess
        self.calls: list[str] = []
        self.memory: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.streams: dict[int, Stream] = {}
        self.events: dict[int, Event] = {}
        self.templates: dict[int, list[Task]] = {}
        self.graphs: dict[int, list[Task]] = {}
        self.uploaded: set[int] = set()
        self._numbers = iter(range(1000, 1 << 30))

    # for tests

    def enqueue(self, stream: int, task: Task) -> None:
        """Work of a kernel."""
        assert self._enqueue(stream, task) == (E.cudaSuccess,)

    def lose(self) -> None:
        """An illegal access: every further call fails."""
        self.lost = True

    def list_left(self) -> dict[str, int]:
        """What was made and not given back."""
        held = ("memory", "pinned", "streams", "events", "templates", "graphs")
        return {name: len(getattr(self, name)) for name in held if getattr(self, name)}

    def _enqueue(self, stream: int, task: Task) -> Any:
        held = self.streams.get(stream)
        if held is None:
            return (E.cudaErrorInvalidResourceHandle,)
        (held.waiting if held.capture is None else held.capture).append(task)
        return (E.cudaSuccess,)

    def _run(self, stream: int) -> None:
        while self.streams[stream].waiting and not self.lost:
            self.streams[stream].waiting.pop(0)()

    def _spoils(self) -> bool:
        """Whether this thread captures: then the call is not allowed, and the capture is of no use any more."""
        mine = [
            held for held in self.streams.values() if held.capture is not None and held.owner == threading.get_ident()
        ]
        for held in mine:
            held.spoiled = True
        return bool(mine)

    def _allocate(self, place: dict[int, Any], size: int) -> int:
        room = (ctypes.c_uint8 * (size + 256))()
        pointer = -(-ctypes.addressof(room) // 256) * 256
        place[pointer] = memoryview(room)[256:]  # keeps it, and knows the size
        return pointer

    def _free(self, place: dict[int, Any], pointer: int) -> Any:
        if self._spoils():
            return (E.cudaErrorStreamCaptureUnsupported,)
        return (E.cudaErrorInvalidValue if place.pop(pointer, None) is None else E.cudaSuccess,)

    def _is_inside(self, place: dict[int, Any], pointer: int, count: int) -> bool:
        return any(start <= pointer and pointer + count <= start + len(room) for start, room in place.items())

    def _make_handle(self, place: dict[int, Any], value: Any) -> Handle:
        handle = Handle(next(self._numbers))
        place[int(handle)] = value
        return handle

    def _fail(self, error: cudaError_t, method: Callable[..., Any]) -> Any:
        """As many values as the real function returns."""
        gives = {
            "cudaMemGetInfo": 2,
            "cudaMalloc": 1,
            "cudaHostAlloc": 1,
            "cudaStreamCreateWithFlags": 1,
            "cudaStreamEndCapture": 1,
            "cudaGraphInstantiate": 1,
            "cudaEventCreateWithFlags": 1,
            "cudaEventElapsedTime": 1,
        }
        return error, *[None] * gives.get(method.__name__, 0)


class FakeCuda(FakeState):
    """Both modules in one: `runtime` and `driver` of `Bindings`.

    devices: (name, major, minor, bytes of memory). starts: what cuInit gives, or an exception that it raises.
    """

    cudaError_t, CUresult = cudaError_t, CUresult
    cudaMemcpyKind, cudaStreamCaptureMode = cudaMemcpyKind, cudaStreamCaptureMode
    cudaHostAllocPortable, cudaStreamNonBlocking, cudaEventDefault, cudaEventDisableTiming = 1, 1, 0, 2

    # the driver

    def cuInit(self, flags: int) -> tuple[CUresult]:
        if isinstance(self.starts, Exception):
            raise self.starts
        return (self.starts,)

    def cuDriverGetVersion(self) -> tuple[CUresult, int]:
        return CUresult.CUDA_SUCCESS, self.served

    # the device

    @_check_call
    def cudaRuntimeGetVersion(self) -> Any:
        return E.cudaSuccess, self.version

    @_check_call
    def cudaGetDeviceCount(self) -> Any:
        return E.cudaSuccess, len(self.devices)

    @_check_call
    def cudaGetDeviceProperties(self, device: int) -> Any:
        name, major, minor, _ = self.devices[device]
        return E.cudaSuccess, SimpleNamespace(name=name.encode() + b"\0\0rest", major=major, minor=minor)

    @_check_call
    def cudaSetDevice(self, device: int) -> Any:
        if not 0 <= device < len(self.devices):
            return (E.cudaErrorInvalidDevice,)
        self.current.device = device
        return (E.cudaSuccess,)

    @_check_call
    def cudaMemGetInfo(self) -> Any:
        total = self.devices[self.current.device][3]
        return E.cudaSuccess, total - sum(len(memory) for memory in self.memory.values()), total

    def cudaGetErrorString(self, error: cudaError_t) -> Any:
        return E.cudaSuccess, f"the text of {error.name}".encode()

    def cudaGetLastError(self) -> Any:
        error, self.last = self.last, E.cudaSuccess
        return (error,)

    # memory

    @_check_call
    def cudaMalloc(self, size: int) -> Any:
        if self._spoils():
            return E.cudaErrorStreamCaptureUnsupported, None
        if size > self.cudaMemGetInfo()[1]:
            return E.cudaErrorMemoryAllocation, None
        return E.cudaSuccess, self._allocate(self.memory, size)

    @_check_call
    def cudaFree(self, devPtr: int) -> Any:
        return self._free(self.memory, devPtr)

    @_check_call
    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        return E.cudaSuccess, self._allocate(self.pinned, size)

    @_check_call
    def cudaFreeHost(self, ptr: int) -> Any:
        return self._free(self.pinned, ptr)

    @_check_call
    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: int) -> Any:
        ours = {
            cudaMemcpyKind.cudaMemcpyHostToDevice: (dst,),
            cudaMemcpyKind.cudaMemcpyDeviceToHost: (src,),
            cudaMemcpyKind.cudaMemcpyDeviceToDevice: (dst, src),
        }[kind]
        if not all(self._is_inside(self.memory, pointer, count) for pointer in ours):
            return (E.cudaErrorInvalidValue,)
        if kind == cudaMemcpyKind.cudaMemcpyHostToDevice and not self._is_inside(self.pinned, src, count):
            staged = ctypes.string_at(src, count)  # pageable memory is read before the call returns
            return self._enqueue(stream, lambda: ctypes.memmove(dst, staged, count))
        done = self._enqueue(stream, lambda: ctypes.memmove(dst, src, count))
        if kind == cudaMemcpyKind.cudaMemcpyDeviceToHost and not self._is_inside(self.pinned, dst, count):
            self._run(stream)  # pageable memory is written before the call returns
        return done

    @_check_call
    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: int) -> Any:
        if not self._is_inside(self.memory, devPtr, count):
            return (E.cudaErrorInvalidValue,)
        return self._enqueue(stream, lambda: ctypes.memset(devPtr, value, count))

    # streams

    @_check_call
    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        assert flags == self.cudaStreamNonBlocking
        return E.cudaSuccess, self._make_handle(self.streams, Stream())

    @_check_call
    def cudaStreamDestroy(self, stream: Any) -> Any:
        if int(stream) not in self.streams:
            return (E.cudaErrorInvalidResourceHandle,)
        self._run(int(stream))
        del self.streams[int(stream)]
        return (E.cudaSuccess,)

    @_check_call
    def cudaStreamSynchronize(self, stream: int) -> Any:
        if self._spoils():
            return (E.cudaErrorStreamCaptureUnsupported,)
        if stream not in self.streams:
            return (E.cudaErrorInvalidResourceHandle,)
        self._run(stream)
        return (E.cudaErrorIllegalAddress if self.lost else E.cudaSuccess,)

    @_check_call
    def cudaStreamBeginCapture(self, stream: int, mode: cudaStreamCaptureMode) -> Any:
        self.streams[stream].capture, self.streams[stream].spoiled = [], False
        self.streams[stream].owner = threading.get_ident()
        return (E.cudaSuccess,)

    @_check_call
    def cudaStreamEndCapture(self, stream: int) -> Any:
        held = self.streams[stream]
        tasks, held.capture = held.capture, None
        if tasks is None or held.spoiled:
            return E.cudaErrorStreamCaptureInvalidated, None
        return E.cudaSuccess, self._make_handle(self.templates, tasks)

    # graphs

    @_check_call
    def cudaGraphInstantiate(self, graph: Handle, flags: int) -> Any:
        return E.cudaSuccess, self._make_handle(self.graphs, list(self.templates[int(graph)]))

    @_check_call
    def cudaGraphUpload(self, graphExec: Handle, stream: int) -> Any:
        self.uploaded.add(int(graphExec))
        return (E.cudaSuccess,)

    @_check_call
    def cudaGraphLaunch(self, graphExec: Handle, stream: int) -> Any:
        for task in self.graphs[int(graphExec)]:
            self._enqueue(stream, task)
        return (E.cudaSuccess,)

    @_check_call
    def cudaGraphDestroy(self, graph: Handle) -> Any:
        del self.templates[int(graph)]
        return (E.cudaSuccess,)

    @_check_call
    def cudaGraphExecDestroy(self, graphExec: Handle) -> Any:
        del self.graphs[int(graphExec)]
        return (E.cudaSuccess,)

    # events

    @_check_call
    def cudaEventCreateWithFlags(self, flags: int) -> Any:
        return E.cudaSuccess, self._make_handle(self.events, Event(flags == self.cudaEventDefault))

    @_check_call
    def cudaEventRecord(self, event: Handle, stream: int) -> Any:
        held = self.events[int(event)]
        held.recorded, held.pending = True, held.pending + 1

        def reached() -> None:
            held.pending, held.time = held.pending - 1, time.perf_counter()

        return self._enqueue(stream, reached)

    @_check_call
    def cudaEventQuery(self, event: Handle) -> Any:
        return (E.cudaErrorNotReady if self.events[int(event)].pending else E.cudaSuccess,)

    @_check_call
    def cudaEventElapsedTime(self, start: Handle, end: Handle) -> Any:
        first, last = self.events[int(start)], self.events[int(end)]
        if not (first.timed and last.timed and first.recorded and last.recorded):
            return E.cudaErrorInvalidResourceHandle, None
        if first.pending or last.pending:
            return E.cudaErrorNotReady, None
        return E.cudaSuccess, 1000 * (last.time - first.time)

    @_check_call
    def cudaEventDestroy(self, event: Handle) -> Any:
        del self.events[int(event)]
        return (E.cudaSuccess,)
