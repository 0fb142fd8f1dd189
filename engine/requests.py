"""A queue in front of one or several `DreamMix` objects, for apps that serve many users at once.

One worker thread a painter takes the requests in their order; each request has a `Ticket`. One more thread, the keeper,
sleeps until the next deadline. All state of a queue and its tickets changes under the queue's one lock; no code of the
app runs under it. That code, `on_step`, runs in a worker's thread, where nothing of this module ever waits: `submit`,
`result` and `close` return at once there, so it cannot stop its own worker for ever.
"""

from __future__ import annotations

import asyncio
import atexit
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import EllipsisType, TracebackType
from typing import Any, Literal, NamedTuple, Protocol

from dreammix_trt.core.errors import Cancelled, DeviceError, EngineError, InputError, QueueFull, TimedOut
from dreammix_trt.core.noise import NoiseProvider
from dreammix_trt.core.request import Request
from dreammix_trt.engine.canvas.pictures import Source
from dreammix_trt.engine.result import Result, StepEvent

__all__ = ["Percentiles", "RequestQueue", "Statistics", "Steps", "Ticket"]

State = Literal["waiting", "running", "done", "failed", "cancelled"]
_HISTORY = 1024  # finished requests that the percentiles are taken of


class Paints(Protocol):
    """What a queue asks of a painter: see `DreamMix`."""

    def request(self, prompt: str, **fields: Any) -> Request: ...
    def iterate(self, image: Source, mask_image: Source, prompt: Request, /, **options: Any) -> Iterator[StepEvent]: ...
    def close(self) -> None: ...


class Steps(NamedTuple):
    """Steps taken, and how many there are over all pictures of the request."""

    done: int
    total: int


class Percentiles(NamedTuple):
    """Seconds that 50, 90 and 99 of 100 requests did not exceed (nearest rank)."""

    p50: float
    p90: float
    p99: float


class Statistics(NamedTuple):
    """A queue now. waiting, running: requests; the next three: tickets that ended so, since the start.

    waited, ran: of the latest 1024 requests that ended "done"; None while there are none.
    """

    waiting: int
    running: int
    done: int
    failed: int
    cancelled: int
    waited: Percentiles | None
    ran: Percentiles | None


@dataclass(frozen=True)
class _Job:
    """What a worker needs of a request."""

    image: Source
    mask_image: Source
    request: Request
    options: dict[str, Any]
    on_step: Callable[[StepEvent], object] | None


