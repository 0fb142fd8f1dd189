"""What this computer can build and run. Reads facts of the machine without loading the packages that they are about.

`examine` never raises. What it cannot find out is None or absent, and the reports give the reason.
"""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from dreammix_trt.core.extras import TRAINING
from dreammix_trt.engine.hardware import (
    CUDA_NEEDED,
    DRIVER_NEEDED,
    INSTALL_KERNELS,
    LEAST_CAPABILITY,
    Driver,
    ask_driver,
    capability_of,
    count_cores,
    cuda_number,
    cuda_text,
    disk_free,
    measure_memory,
    name_processor,
    read_processor_features,
    why_kernels_do_not_fit,
)

GIB: Final = 1 << 30
Tables = list[tuple[str, list[tuple[str, ...]]]]

# The GPUs whose plans TensorRT-RTX 1.7 can make; a test compares this with the package.
RTX_TARGETS: Final = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")

#: Back ends that build plans -> the extra that brings them.
PLANS: Final = {"tensorrt-rtx": "rtx", "tensorrt": "trt"}

# Package as this project calls it -> distributions that bring it.
_DISTRIBUTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "onnxruntime": ("onnxruntime",),
    "onnxruntime-gpu": ("onnxruntime-gpu",),
    "openvino": ("openvino",),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "torch": ("torch",),
    "diffusers": ("diffusers",),
    "transformers": ("transformers",),
    "peft": ("peft",),
    "onnx": ("onnx",),
    "onnxslim": ("onnxslim",),
    "cuda-python": ("cuda-python", "cuda-bindings"),
}


#: Both write into the module's folder `onnxruntime`.
_ONNX_RUNTIMES: Final = ("onnxruntime", "onnxruntime-gpu")
_MEND: Final = "its files are not whole: `dreammix-trt doctor --mend`"
_TRACING: Final = ("torch", "diffusers", "onnx", "onnxslim")
_TRAIN: Final = "`pip install 'dreammix-trt[train]'`"
_EXPORT: Final = "`pip install 'dreammix-trt[export]'`"
_CUDA: Final = "`pip install 'dreammix-trt[cuda]'`"


@dataclass(frozen=True)
class BackendState:
    """Whether a back end can build and run here with this version of the program.

    why: what is missing and how to get it, or what the back end works with.
    """

    name: str
    can_build: bool
    can_run: bool
    why: str


@dataclass(frozen=True)
class TrainingState:
    """Whether `train` can run here. why: what is missing and how to get it, or what it works with."""

    can_train: bool
    why: str


