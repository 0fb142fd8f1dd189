"""The runtime: an engine directory and a request in, a picture out. Needs neither torch nor diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dreammix_trt.core.errors import Cancelled as Cancelled
    from dreammix_trt.core.errors import DreamMixError as DreamMixError
    from dreammix_trt.core.errors import QueueFull as QueueFull
    from dreammix_trt.core.errors import TimedOut as TimedOut
    from dreammix_trt.core.request import Request as Request
    from dreammix_trt.engine.device.memory_plan import Options as Options
    from dreammix_trt.engine.dreammix import DreamMix as DreamMix
    from dreammix_trt.engine.dreammix import Job as Job
    from dreammix_trt.engine.dreammix import Result as Result
    from dreammix_trt.engine.dreammix import StepEvent as StepEvent
    from dreammix_trt.engine.host.denoiser import Denoiser as Denoiser
    from dreammix_trt.engine.host.denoiser import FakeDenoiser as FakeDenoiser
    from dreammix_trt.engine.requests import RequestQueue as RequestQueue
    from dreammix_trt.engine.requests import Ticket as Ticket
    from dreammix_trt.engine.result import read_request as read_request
    from dreammix_trt.engine.result import save as save

_HOMES = {
    "DreamMix": "dreammix_trt.engine.dreammix",
    "Result": "dreammix_trt.engine.dreammix",
    "StepEvent": "dreammix_trt.engine.dreammix",
    "Request": "dreammix_trt.core.request",
    "Denoiser": "dreammix_trt.engine.host.denoiser",
    "FakeDenoiser": "dreammix_trt.engine.host.denoiser",
    "RequestQueue": "dreammix_trt.engine.requests",
    "Ticket": "dreammix_trt.engine.requests",
    "Job": "dreammix_trt.engine.dreammix",
    "save": "dreammix_trt.engine.result",
    "read_request": "dreammix_trt.engine.result",
    "Options": "dreammix_trt.engine.device.memory_plan",
    "QueueFull": "dreammix_trt.core.errors",
    "TimedOut": "dreammix_trt.core.errors",
    "Cancelled": "dreammix_trt.core.errors",
    "DreamMixError": "dreammix_trt.core.errors",
}

__all__ = [
    "Cancelled", "Denoiser", "DreamMix", "DreamMixError", "FakeDenoiser", "Job", "Options", "QueueFull", "Request",
    "RequestQueue", "Result", "StepEvent", "Ticket", "TimedOut", "read_request", "save",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that importing the package stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
