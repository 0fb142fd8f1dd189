"""What a soak comes to: whether every accepted job ended once, and as its client saw it; times; memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np
from _common import Benchmark
from _soak_clients import Outcome

QUANTILES: Final = 51
SERVICE: Final = "service of finished jobs, quantiles from 0 to 1 [s]"
_ENDS: Final = ("done", "failed", "cancelled")


def add_ends(bench: Benchmark, outcomes: Sequence[Outcome], service: dict[str, int]) -> None:
    """Rows of the ends, as clients saw them and as the service counted them.

    service: jobs of the run by their end. A client that vanished knows of its job only that it was accepted.
    """
    ends = Counter(each.end for each in outcomes)
    for name in (*_ENDS, "vanished", "refused"):
        bench.add(f"{name}, for their clients", ends[name])
    accepted = sum(ends[name] for name in (*_ENDS, "vanished"))
    bench.add("accepted jobs that the service did not end exactly once", sum(service.values()) - accepted, bound="== 0")
    more = {name: service.get(name, 0) - ends[name] for name in _ENDS}
    bench.add("of those that vanished, the service cancelled", more["cancelled"])
    killed = sum(each.order.fate == "kills" for each in outcomes)
    bench.add("jobs that failed beside those of the killed worker", service.get("failed", 0) - killed, bound="== 0")
    unlike = sum(more.values()) != ends["vanished"] or more["failed"] or min(more.values()) < 0
    bench.add("ends that differ between clients and service", int(unlike), bound="== 0")
    bench.add("pictures compared with those painted alone", sum(each.compared for each in outcomes))
    bench.add("pictures that differ", sum(each.compared and bool(each.problem) for each in outcomes), bound="== 0")
    bench.add("answers that should not have been", sum(bool(each.problem) for each in outcomes), bound="== 0")


def add_times(bench: Benchmark, outcomes: Sequence[Outcome]) -> None:
    """Rows of waits and service, of the jobs that tell them, and quantiles for `capacity.py`."""
    for name, unit in (("waited", "wait"), ("ran", "service")):
        seconds = [value for each in outcomes if (value := getattr(each, name)) is not None]
        for share in (50, 99) if seconds else ():
            bench.add(f"{unit}, p{share} of {len(seconds)} [s]", float(np.percentile(seconds, share)))
    ran = [each.ran for each in outcomes if each.ran is not None]
    if ran:
        marks = np.quantile(ran, np.linspace(0, 1, QUANTILES))
        bench.add(SERVICE, " ".join(f"{mark:.4g}" for mark in marks))


def add_memory(bench: Benchmark, samples: Sequence[tuple[float, float]], goal: bool) -> None:
    """Rows of the service's resident memory. Also of both halves: in the middle a worker is lost, which may set memory
    free and hide what grows.

    samples: (share of the orders that have ended, bytes).
    """

    def find(begin: float, end: float) -> float | None:
        sizes = [size for share, size in samples if begin <= share < end]
        return float(np.median(sizes)) / 2**20 if sizes else None

    whole = [size / 2**20 for share, size in samples if share >= 0.1]
    if whole:
        bench.add("memory, the least and the most from 10 % on [MiB]", f"{min(whole):.1f} {max(whole):.1f}")
    for name, before, after in (
        ("from 10 % to the end", find(0.1, 0.2), find(0.9, 1.1)),
        ("before a worker is lost", find(0.1, 0.2), find(0.4, 0.5)),
        ("after it", find(0.6, 0.7), find(0.9, 1.1)),
    ):
        if before and after:
            bench.add(
                f"memory, growth {name} (medians of tenths)", after / before - 1, bound="<= 0.05" if goal else None
            )


def find_interval(ratios: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """The median of ratios and its 95 % bootstrap interval."""
    values = np.asarray(ratios, np.float64)
    again = np.median(values[np.random.default_rng(0).integers(len(values), size=(draws, len(values)))], axis=1)
    low, high = np.quantile(again, (0.025, 0.975))
    return float(np.median(values)), float(low), float(high)
