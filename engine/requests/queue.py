"""The request queue that apps use: workers and a keeper around one line."""

from __future__ import annotations

import atexit
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from contextlib import ExitStack, suppress
from types import EllipsisType, TracebackType
from typing import Any, TypeVar, Unpack

from PIL import Image

from dreammix_trt.core.errors import DeviceError, EngineError, InputError
from dreammix_trt.core.request import Request, RequestFields
from dreammix_trt.core.sources import Source, as_bytes
from dreammix_trt.engine.requests.errands import Errand, Paints
from dreammix_trt.engine.requests.keeper import Keeper
from dreammix_trt.engine.requests.line import Line
from dreammix_trt.engine.requests.tally import Statistics
from dreammix_trt.engine.requests.tickets import Noise, Order, Ticket
from dreammix_trt.engine.requests.worker import work
from dreammix_trt.engine.result import StepEvent

T = TypeVar("T")


class RequestQueue:
    """Serves requests from any number of threads, first come first served, with one worker per painter.

    painters: `DreamMix` objects of the same engine (several on one device, or on the CPU, where they share the cores:
        give each its `threads`). They belong to the caller, who must not use them meanwhile, unless `owned`.
    waiting: how many requests may wait beside those that run.
    timeout: seconds each request has from `submit` to its end, unless the request sets its own; None: no limit.
    owned: the last worker closes the painters, in reverse order, as `DreamMix.another` requires.

    A worker paints one request at a time. A batch holds the pictures of one request, or of `inpaint_batch`.

    A request that fails harms no other one: its error goes to its ticket. A `DeviceError` that reports a lost device
    ends that worker. After the last worker, waiting tickets get that error and `submit` raises it. As a context manager
    the queue finishes the accepted requests, or cancels them when an error leaves the block.
    """

    def __init__(
        self, painters: Sequence[Paints], *, waiting: int = 16, timeout: float | None = None, owned: bool = False
    ) -> None:
        _check_painters(painters)
        if isinstance(waiting, bool) or not isinstance(waiting, int) or waiting < 0:
            raise InputError(f"waiting is {waiting!r}; allowed: a whole number from 0")
        self._timeout = _check_seconds("timeout", timeout)
        self._painters, self._owned = tuple(painters), tuple(painters) if owned else ()
        self._request = painters[0].request
        self._line = Line(waiting)
        self._keeper = Keeper(self._line)
        # Daemons: the interpreter does not wait for idle workers at its end, but cancels and joins them.
        atexit.register(self.close)
        try:
            with self._line.lock:
                for painter in painters:
                    self._line.expect(painter)
                    self._start("serve", self._serve, painter)
                    self._line.workers += 1
                self._start("keep", self._keeper.keep)
        except BaseException:  # the system gives no more threads
            self._owned = ()
            self.close()
            raise

    def submit(
        self,
        image: Source,
        mask_image: Source | None,
        prompt: str | Request,
        *,
        timeout: float | EllipsisType | None = ...,
        wait: float | None = 0,
        on_step: Callable[[StepEvent], object] | None = None,
        noise: Noise = None,
        keep_stages: bool = False,
        **fields: Unpack[RequestFields],
    ) -> Ticket:
        """Accept a request, with the arguments of `DreamMix.inpaint`.

        timeout: seconds from now to its end, waiting included; None: no limit; default: the queue's.
        wait: seconds to wait for room; None: no limit. Calls from a callback never wait.
        on_step: called in the worker's thread with each StepEvent; an error in it ends this request and goes to the
            ticket.

        Pictures in memory must stay unchanged until the request ends. Open files are read here.

        Raises InputError for fields that no request takes, QueueFull, TimedOut when the deadline passes before there is
        room, EngineError after `close`, and the DeviceError once all devices are lost. Other faults are found when the
        request is painted.
        """
        begun = time.monotonic()
        allowed = self._timeout if isinstance(timeout, EllipsisType) else _check_seconds("timeout", timeout)
        patience = _check_seconds("wait", 0 if self._line.is_inside() else wait)
        request = prompt.replace(**fields) if isinstance(prompt, Request) else self._request(prompt, **fields)
        if on_step is not None and not callable(on_step):
            raise InputError(f"on_step is a {type(on_step).__name__}: give a function of one StepEvent")
        mask = None if mask_image is None else _hold(mask_image, "mask_image")
        order = Order(_hold(image, "image"), mask, request, noise, keep_stages, on_step)
        ticket = Ticket(self._line, order, begun, allowed)
        with self._line.lock:
            self._line.admit(ticket, patience)
            self._keeper.note_deadline(ticket)
        return ticket

    def visit(self, call: Callable[[Any], T]) -> list[T]:
        """Call a function with each painter, in its worker's thread, between two requests.

        The way to change painters that serve: add subjects, remove them. Waits until every worker has been at it,
        which may take as long as the requests that run; requests that wait come after it.

        call: takes the painter. All painters whose device is not lost are visited, also when it fails with one.

        Returns what it returned, in the order of the painters. Raises the first error; EngineError after `close`, and
        for a call from a callback, which would wait for itself.
        """
        if self._line.is_inside():
            raise EngineError("visit() waits for the workers, so no callback of theirs may call it")
        errands = self._line.send([Errand(painter, call) for painter in self._painters])
        futures.wait([errand.done for errand in errands])
        return [errand.done.result() for errand in errands]

    @property
    def workers(self) -> int:
        """How many painters serve: fewer than were given after the loss of a device, 0 after `close`."""
        return self._line.workers

    def statistics(self) -> Statistics:
        """Counts, and how long finished requests waited and ran."""
        return self._line.statistics()

    def close(self, *, finish: bool = False) -> None:
        """Accept no more requests and wait until the workers have ended.

        finish: let all accepted requests end. Otherwise waiting ones are cancelled and running ones stop after their
            present step.

        Closing again does nothing, or cancels what an earlier call lets finish. A call from a callback only begins the
        closing and returns.
        """
        with self._line.lock:
            self._line.close()
            if not finish:
                self._line.cancel_all()
        if self._line.is_inside():
            return
        try:
            for thread in self._line.threads:
                thread.join()
        except BaseException:  # Ctrl-C while the rest is being finished
            self._line.cancel_all()
            raise
        atexit.unregister(self.close)

    def __enter__(self) -> RequestQueue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(finish=kind is None)

    def _start(self, name: str, target: Callable[..., None], *arguments: Any) -> None:
        threads = self._line.threads
        thread = threading.Thread(target=target, args=arguments, name=f"dreammix-{name}-{len(threads)}", daemon=True)
        thread.start()
        threads.append(thread)

    def _serve(self, painter: Paints) -> None:
        """The work of a worker's thread. The last one to end closes what the queue owns."""
        lost: DeviceError | None = None
        try:
            lost = work(self._line, painter)
        finally:
            with self._line.lock:
                last = self._line.leave(painter, lost)
                self._keeper.wake()
            if last:
                with ExitStack() as owned:
                    for each in self._owned:
                        owned.callback(each.close)


