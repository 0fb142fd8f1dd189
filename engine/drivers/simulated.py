"""A device without a GPU: memory is the host's, kernels are the same sources run there, and everything is recorded.

For tests of the runtime's order and arithmetic, and for apps that want to try their integration:

    with DreamMix.load("engines/mug") as host:  # an engine for ONNX Runtime
        device = SimulatedDevice()
        networks = SimulatedNetworks(device, host.networks)
        options = Options(largest_picture=512 * 512)
        with DreamMix.on_device(device, networks, host.tokenizers, (), options, owned=(device,)) as dm:
            dm.inpaint(...)

It needs the C++ extension. Times are the host's, and every network's weights count as one MiB. It refuses what would go
wrong silently on a GPU: allocation, waiting or host copies within a capture, work on freed memory, and copies beyond
the end of an array. Work runs at once. With `late`, for tests, it runs as late as on a GPU.
"""

from __future__ import annotations

import bisect
import importlib
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.axes import Sides, Tensor
from dreammix_trt.core.errors import DeviceError, OutOfMemoryError
from dreammix_trt.core.networks import is_twin, plain_name, twin_name
from dreammix_trt.core.seam import Array, Stream
from dreammix_trt.core.slots import Slot
from dreammix_trt.engine.drivers.device import Memory

_ALIGNMENT = 256


@dataclass(frozen=True)
class RecordEntry:
    """One thing that happened.

    kind: "kernel", "work", "copy", "clear", "upload", "download", "allocate", "pinned", "free", "capture", "launch",
        "synchronize" or "mark".
    name: of the kernel or the work; of memory its bytes.
    arrays: those that it touches.
    graph: number of the graph to which it belongs, or None.
    """

    kind: str
    name: str = ""
    arrays: Mapping[str, Array] = field(default_factory=dict)
    graph: int | None = None


@dataclass(frozen=True)
class _Task:
    entry: RecordEntry
    run: Callable[[], None]


