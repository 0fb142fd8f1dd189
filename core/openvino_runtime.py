"""The one place that imports OpenVINO, and what keeps it from reporting what is run.

OpenVINO requires the package `openvino_telemetry` and, each time it is imported, sends an event through it without
asking first. Where that package is absent it goes without. So it is made absent before OpenVINO is loaded.

Its CPU plugin gives the thread that loads it another stack for signals, and frees that stack with its core. Where a
core is freed by another thread, or before a later one, the thread keeps the address of memory that is gone, and the
next signal (Ctrl-C, a timer) ends the process with a segmentation fault. So a process has one core, and keeps it.
"""

from __future__ import annotations

import sys
import threading
from functools import cache
from typing import Any, Final

_REPORTER: Final = "openvino_telemetry"
_lock = threading.Lock()


def import_openvino() -> Any:
    """The module `openvino`, unable to report.

    A program that loaded OpenVINO before this package decided for itself.

    Raises MissingExtraError when it is not installed.
    """
    sys.modules.setdefault(_REPORTER, None)  # type: ignore[arg-type]  # an import of it fails now
    try:
        import openvino
    except ModuleNotFoundError as error:
        if error.name != "openvino":
            raise
        from dreammix_trt.core.errors import MissingExtraError

        raise MissingExtraError("openvino is not installed: pip install 'dreammix-trt[openvino]'") from error
    return openvino


def open_core() -> Any:
    """OpenVINO's core, one for the whole process.

    Raises MissingExtraError when OpenVINO is not installed.
    """
    with _lock:  # two threads would make two of them
        return _make_core()


@cache
def _make_core() -> Any:
    return import_openvino().Core()
