"""What this computer can build and run: facts of the machine, read without loading any of the packages they are about.

`examine` never raises: what cannot be found out is None or absent, and the reason is said where it matters.
"""

from __future__ import annotations

import contextlib
import importlib.util
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from dreammix_trt.engine.hardware import Driver, ask_driver, cores, disk_free, memory, processor

GIB: Final = 1 << 30
Tables = list[tuple[str, list[tuple[str, ...]]]]

# The GPUs whose plans TensorRT-RTX 1.7 can make; a test compares this with the package.
RTX_TARGETS: Final = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")

# Package as this project calls it -> distributions that bring it.
_DISTRIBUTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "onnxruntime": ("onnxruntime",),
    "onnxruntime-gpu": ("onnxruntime-gpu",),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "torch": ("torch",),
    "diffusers": ("diffusers",),
    "onnx": ("onnx",),
    "onnxslim": ("onnxslim",),
    "cuda-python": ("cuda-python",),
}


_TRACING: Final = ("torch", "diffusers", "onnx", "onnxslim")
_EXPORT: Final = "`pip install 'dreammix-trt[export]'`"
_NOT_RUN: Final = "this version builds its engines and does not run them yet"


@dataclass(frozen=True)
class BackendState:
    """Whether a back end can build and run here with this version of the program.

    why: what is missing and how to get it, or what it works with.
    """

    name: str
    can_build: bool
    can_run: bool
    why: str


