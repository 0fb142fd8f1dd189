"""What a machine is said to be able to do: from fakes of the driver, the system's files and the installed packages."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dreammix_trt.engine import hardware, machine
from dreammix_trt.engine.hardware import Driver, Gpu, ask_driver, disk_free, measure_memory
from dreammix_trt.engine.machine import Machine, examine, explain_mismatch

GIB = 1 << 30
ADA = Gpu("NVIDIA GeForce RTX 4090", "sm_89", 24 * GIB)
HOPPER = Gpu("NVIDIA H200", "sm_90", 139 * GIB)
NONE = Driver(problem="there is no NVIDIA driver here")
BARE = Machine(
    platform="Linux x86_64",
    system="Linux-6.1",
    cpu="a processor",
    cores=2,
    memory_total=24 * GIB,
    memory_available=8 * GIB,
    store="store",
    disk_free=9 * GIB,
    driver=NONE,
    versions={
        "onnxruntime": "1.31.1",
        "tensorrt-rtx": "1.7.1.116",
        "torch": "2.13.0",
        "diffusers": "0.42.1",
        "onnx": "1.23.2",
        "onnxslim": "0.1.98",
        "cuda-python": "13.4.4",
    },
    extension=True,
    kernels={"toolkit": "13.0", "architectures": ["sm_75", "sm_86", "sm_90"], "ptx": "compute_120"},
)


def list_states(here: Machine) -> dict[str, tuple[bool, bool]]:
    return {state.name: (state.can_build, state.can_run) for state in here.list_backends()}


def find_reason(here: Machine, backend: str) -> str:
    return next(state.why for state in here.list_backends() if state.name == backend)


def add_gpu(gpu: Gpu, **versions: str) -> Machine:
    return replace(BARE, driver=Driver("13.0", (gpu,)), versions={**BARE.versions, **versions})


class FakeDriver:
    """The driver's library as far as it is asked, with the given devices (name, major, minor, memory)."""

    def __init__(self, *devices: tuple[str, int, int, int], starts: int = 0) -> None:
        self.devices, self.starts = devices, starts

    def cuInit(self, flags: int) -> int:
        return self.starts

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = 12080
        return 0

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = len(self.devices)
        return 0

    def cuDeviceGet(self, out: Any, index: int) -> int:
        out._obj.value = index
        return 0

    def cuDeviceGetName(self, buffer: Any, length: int, device: int) -> int:
        buffer.value = self.devices[device][0].encode()
        return 0

    def cuDeviceGetAttribute(self, out: Any, attribute: int, device: int) -> int:
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h
        out._obj.value = self.devices[device][{75: 1, 76: 2}[attribute]]
        return 0

    def cuDeviceTotalMem_v2(self, out: Any, device: int) -> int:
        assert isinstance(out._obj, ctypes.c_size_t)
        out._obj.value = self.devices[device][3]
        return 0


def test_a_machine_without_a_gpu_builds_for_one() -> None:
    assert list_states(BARE) == {
        "onnxruntime": (True, True),
        "onnxruntime (CUDA)": (True, False),
        "tensorrt-rtx": (True, False),
        "tensorrt": (False, False),
    }
    assert "no NVIDIA driver" in find_reason(BARE, "tensorrt-rtx")
    assert "dreammix-trt[trt]" in find_reason(BARE, "tensorrt")
    remedy = "`pip install onnxruntime-gpu`, then `dreammix-trt doctor --mend`"  # the two overwrite each other
    assert remedy in find_reason(BARE, "onnxruntime (CUDA)")


def test_a_gpu_lets_every_back_end_run() -> None:
    here = add_gpu(ADA, tensorrt="11.4.0.106")
    for name in ("tensorrt-rtx", "tensorrt"):
        assert list_states(here)[name] == (True, True)
        assert find_reason(here, name) == f"{name} {here.versions[name]}, on the NVIDIA GeForce RTX 4090"
    assert list_states(here)["onnxruntime (CUDA)"] == (True, False)
    cuda = replace(here, versions={"onnxruntime-gpu": "1.31.1", "cuda-python": "13.4.4"})
    assert list_states(cuda) == {
        "onnxruntime": (True, True),
        "onnxruntime (CUDA)": (True, True),
        "tensorrt-rtx": (False, False),
        "tensorrt": (False, False),
    }


