"""The CUDA device against a fake that keeps CUDA's rules, and against a GPU where there is one."""

from __future__ import annotations

import ast
import gc
import inspect
import logging
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.errors import DeviceError, MissingExtraError, OutOfMemoryError
from dreammix_trt.core.seam import Array
from dreammix_trt.engine.drivers import cuda
from dreammix_trt.engine.drivers.cuda import Bindings, CudaDevice, bindings, checks
from dreammix_trt.engine.drivers.device import Device
from dreammix_trt.engine.hardware import why_kernels_do_not_fit
from tests.support import fake_cuda
from tests.support.fake_cuda import CUresult, FakeCuda

BUILT = {"toolkit": "13.0", "architectures": ["sm_75", "sm_86", "sm_89", "sm_90", "sm_120"], "ptx": "compute_120"}


class FakeExtension:
    """`_cpp` as far as it is asked: a kernel `double` over float32 numbers, and how it was built."""

    def __init__(self, fake: FakeCuda, built: Any = BUILT) -> None:
        self.fake, self.built, self.fails, self.loses = fake, built, "", False
        self.gpu = SimpleNamespace(double=self.double)
        self.given: dict[str, Any] = {}

    def build_info(self) -> dict[str, Any]:
        return {"cuda": self.built}

    def double(self, **arguments: Any) -> None:
        self.given = arguments
        self.fake.lost = self.loses
        if self.fails:
            raise RuntimeError(self.fails)
        if arguments["count"] < 0:
            raise ValueError("count must be positive")
        values = np.ctypeslib.as_array((fake_cuda.ctypes.c_float * 4).from_address(arguments["values"]))

        def run() -> None:
            values[: arguments["count"]] *= 2

        self.fake.enqueue(arguments["stream"], run)


@pytest.fixture
def fake() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def device(fake: FakeCuda) -> Iterator[CudaDevice]:
    with CudaDevice(bindings=Bindings(fake, fake), extension=FakeExtension(fake)) as device:
        yield device
    assert fake.lost or fake.list_left() == {}


def open_fake(fake: FakeCuda, index: int = 0) -> CudaDevice:
    return CudaDevice(index, bindings=Bindings(fake, fake))


def ignore(*_: object) -> None:
    """Calls as statements, in a lambda."""


def make_numbers(*values: float) -> Any:
    return np.array(values, np.float32)


def test_it_is_a_device(device: CudaDevice) -> None:
    as_protocol: Device = device
    assert (as_protocol.name, as_protocol.capability) == ("Fake RTX", "sm_89")
    assert device.memory() == (1 << 20, 1 << 20)


def test_copies_run_in_order_when_somebody_waits(fake: FakeCuda, device: CudaDevice) -> None:
    with device.allocate(16) as memory, device.allocate(16) as other, device.make_stream() as stream:
        assert memory.pointer % 256 == 0 and device.memory()[0] == (1 << 20) - 32
        there, beside = Array(memory.pointer, (4,), "float32"), Array(other.pointer, (2, 2), "float32")
        pinned = device.allocate_pinned(16)
        staged = pinned.array.view(np.float32)
        staged[:] = 0
        out = device.allocate_pinned(16)
        out.array[:] = 255
        device.upload(there, staged, stream)
        staged[:] = [1, 2, 3, 4]  # pinned memory is read when the copy runs
        device.launch_kernel("double", stream, values=there, count=3, nothing=None)
        device.copy(beside, there, stream)
        device.clear(there.part(0, 1), stream)
        device.download(out.array, beside, stream)
        assert (out.array == 255).all()
        device.synchronize(stream)
        np.testing.assert_array_equal(out.array.view(np.float32), [2, 4, 6, 4])
        back = np.empty(4, np.float32)
        device.download(back, there, stream)
        np.testing.assert_array_equal(back, [0, 4, 6, 4])
        extension: Any = device._extension
        assert extension.given == {"values": memory.pointer, "count": 3, "nothing": 0, "stream": stream.handle}
        assert device.transferred == {"uploaded": 16, "downloaded": 32}
        pinned.free()
        out.free()