@dataclass(frozen=True)
class Machine:
    """Facts of a computer. Sizes are in bytes, None where unknown.

    memory_total, memory_available: as this process may use them (container limits).
    store: the folder of the store; disk_free belongs to its disk.
    versions: package -> installed version.
    damaged: distributions of ONNX Runtime whose files are gone, or another's: the CPU's and the GPU's share one folder.
    bfloat16: whether the processor multiplies in it.
    extension: whether the C++ extension is installed.
    kernels: the extension's CUDA kernels, as in `_cpp.build_info()["cuda"]`.
    """

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
    damaged: tuple[str, ...] = ()
    extension: bool = False
    kernels: Mapping[str, Any] | None = None
    bfloat16: bool = False

    def list_backends(self) -> list[BackendState]:
        """The state of each back end here, in the order in which a user should try them."""
        return [
            self._judge_onnxruntime(),
            self._judge_openvino(),
            self._judge_onnxruntime_cuda(),
            self._judge_tensorrt_rtx(),
            self._judge_tensorrt(),
        ]

    def judge_training(self) -> TrainingState:
        """Whether a subject can be trained here, and with which packages."""
        missing = [name for name in TRAINING if name not in self.versions]
        if missing:
            return TrainingState(False, f"{', '.join(missing)} missing: {_TRAIN}")
        return TrainingState(True, ", ".join(f"{name} {self.versions[name]}" for name in TRAINING))

    def list_faults(self) -> list[str]:
        """What is wrong with the installation, each fault with its remedy."""
        faults = []
        if commands := self.mend_onnxruntime():
            faults.append(
                f"{self._describe_onnxruntime_fault()}: `dreammix-trt doctor --mend`, which is "
                + " and then ".join(f"`pip {' '.join(each)}`" for each in commands)
            )
        if self.tensorrt_is_old():
            faults.append(
                f"tensorrt {self.versions['tensorrt']} is too old; `pip install 'dreammix-trt[trt]'` installs 11"
            )
        return faults

    def mend_onnxruntime(self) -> list[list[str]]:
        """The calls of pip, without "pip", after which one whole ONNX Runtime is installed; [] where that is so.

        The CPU's comes with the program. Who has the GPU's as well has asked for that one, and it runs on the CPU, too.
        """
        if all(name in self.versions for name in _ONNX_RUNTIMES):
            gpu = _ONNX_RUNTIMES[-1]
            return [["uninstall", "-y", *_ONNX_RUNTIMES], ["install", "--no-deps", f"{gpu}=={self.versions[gpu]}"]]
        return [["install", "--force-reinstall", "--no-deps", f"{it}=={self.versions[it]}"] for it in self.damaged]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the states of the back ends and the faults."""
        facts = asdict(self) | {"versions": dict(self.versions)}
        states = {
            "backends": [asdict(state) for state in self.list_backends()],
            "training": asdict(self.judge_training()),
        }
        return facts | states | {"faults": self.list_faults()}

    def describe(self) -> Tables:
        """Titled tables of short texts for people to read."""
        extension = (
            "there" if self.extension else "missing: numpy does its work, slower; a few pixels may differ by one level"
        )
        facts: list[tuple[str, ...]] = [
            ("system", self.system),
            ("processor", f"{self.cpu}, {self.cores} {'core' if self.cores == 1 else 'cores'}"),
            ("memory", f"{_spell_size(self.memory_available)} free of {_spell_size(self.memory_total)}"),
            ("C++ extension", extension),
        ]
        if self.store is not None:
            facts.append(("store", f"{self.store}, {_spell_size(self.disk_free)} free"))
        gpus: list[tuple[str, ...]] = [(gpu.name, gpu.capability, _spell_size(gpu.memory)) for gpu in self.driver.gpus]
        driver = self.driver.problem or f"driver for CUDA {self.driver.cuda}"
        gpus.append(("cuda-python", self.versions.get("cuda-python", f"missing: {_CUDA}")))
        gpus.append(("CUDA kernels", self._describe_kernels()))
        states: list[tuple[str, ...]] = [
            (state.name, "builds" if state.can_build else "-", "runs" if state.can_run else "-", state.why)
            for state in self.list_backends()
        ]
        training = self.judge_training()
        versions: list[tuple[str, ...]] = list(self.versions.items())
        tables: Tables = [
            ("Machine", facts),
            ("NVIDIA", [(driver,), *gpus]),
            ("Back ends", states),
            ("Training", [("train", "trains" if training.can_train else "-", training.why)]),
            ("Versions", versions),
        ]
        faults: list[tuple[str, ...]] = [(fault,) for fault in self.list_faults()]
        return tables + ([("Faults", faults)] if faults else [])

    def _judge_onnxruntime(self) -> BackendState:
        installed = [name for name in _ONNX_RUNTIMES if name in self.versions]
        if not installed:
            return BackendState("onnxruntime", False, False, "not installed; `pip install onnxruntime`")
        version = self.versions[installed[0]]
        if set(installed) <= set(self.damaged):
            return BackendState("onnxruntime", False, False, f"onnxruntime {version}: {_MEND}")
        return BackendState("onnxruntime", True, True, f"onnxruntime {version}{self._describe_limits()}")

    def _judge_openvino(self) -> BackendState:
        version = self.versions.get("openvino")
        if not version:
            return BackendState("openvino", False, False, "not installed; `pip install 'dreammix-trt[openvino]'`")
        gain = "computes in bfloat16 here" if self.bfloat16 else "no bfloat16 here, so no faster than onnxruntime"
        return BackendState("openvino", True, True, f"openvino {version}, {gain}{self._describe_limits()}")

    def _describe_onnxruntime_fault(self) -> str:
        names = [name for name in _ONNX_RUNTIMES if name in self.versions]
        if len(names) == 1:
            return f"{names[0]} is installed, but its files are gone, or another package's"
        whose = [name for name in names if name not in self.damaged]
        now = f"the files of {whose[0]} lie there now" if len(whose) == 1 else "neither is whole now"
        now = "an update of one breaks the other" if len(whose) > 1 else now
        return f"onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files ({now})"

    def _judge_onnxruntime_cuda(self) -> BackendState:
        name, version = "onnxruntime (CUDA)", self.versions.get("onnxruntime-gpu")
        builds = bool(version or self.versions.get("onnxruntime"))
        if not version:
            return BackendState(
                name, builds, False, "not installed; `pip install onnxruntime-gpu`, then `dreammix-trt doctor --mend`"
            )
        lacks = [_MEND] if "onnxruntime-gpu" in self.damaged else self.list_gpu_lacks()
        why = self._describe_run(f"onnxruntime-gpu {version}", lacks) + self._describe_limits()
        return BackendState(name, builds, not lacks, why)

    def _judge_tensorrt_rtx(self) -> BackendState:
        name, version = "tensorrt-rtx", self.versions.get("tensorrt-rtx")
        if not version:
            return BackendState(name, False, False, "not installed; `pip install 'dreammix-trt[rtx]'`")
        lacks = self.list_gpu_lacks(RTX_TARGETS)
        return self._judge_plans(name, f"{name} {version}", lacks)

    def _judge_tensorrt(self) -> BackendState:
        name, version = "tensorrt", self.versions.get("tensorrt")
        if not version:
            return BackendState(name, False, False, "not installed; `pip install 'dreammix-trt[trt]'`")
        if self.tensorrt_is_old():
            return BackendState(name, False, False, f"tensorrt {version} is too old, 11 is needed")
        if not self.driver.gpus:
            return BackendState(
                name, False, False, f"tensorrt {version}: builds on the GPU only, {self.driver.problem}"
            )
        return self._judge_plans(name, f"{name} {version}", self.list_gpu_lacks())

    def _judge_plans(self, name: str, package: str, lacks: Sequence[str]) -> BackendState:
        """The state of a back end with plans. It can run where nothing is missing."""
        missing = self._list_missing_tracing()
        needs = f"; building needs {', '.join(missing)}: {_EXPORT}" if missing else ""
        return BackendState(name, not missing, not lacks, self._describe_run(package, lacks) + needs)

    def list_gpu_lacks(self, targets: Collection[str] | None = None) -> list[str]:
        """What is missing for running on the GPU here, each with its remedy.

        targets: the only GPUs that would do, such as "sm_89"; None: all that the program's kernels can run on.

        Of several GPUs the runtime opens the first.
        """
        if not self.driver.gpus:
            return [str(self.driver.problem)]
        gpu = self.driver.gpus[0]
        if targets is not None and gpu.capability not in targets:
            return [f"{gpu.capability} is not among its GPUs ({', '.join(targets)}){self.suggest_gpu(targets)}"]
        if capability_of(gpu.capability) < LEAST_CAPABILITY:
            return [f"the {gpu.name} is an {gpu.capability}, GPUs from sm_75 on are needed"]
        served = cuda_number(self.driver.cuda or "0")
        if served < CUDA_NEEDED:
            return [
                f"the NVIDIA driver serves CUDA {self.driver.cuda}, {cuda_text(CUDA_NEEDED)} is needed: install "
                f"driver {DRIVER_NEEDED} or newer"
            ]
        lacks = [] if "cuda-python" in self.versions else [f"cuda-python is not installed: {_CUDA}"]
        why = why_kernels_do_not_fit(self.kernels, gpu.capability, served)
        return [*lacks, why] if why else lacks

    def suggest_gpu(self, targets: Collection[str]) -> str:
        """How to choose another GPU, in brackets, when the first is not in `targets` and another one is; else ""."""
        index = self.find_gpu(targets)
        return f" ({self.driver.setting_for(index)} chooses the {self.driver.gpus[index].name})" if index else ""

    def find_gpu(self, targets: Collection[str]) -> int:
        """The index of the first GPU that is in `targets`; 0 when none is."""
        gpus = self.driver.gpus
        return next((index for index, gpu in enumerate(gpus) if gpu.capability in targets), 0)

    def _describe_run(self, package: str, lacks: Sequence[str]) -> str:
        if lacks:
            return f"{package}: to run, {'; and '.join(lacks)}" if self.driver.gpus else f"{package}, but {lacks[0]}"
        return f"{package}, on the {self.driver.gpus[0].name}"

    def _describe_kernels(self) -> str:
        if not self.extension:
            return "missing, like the C++ extension"
        if not self.kernels:
            return f"none in the C++ extension; device='cuda' needs them: {INSTALL_KERNELS}"
        known = ", ".join(filter(None, [*self.kernels["architectures"], self.kernels.get("ptx")]))
        return f"{known} (CUDA {self.kernels['toolkit']})"

    def _describe_limits(self) -> str:
        missing = self._list_missing_tracing()
        if not missing:
            return ""
        return f"; builds the embedded model, another base needs {', '.join(missing)}: {_EXPORT}"

    def _list_missing_tracing(self) -> list[str]:
        return [name for name in _TRACING if name not in self.versions]

    def tensorrt_is_old(self) -> bool:
        """Whether this program cannot use the API of the installed TensorRT."""
        version = self.versions.get("tensorrt", "11").split(".")[0]
        return version.isdigit() and int(version) < 11


def examine(store: Path | None = None) -> Machine:
    """Look at this computer.

    store: the folder whose disk matters; it need not exist.
    """
    total, available = measure_memory()
    extension, kernels = _read_extension()
    return Machine(
        platform=f"{platform.system()} {platform.machine()}",
        system=platform.platform(),
        cpu=name_processor(),
        cores=count_cores(),
        memory_total=total,
        memory_available=available,
        store=None if store is None else str(store),
        disk_free=None if store is None else disk_free(store),
        driver=ask_driver(),
        versions=find_versions(),
        damaged=tuple(name for name in _ONNX_RUNTIMES if _is_damaged(name)),
        extension=extension,
        kernels=kernels,
        bfloat16=bool({"avx512_bf16", "amx_bf16"} & set(read_processor_features())),
    )


def explain_mismatch(built_for: Mapping[str, Any], here: Machine) -> str | None:
    """Why an engine that was built elsewhere cannot run here; None when it can.

    built_for: "backend"; "version" of its package; "targets", the GPUs, such as "sm_89"; "platform" as
        `Machine.platform`; "command" that builds it again. Absent keys are not compared.
    """
    backend = str(built_for.get("backend", ""))
    if backend not in PLANS:
        return None
    if not here.driver.gpus:
        return (
            f"this {backend} engine cannot run here: {here.driver.problem}; "
            f"install driver {DRIVER_NEEDED} or newer where there is a GPU; `--backend onnxruntime` builds one that "
            f"runs on the processor (name another --out to keep this one){_rewrite_command(built_for, here)}"
        )
    targets = built_for.get("targets") or ()
    gpu = list(_compare_gpu(targets, here))
    outdated = [
        *_compare_version(backend, built_for.get("version"), here),
        *_compare_platform(backend, built_for.get("platform"), here),
    ]
    differences, lacks = [*outdated, *gpu], _check_package(backend, here)
    if not differences:
        lacks += here.list_gpu_lacks(targets or None)
    if not differences and not lacks:
        return None
    rebuild = outdated or (gpu and not here.suggest_gpu(targets))
    remedy = f"; build it again here{_rewrite_command(built_for, here)}" if rebuild else ""
    return f"this {backend} engine cannot run here: {'; '.join((*lacks, *differences))}{remedy}"


def find_versions() -> dict[str, str]:
    """Versions of the installed packages that matter here, without importing them."""
    found: dict[str, str] = {}
    for name, distributions in _DISTRIBUTIONS.items():
        for distribution in distributions:
            with contextlib.suppress(metadata.PackageNotFoundError):
                found.setdefault(name, metadata.version(distribution))
    return found


def _is_damaged(distribution: str) -> bool:
    """Whether libraries of an installed distribution are missing, or have another size than it installed."""
    try:
        files = metadata.distribution(distribution).files or ()
    except metadata.PackageNotFoundError:
        return False
    for file in files:
        if file.size is None or not (file.suffix in (".so", ".pyd", ".dll") or file.name == "__init__.py"):
            continue
        try:
            size = Path(str(file.locate())).stat().st_size
        except OSError:
            return True
        if size != file.size:
            return True
    return False


def _read_extension() -> tuple[bool, Mapping[str, Any] | None]:
    """Whether the C++ extension is installed, and its CUDA kernels. Loading it loads neither numpy nor a driver."""
    if importlib.util.find_spec("dreammix_trt._cpp") is None:
        return False, None
    try:
        info = importlib.import_module("dreammix_trt._cpp").build_info()
    except (ImportError, AttributeError):  # built for another Python, or by an older version of the program
        return True, None
    return True, info["cuda"]


def _check_package(backend: str, here: Machine) -> list[str]:
    if backend in here.versions:
        return []
    return [f"{backend} is not installed (`pip install 'dreammix-trt[{PLANS[backend]}]'`)"]


def _compare_version(backend: str, built: Any, here: Machine) -> Iterator[str]:
    installed = here.versions.get(backend)
    if installed and built is not None and built != installed:
        yield f"it was built with {backend} {built}, installed is {installed}"


def _compare_gpu(targets: Collection[str], here: Machine) -> Iterator[str]:
    first = here.driver.gpus[0]
    if targets and first.capability not in targets:
        first_gpu = f"the first GPU here is {first.name} ({first.capability}){here.suggest_gpu(targets)}"
        yield f"it was built for {', '.join(targets)}, {first_gpu}"


def _rewrite_command(built_for: Mapping[str, Any], here: Machine) -> str:
    """The command that builds the engine again, changed so that the new one runs here.

    ": " stands before it. Returns "" where no command is known.
    """
    command, instead = str(built_for.get("command") or ""), _choose_instead(built_for, here)
    if not command:
        return ""
    if instead == "--backend onnxruntime":
        plans_alone = ("precision", "shapes", "pictures", "workspace", "vae-image")
        command = _drop_options(command.replace("--no-safe-vae ", ""), "backend", "target", *plans_alone)
    elif instead.startswith("--backend"):
        command = _drop_options(command, "backend", "target")
    elif "--target" in command:
        command = _drop_options(command, "target")
    else:
        return f": `{command}`"
    return f": `{command} {instead}`"


def _choose_instead(built_for: Mapping[str, Any], here: Machine) -> str:
    """The option to build with in place of the old one."""
    if not here.driver.gpus:
        return "--backend onnxruntime"
    targets = RTX_TARGETS if built_for["backend"] == "tensorrt-rtx" else None
    # Maybe not the first GPU; then the user must choose it.
    capability = here.driver.gpus[here.find_gpu(built_for.get("targets") or ())].capability
    return f"--target {capability}" if targets is None or capability in targets else "--backend tensorrt"


def _drop_options(command: str, *options: str) -> str:
    return re.sub(rf"--({'|'.join(options)}) \S+ ?", "", command).strip()


def _compare_platform(backend: str, built: Any, here: Machine) -> Iterator[str]:
    # Plans of TensorRT-RTX run on Linux and Windows alike; only the processor must agree.
    whole = backend == "tensorrt"
    if built is not None and _normalise_platform(str(built), whole) != _normalise_platform(here.platform, whole):
        yield f"it was built on {built}, this is {here.platform}"


def _normalise_platform(name: str, whole: bool) -> str:
    system, _, processor = name.lower().partition(" ")
    processor = {"amd64": "x86_64", "arm64": "aarch64"}.get(processor, processor)
    return f"{system} {processor}" if whole else processor


def _spell_size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / GIB:.1f} GiB"
