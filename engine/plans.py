"""Built plans as files that somebody else may have made: what loading one would run on this computer."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Any

from dreammix_trt.core.errors import EngineError
from dreammix_trt.engine.tensorrt_callbacks import logger_of
from dreammix_trt.engine.tensorrt_package import PACKAGES, load


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


def refuse_host_code(plan: Path) -> None:
    """Raise EngineError for a plan that would run programs on this computer when it is loaded."""
    if holds_host_code(plan):
        raise EngineError(
            f"{plan} carries code for the host, which loading would run; this program never builds such engines: "
            "do not trust its source, and build it again with `dreammix-trt build`"
        )


def guarded_runtime(backend: str) -> Any:
    """The runtime of a back end, which itself refuses plans with host code."""
    trt = load(backend)
    runtime = trt.Runtime(logger_of(trt))
    runtime.engine_host_code_allowed = False
    if runtime.engine_host_code_allowed:
        raise EngineError(f"{PACKAGES[backend].title} does not refuse engines with host code; install it again")
    return runtime