def test_pageable_memory_is_read_at_once(device: CudaDevice) -> None:
    with device.allocate(16) as memory, device.make_stream() as stream:
        there, source, back = Array(memory.pointer, (4,), "float32"), make_numbers(1, 2, 3, 4), make_numbers(0, 0, 0, 0)
        device.upload(there, source, stream)
        source[:] = 0
        device.download(back, there, stream)
        np.testing.assert_array_equal(back, [1, 2, 3, 4])


def test_sizes_and_bounds_are_checked_before_any_call(fake: FakeCuda, device: CudaDevice) -> None:
    with device.allocate(16) as memory, device.make_stream() as stream:
        there = Array(memory.pointer, (4,), "float32")
        beyond = Array(memory.pointer + 4, (4,), "float32")
        read_only = make_numbers(1, 2, 3, 4)
        read_only.flags.writeable = False
        before = len(fake.calls)
        for wrong in (
            lambda: device.upload(there, make_numbers(1, 2, 3), stream),
            lambda: device.upload(there, np.zeros((4, 2), np.float32)[:, 0], stream),
            lambda: device.upload(beyond, make_numbers(1, 2, 3, 4), stream),
            lambda: device.upload(Array(0, (4,), "float32"), make_numbers(1, 2, 3, 4), stream),
            lambda: device.download(make_numbers(1, 2, 3), there, stream),
            lambda: device.download(read_only, there, stream),
            lambda: device.copy(there, there.part(0, 3), stream),
            lambda: device.copy(there, beyond, stream),
            lambda: device.clear(beyond, stream),
            lambda: device.allocate(-1),
            lambda: device.allocate_pinned(-1),
        ):
            with pytest.raises(ValueError):
                wrong()
        assert len(fake.calls) == before and device.transferred == {"uploaded": 0, "downloaded": 0}
        device.upload(there.part(4, 0), make_numbers(), stream)  # nothing is nothing


def test_memory_that_does_not_fit_is_told_with_what_there_is(device: CudaDevice) -> None:
    with device.allocate(1 << 19):
        with pytest.raises(OutOfMemoryError, match=r"768\.0 KiB .* 512\.0 KiB of 1\.0 MiB are free on the Fake RTX"):
            device.allocate(768 << 10)
        with device.allocate(1 << 19):  # it stays usable
            assert device.memory()[0] == 0


def test_what_is_given_back_is_given_back_once(fake: FakeCuda, device: CudaDevice) -> None:
    memory, pinned, stream = device.allocate(8), device.allocate_pinned(8), device.make_stream()
    graph = device.capture(stream, lambda: None)
    for _ in range(2):
        memory.free()
        pinned.free()
        graph.close()
        stream.close()
    assert [fake.calls.count(name) for name in ("cudaFree", "cudaFreeHost", "cudaGraphExecDestroy")] == [1, 1, 1]
    for used in (
        lambda: memory.pointer,
        lambda: pinned.array,
        lambda: stream.handle,
        lambda: device.synchronize(stream),
        lambda: graph.launch(device.make_stream()),
    ):
        with pytest.raises(DeviceError, match="after it was freed"):
            used()
    assert [each.kind for each in device._belongings._owned.values()] == ["stream"]


def test_closing_gives_back_what_is_left_and_says_so(fake: FakeCuda, caplog: pytest.LogCaptureFixture) -> None:
    device = CudaDevice(bindings=Bindings(fake, fake))
    stream, memory = device.make_stream(), device.allocate(3 << 10)
    device.allocate_pinned(8)
    mark = device.mark(stream)
    device.capture(stream, lambda: device.clear(Array(memory.pointer, (8,), "uint8"), stream))
    assert fake.list_left() == {"memory": 1, "pinned": 1, "streams": 1, "events": 1, "graphs": 1}
    with caplog.at_level(logging.WARNING):
        device.close()
        device.close()
    assert fake.list_left() == {}
    (record,) = caplog.records
    for words in ("the Fake RTX was closed", "1 x stream", "1 x memory", "1 x graph", "3.0 KiB of device memory"):
        assert words in record.getMessage()
    for used in (device.memory, device.make_stream, mark.has_passed, lambda: device.allocate(1)):
        with pytest.raises(DeviceError, match="closed"):
            used()
    memory.free()
    stream.close()


