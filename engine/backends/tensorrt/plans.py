"""Plans as files that somebody else may have built.

Whether loading one would run programs on this computer, whether it fits here, and what a package's messages mean.
"""

from __future__ import annotations

import logging
import mmap
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dreammix_trt.core.errors import DeviceError, EngineError, OutOfMemoryError
from dreammix_trt.core.files import ask_file
from dreammix_trt.engine import hardware
from dreammix_trt.engine.backends.tensorrt.callbacks import (
    collect_messages,
    get_logger,
    get_quiet_logger,
    get_recorder,
)
from dreammix_trt.engine.backends.tensorrt.package import PACKAGES, Package, check_runtime, load
from dreammix_trt.engine.machine import RTX_TARGETS

REBUILD: Final = "build it again with `dreammix-trt build`"
_HOST_CODE, _NO_HOST_CODE = "found", "none"
_QUESTION: Final = "host code, rule 1"  # the number rises when `holds_host_code` changes: then all plans are read again
LOGGER = logging.getLogger(__name__)


def holds_host_code(plan: Path) -> bool:
    """Whether a plan carries programs for the host: ELF files other than CUDA's, or Windows' executables.

    Version compatible plans do (the lean runtime), and loading one runs it.
    """
    if plan.stat().st_size == 0:
        return False
    with plan.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        elf = re.compile(rb"\x7fELF[\x01\x02][\x01\x02]\x01.{11}(..)", re.DOTALL)
        for found in elf.finditer(data):
            if found[1] not in (b"\xbe\x00", b"\x00\xbe"):  # EM_CUDA: code for the GPU
                return True
        # "PE", a processor (x86-64, ARM64, x86), and after the rest of the header the mark of an image.
        image = re.compile(rb"PE\x00\x00(?:\x64\x86|\x64\xaa|\x4c\x01).{18}\x0b[\x01\x02]", re.DOTALL)
        return image.search(data) is not None


def refuse_host_code(plan: Path, *, verify: bool = False) -> None:
    """Raise EngineError for a plan that would run programs on this computer when it is loaded.

    What was found in a large file is remembered beside its hash, so a second load need not read it. The runtime refuses
    host code as well (`open_guarded_runtime`).

    verify: read the plan again.
    """

    def find(file: Path) -> str:
        return _HOST_CODE if holds_host_code(file) else _NO_HOST_CODE

    if ask_file(plan, _QUESTION, find, verify=verify) != _NO_HOST_CODE:
        raise EngineError(
            f"{plan} carries code for the host, which loading would run; this program never builds such engines: "
            "do not trust its source, and build it again with `dreammix-trt build`"
        )


def open_guarded_runtime(backend: str) -> Any:
    """Open the runtime of a back end so that it refuses plans with host code itself.

    It is started twice: first with the logger that hears why it does not start, then with the one for running.

    Raises MissingExtraError or EngineError for a package that is absent or lacks something, DeviceError where the
    package cannot start.
    """
    trt = load(backend)
    check_runtime(trt, PACKAGES[backend])
    with collect_messages() as messages:
        try:
            trt.Runtime(get_logger(trt))
        except (RuntimeError, TypeError) as error:  # pybind11 raises TypeError where the factory gives nothing
            raise explain_failure(
                f"{PACKAGES[backend].title} does not start", messages or [("ERROR", str(error))]
            ) from error
    runtime = trt.Runtime(get_quiet_logger(trt))
    runtime.error_recorder = get_recorder(trt)
    runtime.engine_host_code_allowed = False
    if runtime.engine_host_code_allowed:
        raise EngineError(f"{PACKAGES[backend].title} does not refuse engines with host code; install it again")
    return runtime


@dataclass(frozen=True)
class Origin:
    """A plan file and the record of its build.

    plan: the file.
    build: the record in its `network.json`.
    gpu: name and capability of this machine's device.
    """

    plan: Path
    build: Mapping[str, Any]
    gpu: tuple[str, str]

    @property
    def version(self) -> str:
        """The version of the package that built it; "" where that is not recorded."""
        return str(self.build.get("version") or "")

    @property
    def targets(self) -> Sequence[str]:
        """The GPUs for which it was built; empty where they are not recorded."""
        return tuple(self.build.get("targets") or ())


def map_plan(plan: Path) -> mmap.mmap:
    """A plan's bytes without a copy: its pages come from the file and go again. Keep it as long as its engine.

    Raises EngineError for a file that is missing, unreadable or empty.
    """
    try:
        with plan.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise EngineError(f"{plan}: missing, unreadable or empty ({error}); {REBUILD}") from error


def check_origin(trt: Any, package: Package, origin: Origin) -> None:
    """Raise EngineError for a plan of another version, DeviceError for one of another GPU.

    It knows no more than `network.json`. TensorRT-RTX itself knows better on which GPUs a plan runs (`check_validity`).
    """
    if origin.version and origin.version != str(trt.__version__):
        raise _make_version_error(trt, package, origin)
    if not package.jit and origin.targets and origin.gpu[1] not in origin.targets:
        raise _make_gpu_error(package, origin)