class SimulatedDevice:
    """The `Device` of engine/drivers/device.py on host memory.

    total: bytes that it pretends to have.
    threads: host threads (blocks, threads) of each kernel.
    late: run work only when somebody waits for it or asks for a mark behind it. Pinned memory is read then, and spoilt
        when it is freed.
    record: what was enqueued, in order; entries of a replayed graph have its number.
    transferred: bytes "uploaded" and "downloaded".
    """

    name, capability = "simulated device", "sm_89"

    def __init__(self, total: int = 8 << 30, threads: tuple[int, int] = (1, 1), late: bool = False) -> None:
        self.total, self.threads, self.late = total, threads, late
        self._waiting: deque[Callable[[], None]] = deque()
        self._done = 0
        self._pinned: list[SimulatedPinned] = []
        self.record: list[RecordEntry] = []
        self.transferred = {"uploaded": 0, "downloaded": 0}
        self._live: dict[int, SimulatedMemory] = {}
        self._starts: list[int] = []
        self._threads = threading.local()  # a capture belongs to its thread, as on a GPU
        self._graphs = 0
        self._kernels = importlib.import_module("dreammix_trt._cpp").gpu

    @property
    def _capturing(self) -> list[_Task] | None:
        return getattr(self._threads, "tasks", None)

    @property
    def used(self) -> int:
        """Bytes allocated now."""
        return sum(memory.nbytes for memory in self._live.values())

    def memory(self) -> tuple[int, int]:
        return self.total - self.used, self.total

    def allocate(self, nbytes: int) -> SimulatedMemory:
        self._refuse_in_capture("allocate memory")
        if nbytes > self.total - self.used:
            raise OutOfMemoryError(
                f"{nbytes} bytes were asked for, {self.total - self.used} of {self.total} are free on the {self.name}"
            )
        memory = SimulatedMemory(self, nbytes)
        self._live[memory.pointer] = memory
        bisect.insort(self._starts, memory.pointer)
        self.record.append(RecordEntry("allocate", str(nbytes)))
        return memory

    def allocate_pinned(self, nbytes: int) -> SimulatedPinned:
        self._refuse_in_capture("allocate host memory")
        self.record.append(RecordEntry("pinned", str(nbytes)))
        pinned = SimulatedPinned(np.zeros(nbytes, np.uint8))
        self._pinned = [*(each for each in self._pinned if each.array.size), pinned]
        return pinned

    def make_stream(self) -> SimulatedStream:
        return SimulatedStream()

    def upload(self, to: Array, source: npt.NDArray[Any], stream: Stream) -> None:
        self._refuse_in_capture("copy from the host")
        self._check_size(to, source.nbytes)
        if not source.flags.c_contiguous:
            raise DeviceError("only contiguous host memory can be copied to a device")
        self.transferred["uploaded"] += to.nbytes
        pinned = any(np.may_share_memory(source, each.array) for each in self._pinned)
        kept = source if pinned or not self.late else source.copy()  # memory that is not pinned is read at once
        self._enqueue(
            RecordEntry("upload", "", {"to": to}), lambda: _copy(self.view_bytes(to), kept.reshape(-1).view(np.uint8))
        )

    def download(self, to: npt.NDArray[Any], source: Array, stream: Stream) -> None:
        self._refuse_in_capture("copy to the host")
        self._check_size(source, to.nbytes)
        self.transferred["downloaded"] += source.nbytes
        entry = RecordEntry("download", "", {"source": source})
        self._enqueue(entry, lambda: _copy(to.reshape(-1).view(np.uint8), self.view_bytes(source)))

    def copy(self, to: Array, source: Array, stream: Stream) -> None:
        self._check_size(to, source.nbytes)
        entry = RecordEntry("copy", "", {"to": to, "source": source})
        self._enqueue(entry, lambda: _copy(self.view_bytes(to), self.view_bytes(source)))

    def clear(self, to: Array, stream: Stream) -> None:
        self._enqueue(RecordEntry("clear", "", {"to": to}), lambda: self.view_bytes(to).fill(0))

    def launch_kernel(self, name: str, stream: Stream, **arguments: Any) -> None:
        function = getattr(self._kernels, name)
        arrays = {key: value for key, value in arguments.items() if isinstance(value, Array)}
        plain = {key: _to_argument(value) for key, value in arguments.items()}
        blocks, threads = self.threads
        self._enqueue(
            RecordEntry("kernel", name, arrays), lambda: function(**plain, stream=None, blocks=blocks, threads=threads)
        )

    def enqueue_work(self, label: str, stream: Stream, run: Callable[[], None]) -> None:
        self._enqueue(RecordEntry("work", label), run)

    def capture(self, stream: Stream, record: Callable[[], None]) -> SimulatedGraph:
        self._refuse_in_capture("capture")
        tasks: list[_Task] = []
        self._threads.tasks = tasks
        try:
            record()
        finally:
            self._threads.tasks = None
        self._graphs += 1
        self.record.append(RecordEntry("capture", "", graph=self._graphs))
        return SimulatedGraph(self, self._graphs, tasks)

    def mark(self, stream: Stream, *, timed: bool = False) -> SimulatedMark:
        self._refuse_in_capture("mark the stream")
        self.record.append(RecordEntry("mark"))
        return SimulatedMark(self, self._done + len(self._waiting), time.perf_counter())

    def synchronize(self, stream: Stream) -> None:
        self._refuse_in_capture("wait")
        self.record.append(RecordEntry("synchronize"))
        self.reach(self._done + len(self._waiting))

    def reach(self, done: int) -> None:
        """Run waiting tasks of all streams, until `done` tasks have run since the device was made."""
        while self._waiting and self._done < done:
            self._done += 1
            self._waiting.popleft()()

    def close(self) -> None:
        self._waiting.clear()
        for memory in list(self._live.values()):
            memory.free()

    def __enter__(self) -> SimulatedDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def view(self, array: Array) -> npt.NDArray[Any]:
        """An array's memory as numpy, for tests and simulated networks."""
        seen: npt.NDArray[Any] = self.view_bytes(array).view(array.dtype).reshape(array.shape)
        return seen

    def view_bytes(self, array: Array) -> npt.NDArray[np.uint8]:
        """The array's bytes, uint8 (nbytes,). Raises DeviceError for an array outside allocated memory."""
        place = bisect.bisect_right(self._starts, array.pointer) - 1
        memory = self._live.get(self._starts[place]) if place >= 0 else None
        start = array.pointer - self._starts[place] if memory else 0
        if memory is None or start + array.nbytes > memory.nbytes:
            raise DeviceError(f"{array.shape} {array.dtype} is not in memory of the {self.name}")
        return memory.data[start : start + array.nbytes]

    def forget(self, memory: SimulatedMemory) -> None:
        """Called by memory that is freed."""
        self._refuse_in_capture("free memory")
        self.reach(self._done + len(self._waiting))  # as cudaFree does
        del self._live[memory.pointer]
        self._starts.remove(memory.pointer)
        self.record.append(RecordEntry("free", str(memory.nbytes)))

    def _enqueue(self, entry: RecordEntry, run: Callable[[], None]) -> None:
        for array in entry.arrays.values():
            self.view_bytes(array)
        if self._capturing is not None:
            self._capturing.append(_Task(entry, run))
            return
        self.record.append(entry)
        self.run(run)

    def run(self, task: Callable[[], None]) -> None:
        """Run a task in its turn: now, or later."""
        if self.late:
            self._waiting.append(task)
        else:
            task()

    def is_idle(self) -> bool:
        """Whether nothing waits to be run."""
        return not self._waiting

    def _refuse_in_capture(self, what: str) -> None:
        if self._capturing is not None:
            raise DeviceError(f"a captured graph cannot {what}")

    def _check_size(self, array: Array, nbytes: int) -> None:
        if array.nbytes != nbytes:
            raise DeviceError(f"a copy between {array.nbytes} and {nbytes} bytes")