def test_a_device_whose_owners_gave_all_back_closes_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeCuda()
    with caplog.at_level(logging.DEBUG), open_fake(fake) as device, device.make_stream() as stream, device.allocate(8):
        device.mark(stream)
    assert fake.list_left() == {} and not caplog.records


def test_a_graph_is_captured_once_and_launched_often(fake: FakeCuda, device: CudaDevice) -> None:
    with device.allocate(16) as memory, device.make_stream() as stream:
        values, back = Array(memory.pointer, (4,), "float32"), make_numbers(0, 0, 0, 0)
        device.upload(values, make_numbers(1, 2, 3, 4), stream)
        graph: Any = device.capture(stream, lambda: device.launch_kernel("double", stream, values=values, count=4))
        assert int(graph._live) in fake.uploaded and not fake.templates
        device.download(back, values, stream)
        np.testing.assert_array_equal(back, [1, 2, 3, 4])
        for _ in range(3):
            graph.launch(stream)
        device.download(back, values, stream)
        np.testing.assert_array_equal(back, [8, 16, 24, 32])
        graph.close()


def test_what_is_not_allowed_in_a_capture_ends_it(fake: FakeCuda, device: CudaDevice) -> None:
    with device.allocate(16) as memory, device.make_stream() as stream:
        values, host = Array(memory.pointer, (4,), "float32"), make_numbers(1, 2, 3, 4)
        spare, mark = device.allocate(8), device.mark(stream)
        for wrong in (
            lambda: device.allocate(1),
            lambda: device.allocate_pinned(1),
            lambda: device.synchronize(stream),
            lambda: device.upload(values, host, stream),
            lambda: device.download(host, values, stream),
            lambda: device.mark(stream),
            lambda: mark.has_passed(),
            lambda: device.capture(stream, lambda: None),
            lambda: spare.free(),
            lambda: device.close(),
        ):
            before = len(fake.calls)
            with pytest.raises(DeviceError, match="not allowed within a capture"):
                device.capture(stream, wrong)
            assert fake.calls[before:] == [
                "cudaSetDevice",
                "cudaStreamBeginCapture",
                "cudaStreamEndCapture",
                "cudaGraphDestroy",
            ]
            assert fake.streams[stream.handle].capture is None
        device.capture(stream, lambda: device.clear(values, stream)).close()
        spare.free()
        assert not fake.templates and not fake.graphs


def test_an_exception_of_the_recorder_goes_on(fake: FakeCuda, device: CudaDevice) -> None:
    def record() -> None:
        device.clear(Array(memory.pointer, (16,), "uint8"), stream)
        raise KeyboardInterrupt

    with device.allocate(16) as memory, device.make_stream() as stream:
        with pytest.raises(KeyboardInterrupt):
            device.capture(stream, record)
        assert not fake.streams[stream.handle].waiting
        device.synchronize(stream)


def test_a_capture_that_others_spoiled_is_an_error(fake: FakeCuda, device: CudaDevice) -> None:
    with device.make_stream() as stream:
        with pytest.raises(DeviceError, match=r"cudaStreamEndCapture.*CUDA error 901"):
            device.capture(stream, lambda: ignore(fake.cudaMalloc(1)))
        assert fake.last == 0, "the last error must not be found by others"
        device.capture(stream, lambda: None).close()


def test_another_thread_may_allocate_beside_a_capture(device: CudaDevice) -> None:
    def elsewhere() -> None:
        with device.allocate(8), device.make_stream() as own:
            device.synchronize(own)
        done.append(True)

    def record() -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    done: list[bool] = []
    with device.make_stream() as stream:
        device.capture(stream, record).close()
    assert done == [True]


def test_every_thread_works_on_the_chosen_device() -> None:
    fake = FakeCuda(("A", 8, 9, 1 << 20), ("B", 12, 0, 2 << 20))
    with open_fake(fake, 1) as device:
        told: list[tuple[int, int]] = []
        fake.cudaSetDevice(0)  # as others in the same process may do
        told.append(device.memory())
        thread = threading.Thread(target=lambda: told.append(device.memory()))
        thread.start()
        thread.join()
        assert told == [(2 << 20, 2 << 20)] * 2 and (device.name, device.capability) == ("B", "sm_120")