def test_a_gpu_that_tensorrt_rtx_does_not_know_can_only_build_with_it() -> None:
    here = add_gpu(HOPPER, tensorrt="11.4.0.106")
    assert list_states(here)["tensorrt-rtx"] == (True, False)
    assert "sm_90" in find_reason(here, "tensorrt-rtx") and "sm_89" in find_reason(here, "tensorrt-rtx")
    assert list_states(here)["tensorrt"] == (True, True)
    both = replace(here, driver=Driver("13.0", (HOPPER, ADA)))
    assert list_states(both)["tensorrt-rtx"] == (True, False) and list_states(both)["tensorrt"] == (True, True)
    assert find_reason(both, "tensorrt-rtx").endswith("(CUDA_VISIBLE_DEVICES=1 chooses the NVIDIA GeForce RTX 4090)")
    assert find_reason(both, "tensorrt").endswith("on the NVIDIA H200")
    turned = replace(here, driver=Driver("13.0", (ADA, HOPPER)))
    assert find_reason(turned, "tensorrt-rtx").endswith("on the NVIDIA GeForce RTX 4090")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"kernels": None}, "the C++ extension is missing or has no CUDA kernels; install dreammix-trt again"),
        ({"versions": {"tensorrt": "11.4"}}, "cuda-python is not installed: `pip install 'dreammix-trt[cuda]'`"),
        ({"driver": Driver("12.8", (ADA,))}, "driver serves CUDA 12.8, 13.0 is needed: install driver 580"),
        ({"driver": Driver("13.0", (Gpu("GTX 1080", "sm_61", GIB),))}, "GTX 1080 is an sm_61, GPUs from sm_75 on"),
        ({"driver": Driver("13.0", (Gpu("A100", "sm_80", GIB),))}, "DREAMMIX_CUDA_ARCHITECTURES=80-real"),
    ],
)
def test_what_running_on_a_gpu_lacks_is_said_with_the_remedy(change: dict[str, Any], said: str) -> None:
    here = replace(add_gpu(ADA, tensorrt="11.4.0.106"), **change)
    assert list_states(here)["tensorrt"][1] is False and said in find_reason(here, "tensorrt")
    (lack,) = here.list_gpu_lacks()
    assert said in lack
    assert add_gpu(ADA).list_gpu_lacks() == []


def test_without_what_tracing_needs_only_the_embedded_model_is_built() -> None:
    lacks = {name: version for name, version in BARE.versions.items() if name not in ("torch", "onnxslim")}
    here = replace(add_gpu(ADA), versions={**lacks, "tensorrt": "11.4.0.106"})
    for name in ("tensorrt-rtx", "tensorrt"):
        assert list_states(here)[name] == (False, True)
        assert "building needs torch, onnxslim: `pip install 'dreammix-trt[export]'`" in find_reason(here, name)
    assert list_states(here)["onnxruntime"] == (True, True)
    assert "builds the embedded model, another base needs torch, onnxslim" in find_reason(here, "onnxruntime")
    assert "another base" not in find_reason(BARE, "onnxruntime")


def test_faults_of_the_installation_come_with_a_remedy() -> None:
    assert BARE.list_faults() == []
    old = add_gpu(ADA, tensorrt="10.16.2")
    assert "10.16.2" in old.list_faults()[0] and list_states(old)["tensorrt"] == (False, False)


BOTH = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.30.0"}
REINSTALL = ["install", "--force-reinstall", "--no-deps"]