def check_validity(trt: Any, package: Package, data: Any, origin: Origin) -> None:
    """Raise the error that fits what TensorRT-RTX finds wrong with a plan on this GPU, before loading it.

    data: the plan's bytes.

    It asks a runtime of its own, which costs microseconds: what is wrong with the driver goes to the logger alone.
    """
    runtime = trt.Runtime(get_logger(trt))
    with collect_messages() as messages:
        validity, bits = runtime.get_engine_validity(data)
    if validity == trt.EngineValidity.SUBOPTIMAL:
        LOGGER.warning("%s: not made for %s (%s); it may be slow", origin.plan, *origin.gpu)
    if validity != trt.EngineValidity.INVALID:
        return
    kinds = trt.EngineInvalidityDiagnostics
    driver = f"{package.title} {trt.__version__} needs another NVIDIA driver ({_describe_driver()})"
    reasons: list[tuple[Any, EngineError]] = [
        (kinds.CUDA_ERROR, DeviceError(f"{driver}: CUDA does not work here; install a driver again")),
        (kinds.OLD_CUDA_DRIVER, DeviceError(f"{driver}: this one is too old; update it")),
        (
            kinds.OLD_CUDA_RUNTIME,
            DeviceError(
                f"{origin.plan}: the CUDA runtime is too old; `pip install --upgrade 'dreammix-trt[{package.extra}]'`"
            ),
        ),
        (kinds.MALFORMED_ENGINE, EngineError(f"{origin.plan}: damaged, or no {package.title} engine; {REBUILD}")),
        (kinds.VERSION_MISMATCH, _make_version_error(trt, package, origin)),
        (kinds.UNSUPPORTED_CC, _make_gpu_error(package, origin)),
        (
            kinds.INSUFFICIENT_GPU_MEMORY,
            OutOfMemoryError(f"{origin.plan}: {origin.gpu[0]} has too little memory for it; {SMALLER}"),
        ),
    ]
    for kind, error in reasons:
        if int(bits) & int(kind):
            raise error
    raise explain_failure(f"{origin.plan} does not fit {origin.gpu[0]} ({origin.gpu[1]})", messages)


SMALLER: Final = "end other programs that use the GPU, or take less: `--pictures 1`, static shapes, or a smaller base"


def explain_failure(what: str, messages: Sequence[tuple[str, str]]) -> EngineError:
    """The error for something that the package did not do: OutOfMemoryError, DeviceError or EngineError.

    what: what it did not do.
    messages: (severity, text) from `collect_messages`; they decide the kind of error.
    """
    said = [text for level, text in messages if level != "WARNING"] or [text for _, text in messages]
    everything = " ".join(said)
    why = " ".join((said or ["no reason given"])[0].split())[:500]
    for mark, kind, remedy in _CAUSES:
        if mark.search(everything):
            return kind(f"{what}: {why}; {remedy or f'install or update the NVIDIA driver ({_describe_driver()})'}")
    return EngineError(f"{what}: {why}; {REBUILD}")


_CAUSES: Final[tuple[tuple[re.Pattern[str], type[EngineError], str], ...]] = (
    # No driver, or one too old; names and numbers are those of the CUDA runtime's cudaError.
    (
        re.compile(r"cudaError (?:35|100|803|804)\b|driver version is insufficient|no CUDA-capable device"),
        DeviceError,
        "",
    ),
    (
        re.compile(r"out ?of ?memory|cudaError 2\b|memory allocation failed|could not be allocated", re.IGNORECASE),
        OutOfMemoryError,
        SMALLER,
    ),
    (
        re.compile(r"compute capability|different (?:device|GPU) model|no kernel image", re.IGNORECASE),
        DeviceError,
        f"it is for another GPU: {REBUILD}",
    ),
    (
        re.compile(r"Serialization|version tag|incompatible.*version", re.IGNORECASE),
        EngineError,
        f"the plan is damaged or of another version: {REBUILD}",
    ),
    (
        re.compile(r"Cuda Runtime|cudaError \d+|illegal memory access"),
        DeviceError,
        "the device failed: start the program again; if it recurs, update the NVIDIA driver",
    ),
)


def _make_version_error(trt: Any, package: Package, origin: Origin) -> EngineError:
    built = f"{package.title} {origin.version}" if origin.version else f"another {package.title}"
    return EngineError(f"{origin.plan}: built with {built}, installed is {trt.__version__}; {REBUILD}")


def _make_gpu_error(package: Package, origin: Origin) -> DeviceError:
    name, capability = origin.gpu
    built = ", ".join(origin.targets) or "another GPU"
    remedy = f"build it for this GPU (`dreammix-trt build ... --target {capability}`), or"
    if package.jit and capability not in RTX_TARGETS:
        remedy = f"{package.title} has no engines for that: use `--backend tensorrt`, or"
    return DeviceError(
        f"{origin.plan}: built for {built}, here is {name} ({capability}); {remedy} use `--backend onnxruntime`"
    )


def _describe_driver() -> str:
    driver = hardware.ask_driver()
    return driver.problem or f"installed is one for CUDA {driver.cuda}"
