"""An errand: what a worker does with its painter between two requests, where nothing else uses the painter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Protocol, Unpack

from dreammix_trt.core.errors import DeviceError
from dreammix_trt.core.request import Request, RequestFields
from dreammix_trt.core.sources import Source
from dreammix_trt.engine.requests.tickets import Noise
from dreammix_trt.engine.result import StepEvent


class Paints(Protocol):
    """What a queue needs of a painter: see `DreamMix`.

    Where a painter waits for others, what `iterate` returns has a `stop`: it is called in any thread once nobody wants
    the next step any more, never waits, and ends the iteration.
    """

    def request(self, prompt: str, **fields: Unpack[RequestFields]) -> Request: ...
    def iterate(
        self, image: Source, mask_image: Source | None, prompt: Request, /, *, noise: Noise, keep_stages: bool
    ) -> Iterator[StepEvent]: ...
    def close(self) -> None: ...


class Errand:
    """One call of the app's with one painter. Its value or error is the `done` future's.

    painter: with which it is called, in its worker's thread.
    """

    def __init__(self, painter: Paints, call: Callable[[Any], Any]) -> None:
        self.painter, self._call = painter, call
        self.done: Future[Any] = Future()

    def run(self) -> DeviceError | None:
        """Do it. Returns the error when the device is lost."""
        try:
            self.done.set_result(self._call(self.painter))
        except BaseException as error:
            self.end(error)
            return error if isinstance(error, DeviceError) and error.lost else None
        return None

    def end(self, error: BaseException) -> None:
        """End it with an error."""
        self.done.set_exception(error)