@pytest.mark.parametrize(
    ("versions", "damaged", "said", "commands"),
    [
        (BOTH, ("onnxruntime-gpu",), "the files of onnxruntime lie there now",
         [["uninstall", "-y", "onnxruntime", "onnxruntime-gpu"], ["install", "--no-deps", "onnxruntime-gpu==1.30.0"]]),
        (BOTH, ("onnxruntime",), "the files of onnxruntime-gpu lie there now",
         [["uninstall", "-y", "onnxruntime", "onnxruntime-gpu"], ["install", "--no-deps", "onnxruntime-gpu==1.30.0"]]),
        (BOTH, (), "an update of one breaks the other",
         [["uninstall", "-y", "onnxruntime", "onnxruntime-gpu"], ["install", "--no-deps", "onnxruntime-gpu==1.30.0"]]),
        (BOTH, ("onnxruntime", "onnxruntime-gpu"), "neither is whole now",
         [["uninstall", "-y", "onnxruntime", "onnxruntime-gpu"], ["install", "--no-deps", "onnxruntime-gpu==1.30.0"]]),
        ({"onnxruntime": "1.31.1"}, ("onnxruntime",), "onnxruntime is installed, but its files are gone",
         [[*REINSTALL, "onnxruntime==1.31.1"]]),
        ({"onnxruntime-gpu": "1.30.0"}, ("onnxruntime-gpu",), "onnxruntime-gpu is installed, but its files are gone",
         [[*REINSTALL, "onnxruntime-gpu==1.30.0"]]),
    ],
)  # fmt: skip
def test_a_broken_onnxruntime_is_named_with_the_commands_that_mend_it(
    versions: dict[str, str], damaged: tuple[str, ...], said: str, commands: list[list[str]]
) -> None:
    here = replace(add_gpu(ADA), versions={**versions, "cuda-python": "13.4.4"}, damaged=damaged)
    (fault,) = here.list_faults()
    assert said in fault and here.mend_onnxruntime() == commands
    for command in commands:
        assert f"`pip {' '.join(command)}`" in fault
    whole = set(versions) - set(damaged)
    assert list_states(here)["onnxruntime"][1] is bool(whole)
    assert list_states(here)["onnxruntime (CUDA)"][1] is ("onnxruntime-gpu" in whole)
    alone = replace(here, versions={"onnxruntime-gpu": "1.30.0"}, damaged=())
    assert alone.mend_onnxruntime() == [] == alone.list_faults()


def install(folder: Path, name: str, library: str) -> None:
    """A distribution as pip leaves it: its library in the shared folder, and a record of its size."""
    (folder / "onnxruntime" / "capi").mkdir(parents=True, exist_ok=True)
    (folder / "onnxruntime" / "__init__.py").write_text("")
    (folder / "onnxruntime" / "capi" / "state.so").write_text(library)
    info = folder / f"{name.replace('-', '_')}-1.31.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.31.1\n")
    record = f"onnxruntime/__init__.py,,0\nonnxruntime/capi/state.so,,{len(library)}\nonnxruntime/capi/none.pyc,,\n"
    (info / "RECORD").write_text(record)


def test_whose_files_lie_in_the_shared_folder_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *[each for each in sys.path if "site-packages" not in each]])
    install(tmp_path, "onnxruntime", "the processor's")
    assert examine().damaged == () and examine().versions["onnxruntime"] == "1.31.1"
    install(tmp_path, "onnxruntime-gpu", "the graphics card's, larger")
    assert examine().damaged == ("onnxruntime",)
    (tmp_path / "onnxruntime" / "capi" / "state.so").unlink()
    assert examine().damaged == ("onnxruntime", "onnxruntime-gpu")


def test_tables_and_json_say_the_same() -> None:
    here = add_gpu(ADA)
    tables = dict(here.describe())
    assert set(tables) == {"Machine", "NVIDIA", "Back ends", "Training", "Versions"}
    assert ("NVIDIA GeForce RTX 4090", "sm_89", "24.0 GiB") in tables["NVIDIA"]
    assert ("memory", "8.0 GiB free of 24.0 GiB") in tables["Machine"]
    assert ("cuda-python", "13.4.4") in tables["NVIDIA"]
    assert ("CUDA kernels", "sm_75, sm_86, sm_90, compute_120 (CUDA 13.0)") in tables["NVIDIA"]
    bare = dict(dict(replace(here, versions={}, kernels=None).describe())["NVIDIA"][2:])
    assert "dreammix-trt[cuda]" in bare["cuda-python"] and "from a wheel" in bare["CUDA kernels"]
    assert "missing" in dict(dict(replace(here, extension=False).describe())["NVIDIA"][2:])["CUDA kernels"]
    record = json.loads(json.dumps(here.to_dict()))
    assert record["driver"]["gpus"][0]["capability"] == "sm_89"
    assert [row[0] for row in tables["Back ends"]] == [state["name"] for state in record["backends"]]
    unknown = replace(BARE, memory_total=None, memory_available=None, disk_free=None, versions={"tensorrt": "9.0"})
    tables = dict(unknown.describe())
    assert ("memory", "unknown free of unknown") in tables["Machine"] and "Faults" in tables