class SimulatedMemory:
    """Host memory that counts as a device's. It is filled with a pattern of NaN, as fresh memory may be."""

    def __init__(self, device: SimulatedDevice, nbytes: int) -> None:
        whole = np.full(nbytes + _ALIGNMENT, 0xFF, np.uint8)
        start = -whole.ctypes.data % _ALIGNMENT
        self.data = whole[start : start + nbytes]
        self.pointer, self.nbytes = self.data.ctypes.data, nbytes
        self._device: SimulatedDevice | None = device

    def free(self) -> None:
        if self._device is not None:
            self._device.forget(self)
            self._device = None

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()


@dataclass
class SimulatedPinned:
    """Host memory that counts as pinned."""

    array: npt.NDArray[np.uint8]

    def free(self) -> None:
        self.array[:] = 0xAA  # a copy that is under way copies this
        self.array = np.zeros(0, np.uint8)


class SimulatedStream:
    handle = None

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class SimulatedMark:
    device: SimulatedDevice
    done: int
    moment: float

    def has_passed(self) -> bool:
        self.device.reach(self.done)
        return True

    def seconds_since(self, earlier: Any) -> float:
        return self.moment - float(earlier.moment)


class SimulatedGraph:
    """Recorded tasks, run in order by `launch`. Refuses to run once memory that they name was freed."""

    def __init__(self, device: SimulatedDevice, number: int, tasks: list[_Task]) -> None:
        self._device, self.number, self._tasks = device, number, tasks
        self.open = True

    @property
    def entries(self) -> tuple[RecordEntry, ...]:
        """What was captured."""
        return tuple(task.entry for task in self._tasks)

    def launch(self, stream: Stream) -> None:
        self._device._refuse_in_capture("launch another")
        if not self.open:
            raise DeviceError("a closed graph was launched")
        self._device.record.append(RecordEntry("launch", graph=self.number))
        for task in self._tasks:
            for array in task.entry.arrays.values():
                self._device.view_bytes(array)
            entry = task.entry
            self._device.record.append(RecordEntry(entry.kind, entry.name, entry.arrays, self.number))
            self._device.run(task.run)

    def close(self) -> None:
        if not self._device.is_idle():
            raise DeviceError("a graph is closed while work is under way")
        self.open = False


