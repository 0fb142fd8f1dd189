"""What travels between the front and the replicas of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from dreammix_trt.core.errors import DreamMixError
from dreammix_trt.core.request import Request
from dreammix_trt.core.seam import BaseFacts
from dreammix_trt.core.sources import Source
from dreammix_trt.core.subject import Subject
from dreammix_trt.engine.result import Result


@dataclass(frozen=True)
class Order:
    """One attempt at a request.

    id: under which its previews are asked for.
    """

    id: str
    image: Source
    mask_image: Source | None
    request: Request
    keep_stages: bool = False


class Guest(NamedTuple):
    """A subject that was added to a service: a replica that lacks it loads it.

    number: tells it from an earlier one of that name.
    subject: Ray's reference to the `Subject`, as the front has read it from what a client sent.
    """

    name: str
    number: int
    subject: Any


class Begun(NamedTuple):
    """The request is checked. remarks: what its user should know."""

    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Stepped:
    """A step was taken: see `StepEvent`."""

    index: int
    total: int
    stage: str
    picture: int
    result: Result | None


class Shown(NamedTuple):
    """A preview that was asked for; None: it could not be made."""

    image: Image.Image | None


class Failed(NamedTuple):
    """The end of a request or call. place: of an error that nobody expected, without its message."""

    error: DreamMixError
    place: str = ""


Item = Begun | Stepped | Shown | Failed


class Facts(NamedTuple):
    """What the front must know of an engine. subjects: those that came with it, without their factors' numbers."""

    base: BaseFacts
    contexts: Sequence[int] | None
    has_adapter: bool
    defaults: dict[str, Any]
    subjects: tuple[Subject, ...]
