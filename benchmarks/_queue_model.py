"""A line in front of k servers, by simulation: arrivals as a Poisson process or as recorded, service times as measured.

First come, first served, by whichever server is free first (Kiefer and Wolfowitz, 1955): M/G/k, with room for so many
or for any number. Formulas of Erlang and of Pollaczek and Khinchine check it in tests/benchmarks/test_capacity.py.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
ARRIVALS: Final = 100_000
_SETTLE: Final = 0.05  # share of the arrivals before the line is as long as it will be


@dataclass(frozen=True)
class Waits:
    """What arrivals met: waits in seconds of those that were taken, and the share that was refused."""

    seconds: Floats
    refused: float

    def find(self, share: float) -> float:
        """The wait that so many percent did not exceed (nearest rank)."""
        return float(np.percentile(self.seconds, share, method="inverted_cdf")) if len(self.seconds) else 0.0

    @property
    def mean(self) -> float:
        return float(self.seconds.mean()) if len(self.seconds) else 0.0


@dataclass(frozen=True)
class Capacity:
    """Servers, how busy they are (1: always), and the waits."""

    servers: int
    busy: float
    waits: Waits


def simulate(arrivals: Floats, service: Floats, servers: int, room: int | None = None) -> Waits:
    """Serve arrivals one after the other.

    arrivals: seconds, ascending; service: seconds of each.
    room: how many may wait; those that find no room are refused. None: any number.
    """
    free = [0.0] * servers  # when each server is free, a heap
    starts: list[float] = []  # of those that may still wait, a heap
    waits: list[float] = []
    for now, seconds in zip(arrivals.tolist(), service.tolist(), strict=True):
        if room is not None:
            while starts and starts[0] <= now:
                heapq.heappop(starts)
            if len(starts) >= room and free[0] > now:
                continue
        start = max(now, free[0])
        heapq.heapreplace(free, start + seconds)
        if room is not None and start > now:
            heapq.heappush(starts, start)
        waits.append(start - now)
    return Waits(np.asarray(waits), 1 - len(waits) / max(1, len(arrivals)))


def draw_arrivals(rate: float, count: int, rng: np.random.Generator) -> Floats:
    """Seconds of a Poisson process of so many a second."""
    return np.cumsum(rng.exponential(1 / rate, count))


def draw_service(measured: Sequence[float] | Floats, count: int, rng: np.random.Generator) -> Floats:
    """Service times after measured ones, or their quantiles: between two neighbours all are equally likely."""
    marks = np.sort(np.asarray(measured, np.float64))
    return np.interp(rng.random(count), np.linspace(0, 1, len(marks)), marks)


def predict(
    rate: float, measured: Sequence[float] | Floats, servers: int, room: int | None = None, count: int = ARRIVALS
) -> Waits:
    """The waits at a rate a second, once the line is as long as it will be. Seeded: the same again."""
    rng = np.random.default_rng(0)
    arrivals, service = draw_arrivals(rate, count, rng), draw_service(measured, count, rng)
    waits = simulate(arrivals, service, servers, room)
    return Waits(waits.seconds[round(len(waits.seconds) * _SETTLE) :], waits.refused)


def plan(
    rate: float, measured: Sequence[float] | Floats, longest: float, room: int | None = None, more: int = 2
) -> list[Capacity]:
    """From too few servers to enough and two more: the first row that waits `longest` seconds at most in p99, and with
    limited room refuses fewer than 1 %, is enough (`is_enough`)."""
    mean = float(np.mean(draw_service(measured, 10_000, np.random.default_rng(1))))
    rows: list[Capacity] = []
    servers, left = max(1, int(np.ceil(rate * mean)) - 1), more
    while left >= 0:
        if room is None and rate * mean >= servers:  # the line grows for ever
            waits = Waits(np.full(1, np.inf), 0.0)
        else:
            waits = predict(rate, measured, servers, room)
        rows.append(Capacity(servers, min(1.0, rate * (1 - waits.refused) * mean / servers), waits))
        left -= is_enough(rows[-1], longest)
        servers += 1
    return rows


def is_enough(row: Capacity, longest: float) -> bool:
    """Whether p99 of the wait and the refusals keep their bounds."""
    return row.waits.find(99) <= longest and row.waits.refused < 0.01
