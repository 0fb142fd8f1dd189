"""A request in a queue: what its user sees of it, and how it ends."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dreammix_trt.core.errors import Cancelled, EngineError, TimedOut
from dreammix_trt.core.noise import NoiseProvider
from dreammix_trt.core.request import Request
from dreammix_trt.core.sources import Source
from dreammix_trt.engine.result import Result, StepEvent

if TYPE_CHECKING:
    from dreammix_trt.engine.requests.line import Line

Noise = NoiseProvider | Sequence[NoiseProvider] | None
State = Literal["waiting", "running", "done", "failed", "cancelled"]


class StepCount(NamedTuple):
    """Steps taken, and their total over all pictures of the request."""

    done: int
    total: int


@dataclass(frozen=True)
class Order:
    """What a worker needs of a request."""

    image: Source
    mask_image: Source | None
    request: Request
    noise: Noise
    keep_stages: bool
    on_step: Callable[[StepEvent], object] | None


class Ticket:
    """A request in a queue. Every method may be called from any thread. `await ticket` is `result` for asyncio.

    request: what will be painted.

    Leaving an `await` (a cancelled task, `asyncio.wait_for`) cancels the request; `await asyncio.shield(ticket)` lets
    it go on.
    """

    # Names with an underscore are the queue's; those that change a ticket are called under its lock.

    def __init__(self, line: Line, order: Order, begun: float, allowed: float | None) -> None:
        self.request = order.request
        self._line, self._allowed = line, allowed
        self._order: Order | None = order  # dropped at the end: tickets live longer than pictures should
        self._future: Future[Result] = Future()
        self._steps = StepCount(0, order.request.steps * order.request.num_images_per_prompt)
        self._begun, self._deadline = begun, math.inf if allowed is None else begun + allowed
        self._started: float | None = None
        self._ended: float | None = None
        self._halt: Callable[[], object] | None = None  # ends the wait of its worker
        self._stop: Cancelled | None = None  # how it ends from now on, whatever the present step gives

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the result.

        timeout: the longest wait in seconds; after it the built-in TimeoutError is raised, and the request goes on. A
            call from an `on_step` callback never waits.

        Raises what the request raised: Cancelled after `cancel` or `close`, TimedOut past the deadline, any other error
        unchanged.
        """
        try:
            return self._future.result(0 if self._line.is_inside() else timeout)
        finally:
            del self  # or the error's traceback keeps the ticket, and the ticket the error

    def cancel(self) -> bool:
        """Stop the request: a waiting one never starts, a running one stops after its present step.

        Returns False when it had already ended otherwise. True: it ends "cancelled", even if the present step is the
        last one or fails.
        """
        return self._line.cancel(self)

    def done(self) -> bool:
        """Whether it has ended, in any way."""
        return self._future.done()

    @property
    def state(self) -> State:
        """One of "waiting", "running", "done", "failed" (also after TimedOut) or "cancelled"."""
        if not self._future.done():
            return "waiting" if self._started is None else "running"
        error = self._future.exception()
        return "done" if error is None else "cancelled" if isinstance(error, Cancelled) else "failed"

    @property
    def steps(self) -> StepCount:
        """(done, total) steps over all pictures of the request."""
        return self._steps

    @property
    def position(self) -> int | None:
        """Its place among the requests that wait, 1 for the next one; None when it does not wait."""
        return self._line.find_position(self)

    @property
    def waited(self) -> float:
        """Seconds from the call of `submit` to the start of its work (or to its end, or until now)."""
        return _choose_time(self._started, self._ended) - self._begun

    @property
    def ran(self) -> float:
        """Seconds from the start of its work to its end (or until now)."""
        return 0.0 if self._started is None else _choose_time(self._ended) - self._started

    def __await__(self) -> Generator[Any, None, Result]:
        return self._wait_for_result().__await__()

    async def _wait_for_result(self) -> Result:
        loop = asyncio.get_running_loop()
        woken = loop.create_future()

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        def wake_up(_: Future[Result]) -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody waits in it
                loop.call_soon_threadsafe(wake)

        self._future.add_done_callback(wake_up)
        try:
            await woken
            return self._future.result()
        except (asyncio.CancelledError, GeneratorExit):  # nobody waits any more
            self.cancel()
            raise
        finally:
            del self

    def _be_halted(self) -> None:
        """Have its worker wait no longer for a painter elsewhere."""
        if self._halt is not None:
            self._halt()

    def _must_stop(self) -> bool:
        """Whether its worker should stop."""
        return self._stop is not None or self._future.done()

    def _make_overdue_error(self) -> TimedOut:
        """The error for its deadline, with the present state of the request."""
        done, total = self._steps
        fewer = ", or submit fewer at a time" if self.waited > self.ran / 4 else ""
        return TimedOut(
            f"the request had {self._allowed:g} s, of which it waited {self.waited:.3f} s, and took {done} of {total} "
            f"steps: give it a longer timeout{fewer}"
        )

    def _end(self, result: Result | None = None, error: BaseException | None = None) -> bool:
        """The one place where a ticket ends. Only the first end counts. Returns False when it has ended before."""
        if self.done():
            return False
        error = self._stop or error
        if error is not None and not isinstance(error, Exception):  # it would end the app's thread or event loop
            cause, error = error, Cancelled(f"the request was stopped by {type(error).__name__} in its worker")
            error.__cause__ = cause
        self._ended, self._order = time.monotonic(), None
        if error is None and result is not None:
            self._future.set_result(result)
        else:
            self._future.set_exception(error or EngineError("the painter ended without a result"))
        return True


def _choose_time(*times: float | None) -> float:
    """The first time that is known, or now."""
    return next((each for each in times if each is not None), time.monotonic())
