"""Rows that threads draw while the step before is computed. Each has its own dice, so their order decides nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Row = Mapping[str, "NDArray[np.float32]"]
_MOST_THREADS = 8


class RowReader:
    """Draws batches by their numbers. Use it as a context manager."""

    def __init__(self, draw: Callable[[np.random.Generator], Row], seeds: Sequence[int], rows: range) -> None:
        """draw: one row. seeds: of all rows. rows: the numbers of those that a batch takes here."""
        self._draw, self._seeds, self._rows = draw, tuple(seeds), rows
        self._ordered: dict[int, list[Future[Row]]] = {}
        self._threads = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "rows")

    def take(self, number: int) -> dict[str, Tensor]:
        """The rows of a batch, stacked under each name; the next batch is begun."""
        import torch

        rows = [future.result() for future in self._order(number)]
        del self._ordered[number]
        self._order(number + 1)
        return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}

    def _order(self, number: int) -> list[Future[Row]]:
        if number not in self._ordered:
            dice = ([*self._seeds, number, row] for row in self._rows)
            self._ordered[number] = [self._threads.submit(self._draw, np.random.default_rng(each)) for each in dice]
        return self._ordered[number]

    def __enter__(self) -> RowReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
