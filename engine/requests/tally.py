"""Statistics of a queue: how many requests ended in which way, and how long they took."""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import NamedTuple

from dreammix_trt.engine.requests.tickets import State, Ticket

_HISTORY = 1024  # finished requests behind the percentiles


class Percentiles(NamedTuple):
    """Seconds that 50, 90 and 99 of 100 requests did not exceed (nearest rank)."""

    p50: float
    p90: float
    p99: float


class Statistics(NamedTuple):
    """The state of a queue now.

    waiting, running: numbers of requests.
    done, failed, cancelled: numbers of tickets that ended so, since the start.
    waited, ran: seconds of the latest 1024 requests that ended "done"; None while there are none.
    """

    waiting: int
    running: int
    done: int
    failed: int
    cancelled: int
    waited: Percentiles | None
    ran: Percentiles | None


class Tally:
    """Counts tickets as they end."""

    def __init__(self) -> None:
        self._ends: Counter[State] = Counter()
        self._history: deque[tuple[float, float]] = deque(maxlen=_HISTORY)

    def add(self, ticket: Ticket) -> None:
        """Count a ticket that has just ended."""
        self._ends[ticket.state] += 1
        if ticket.state == "done":
            self._history.append((ticket.waited, ticket.ran))

    def summarise(self, waiting: int, running: int) -> Statistics:
        """Make the statistics.

        waiting, running: numbers of requests that have not ended.
        """
        waited, ran = ([pair[k] for pair in self._history] for k in (0, 1))
        ends = (self._ends["done"], self._ends["failed"], self._ends["cancelled"])
        return Statistics(waiting, running, *ends, _find_percentiles(waited), _find_percentiles(ran))


def _find_percentiles(seconds: list[float]) -> Percentiles | None:
    if not seconds:
        return None
    ranked = sorted(seconds)
    return Percentiles(*(ranked[math.ceil(len(ranked) * share / 100) - 1] for share in (50, 90, 99)))