def test_marks_pass_when_the_work_before_them_is_done(fake: FakeCuda, device: CudaDevice) -> None:
    with device.make_stream() as stream:
        first = device.mark(stream, timed=True)
        fake.enqueue(stream.handle, lambda: time.sleep(0.01))
        second = device.mark(stream, timed=True)
        plain = device.mark(stream)
        assert not first.has_passed() and not plain.has_passed()
        with pytest.raises(ValueError, match="have passed"):
            second.seconds_since(first)
        device.synchronize(stream)
        assert first.has_passed() and plain.has_passed()
        assert 0.01 <= second.seconds_since(first) < 1
        with pytest.raises(ValueError, match="timed=True"):
            plain.seconds_since(first)


def test_events_are_used_again_when_their_marks_are_gone(fake: FakeCuda, device: CudaDevice) -> None:
    with device.make_stream() as stream:
        for _ in range(1000):
            device.mark(stream)
        kept = [device.mark(stream, timed=True) for _ in range(3)]
        gc.collect()
        assert len(fake.events) == 4
        device.synchronize(stream)
        assert all(mark.has_passed() for mark in kept)


def test_a_network_enqueues_its_own_work_now(device: CudaDevice) -> None:
    ran: list[str] = []
    with device.make_stream() as stream:
        device.enqueue_work("unet", stream, lambda: ran.append("unet"))
    assert ran == ["unet"]


def test_the_context_is_lost_with_an_illegal_access(fake: FakeCuda, caplog: pytest.LogCaptureFixture) -> None:
    device = CudaDevice(bindings=Bindings(fake, fake), extension=FakeExtension(fake))
    memory, stream = device.allocate(8), device.make_stream()
    fake.enqueue(stream.handle, fake.lose)
    with pytest.raises(
        DeviceError, match=r"cudaErrorIllegalAddress.*context is lost.*start the program again"
    ) as first:
        device.synchronize(stream)
    assert first.value.lost
    calls = len(fake.calls)
    for used in (device.memory, lambda: device.allocate(1), lambda: device.launch_kernel("double", stream, count=1)):
        with pytest.raises(DeviceError, match="context is lost") as again:
            used()
        assert again.value.lost
    with caplog.at_level(logging.WARNING):
        memory.free()
        device.close()
    assert len(fake.calls) == calls, "nothing is asked of a lost device"


def test_other_errors_leave_the_device_usable(fake: FakeCuda, device: CudaDevice) -> None:
    with device.make_stream() as stream:
        stranger: Any = SimpleNamespace(handle=12345)
        with pytest.raises(DeviceError, match=r"cudaStreamSynchronize: .*CUDA error 400"):
            device.synchronize(stranger)
        nobody: Any = SimpleNamespace(handle=None)
        with pytest.raises(DeviceError, match="does not belong to a GPU"):
            device.synchronize(nobody)
        assert fake.last == 0
        device.synchronize(stream)


def test_kernels_that_fail_are_told_by_name(fake: FakeCuda) -> None:
    extension = FakeExtension(fake)
    with CudaDevice(bindings=Bindings(fake, fake), extension=extension) as device, device.make_stream() as stream:
        with pytest.raises(DeviceError, match="no kernel 'halve'"):
            device.launch_kernel("halve", stream)
        with pytest.raises(ValueError, match="count must be positive"):
            device.launch_kernel("double", stream, values=1, count=-1)
        extension.fails = "launch: invalid argument"
        with pytest.raises(DeviceError, match="kernel double: launch: invalid argument") as caught:
            device.launch_kernel("double", stream)
        assert "lost" not in str(caught.value) and not caught.value.lost
        extension.fails = "launch: out of memory"
        with pytest.raises(OutOfMemoryError):
            device.launch_kernel("double", stream)
        extension.loses = True
        with pytest.raises(DeviceError, match=r"kernel double: .*context is lost") as caught:
            device.launch_kernel("double", stream)
        assert caught.value.lost