class SimulatedNetworks:
    """A host `EngineSet` (or anything with its `run`) as `DeviceNetworks` of a `SimulatedDevice`.

    half: float32 inputs and outputs that TensorRT would have in float16 are float16.
    frames, lengths, most_pictures: as a built engine would restrict them; lengths are those of the condition.
    twins: networks that also exist in float32.
    capturable: whether its networks can be captured.
    unread: inputs that are not there, as engines lack what nothing reads.
    away: networks that are not loaded at first.
    """

    def __init__(
        self,
        device: SimulatedDevice,
        runner: Any,
        *,
        half: bool = False,
        frames: tuple[tuple[int, int], ...] | None = None,
        lengths: tuple[int, ...] | None = None,
        most_pictures: int | None = None,
        twins: tuple[str, ...] = (),
        capturable: bool = True,
        unread: Collection[str] = (),
        away: Collection[str] = (),
    ) -> None:
        self._device, self._runner, self._half = device, runner, half
        self._weights: dict[str, dict[str, npt.NDArray[Any]]] = {}
        self._frames, self._lengths, self.most_pictures = frames, lengths, most_pictures
        self._twins, self._capturable = twins, capturable
        self._unread = unread
        self.facts = runner.facts
        self._away = set(away)
        self.bound: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._runner or name in map(twin_name, self._twins)

    def slots(self, name: str) -> tuple[Slot, ...]:
        slots: tuple[Slot, ...] = self._runner.slots(plain_name(name))
        return slots

    def weights(self, name: str) -> Mapping[str, npt.NDArray[Any]]:
        if name not in self._weights:
            types = {tensor.name: tensor.dtype for tensor in self.inputs(name)}
            held = self._runner.weights(plain_name(name))
            self._weights[name] = {key: held[key].astype(types[key], copy=False) for key in held if key in types}
        return self._weights[name]

    def inputs(self, name: str) -> tuple[Tensor, ...]:
        return tuple(self._list_tensors(name, "inputs"))

    def outputs(self, name: str) -> tuple[Tensor, ...]:
        return tuple(self._list_tensors(name, "outputs"))

    def contexts(self) -> tuple[int, ...] | None:
        """The lengths that it was made with."""
        return self._lengths

    def frames(self) -> tuple[tuple[int, int], ...] | None:
        return self._frames

    def weight_bytes(self, name: str) -> int:
        return 1 << 20

    def workspace_bytes(self, name: str, sides: Sides) -> int:
        return 1 << 16

    def bind(
        self, name: str, sides: Sides, arrays: Mapping[str, Array], workspace: Array | None = None
    ) -> SimulatedBound:
        given = {tensor.name: tensor for tensor in (*self.inputs(name), *self.outputs(name))}
        if arrays.keys() != given.keys():
            raise DeviceError(f"{name} is bound to {sorted(arrays)}, its tensors are {sorted(given)}")
        for key, tensor in given.items():
            if arrays[key].shape != sides.shape(tensor) or arrays[key].dtype != tensor.dtype:
                raise DeviceError(f"{name}: {key} is {arrays[key]}, expected {sides.shape(tensor)} {tensor.dtype}")
            self._device.view_bytes(arrays[key])
        if workspace is None or workspace.nbytes < self.workspace_bytes(name, sides):
            raise DeviceError(f"{name} has too little workspace")
        self.bound.append(name)
        return SimulatedBound(self, name, dict(arrays))

    @property
    def loaded(self) -> tuple[str, ...]:
        names = (*self._runner.entries, *map(twin_name, self._twins))
        return tuple(name for name in names if name not in self._away)

    def unload(self, name: str) -> None:
        self._away.add(name)

    def load(self, name: str) -> None:
        self._away.discard(name)

    def close(self) -> None:
        """The runner belongs to its owner."""

    def run(self, name: str, arrays: Mapping[str, Array]) -> None:
        """Do a bound network's work, now."""
        if name in self._away:
            raise DeviceError(f"{name} is enqueued, but its weights are not loaded")
        values = {key: self._device.view(array) for key, array in arrays.items()}
        outputs = {tensor.name for tensor in self.outputs(name)}
        weights = self.weights(name)
        given = {
            key: value.astype(np.float32 if value.dtype == np.float16 else value.dtype, copy=key not in weights)
            for key, value in values.items()
            if key not in outputs
        }
        for key, value in self._runner.run(plain_name(name), **given).items():
            with np.errstate(over="ignore"):
                values[key][...] = value

    def enqueue(self, name: str, arrays: Mapping[str, Array], stream: Stream) -> None:
        """Put a bound network's work into the stream."""
        self._device.enqueue_work(name, stream, lambda: self.run(name, arrays))

    @property
    def captures(self) -> bool:
        return self._capturable

    def _list_tensors(self, name: str, side: str) -> list[Tensor]:
        found = []
        wide = is_twin(name)
        for entry in self._runner.entries[plain_name(name)][side]:
            tensor = Tensor.of(entry)
            keeps = wide or not self._half or tensor.dtype != "float32" or tensor.name in ("timestep", "time_ids")
            if tensor.name not in self._unread:
                found.append(replace(tensor, dtype=tensor.dtype if keeps else "float16"))
        return found


class SimulatedBound:
    """A network of `SimulatedNetworks` with its arrays."""

    def __init__(self, networks: SimulatedNetworks, name: str, arrays: dict[str, Array]) -> None:
        self._networks, self._name, self._arrays = networks, name, arrays
        self._ran = False

    @property
    def capturable(self) -> bool:
        """As with TensorRT, not before the first run."""
        return self._networks.captures and self._ran

    def enqueue(self, stream: Stream) -> None:
        self._ran = True
        self._networks.enqueue(self._name, self._arrays, stream)

    def close(self) -> None:
        """Nothing is held."""


def _to_argument(value: Any) -> Any:
    return value.pointer if isinstance(value, Array) else 0 if value is None else value


def _copy(to: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8]) -> None:
    to[...] = source
