"""The one place that imports ONNX Runtime, and the switch that keeps it and others from reporting what is run.

From 1.29 on, ONNX Runtime's packages for Linux report sessions and models by default: they write `deviceid` and a
database into the user's cache and open connections. It reads its switch once, when it is loaded. So the switch is set
when `dreammix_trt` is imported, before anything here can load it, and worker processes inherit it.
"""

from __future__ import annotations

import os
from typing import Any

#: Environment variables that switch reports off: ONNX Runtime's, and that of the libraries that training uses.
SWITCHES = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

#: for sessions: leave QuantizeLinear where it is. ONNX Runtime moves it before a Transpose, which takes no E4M3.
KEEP_QUANTIZERS = ("session.disable_quant_qdq", "1")


def forbid_reports() -> None:
    """Switch reports off in this process and in those that it starts."""
    os.environ.update(SWITCHES)


def import_onnxruntime() -> Any:
    """The module `onnxruntime`, with its reports switched off.

    A program that loaded ONNX Runtime before this package decided for itself; then further events are still held back.

    Raises MissingExtraError when it is not installed, or its files went with another package that shares its folder.
    """
    forbid_reports()
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        from dreammix_trt.core.errors import MissingExtraError

        raise MissingExtraError("onnxruntime is not installed: pip install onnxruntime") from error
    if not hasattr(onnxruntime, "InferenceSession"):  # an empty folder imports as well
        from dreammix_trt.core.errors import MissingExtraError

        raise MissingExtraError("the files of onnxruntime are not whole: dreammix-trt doctor --mend")
    onnxruntime.disable_telemetry_events()
    return onnxruntime