@pytest.mark.parametrize(
    "built, said",
    [
        (None, ["no CUDA kernels", "DREAMMIX_CUDA=ON"]),
        ({**BUILT, "toolkit": "14.0"}, ["serves CUDA 13.2", "built with 14.0", "driver"]),
        ({**BUILT, "architectures": ["sm_90"]}, ["sm_90, compute_120", "DREAMMIX_CUDA_ARCHITECTURES=89-real"]),
    ],
)
def test_an_extension_that_does_not_fit_is_told_with_the_remedy(built: Any, said: list[str], fake: FakeCuda) -> None:
    with CudaDevice(bindings=Bindings(fake, fake), extension=FakeExtension(fake, built)) as device:
        with device.make_stream() as stream, pytest.raises(DeviceError) as caught:
            device.launch_kernel("double", stream)
        for words in (*said, "Fake RTX (sm_89)"):
            assert words in str(caught.value)


def test_an_extension_that_is_missing_or_old_is_told(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    with open_fake(fake) as device:
        monkeypatch.setattr(checks, "import_module", absent)
        with pytest.raises(DeviceError, match=r"C.. extension is missing"):
            device.require_kernels()
        device._extension = object()
        with pytest.raises(DeviceError, match=r"C.. extension is missing or has no CUDA kernels"):
            device.require_kernels()


@pytest.mark.parametrize(
    "capability, driver, fits",
    [
        ("sm_75", 13000, True), ("sm_86", 13000, True), ("sm_87", 13000, True), ("sm_89", 13000, True),
        ("sm_90", 13000, True), ("sm_120", 13000, True), ("sm_121", 13000, True),
        ("sm_80", 13000, False),  # older than sm_86, and PTX does not go back
        ("sm_100", 13000, False), ("sm_103", 13000, False),
        ("sm_130", 13000, True), ("sm_130", 12080, False),
    ],
)  # fmt: skip
def test_which_gpus_the_kernels_fit(capability: str, driver: int, fits: bool) -> None:
    assert (why_kernels_do_not_fit(BUILT, capability, driver) is None) == fits


def test_ptx_needs_a_driver_that_knows_its_toolkit() -> None:
    newer = {**BUILT, "toolkit": "13.4"}
    assert why_kernels_do_not_fit(newer, "sm_89", 13000) is None
    why = why_kernels_do_not_fit(newer, "sm_130", 13000)
    assert why and "PTX of CUDA 13.4" in why and "13.0" in why and "130-real" in why
    assert "none of which" in str(why_kernels_do_not_fit({**BUILT, "ptx": None}, "sm_130", 13000))


@pytest.mark.parametrize(
    "fake, said",
    [
        (FakeCuda(starts=RuntimeError("libcuda.so.1")), ["no NVIDIA driver here", "580", "device='cpu'"]),
        (FakeCuda(starts=CUresult.CUDA_ERROR_NO_DEVICE), ["finds no device", "CUDA_VISIBLE_DEVICES", "100"]),
        (FakeCuda(starts=CUresult.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH), ["restart the computer", "803"]),
        (FakeCuda(starts=CUresult.CUDA_ERROR_UNKNOWN), ["does not start", "999"]),
        (FakeCuda(served=12080), ["serves CUDA 12.8", "needs 13.0", "driver 580 or newer"]),
        (FakeCuda(served=13020, runtime=14000), ["serves CUDA 13.2", "needs 14.0"]),
        (FakeCuda(("A", 8, 9, 1), ("B", 9, 0, 1)), ["no GPU 7 here", "0: A, 1: B"]),
    ],
)
def test_a_driver_or_device_that_does_not_do_is_told(fake: FakeCuda, said: list[str]) -> None:
    with pytest.raises(DeviceError) as caught:
        open_fake(fake, 7)
    for words in said:
        assert words in str(caught.value)


def test_an_old_gpu_is_told() -> None:
    with pytest.raises(DeviceError, match=r"the GTX 1080 is an sm_61, GPUs from sm_75 on .*device='cpu'"):
        open_fake(FakeCuda(("GTX 1080", 6, 1, 1)))
    for index in (-1, 1):
        with pytest.raises(DeviceError, match=f"no GPU {index} here"):
            open_fake(FakeCuda(), index)


def test_a_driver_of_the_same_major_version_will_do() -> None:
    open_fake(FakeCuda(served=13000, runtime=13040)).close()


def test_the_package_that_is_missing_or_broken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_with(error: Exception) -> Any:
        def load(name: str) -> Any:
            raise error

        return load

    monkeypatch.setattr(bindings, "import_module", fail_with(ModuleNotFoundError("no module", name="cuda")))
    with pytest.raises(MissingExtraError, match=r"dreammix-trt\[cuda\]"):
        CudaDevice()
    monkeypatch.setattr(bindings, "import_module", fail_with(ImportError("undefined symbol")))
    with pytest.raises(DeviceError, match=r"does not load .undefined symbol.*force-reinstall"):
        CudaDevice()


# ---------------------------------------------------------------------------------------- the real package

NAMES = re.compile(r"cu(da)?[A-Z]\w+|CU[a-z]\w+|CUDA_(SUCCESS|ERROR_\w+)")


def find_used_names() -> set[tuple[str, ...]]:
    """Dotted names of cuda.bindings in the source: `runtime.cudaMemcpyKind.cudaMemcpyHostToDevice`, `"cudaMalloc"`."""
    found = set()
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in Path(str(cuda.__file__)).parent.glob("*.py")]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAMES.fullmatch(node.value):
            found.add((node.value,))
        elif isinstance(node, ast.Attribute):
            parts = [node.attr]
            value = node.value
            while isinstance(value, ast.Attribute):
                parts.insert(0, value.attr)
                value = value.value
            names = [part for part in parts if NAMES.fullmatch(part)]
            if names:
                found.add(tuple(names))
    return found


