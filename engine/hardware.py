"""What the system reports about itself: memory, disk, processor, NVIDIA driver. Nothing here raises; None: unknown."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dreammix_trt.core.files import disk_free as disk_free

#: The CUDA version that a driver must serve (1000 major + 10 minor), the first driver that does, and the least GPU.
CUDA_NEEDED: Final = 13000
DRIVER_NEEDED: Final = "580"
LEAST_CAPABILITY: Final = (7, 5)
_SOURCES: Final = "from its sources (nvcc comes along): `pip install . -C cmake.define.DREAMMIX_CUDA=ON"
#: What brings the CUDA kernels. Wheels have them; no running machine needs nvcc.
INSTALL_KERNELS: Final = f"install dreammix-trt again from a wheel, or {_SOURCES}`"


_ARITHMETIC: Final = ("amx", "asimd", "avx", "bf16", "f16c", "fma", "i8mm", "sme", "sse", "sve")


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA device.

    capability: such as "sm_89".
    memory: in bytes.
    """

    name: str
    capability: str
    memory: int


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver.

    cuda: the CUDA version that it serves ("13.0"); None: unknown.
    gpus: those that this process may see; the runtime opens the first.
    problem: why it cannot be used, or None.
    visible: the entries of CUDA_VISIBLE_DEVICES that name `gpus`, in the same order, numbers or UUIDs; (): the variable
        is not set, and the driver's own numbers count.
    """

    cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()
    problem: str | None = None
    visible: tuple[str, ...] = ()

    def setting_for(self, index: int) -> str:
        """The setting that makes GPU `index` of `gpus` the first one."""
        return f"CUDA_VISIBLE_DEVICES={self.visible[index] if self.visible else index}"


def measure_memory(root: Path = Path("/")) -> tuple[int | None, int | None]:
    """Total bytes of memory and bytes free for this process, within the limits of its control groups.

    root: where /proc and /sys are, for tests.

    File pages that the system may drop count as free. Windows and macOS have no control groups, and macOS reports the
    total only. Returns (None, None) where nothing is known.
    """
    elsewhere = {"Windows": _measure_windows_memory, "Darwin": _measure_mac_memory}.get(platform.system())
    if elsewhere:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return elsewhere()
        return None, None
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        total, available = sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        return None, None
    for limit, used in _read_group_limits(root):
        total, available = min(total, limit), min(available, max(limit - used, 0))
    return total, available


def name_processor() -> str:
    """The processor's name, as far as the system reports it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def read_processor_features() -> tuple[str, ...]:
    """The processor's instruction sets for arithmetic, as Linux names them ("avx2", "amx_bf16"); (): unknown."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, words = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return tuple(sorted(word for word in set(words.split()) if word.startswith(_ARITHMETIC)))
    return ()


def count_cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def ask_driver(load: Callable[[str], Any] | None = None) -> Driver:
    """Ask the NVIDIA driver for its version and devices. Without a driver, `problem` says so.

    load: returns the driver's library for a file name, for tests.
    """
    windows = platform.system() == "Windows"
    name = "nvcuda.dll" if windows else "libcuda.so.1"
    if load is None:
        load = ctypes.WinDLL if windows else ctypes.CDLL  # type: ignore[attr-defined,unused-ignore]
    try:
        library = load(name)
        failed = library.cuInit(0)
    except (OSError, AttributeError):
        return Driver(problem="there is no NVIDIA driver here")
    if failed:
        reason = {100: "finds no device", 803: "does not fit its library", 804: "does not fit this device"}.get(failed)
        return Driver(problem=f"the NVIDIA driver {reason or 'does not start'} (CUDA error {failed})")
    version = _read_int(lambda out: library.cuDriverGetVersion(out)) or 0
    count = _read_int(lambda out: library.cuDeviceGetCount(out)) or 0
    gpus = tuple(gpu for index in range(count) if (gpu := _read_gpu(library, index)))
    problem = None if gpus else "the NVIDIA driver finds no device"
    entries = (entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))
    return Driver(cuda_text(version), gpus, problem, tuple(filter(None, entries)))


def cuda_text(version: int) -> str:
    """A CUDA version as people write it: 13000 -> "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def cuda_number(text: str) -> int:
    """The inverse of `cuda_text`: "13.0" -> 13000."""
    major, _, minor = text.partition(".")
    return 1000 * int(major) + 10 * int(minor or 0)