def test_this_machine_is_examined_without_loading_what_it_is_about(tmp_path: Path) -> None:
    here = examine(tmp_path / "not" / "there")
    assert here.cores >= 1 and here.disk_free and here.store and here.store.endswith("there")
    assert examine().disk_free is None
    json.dumps(here.to_dict())
    heavy = "torch", "diffusers", "onnxruntime", "tensorrt_rtx", "tensorrt", "numpy"
    probe = (
        "import sys; from dreammix_trt.engine.machine import examine; examine().describe(); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_kernels_of_the_extension_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_as(found: Any) -> Any:
        def load(name: str) -> Any:
            if isinstance(found, Exception):
                raise found
            return found

        return load

    built = {"toolkit": "13.0", "architectures": ["sm_75"], "ptx": None}
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: object())
    for found, kernels in (
        (SimpleNamespace(build_info=lambda: {"cuda": built}), built),
        (SimpleNamespace(build_info=lambda: {"cuda": None}), None),
        (SimpleNamespace(), None),
        (ImportError("of another Python"), None),
    ):
        monkeypatch.setattr(machine.importlib, "import_module", import_as(found))
        assert (examine().extension, examine().kernels) == (True, kernels)
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    assert (examine().extension, examine().kernels) == (False, None)


@pytest.mark.parametrize(
    "given, visible, second",
    [(None, (), "1"), ("2,3", ("2", "3"), "3"), ("GPU-5d1f, GPU-8a02", ("GPU-5d1f", "GPU-8a02"), "GPU-8a02")],
)
def test_the_driver_is_asked_for_its_devices(
    given: str | None, visible: tuple[str, ...], second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    library = FakeDriver(("RTX 4090", 8, 9, 24 * GIB), ("RTX 5090", 12, 0, 32 * GIB))
    driver = ask_driver(lambda name: library)
    gpus = Gpu("RTX 4090", "sm_89", 24 * GIB), Gpu("RTX 5090", "sm_120", 32 * GIB)
    assert driver == Driver("12.8", gpus, visible=visible)
    assert driver.setting_for(1) == f"CUDA_VISIBLE_DEVICES={second}"


@pytest.mark.parametrize("starts, said", [(100, "no device"), (999, "does not start"), (803, "library")])
def test_a_driver_that_does_not_start_says_so(starts: int, said: str) -> None:
    driver = ask_driver(lambda name: FakeDriver(starts=starts))
    assert driver.gpus == () and driver.problem and said in driver.problem and str(starts) in driver.problem


def test_a_driver_without_devices_or_without_a_library_says_so() -> None:
    def absent(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    assert ask_driver(lambda name: FakeDriver()).problem == "the NVIDIA driver finds no device"
    assert ask_driver(absent) == NONE
    assert ask_driver(lambda name: object()) == NONE


def write_system(root: Path, groups: str, **files: str) -> Path:
    """A system's memory files: 16 GiB in all, 12 of them free."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 12582912 kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_memory_without_groups_is_what_the_system_says(tmp_path: Path) -> None:
    assert measure_memory(write_system(tmp_path, "")) == (16 * GIB, 12 * GIB)
    assert measure_memory(tmp_path / "nothing") == (None, None)


class FakeKernel:
    """Windows' kernel32 as far as it is asked: 16 GiB, 5 of them free."""

    def __init__(self, works: bool) -> None:
        self.kernel32, self.works = self, works

    def GlobalMemoryStatusEx(self, out: Any) -> int:
        raw = (ctypes.c_char * 64).from_address(ctypes.addressof(out._obj))
        assert int.from_bytes(raw[:4], "little") == 64 == ctypes.sizeof(out._obj)  # sizeof(MEMORYSTATUSEX)
        raw[8:16], raw[16:24] = (16 * GIB).to_bytes(8, "little"), (5 * GIB).to_bytes(8, "little")
        return int(self.works)


def test_memory_of_windows_and_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.platform, "system", lambda: "Windows")
    for works, told in ((True, (16 * GIB, 5 * GIB)), (False, (None, None))):
        monkeypatch.setattr(hardware.ctypes, "windll", FakeKernel(works), raising=False)
        assert measure_memory() == told
    monkeypatch.delattr(hardware.ctypes, "windll")
    assert measure_memory() == (None, None)
    monkeypatch.setattr(hardware.platform, "system", lambda: "Darwin")
    pages = {"SC_PHYS_PAGES": 1 << 20, "SC_PAGE_SIZE": 16384}
    monkeypatch.setattr(hardware.os, "sysconf", pages.__getitem__)
    assert measure_memory() == (16 * GIB, None)

    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(hardware.os, "sysconf", unknown)
    assert measure_memory() == (None, None)


def test_memory_keeps_to_the_limit_of_a_group_and_counts_droppable_pages_as_free(tmp_path: Path) -> None:
    version2 = write_system(
        tmp_path / "2",
        "0::/app\n",
        app__memory_DOT_max=str(4 * GIB),
        app__memory_DOT_current=str(3 * GIB),
        app__memory_DOT_stat=f"anon 1\ninactive_file {GIB}\n",
    )
    assert measure_memory(version2) == (4 * GIB, 2 * GIB)
    version1 = write_system(
        tmp_path / "1",
        "9:name=systemd:/\n4:cpu,memory:/host/path\n",
        memory__memory_DOT_limit_in_bytes=str(6 * GIB),
        memory__memory_DOT_usage_in_bytes=str(5 * GIB),
        memory__memory_DOT_stat=f"total_inactive_file {2 * GIB}\n",
    )
    assert measure_memory(version1) == (6 * GIB, 3 * GIB)


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    root = write_system(
        tmp_path,
        "0::/a/b\n",
        a__b__memory_DOT_max="max",
        a__b__memory_DOT_current="5",
        a__b__memory_DOT_stat="",
        a__memory_DOT_max=str(GIB),
        a__memory_DOT_current=str(2 * GIB),
        a__memory_DOT_stat="",
    )
    assert measure_memory(root) == (GIB, 0)


def test_disk_is_measured_where_the_folder_will_be(tmp_path: Path) -> None:
    assert disk_free(tmp_path / "a" / "b") == pytest.approx(disk_free(tmp_path), rel=0.2)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells a process its memory")
def test_the_watch_sees_memory_that_is_gone_afterwards() -> None:
    """In a process of its own, where no other test's memory comes back meanwhile."""
    code = """
from dreammix_trt.engine.hardware import MemoryWatch
with MemoryWatch(every=0.001) as before:
    pass
with MemoryWatch(every=0.001) as watch:
    held = bytearray(64 << 20)
    held[::4096] = b"x" * len(held[::4096])
    watch._sample()
    del held
assert before.anonymous and watch.anonymous and watch.rss
assert watch.anonymous - before.anonymous > 60 << 20
assert watch.rss > watch.anonymous
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])


BUILT: dict[str, Any] = {
    "backend": "tensorrt-rtx",
    "version": "1.7.1.116",
    "targets": ["sm_86", "sm_89"],
    "platform": "Linux x86_64",
    "command": "dreammix-trt build --target sm_89",
}


def test_the_first_gpu_is_what_the_runtime_opens() -> None:
    both = replace(add_gpu(HOPPER), driver=Driver("13.0", (HOPPER, ADA)))
    chooses = "(CUDA_VISIBLE_DEVICES=1 chooses the NVIDIA GeForce RTX 4090)"
    text = explain_mismatch(BUILT, both)
    assert text and text.endswith(chooses), "nothing has to be built again"
    text = explain_mismatch(BUILT, replace(both, driver=Driver("13.0", (HOPPER, ADA), visible=("2", "GPU-8a02"))))
    assert text and text.endswith("(CUDA_VISIBLE_DEVICES=GPU-8a02 chooses the NVIDIA GeForce RTX 4090)")
    text = explain_mismatch(BUILT | {"targets": ["sm_86"]}, both)
    assert text and "CUDA_VISIBLE_DEVICES" not in text
    assert text.endswith("build it again here: `dreammix-trt build --backend tensorrt`")
    text = explain_mismatch(BUILT | {"version": "1.6"}, both)
    assert text and text.endswith(f"{chooses}; {AGAIN}"), "for the one that is chosen"


def test_nothing_differs_where_nothing_does() -> None:
    assert explain_mismatch(BUILT, add_gpu(ADA)) is None
    assert explain_mismatch({"backend": "tensorrt-rtx"}, add_gpu(ADA)) is None
    assert explain_mismatch({"backend": "onnxruntime", "version": "0", "platform": "Windows AMD64"}, BARE) is None


AGAIN = "build it again here: `dreammix-trt build --target sm_89`"
UNBUILT = replace(BARE, versions={}, kernels=None)


@pytest.mark.parametrize(
    "change, here, said, remedy",
    [
        (
            {},
            add_gpu(HOPPER),
            ["built for sm_86, sm_89", "NVIDIA H200 (sm_90)"],
            "build it again here: `dreammix-trt build --backend tensorrt`",
        ),
        (
            {"targets": ["sm_86"], "command": "dreammix-trt build --target sm_86 --target sm_80 --out it"},
            add_gpu(ADA),
            ["built for sm_86, the first GPU here is NVIDIA GeForce RTX 4090"],
            "build it again here: `dreammix-trt build --out it --target sm_89`",
        ),
        ({"version": "1.6.1.120"}, add_gpu(ADA), ["1.6.1.120", "1.7.1.116"], AGAIN),
        (
            {
                "command": "dreammix-trt build --out it --backend tensorrt-rtx --precision float16 "
                "--vae-image a.png --no-safe-vae --pictures 2 --no-slots"
            },
            BARE,
            ["no NVIDIA driver"],
            "(name another --out to keep this one): `dreammix-trt build --out it --no-slots --backend onnxruntime`",
        ),
        ({"command": None}, BARE, ["no NVIDIA driver"], "(name another --out to keep this one)"),
        (
            {},
            replace(UNBUILT, driver=Driver("13.0", (ADA,))),
            ["not installed", "dreammix-trt[rtx]", "dreammix-trt[cuda]"],
            "`pip install . -C cmake.define.DREAMMIX_CUDA=ON`",
        ),
        ({}, replace(add_gpu(ADA), platform="Linux aarch64"), ["Linux x86_64", "Linux aarch64"], AGAIN),
        (
            {"backend": "tensorrt", "version": "11.4", "command": "dreammix-trt build --backend tensorrt"},
            replace(add_gpu(ADA, tensorrt="11.4"), platform="Windows AMD64"),
            ["Windows AMD64"],
            "build it again here: `dreammix-trt build --backend tensorrt`",
        ),
    ],
)
def test_what_differs_is_said_with_what_to_do(
    change: dict[str, Any], here: Machine, said: list[str], remedy: str
) -> None:
    text = explain_mismatch(BUILT | change, here)
    assert text and text.endswith(remedy)
    for part in said:
        assert part in text


def test_tensorrt_rtx_moves_between_linux_and_windows() -> None:
    assert explain_mismatch(BUILT, replace(add_gpu(ADA), platform="Windows AMD64")) is None


def test_versions_are_read_from_the_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"onnxruntime": "1.31.1", "tensorrt-cu13": "11.4.0.106"}

    def version(name: str) -> str:
        if name not in installed:
            raise machine.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(machine.metadata, "version", version)
    assert machine.find_versions() == {"onnxruntime": "1.31.1", "tensorrt": "11.4.0.106"}
    assert hardware.name_processor()