def import_modules() -> tuple[Any, Any]:
    return (
        pytest.importorskip("cuda.bindings.runtime", exc_type=ImportError),
        pytest.importorskip("cuda.bindings.driver", exc_type=ImportError),
    )


def test_every_name_that_is_used_exists_in_the_package() -> None:
    runtime, driver = import_modules()
    names = find_used_names()
    assert {("cudaMalloc",), ("cudaMemcpyKind",), ("cuInit",), ("cudaErrorUnknown",)} <= names
    for chain in names:
        holder: Any = runtime if hasattr(runtime, chain[0]) else driver
        if re.fullmatch(r"cudaError[A-Z]\w+", chain[0]):
            holder = runtime.cudaError_t
        elif len(chain) == 1 and chain[0].startswith("cudaMemcpy") and not hasattr(runtime, chain[0]):
            holder = runtime.cudaMemcpyKind
        for name in chain:
            holder = getattr(holder, name)


def test_the_fake_keeps_the_packages_convention() -> None:
    runtime, driver = import_modules()
    functions = {
        name: each for name, each in vars(FakeCuda).items() if NAMES.fullmatch(name) and inspect.isfunction(each)
    }
    used = {name for name, *_ in find_used_names() if hasattr(runtime, name) or hasattr(driver, name)}
    assert used <= set(dir(FakeCuda))
    for name, function in functions.items():
        real = getattr(runtime, name, None) or getattr(driver, name)
        signature = (real.__doc__ or "").splitlines()[0]
        given = [word for word in signature.partition("(")[2][:-1].split(",") if word]
        assert len(inspect.signature(function).parameters) - 1 == len(given), signature
    for enum in (fake_cuda.cudaError_t, fake_cuda.cudaMemcpyKind, fake_cuda.cudaStreamCaptureMode, CUresult):
        real = getattr(runtime, enum.__name__, None) or getattr(driver, enum.__name__)
        for member in enum:
            assert int(getattr(real, member.name)) == int(member)
    for name in ("cudaHostAllocPortable", "cudaStreamNonBlocking", "cudaEventDefault", "cudaEventDisableTiming"):
        assert getattr(FakeCuda, name) == getattr(runtime, name)


def test_without_a_driver_the_real_package_is_told_so() -> None:
    from dreammix_trt.engine.hardware import ask_driver

    import_modules()
    if ask_driver().problem != "there is no NVIDIA driver here":
        pytest.skip("there is a driver here")
    with pytest.raises(DeviceError, match="there is no NVIDIA driver here; install"):
        CudaDevice()


