"""Times on a device: events around work in a stream, replays of captured work, and the ceilings of this machine."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from dreammix_trt.core.seam import Array, Stream
    from dreammix_trt.engine.drivers.device import Device

Work = Callable[[], object]
REPEATS = 20  # of a measurement that does not say


def event_seconds(device: Device, stream: Stream, work: Work, *, repeats: int = 0, warm: int = 3) -> list[float]:
    """Device seconds of each of `repeats` (0: REPEATS) runs of what `work` enqueues, by events around it."""
    for _ in range(warm):
        work()
    pairs = []
    for _ in range(repeats or REPEATS):
        start = device.mark(stream, timed=True)
        work()
        pairs.append((start, device.mark(stream, timed=True)))
    device.synchronize(stream)
    return [end.seconds_since(start) for start, end in pairs]


def replay_seconds(
    device: Device, stream: Stream, works: Sequence[Work], *, repeats: int = 0, warm: int = 3
) -> list[float]:
    """Device seconds of one work, for each of `repeats` replays of a graph of all `works`, one after the other.

    Works on different memory keep the caches from flattering the figure.
    """
    for work in works:  # loads modules, which a capture must not
        work()
    device.synchronize(stream)

    def all_works() -> None:
        for work in works:
            work()

    graph = device.capture(stream, all_works)
    try:
        times = event_seconds(device, stream, lambda: graph.launch(stream), repeats=repeats, warm=warm)
    finally:
        device.synchronize(stream)
        graph.close()
    return [each / len(works) for each in times]


def wall_seconds(work: Work, wait: Work, *, repeats: int = 5, warm: int = 1) -> list[float]:
    """Wall seconds of each run of `work` until `wait` returns."""
    for _ in range(warm):
        work()
    wait()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return times


def copy_bandwidth(device: Device, *, nbytes: int = 1 << 30) -> float:
    """Bytes read plus bytes written a second of a copy within the device."""
    with ExitStack() as owned:
        stream = device.make_stream()
        owned.callback(stream.close)
        here, there = (array(device, owned, (nbytes,), "uint8") for _ in range(2))
        upload(device, stream, here, np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8))
        times = event_seconds(device, stream, lambda: device.copy(there, here, stream))
    return 2 * nbytes / statistics.median(times)


def matmul_rate(torch_device: str, *, side: int = 8192) -> float:
    """FLOP a second of a float16 product of random matrices with float32 sums. Needs torch."""
    import torch

    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    made = torch.Generator(torch_device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=made, device=torch_device).half() for _ in range(2))
    out = torch.empty_like(a)
    times = torch_seconds(torch_device, lambda: torch.mm(a, b, out=out))
    return 2 * side**3 / statistics.median(times)


def torch_seconds(torch_device: str, work: Work, *, warm: int = 3) -> list[float]:
    """Device seconds of each run of torch's work in its present stream (on a CPU: wall seconds)."""
    import torch

    if torch_device == "cpu":
        return wall_seconds(work, lambda: None, repeats=REPEATS, warm=warm)
    for _ in range(warm):
        work()
    pairs = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in pairs]


@dataclass
class Calls:
    """What a device was asked for: kernels by name, bytes copied within it, uploaded and downloaded, in how many
    copies. Networks' own kernels and replayed graphs are not among them."""

    kernels: Counter[str] = field(default_factory=Counter)
    copies: int = 0
    copied: int = 0
    uploaded: int = 0
    downloaded: int = 0


@contextmanager
def count_calls(device: Device) -> Iterator[Calls]:
    """Count what the runtime asks of the device within the block."""
    calls, launch, copy = Calls(), device.launch_kernel, device.copy
    before = dict(device.transferred)

    def counted_launch(name: str, stream: Stream, **arguments: Any) -> None:
        calls.kernels[name] += 1
        launch(name, stream, **arguments)

    def counted_copy(to: Array, source: Array, stream: Stream) -> None:
        calls.copies, calls.copied = calls.copies + 1, calls.copied + to.nbytes
        copy(to, source, stream)

    device.launch_kernel, device.copy = counted_launch, counted_copy
    try:
        yield calls
    finally:
        device.launch_kernel, device.copy = launch, copy
        calls.uploaded = device.transferred["uploaded"] - before["uploaded"]
        calls.downloaded = device.transferred["downloaded"] - before["downloaded"]


def array(device: Device, owned: ExitStack, shape: Sequence[int], dtype: str) -> Array:
    """Memory on the device that `owned` frees."""
    from dreammix_trt.core.seam import Array

    wanted = Array(0, tuple(shape), dtype)
    memory = device.allocate(max(wanted.nbytes, 1))
    owned.callback(memory.free)
    return Array(memory.pointer, wanted.shape, dtype)


def upload(device: Device, stream: Stream, to: Array, values: Any) -> None:
    """Copy a numpy array to the device, again and again where `to` is larger, and wait."""
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    for start in range(0, to.nbytes, max(flat.size, 1)):
        part = to.reshape((to.nbytes,), "uint8").part(start, min(flat.size, to.nbytes - start))
        device.upload(part, flat[: part.size], stream)
    device.synchronize(stream)


def download(device: Device, stream: Stream, source: Array) -> Any:
    """An array's values as numpy, waited for."""
    out = np.empty(source.shape, source.dtype)
    device.download(out, source, stream)
    device.synchronize(stream)
    return out
