"""The one place that imports OpenVINO, and what keeps it from reporting what is run.

OpenVINO requires the package `openvino_telemetry` and, each time it is imported, sends an event through it without
asking first. Where that package is absent it goes without. So it is made absent before OpenVINO is loaded.
"""

from __future__ import annotations

import sys
from typing import Any, Final

_REPORTER: Final = "openvino_telemetry"


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