class Ticket:
    """A request in a queue. Every method may be called from any thread; `await ticket` is `result` for asyncio.

    request: what will be painted. Leaving an `await` (a cancelled task, `asyncio.wait_for`) does not cancel it.
    """

    def __init__(self, queue: RequestQueue, job: _Job, begun: float, allowed: float | None) -> None:
        self.request = job.request
        self._queue, self._allowed = queue, allowed
        self._job: _Job | None = job  # given up at the end: tickets are kept longer than pictures should be
        self._future: Future[Result] = Future()
        self._steps = Steps(0, job.request.steps * job.request.num_images_per_prompt)
        self._begun, self._deadline = begun, math.inf if allowed is None else begun + allowed
        self._started: float | None = None
        self._ended: float | None = None
        self._stop: Cancelled | None = None  # how it ends from now on, whatever the present step gives

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the result, at most `timeout` seconds; then the built-in TimeoutError, and the request goes on.

        Raises what the request raised: Cancelled after `cancel` or `close`, TimedOut past the deadline, anything else
        as it was. From an `on_step` callback it never waits.
        """
        try:
            return self._future.result(0 if self._queue._inside() else timeout)
        finally:
            del self  # or the error's traceback keeps the ticket, and the ticket the error

    def cancel(self) -> bool:
        """Stop it: a waiting request never starts, a running one stops after its present step.

        False when it had already ended otherwise. True: it ends "cancelled", even if the present step is the last one
        or fails.
        """
        return self._queue._cancel(self)

    def done(self) -> bool:
        """Whether it has ended, in any way."""
        return self._future.done()

    @property
    def state(self) -> State:
        """One of "waiting", "running", "done", "failed" (TimedOut, too) or "cancelled"."""
        if not self._future.done():
            return "waiting" if self._started is None else "running"
        error = self._future.exception()
        return "done" if error is None else "cancelled" if isinstance(error, Cancelled) else "failed"

    @property
    def steps(self) -> Steps:
        """(done, total) steps over all pictures of the request."""
        return self._steps

    @property
    def waited(self) -> float:
        """Seconds from the call of `submit` to the start of its work (or the end, or now)."""
        return _first(self._started, self._ended) - self._begun

    @property
    def ran(self) -> float:
        """Seconds from the start of its work to the end (or now)."""
        return 0.0 if self._started is None else _first(self._ended) - self._started

    def _leaving(self) -> bool:
        """Whether its worker should stop."""
        return self._stop is not None or self._future.done()

    def __await__(self) -> Generator[Any, None, Result]:
        return self._awaited().__await__()

    async def _awaited(self) -> Result:
        loop = asyncio.get_running_loop()
        woken = loop.create_future()

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        def ended(_: Future[Result]) -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody waits in it any more
                loop.call_soon_threadsafe(wake)

        self._future.add_done_callback(ended)
        try:
            await woken
            return self._future.result()
        finally:
            del self


class RequestQueue:
    """Serves requests from any number of threads, first come first served, with as many workers as painters.

    painters: `DreamMix` objects of the same engine (several contexts on one device, or on the CPU, where they share the
    cores: give each its `threads`). They stay their owner's, who must not use them meanwhile, unless `owned`: then the
    last worker closes them, in reverse order, as `DreamMix.another` wants it. waiting: how many requests may wait
    beside those that run. timeout: seconds each request has from `submit` to its end, unless it says otherwise; None:
    any. A worker paints one request at a time: batches hold the pictures of one request, or of `inpaint_batch`.

    A request that fails harms no other one: its error goes to its ticket. A `DeviceError` that says the device is lost
    ends that worker; after the last one, waiting tickets get that error and `submit` raises it. As a context manager it
    finishes what was taken, or cancels it when an error leaves the block.
    """

    def __init__(
        self, painters: Sequence[Paints], *, waiting: int = 16, timeout: float | None = None, owned: bool = False
    ) -> None:
        if isinstance(painters, Sequence):
            unfit = {f"painters[{k}]": each for k, each in enumerate(painters) if not hasattr(each, "iterate")}
        else:
            unfit = {"painters": painters}
        for name, each in unfit.items():
            raise InputError(f"{name} is a {type(each).__name__}: give a list of DreamMix, RequestQueue([dm])")
        if not painters or len({id(painter) for painter in painters}) < len(painters):
            raise InputError(f"painters: {len(painters)} given; give one DreamMix or more, each of them once")
        if isinstance(waiting, bool) or not isinstance(waiting, int) or waiting < 0:
            raise InputError(f"waiting is {waiting!r}; allowed: a whole number from 0")
        self._most_waiting, self._timeout = waiting, _seconds("timeout", timeout)
        self._owned = tuple(painters) if owned else ()
        self._request = painters[0].request
        self._lock = threading.RLock()  # reentrant: a signal's handler or a finaliser may come in the middle
        self._work = threading.Condition(self._lock)  # a request waits, or closing
        self._room = threading.Condition(self._lock)  # `submit` may look again
        self._times = threading.Condition(self._lock)  # an earlier deadline, or the end
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []  # one for each busy worker
        self._doors: deque[object] = deque()  # calls of `submit` in their order
        self._history: deque[tuple[float, float]] = deque(maxlen=_HISTORY)
        self._ends: Counter[State] = Counter()
        self._alarm = math.inf  # when the keeper wakes
        self._closing = False
        self._lost: DeviceError | None = None
        self._alive = 0
        self._threads: list[threading.Thread] = []
        # Daemons, so that the interpreter's end is not kept waiting by idle workers, but cancels and joins them.
        atexit.register(self.close)
        try:
            with self._lock:
                for painter in painters:
                    self._start(self._serve, painter)
                    self._alive += 1
                self._start(self._keep)
        except BaseException:  # no more threads to be had
            self._owned = ()
            self.close()
            raise

    def submit(
        self,
        image: Source,
        mask_image: Source,
        prompt: str | Request,
        *,
        timeout: float | EllipsisType | None = ...,
        wait: float | None = 0,
        on_step: Callable[[StepEvent], object] | None = None,
        noise: NoiseProvider | Sequence[NoiseProvider] | None = None,
        keep_stages: bool = False,
        **fields: Any,
    ) -> Ticket:
        """Take a request in, as `DreamMix.inpaint` has it. Pictures in memory must stay as they are until its end.

        timeout: seconds from now to its end, waiting included; None: any; default: the queue's. wait: seconds to wait
        for room (None: any; from a callback: none). on_step: called in the worker's thread with each StepEvent; an
        error of it ends this request and goes to the ticket. Raises InputError for fields that no request takes,
        QueueFull, TimedOut when the deadline passes before there is room, EngineError after `close`, and the
        DeviceError once all devices are lost. Other faults are found when the request is painted.
        """
        begun = time.monotonic()
        allowed = self._timeout if isinstance(timeout, EllipsisType) else _seconds("timeout", timeout)
        patience = _seconds("wait", 0 if self._inside() else wait)
        request = prompt.replace(**fields) if isinstance(prompt, Request) else self._request(prompt, **fields)
        if on_step is not None and not callable(on_step):
            raise InputError(f"on_step is a {type(on_step).__name__}: give a function of one StepEvent")
        job = _Job(image, mask_image, request, {"noise": noise, "keep_stages": keep_stages}, on_step)
        ticket = Ticket(self, job, begun, allowed)
        with self._lock:
            self._enter(ticket, patience)
            self._waiting.append(ticket)
            self._work.notify()
            if ticket._deadline < self._alarm:
                self._times.notify()
        return ticket

    def statistics(self) -> Statistics:
        """Counts, and how long finished requests waited and ran."""
        with self._lock:
            history, ends = list(self._history), self._ends
            counts = (len(self._waiting), len(self._running), ends["done"], ends["failed"], ends["cancelled"])
        waited, ran = ([pair[k] for pair in history] for k in (0, 1))
        return Statistics(*counts, _percentiles(waited), _percentiles(ran))

    def close(self, *, finish: bool = False) -> None:
        """Take no more requests and wait for the workers' end.

        finish: let all that were taken end; otherwise waiting ones are cancelled and running ones stop after their
        present step. Closing again does nothing, or cancels what an earlier call lets finish. From a callback it only
        begins the closing and returns.
        """
        with self._lock:
            self._closing = True
            self._work.notify_all()
            self._room.notify_all()
            if not finish:
                self._cancel_all()
        if self._inside():
            return
        try:
            for thread in self._threads:
                thread.join()
        except BaseException:  # Ctrl-C while the rest is being finished
            with self._lock:
                self._cancel_all()
            raise
        atexit.unregister(self.close)

    def __enter__(self) -> RequestQueue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(finish=kind is None)

    # Taking in

    def _enter(self, ticket: Ticket, patience: float | None) -> None:
        """Wait for room, behind those who came before. Under the lock."""
        here = object()
        self._doors.append(here)
        limit = min(ticket._begun + (math.inf if patience is None else patience), ticket._deadline)
        try:
            while True:
                self._check_open()
                if self._doors[0] is here and self._free():
                    return
                now = time.monotonic()
                if now >= ticket._deadline:
                    raise _timed_out(ticket)
                if now >= limit:
                    raise QueueFull(
                        f"{len(self._waiting)} requests wait, and the queue takes waiting={self._most_waiting}: "
                        f"submit again later, or with wait=SECONDS"
                    )
                self._room.wait(_pause(limit - now))
        finally:
            self._doors.remove(here)
            self._room.notify_all()

    def _free(self) -> bool:
        """A request that an idle worker is about to take does not count as waiting."""
        return len(self._waiting) + len(self._running) < self._most_waiting + self._alive

    def _check_open(self) -> None:
        if self._lost is not None:
            raise _again(self._lost)
        if self._closing:
            raise EngineError("this queue was closed: make another RequestQueue, or submit before close()")

    # Ending

    def _cancel(self, ticket: Ticket, why: str = "the request was cancelled") -> bool:
        with self._lock:
            if ticket.done():
                return ticket.state == "cancelled"
            ticket._stop = ticket._stop or Cancelled(why)
            if ticket._started is None:
                self._drop(ticket)
            return True

    def _cancel_all(self) -> None:
        for ticket in (*self._waiting, *self._running):
            self._cancel(ticket, "the request was cancelled: its queue was closed")

    def _expire(self, ticket: Ticket) -> None:
        """End a ticket whose deadline has passed; its worker, if it has one, leaves after the present step."""
        if ticket._started is None:
            self._drop(ticket, _timed_out(ticket))
        else:
            self._end(ticket, error=_timed_out(ticket))

    def _drop(self, ticket: Ticket, error: BaseException | None = None) -> None:
        """End a waiting ticket."""
        self._waiting.remove(ticket)
        self._room.notify_all()
        self._end(ticket, error=error)

    def _end(self, ticket: Ticket, result: Result | None = None, error: BaseException | None = None) -> None:
        """The one place where a ticket ends; the first end holds. Under the lock."""
        if ticket.done():
            return
        error = ticket._stop or error
        if error is not None and not isinstance(error, Exception):  # it would end the app's thread or event loop
            cause, error = error, Cancelled(f"the request was stopped by {type(error).__name__} in its worker")
            error.__cause__ = cause
        ticket._ended, ticket._job = time.monotonic(), None
        if error is None and result is not None:
            self._history.append((ticket.waited, ticket.ran))
            ticket._future.set_result(result)
        else:
            ticket._future.set_exception(error or EngineError("the painter ended without a result"))
        self._ends[ticket.state] += 1

    # Workers

    def _inside(self) -> bool:
        """Whether this is a thread of the queue, which must not wait for it."""
        return threading.current_thread() in self._threads

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        name = f"dreammix-{target.__name__.strip('_')}-{len(self._threads)}"
        thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _serve(self, painter: Paints) -> None:
        """A worker: one request after the other until the queue closes or the device is lost."""
        lost: DeviceError | None = None
        try:
            while lost is None and (ticket := self._next()) is not None:
                lost = self._paint(painter, ticket)
                del ticket  # nothing of a request is kept while waiting for the next
        finally:
            self._leave(lost)

    def _next(self) -> Ticket | None:
        """The first waiting request; None when the queue is closed and none is left."""
        with self._lock:
            while self._work.wait_for(lambda: self._waiting or self._closing) and self._waiting:
                ticket = self._waiting[0]
                now = time.monotonic()
                if now < ticket._deadline:
                    ticket._started = now
                    self._running.append(self._waiting.popleft())
                    return ticket
                self._expire(ticket)
                del ticket
        return None

    def _paint(self, painter: Paints, ticket: Ticket) -> DeviceError | None:
        """Serve one request; whatever comes of it goes to its ticket. Returns the error when the device is lost."""
        result: Result | None = None
        error: BaseException | None = None
        try:
            result = _painted(painter, ticket)
        except BaseException as caught:
            error = caught
        with self._lock:
            self._running.remove(ticket)
            self._room.notify_all()
            self._end(ticket, result, error)
        try:
            return error if isinstance(error, DeviceError) and error.lost else None
        finally:
            del error, ticket  # or its traceback keeps both

    def _leave(self, lost: DeviceError | None) -> None:
        """A worker ends; the last one leaves no ticket behind, and closes what the queue owns."""
        with self._lock:
            self._alive -= 1
            last = not self._alive
            if last:
                if lost is not None and not self._closing:
                    self._lost = _again(lost)
                self._closing = True
                for ticket in tuple(self._waiting):
                    self._drop(ticket, EngineError("the queue's workers ended") if lost is None else _again(lost))
            self._room.notify_all()
            self._times.notify_all()
        if last:
            with ExitStack() as owned:
                for painter in self._owned:
                    owned.callback(painter.close)

    def _keep(self) -> None:
        """The keeper: ends tickets whose deadline has passed, sleeping in between."""
        with self._lock:
            while self._alive:
                now = time.monotonic()
                self._alarm = self._expire_until(now)
                self._times.wait(_pause(self._alarm - now))

    def _expire_until(self, now: float) -> float:
        """Returns the next deadline."""
        tickets = [ticket for ticket in (*self._waiting, *self._running) if not ticket.done()]
        for ticket in tickets:
            if ticket._deadline <= now:
                self._expire(ticket)
        return min((ticket._deadline for ticket in tickets if ticket._deadline > now), default=math.inf)


def _painted(painter: Paints, ticket: Ticket) -> Result | None:
    """Take the steps of a request; None when it was left before the last one."""
    job, result = ticket._job, None
    try:
        if job is None:  # its deadline passed in this moment
            return None
        events = painter.iterate(job.image, job.mask_image, job.request, **job.options)
        try:
            for event in events:
                ticket._steps = Steps(event.index + 1, event.total)
                if job.on_step is not None and not ticket._leaving():
                    job.on_step(event)
                result = event.result or result
                if ticket._leaving():
                    break
        finally:
            getattr(events, "close", lambda: None)()  # a generator; leaving it stops the work
        return result
    finally:
        del ticket  # as in Ticket.result


def _timed_out(ticket: Ticket) -> TimedOut:
    done, total = ticket.steps
    fewer = ", or submit fewer at a time" if ticket.waited > ticket.ran / 4 else ""
    return TimedOut(
        f"the request had {ticket._allowed:g} s, of which it waited {ticket.waited:.3f} s, and took {done} of {total} "
        f"steps: give it a longer timeout{fewer}"
    )


def _again(error: DeviceError) -> DeviceError:
    """The same error without a traceback: raising one object again and again makes its traceback grow."""
    fresh = DeviceError(*error.args)
    fresh.lost = True
    return fresh


def _seconds(name: str, value: Any) -> float | None:
    try:
        seconds = None if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if isinstance(value, bool | str | bytes) or (seconds is not None and not seconds >= 0):
        raise InputError(f"{name} is {value!r}; allowed: seconds from 0, or None for no limit")
    return seconds


def _pause(seconds: float) -> float | None:
    """As `threading` takes it."""
    return None if seconds == math.inf else min(max(seconds, 0.0), threading.TIMEOUT_MAX)


def _first(*times: float | None) -> float:
    """The first time that is known, or now."""
    return next((each for each in times if each is not None), time.monotonic())


def _percentiles(seconds: list[float]) -> Percentiles | None:
    if not seconds:
        return None
    ranked = sorted(seconds)
    return Percentiles(*(ranked[math.ceil(len(ranked) * share / 100) - 1] for share in (50, 90, 99)))
