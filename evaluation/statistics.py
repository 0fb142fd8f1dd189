"""Running sums of metrics by subject and task, and their means with intervals over subjects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000


@dataclass(frozen=True)
class Mean:
    """A mean. low, high: its 95 % interval; None where there is none. pictures: how many count in it."""

    mean: float
    pictures: int
    low: float | None = None
    high: float | None = None


class Tally:
    """Sums by (subject, task, metric): its memory does not grow with the number of pictures."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str, str], tuple[int, float]] = {}

    def add(self, subject: str, task: str, values: Mapping[str, float | None]) -> None:
        """Add one picture's values; None counts nowhere."""
        for metric, value in values.items():
            if value is not None:
                count, total = self._sums.get((subject, task, metric), (0, 0.0))
                self._sums[subject, task, metric] = (count + 1, total + value)

    @property
    def subjects(self) -> list[str]:
        return list(dict.fromkeys(subject for subject, _, _ in self._sums))

    def of_subject(self, subject: str, task: str, metric: str) -> Mean | None:
        """The mean over a subject's pictures; None: none has a value."""
        count, total = self._sums.get((subject, task, metric), (0, 0.0))
        return Mean(total / count, count) if count else None

    def over_subjects(self, task: str, metric: str) -> Mean | None:
        """The mean of the subjects' means, each counting once, with its bootstrap interval."""
        found = [mean for each in self.subjects if (mean := self.of_subject(each, task, metric))]
        if not found:
            return None
        means = [each.mean for each in found]
        low, high = bootstrap_interval(means) or (None, None)
        return Mean(float(np.mean(means)), sum(each.pictures for each in found), low, high)


def bootstrap_interval(means: Sequence[float], draws: int = DRAWS, seed: int = 0) -> tuple[float, float] | None:
    """The 95 % percentile interval of the mean when subjects are drawn anew with replacement.

    means: one a subject. None for fewer than two.
    """
    if len(means) < 2:
        return None
    values = np.asarray(means, np.float64)
    again = values[np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))].mean(1)
    low, high = np.quantile(again, (0.025, 0.975))
    return float(low), float(high)
