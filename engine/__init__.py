"""The runtime: an engine directory and a request in, a picture out. Needs neither torch nor diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dreammix_trt.core.request import Request as Request
    from dreammix_trt.engine.denoiser import Denoiser as Denoiser
    from dreammix_trt.engine.denoiser import FakeDenoiser as FakeDenoiser
    from dreammix_trt.engine.dreammix import DreamMix as DreamMix
    from dreammix_trt.engine.dreammix import Result as Result
    from dreammix_trt.engine.dreammix import StepEvent as StepEvent
    from dreammix_trt.engine.requests import RequestQueue as RequestQueue
    from dreammix_trt.engine.requests import Ticket as Ticket

_HOMES = {
    "DreamMix": "dreammix_trt.engine.dreammix",
    "Result": "dreammix_trt.engine.dreammix",
    "StepEvent": "dreammix_trt.engine.dreammix",
    "Request": "dreammix_trt.core.request",
    "Denoiser": "dreammix_trt.engine.denoiser",
    "FakeDenoiser": "dreammix_trt.engine.denoiser",
    "RequestQueue": "dreammix_trt.engine.requests",
    "Ticket": "dreammix_trt.engine.requests",
}

__all__ = ["Denoiser", "DreamMix", "FakeDenoiser", "Request", "RequestQueue", "Result", "StepEvent", "Ticket"]


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that importing the package stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
