"""Subject-driven SDXL inpainting (DreamMix) as ONNX and TensorRT engines.

Importing this package loads neither torch nor a runtime; the public names arrive on first use:

    from dreammix_trt.engine import DreamMix

    with DreamMix.load("engines/mug") as dm:
        dm.inpaint(image, mask_image, "a red sks mug").save("out.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dreammix_trt.core.onnx_runtime import forbid_reports

if TYPE_CHECKING:
    from dreammix_trt.building import build as build
    from dreammix_trt.core.errors import DreamMixError as DreamMixError
    from dreammix_trt.core.request import Request as Request
    from dreammix_trt.core.request import RequestFields as RequestFields
    from dreammix_trt.engine.dreammix import DreamMix as DreamMix
    from dreammix_trt.engine.result import Result as Result
    from dreammix_trt.trainer.lora import train_lora as train_lora

__version__ = "0.1.0"
__all__ = [
    "DreamMix", "DreamMixError", "Request", "RequestFields", "Result", "__version__", "build", "train_lora",
]  # fmt: skip

_HOMES = {
    "DreamMix": "dreammix_trt.engine.dreammix",
    "Result": "dreammix_trt.engine.result",
    "Request": "dreammix_trt.core.request",
    "RequestFields": "dreammix_trt.core.request",
    "DreamMixError": "dreammix_trt.core.errors",
    "build": "dreammix_trt.building",
    "train_lora": "dreammix_trt.trainer.lora",
}

forbid_reports()  # nothing that this package loads phones home


def __getattr__(name: str) -> Any:
    """Public names are imported when first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
