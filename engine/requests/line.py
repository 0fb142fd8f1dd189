"""The line of requests in front of the workers, and the one lock under which all of it changes."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from dreammix_trt.core.errors import Cancelled, DeviceError, EngineError, QueueFull
from dreammix_trt.engine.requests.errands import Errand, Paints
from dreammix_trt.engine.requests.tally import Statistics, Tally
from dreammix_trt.engine.requests.tickets import Ticket
from dreammix_trt.engine.result import Result


class Line:
    """Who waits for room, who waits for a worker, who is being served, and whether the line still accepts requests.

    most_waiting: how many tickets may wait beside those that run.
    workers: how many workers serve the line now.
    threads: the queue's own threads.

    Every method may be called from any thread, and takes the lock itself.
    """

    def __init__(self, most_waiting: int) -> None:
        self.lock = threading.RLock()  # reentrant: a signal handler or a finaliser may run in the middle
        self.workers = 0
        self.threads: list[threading.Thread] = []
        self._most_waiting = most_waiting
        self._work = threading.Condition(self.lock)  # a ticket waits, or closing
        self._room = threading.Condition(self.lock)  # callers of `admit` may look again
        self._doors: deque[object] = deque()  # calls of `admit` in their order
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []  # one for each busy worker
        self._errands: dict[int, deque[Errand]] = {}  # by the id of the painter
        self._tally = Tally()
        self._closing = False
        self._lost: DeviceError | None = None

    def is_inside(self) -> bool:
        """Whether the current thread is one of the queue's, which must not wait for the queue."""
        return threading.current_thread() in self.threads

    def admit(self, ticket: Ticket, patience: float | None) -> None:
        """Wait for room behind earlier callers, then accept the ticket.

        patience: the longest wait in seconds; None: no limit.

        Raises QueueFull, TimedOut past the ticket's deadline, EngineError after `close`, and the DeviceError once all
        devices are lost.
        """
        here = object()
        limit = min(ticket._begun + (math.inf if patience is None else patience), ticket._deadline)
        with self.lock:
            self._doors.append(here)
            try:
                while not self._lets_in(here):
                    now = time.monotonic()
                    if now >= ticket._deadline:
                        raise ticket._make_overdue_error()
                    if now >= limit:
                        raise QueueFull(
                            f"{len(self._waiting)} requests wait, and the queue takes waiting={self._most_waiting}: "
                            f"submit again later, or with wait=SECONDS"
                        )
                    self._room.wait(limit_wait(limit - now))
            finally:
                self._doors.remove(here)
                self._room.notify_all()
            self._waiting.append(ticket)
            self._work.notify()

    def take(self, painter: Paints) -> Ticket | Errand | None:
        """Wait for an errand with this painter or for the first ticket, and start that. None: closed and empty."""
        with self.lock:
            errands = self._errands[id(painter)]
            while self._work.wait_for(lambda: errands or self._waiting or self._closing):
                if errands:
                    return errands.popleft()
                if not self._waiting:
                    break
                ticket = self._waiting[0]
                now = time.monotonic()
                if now < ticket._deadline:
                    ticket._started = now
                    self._running.append(self._waiting.popleft())
                    return ticket
                self._expire(ticket)
                del ticket
        return None

    def expect(self, painter: Paints) -> None:
        """Keep errands for a painter whose worker is about to start."""
        with self.lock:
            self._errands[id(painter)] = deque()

    def send(self, errands: Sequence[Errand]) -> list[Errand]:
        """Have workers do errands with their painters before their next tickets.

        Returns those whose painter has a worker. Raises EngineError where none has, and after `close`.
        """
        with self.lock:
            sent = [errand for errand in errands if id(errand.painter) in self._errands]
            if self._closing or not sent:
                raise EngineError("this queue was closed, or its devices are lost: make another RequestQueue")
            for errand in sent:
                self._errands[id(errand.painter)].append(errand)
            self._work.notify_all()
            return sent

    def find_position(self, ticket: Ticket) -> int | None:
        """The place of a ticket that waits, from 1; None for any other."""
        with self.lock:
            return next((place for place, each in enumerate(self._waiting, 1) if each is ticket), None)

    def follow(self, ticket: Ticket, stop: Callable[[], object] | None) -> None:
        """Call `stop` as soon as nobody wants the next step of a ticket that runs. None: its worker will see it."""
        with self.lock:
            ticket._halt = stop
            if ticket._must_stop():
                ticket._be_halted()

    def finish(self, ticket: Ticket, result: Result | None, error: BaseException | None) -> None:
        """End a ticket whose worker is done with it, with the result or the error, unless it has ended before."""
        with self.lock:
            self._running.remove(ticket)
            self._room.notify_all()
            self._end(ticket, result, error)

    def cancel(self, ticket: Ticket, why: str = "the request was cancelled") -> bool:
        """Stop a ticket; see `Ticket.cancel`."""
        with self.lock:
            if ticket.done():
                return ticket.state == "cancelled"
            ticket._stop = ticket._stop or Cancelled(why)
            if ticket.state == "waiting":
                self._drop(ticket)
            else:
                ticket._be_halted()
            return True

    def cancel_all(self) -> None:
        """Stop all accepted tickets."""
        with self.lock:
            for ticket in (*self._waiting, *self._running):
                self.cancel(ticket, "the request was cancelled: its queue was closed")

    def expire_until(self, now: float) -> float:
        """End the tickets whose deadline has passed. Their workers stop after the present step.

        now: seconds of `time.monotonic`.

        Returns the next deadline, `math.inf` where there is none.
        """
        with self.lock:
            tickets = [ticket for ticket in (*self._waiting, *self._running) if not ticket.done()]
            for ticket in tickets:
                if ticket._deadline <= now:
                    self._expire(ticket)
            return min((ticket._deadline for ticket in tickets if ticket._deadline > now), default=math.inf)

    def close(self) -> None:
        """Accept no more requests, and refuse those who wait for room."""
        with self.lock:
            self._closing = True
            self._work.notify_all()
            self._room.notify_all()

    def leave(self, painter: Paints, lost: DeviceError | None) -> bool:
        """Remove a painter's worker for good. The last one ends all tickets that still wait.

        lost: the error that reports the loss of its device, or None.

        Returns whether it was the last.
        """
        with self.lock:
            self.workers -= 1
            for errand in self._errands.pop(id(painter), ()):
                errand.end(EngineError("the queue's worker ended") if lost is None else _copy_error(lost))
            if not self.workers:
                if lost is not None and not self._closing:
                    self._lost = _copy_error(lost)
                self._closing = True
                for ticket in tuple(self._waiting):
                    self._drop(ticket, EngineError("the queue's workers ended") if lost is None else _copy_error(lost))
            self._room.notify_all()
            return not self.workers

    def statistics(self) -> Statistics:
        """Counts, and how long finished requests waited and ran."""
        with self.lock:
            return self._tally.summarise(len(self._waiting), len(self._running))

    # Under the lock

    def _lets_in(self, here: object) -> bool:
        """Whether a call of `admit` is the next one and there is room. Raises when the line accepts nobody.

        A ticket that an idle worker is about to take does not count as waiting.
        """
        if self._lost is not None:
            raise _copy_error(self._lost)
        if self._closing:
            raise EngineError("this queue was closed: make another RequestQueue, or submit before close()")
        there = len(self._waiting) + len(self._running)
        return self._doors[0] is here and there < self._most_waiting + self.workers

    def _expire(self, ticket: Ticket) -> None:
        """End a ticket whose deadline has passed."""
        if ticket.state == "waiting":
            self._drop(ticket, ticket._make_overdue_error())
        else:
            self._end(ticket, error=ticket._make_overdue_error())
            ticket._be_halted()

    def _drop(self, ticket: Ticket, error: BaseException | None = None) -> None:
        """End a waiting ticket."""
        self._waiting.remove(ticket)
        self._room.notify_all()
        self._end(ticket, error=error)

    def _end(self, ticket: Ticket, result: Result | None = None, error: BaseException | None = None) -> None:
        if ticket._end(result, error):
            self._tally.add(ticket)


def limit_wait(seconds: float) -> float | None:
    """Seconds as `threading` takes them; None for no limit."""
    return None if seconds == math.inf else min(max(seconds, 0.0), threading.TIMEOUT_MAX)


def _copy_error(error: DeviceError) -> DeviceError:
    """The same error without a traceback: raising one object repeatedly makes its traceback grow."""
    fresh = DeviceError(*error.args)
    fresh.lost = True
    return fresh