def _check_painters(painters: Sequence[Paints]) -> None:
    """Raise InputError unless this is a list of different painters."""
    if isinstance(painters, Sequence):
        unfit = {f"painters[{k}]": each for k, each in enumerate(painters) if not hasattr(each, "iterate")}
    else:
        unfit = {"painters": painters}
    for name, each in unfit.items():
        raise InputError(f"{name} is a {type(each).__name__}: give a list of DreamMix, RequestQueue([dm])")
    if not painters or len({id(painter) for painter in painters}) < len(painters):
        raise InputError(f"painters: {len(painters)} given; give one DreamMix or more, each of them once")


def _hold(source: Source, name: str) -> Source:
    """A source that stays when its file is closed after `submit`."""
    if isinstance(source, Image.Image):
        with suppress(OSError, ValueError, SyntaxError):  # whoever reads it says what is wrong with it
            source.load()
        return source
    data = as_bytes(source, name)
    return source if data is None else data


def _check_seconds(name: str, value: Any) -> float | None:
    """Seconds as a float, None for no limit. Raises InputError for anything else."""
    try:
        seconds = None if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if isinstance(value, bool | str | bytes) or (seconds is not None and not seconds >= 0):
        raise InputError(f"{name} is {value!r}; allowed: seconds from 0, or None for no limit")
    return seconds