@dataclass(frozen=True)
class Machine:
    """Facts of a computer. Sizes in bytes, None where unknown; memory as this process may use it (container limits)."""

    platform: str
    system: str
    cpu: str
    cores: int
    memory_total: int | None
    memory_available: int | None
    store: str | None
    disk_free: int | None
    driver: Driver
    versions: Mapping[str, str] = field(default_factory=dict)
    extension: bool = False

    def backends(self) -> list[BackendState]:
        """What each back end can do here, in the order in which a user should try them."""
        return [self._onnxruntime(), self._onnxruntime_cuda(), self._tensorrt_rtx(), self._tensorrt()]

    def faults(self) -> list[str]:
        """What is wrong with the installation, each with its remedy."""
        faults = []
        if "onnxruntime" in self.versions and "onnxruntime-gpu" in self.versions:
            faults.append(
                "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; "
                "`pip uninstall onnxruntime onnxruntime-gpu`, then install the one you want"
            )
        if self._old_tensorrt():
            faults.append(
                f"tensorrt {self.versions['tensorrt']} is too old; `pip install 'dreammix-trt[trt]'` brings 11"
            )
        return faults

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the states of the back ends and the faults."""
        facts = asdict(self) | {"versions": dict(self.versions)}
        return facts | {"backends": [asdict(state) for state in self.backends()], "faults": self.faults()}

    def describe(self) -> Tables:
        """Titled tables of short texts, as a person wants to read it."""
        extension = "there" if self.extension else "missing: numpy does its work, slower"
        facts: list[tuple[str, ...]] = [
            ("system", self.system),
            ("processor", f"{self.cpu}, {self.cores} {'core' if self.cores == 1 else 'cores'}"),
            ("memory", f"{_size(self.memory_available)} free of {_size(self.memory_total)}"),
            ("C++ extension", extension),
        ]
        if self.store is not None:
            facts.append(("store", f"{self.store}, {_size(self.disk_free)} free"))
        gpus: list[tuple[str, ...]] = [(gpu.name, gpu.capability, _size(gpu.memory)) for gpu in self.driver.gpus]
        driver = self.driver.problem or f"driver for CUDA {self.driver.cuda}"
        states: list[tuple[str, ...]] = [
            (state.name, "builds" if state.can_build else "-", "runs" if state.can_run else "-", state.why)
            for state in self.backends()
        ]
        versions: list[tuple[str, ...]] = list(self.versions.items())
        tables: Tables = [
            ("Machine", facts),
            ("NVIDIA", [(driver,), *gpus]),
            ("Back ends", states),
            ("Versions", versions),
        ]
        faults: list[tuple[str, ...]] = [(fault,) for fault in self.faults()]
        return tables + ([("Faults", faults)] if faults else [])

    def _onnxruntime(self) -> BackendState:
        version = self.versions.get("onnxruntime") or self.versions.get("onnxruntime-gpu")
        if not version:
            return BackendState("onnxruntime", False, False, "not installed; `pip install onnxruntime`")
        return BackendState("onnxruntime", True, True, f"onnxruntime {version}{self._embedded_only()}")

    def _onnxruntime_cuda(self) -> BackendState:
        name, version = "onnxruntime (CUDA)", self.versions.get("onnxruntime-gpu")
        builds = bool(version or self.versions.get("onnxruntime"))
        if not version:
            return BackendState(
                name, builds, False, "not installed; `pip install onnxruntime-gpu` in onnxruntime's place"
            )
        why = self._gpu_or(f"onnxruntime-gpu {version}") + self._embedded_only()
        return BackendState(name, builds, bool(self.driver.gpus), why)

    def _tensorrt_rtx(self) -> BackendState:
        name, version = "tensorrt-rtx", self.versions.get("tensorrt-rtx")
        if not version:
            return BackendState(name, False, False, "not installed; `pip install 'dreammix-trt[rtx]'`")
        known = [gpu for gpu in self.driver.gpus if gpu.capability in RTX_TARGETS]
        if self.driver.gpus and not known:
            gpu = f"{self.driver.gpus[0].capability} is not among its GPUs ({', '.join(RTX_TARGETS)})"
        else:
            gpu = self._gpu_or(f"the {known[0].name} would do" if known else "")
        return self._builds_only(name, version, gpu)

    def _tensorrt(self) -> BackendState:
        name, version = "tensorrt", self.versions.get("tensorrt")
        if not version:
            return BackendState(name, False, False, "not installed; `pip install 'dreammix-trt[trt]'`")
        if self._old_tensorrt():
            return BackendState(name, False, False, f"tensorrt {version} is too old, 11 is needed")
        if not self.driver.gpus:
            return BackendState(
                name, False, False, f"tensorrt {version}: builds on the GPU only, {self.driver.problem}"
            )
        return self._builds_only(name, version, f"the {self.driver.gpus[0].name} would do")

    def _builds_only(self, name: str, version: str, gpu: str) -> BackendState:
        """The state of a back end that `DreamMix` does not run; gpu: what is to be said of the GPU."""
        missing = self._untraceable()
        lacks = f"; building needs {', '.join(missing)}: {_EXPORT}" if missing else ""
        return BackendState(name, not missing, False, f"{name} {version}: {_NOT_RUN} ({gpu}){lacks}")

    def _embedded_only(self) -> str:
        missing = self._untraceable()
        if not missing:
            return ""
        return f"; builds the embedded model, another base needs {', '.join(missing)}: {_EXPORT}"

    def _untraceable(self) -> list[str]:
        return [name for name in _TRACING if name not in self.versions]

    def _gpu_or(self, well: str) -> str:
        if self.driver.gpus:
            return well
        return f"{well}, but {self.driver.problem}" if well else str(self.driver.problem)

    def _old_tensorrt(self) -> bool:
        version = self.versions.get("tensorrt", "11").split(".")[0]
        return version.isdigit() and int(version) < 11


def examine(store: Path | None = None) -> Machine:
    """Look at this computer; `store` is the folder whose disk matters (it need not exist)."""
    total, available = memory()
    return Machine(
        platform=f"{platform.system()} {platform.machine()}",
        system=platform.platform(),
        cpu=processor(),
        cores=cores(),
        memory_total=total,
        memory_available=available,
        store=None if store is None else str(store),
        disk_free=None if store is None else disk_free(store),
        driver=ask_driver(),
        versions=installed_versions(),
        extension=importlib.util.find_spec("dreammix_trt._cpp") is not None,
    )


def explain_mismatch(built_for: Mapping[str, Any], here: Machine) -> str | None:
    """Say why an engine built elsewhere cannot run here, or None when nothing speaks against it.

    built_for: "backend"; "version" of its package; "targets", the GPUs as "sm_89"; "platform" as `Machine.platform`;
    "command" that builds it again. Absent keys are not compared.
    """
    backend = str(built_for.get("backend", ""))
    if backend not in ("tensorrt-rtx", "tensorrt"):
        return None
    differences = [
        *_version_differs(backend, built_for.get("version"), here),
        *_gpu_differs(built_for.get("targets"), here),
        *_platform_differs(backend, built_for.get("platform"), here),
    ]
    if not differences:
        return None
    command = built_for.get("command")
    remedy = f"; build it again here: `{command}`" if command else "; build it again here"
    return f"this {backend} engine cannot run here: {'; '.join(differences)}{remedy}"


def installed_versions() -> dict[str, str]:
    """Versions of the packages that matter here and are installed, without importing them."""
    found: dict[str, str] = {}
    for name, distributions in _DISTRIBUTIONS.items():
        for distribution in distributions:
            with contextlib.suppress(metadata.PackageNotFoundError):
                found.setdefault(name, metadata.version(distribution))
    return found


def _version_differs(backend: str, built: Any, here: Machine) -> Iterator[str]:
    installed = here.versions.get(backend)
    if installed is None:
        extra = {"tensorrt-rtx": "rtx", "tensorrt": "trt"}[backend]
        yield f"{backend} is not installed (`pip install 'dreammix-trt[{extra}]'`)"
    elif built is not None and built != installed:
        yield f"it was built with {backend} {built}, installed is {installed}"


def _gpu_differs(targets: Any, here: Machine) -> Iterator[str]:
    if not here.driver.gpus:
        yield str(here.driver.problem)
    elif targets and not any(gpu.capability in targets for gpu in here.driver.gpus):
        gpus = ", ".join(f"{gpu.name} ({gpu.capability})" for gpu in here.driver.gpus)
        yield f"it was built for {', '.join(targets)}, here is {gpus}"


def _platform_differs(backend: str, built: Any, here: Machine) -> Iterator[str]:
    # TensorRT-RTX moves its plans between Linux and Windows; only the processor must agree.
    whole = backend == "tensorrt"
    if built is not None and _comparable(str(built), whole) != _comparable(here.platform, whole):
        yield f"it was built on {built}, this is {here.platform}"


def _comparable(name: str, whole: bool) -> str:
    system, _, processor = name.lower().partition(" ")
    processor = {"amd64": "x86_64", "arm64": "aarch64"}.get(processor, processor)
    return f"{system} {processor}" if whole else processor


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / GIB:.1f} GiB"