def why_kernels_do_not_fit(cuda: Mapping[str, Any] | None, capability: str, driver: int) -> str | None:
    """Why the extension's CUDA kernels do not run on a GPU, with the remedy. None when they run.

    cuda: of the extension's `build_info()`; None without kernels.
    capability: of the GPU, such as "sm_89".
    driver: the CUDA version that the driver serves, such as 13000.

    Code for a GPU runs on GPUs of the same major and no smaller minor number. PTX runs on every later one whose driver
    knows its toolkit (CUDA C++ Programming Guide, compute capabilities and PTX compatibility).
    """
    if not cuda:
        return f"the C++ extension is missing or has no CUDA kernels; {INSTALL_KERNELS}"
    toolkit, ptx, here = cuda_number(str(cuda["toolkit"])), cuda.get("ptx"), capability_of(capability)
    if toolkit // 1000 > driver // 1000:
        return (
            f"its driver serves CUDA {cuda_text(driver)}, the extension was built with {cuda_text(toolkit)}; install "
            f"an NVIDIA driver {DRIVER_NEEDED} or newer"
        )
    built = [capability_of(each) for each in cuda["architectures"]]
    if any(each[0] == here[0] and each[1] <= here[1] for each in built):
        return None
    number = f"{here[0]}{here[1]}"
    with_this = f"install dreammix-trt again {_SOURCES} -C cmake.define.DREAMMIX_CUDA_ARCHITECTURES={number}-real`"
    if not ptx or capability_of(ptx) > here:
        known = ", ".join(filter(None, [*cuda["architectures"], ptx]))
        return f"the extension has kernels for {known}, none of which run on an sm_{number}; {with_this}"
    if toolkit > driver:
        return (
            f"only the extension's PTX of CUDA {cuda_text(toolkit)} fits an sm_{number}, and its driver serves CUDA "
            f"{cuda_text(driver)}; update the driver, or {with_this}"
        )
    return None


def capability_of(name: str) -> tuple[int, int]:
    """sm_89, compute_120 -> (8, 9), (12, 0)."""
    return divmod(int(re.sub(r"\D", "", name)), 10)


def give_back_memory() -> None:
    """Return freed memory to the system where the C library keeps it (glibc keeps gigabytes after a large build)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class MemoryWatch:
    """Samples the most memory that this process held inside a `with` block. None where the system does not report it.

    rss: total bytes.
    anonymous: bytes without mapped files, which the system may drop. This much must fit.
    """

    def __init__(self, every: float = 0.02) -> None:
        self.rss: int | None = None
        self.anonymous: int | None = None
        self._every, self._stop = every, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory watch", daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            self._sample()

    def _sample(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            pages = [int(count) for count in Path("/proc/self/statm").read_text().split()]
            page = os.sysconf("SC_PAGE_SIZE")
            self.rss = max(self.rss or 0, pages[1] * page)
            self.anonymous = max(self.anonymous or 0, (pages[1] - pages[2]) * page)


class _MemoryStatus(ctypes.Structure):
    """Windows' MEMORYSTATUSEX (sysinfoapi.h)."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("rest", ctypes.c_uint64 * 5),
    )


def _measure_windows_memory() -> tuple[int | None, int | None]:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    kernel: Any = getattr(ctypes, "windll").kernel32  # noqa: B009  only there on Windows
    done = kernel.GlobalMemoryStatusEx(ctypes.byref(status))
    return (int(status.total), int(status.available)) if done else (None, None)


def _measure_mac_memory() -> tuple[int | None, int | None]:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (total, None) if total > 0 else (None, None)


def _read_group_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used without droppable file pages) of every control group of this process, versions 1 and 2."""
    try:
        entries = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for entry in entries:
        if len(entry) != 3:
            continue
        _, controllers, path = entry
        if controllers == "":
            top, files = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # The group's own folder and those above it; inside a container only the top may be visible.
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (limit := _read_limit(folder, *files)):
                yield limit


def _read_limit(folder: Path, limit: str, usage: str, droppable: str) -> tuple[int, int] | None:
    try:
        bound = int((folder / limit).read_text())
        used = int((folder / usage).read_text())
        for line in (folder / "memory.stat").read_text().splitlines():
            if line.split()[0] == droppable:
                used -= int(line.split()[1])
    except (OSError, ValueError, IndexError):  # "max": no limit
        return None
    return bound, max(used, 0)


def _read_gpu(library: Any, index: int) -> Gpu | None:
    device = _read_int(lambda out: library.cuDeviceGet(out, index))
    if device is None:
        return None
    name = ctypes.create_string_buffer(256)
    library.cuDeviceGetName(name, 256, device)
    major = _read_int(lambda out: library.cuDeviceGetAttribute(out, 75, device))
    minor = _read_int(lambda out: library.cuDeviceGetAttribute(out, 76, device))
    size = ctypes.c_size_t()
    library.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    return Gpu(name.value.decode(errors="replace"), f"sm_{major}{minor}", size.value)


def _read_int(call: Callable[[Any], int]) -> int | None:
    """The int that a driver call writes; None when the call fails."""
    value = ctypes.c_int()
    return None if call(ctypes.byref(value)) else value.value
