"""The simulated device refuses what a GPU would get wrong silently, and runs the rest in order."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from dreammix_trt.core.errors import DeviceError, OutOfMemoryError
from dreammix_trt.core.seam import Array
from dreammix_trt.engine.drivers.simulated import SimulatedDevice, SimulatedStream

STREAM = SimulatedStream()


def fill_array(device: SimulatedDevice, values: list[float]) -> Array:
    array = Array(device.allocate(4 * len(values)).pointer, (len(values),), "float32")
    device.upload(array, np.array(values, np.float32), STREAM)
    return array


def halve(device: SimulatedDevice, source: Array, out: Array) -> None:
    device.launch_kernel("scaled", STREAM, latent=source, factor=2.0, out=out, count=source.size, half=False)


def test_a_capture_runs_nothing_and_its_replays_run_everything_in_order() -> None:
    with SimulatedDevice() as device:
        first, second = fill_array(device, [8, 4]), fill_array(device, [0, 0])
        graph = device.capture(STREAM, lambda: (halve(device, first, second), device.copy(first, second, STREAM)))
        assert device.view(second).tolist() == [0, 0]
        graph.launch(STREAM)
        graph.launch(STREAM)
        assert device.view(second).tolist() == [2, 1] and device.view(first).tolist() == [2, 1]
        kinds = [(entry.kind, entry.name) for entry in device.record if entry.graph == graph.number]
        assert kinds == [("capture", ""), *2 * [("launch", ""), ("kernel", "scaled"), ("copy", "")]]


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda device, array: device.allocate(16),
        lambda device, array: device.allocate_pinned(16),
        lambda device, array: device.synchronize(STREAM),
        lambda device, array: device.upload(array, np.zeros(2, np.float32), STREAM),
        lambda device, array: device.download(np.zeros(2, np.float32), array, STREAM),
        lambda device, array: device.mark(STREAM),
        lambda device, array: device.capture(STREAM, lambda: None),
    ],
)
def test_what_a_capture_must_not_do_is_refused_and_ends_it(
    forbidden: Callable[[SimulatedDevice, Array], object],
) -> None:
    with SimulatedDevice() as device:
        array = fill_array(device, [8, 4])
        with pytest.raises(DeviceError, match="a captured graph cannot"):
            device.capture(STREAM, lambda: forbidden(device, array))
        halve(device, array, array)
        assert device.view(array).tolist() == [4, 2]


def test_memory_cannot_leave_a_captured_graph() -> None:
    with SimulatedDevice() as device:
        memory = device.allocate(8)
        array = Array(memory.pointer, (2,), "float32")
        graph = device.capture(STREAM, lambda: halve(device, array, array))
        memory.free()
        with pytest.raises(DeviceError, match="is not in memory"):
            graph.launch(STREAM)


def test_arrays_must_lie_in_memory_and_copies_must_fit() -> None:
    with SimulatedDevice() as device:
        array = fill_array(device, [1, 2])
        with pytest.raises(DeviceError, match="is not in memory"):
            halve(device, Array(array.pointer, (3,), "float32"), array)
        with pytest.raises(DeviceError, match="a copy between 8 and 12 bytes"):
            device.upload(array, np.zeros(3, np.float32), STREAM)
        with pytest.raises(DeviceError, match="a copy between"):
            device.copy(array, array.part(0, 1), STREAM)


def test_memory_ends_and_comes_back() -> None:
    device = SimulatedDevice(total=1000)
    first = device.allocate(600)
    with pytest.raises(OutOfMemoryError, match="600 bytes were asked for, 400 of 1000 are free"):
        device.allocate(600)
    first.free()
    first.free()
    with device.allocate(1000) as whole:
        assert device.memory() == (0, 1000) and whole.pointer % 256 == 0
    assert device.used == 0


def test_arrays_are_cut_where_numpy_cuts() -> None:
    array = Array(1024, (3, 4, 2), "float16")
    assert array[1] == Array(1024 + 16, (4, 2), "float16")
    assert array.part(1, 2) == Array(1024 + 16, (2, 4, 2), "float16")
    assert array.reshape((6,), "float32").nbytes == 24 and array.half
    with pytest.raises(ValueError, match="larger"):
        array.reshape((13,), "float32")
    with pytest.raises(ValueError, match="entries 2 to 4"):
        array.part(2, 2)


def test_a_capture_is_its_threads_alone() -> None:
    with SimulatedDevice() as device:
        first, second = fill_array(device, [8, 4]), fill_array(device, [8, 4])

        def record() -> None:
            halve(device, first, first)
            other = threading.Thread(target=lambda: halve(device, second, second))
            other.start()
            other.join()

        device.capture(STREAM, record)
        assert device.view(first).tolist() == [8, 4]
        assert device.view(second).tolist() == [4, 2]
