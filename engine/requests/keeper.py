"""The keeper of deadlines: a thread that ends tickets whose time is over, and sleeps in between."""

from __future__ import annotations

import math
import threading
import time

from dreammix_trt.engine.requests.line import Line, limit_wait
from dreammix_trt.engine.requests.tickets import Ticket


class Keeper:
    """Watches the deadlines of one line. `keep` is the thread's work."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._times = threading.Condition(line.lock)  # an earlier deadline, or the end
        self._alarm = math.inf  # when the keeper wakes

    def note_deadline(self, ticket: Ticket) -> None:
        """Take a new ticket into account; its deadline may be the next one."""
        with self._line.lock:
            if ticket._deadline < self._alarm:
                self.wake()

    def wake(self) -> None:
        """Look at the clock and the line now."""
        with self._line.lock:
            self._times.notify()

    def keep(self) -> None:
        """Go on until no worker is left."""
        with self._line.lock:
            while self._line.workers:
                now = time.monotonic()
                self._alarm = self._line.expire_until(now)
                self._times.wait(limit_wait(self._alarm - now))