def test_importing_the_module_loads_no_cuda() -> None:
    import subprocess
    import sys

    names = "[name for name in sys.modules if name.startswith('cuda')]"
    probe = f"import sys, dreammix_trt.engine.drivers.cuda; print({names})"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------- a real GPU


@pytest.fixture
def real(gpu: None) -> Iterator[CudaDevice]:
    pytest.importorskip("cuda.bindings.runtime", exc_type=ImportError)
    with CudaDevice() as device:
        yield device


def test_real_copies_and_memory(real: CudaDevice) -> None:
    values = np.random.default_rng(1).integers(0, 256, 5 << 20, np.uint8)
    before, total = real.memory()
    assert 0 < before <= total
    with real.allocate(values.nbytes) as memory, real.allocate(values.nbytes) as other, real.make_stream() as stream:
        assert memory.pointer % 256 == 0 and real.memory()[0] < before
        there, beside = (Array(each.pointer, values.shape, "uint8") for each in (memory, other))
        pinned = real.allocate_pinned(values.nbytes)
        pinned.array[:] = values
        real.upload(there, pinned.array, stream)
        real.copy(beside, there, stream)
        real.clear(there.part(0, 1000), stream)
        back = np.empty_like(values)
        real.download(back, beside, stream)
        real.synchronize(stream)
        np.testing.assert_array_equal(back, values)
        real.download(back, there, stream)
        real.synchronize(stream)
        assert not back[:1000].any() and (back[1000:] == values[1000:]).all()
        pinned.free()


def test_real_events_tell_device_time(real: CudaDevice) -> None:
    with real.allocate(256 << 20) as memory, real.make_stream() as stream:
        there = Array(memory.pointer, (256 << 20,), "uint8")
        first = real.mark(stream, timed=True)
        for _ in range(20):
            real.clear(there, stream)
        second = real.mark(stream, timed=True)
        real.synchronize(stream)
        assert first.has_passed() and second.has_passed()
        assert 20 * (256 << 20) / 20e12 < second.seconds_since(first) < 10  # no GPU writes 20 TB/s


def test_a_real_graph_with_a_kernel(real: CudaDevice) -> None:
    real.require_kernels()
    with real.allocate(4096) as memory, real.make_stream() as stream:
        wide = Array(memory.pointer, (256,), "float32")
        narrow = Array(memory.pointer + 2048, (256,), "float16")
        back = np.empty(256, np.float16)

        def record() -> None:
            real.launch_kernel("convert", stream, source=wide, source_half=0, out=narrow, out_half=1, count=256)

        graph = real.capture(stream, record)
        for seed in (1, 2):
            values = np.random.default_rng(seed).normal(size=256).astype(np.float32)
            real.upload(wide, values, stream)
            graph.launch(stream)
            real.download(back, narrow, stream)
            real.synchronize(stream)
            np.testing.assert_array_equal(back, values.astype(np.float16))
        with pytest.raises(DeviceError, match="not allowed within a capture"):
            real.capture(stream, lambda: ignore(real.allocate(1)))
        real.synchronize(stream)
        graph.close()


def test_real_memory_that_does_not_fit_leaves_the_device_usable(real: CudaDevice) -> None:
    total = real.memory()[1]
    with pytest.raises(OutOfMemoryError, match="are free"):
        real.allocate(2 * total)
    with real.allocate(1 << 20), real.make_stream() as stream:
        real.synchronize(stream)


def test_a_real_capture_that_something_spoils_is_discarded(real: CudaDevice) -> None:
    runtime = real._context.runtime
    with real.make_stream() as stream, real.allocate(256) as memory:
        with pytest.raises(DeviceError, match="CUDA error 90"):
            real.capture(stream, lambda: ignore(runtime.cudaStreamSynchronize(stream.handle)))
        real.clear(Array(memory.pointer, (256,), "uint8"), stream)
        real.synchronize(stream)


def test_a_real_device_that_is_not_there(gpu: None) -> None:
    pytest.importorskip("cuda.bindings.runtime", exc_type=ImportError)
    with pytest.raises(DeviceError, match="no GPU 99 here, only 0: "):
        CudaDevice(99)
