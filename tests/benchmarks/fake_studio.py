"""A trainer, painter and judge that does nothing, for benchmarks with a work folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from _ablation_cases import Case, Training
from _ablation_work import Values, score

from dreammix_trt.trainer.folder import RECORD


class Killed(Exception):
    """Stands for the end of a process."""


class FakeStudio:
    """Counts what it is asked for; dies before work number `dies`. An edit is right in scenes below `right`[row]."""

    base = "fake"

    def __init__(self, right: dict[str, int] | None = None, dies: int = 10**9, painter: str = "") -> None:
        self.painter = painter
        self.trained: list[tuple[int, Training]] = []
        self.painted: list[Case] = []
        self._right, self._left = right or {}, dies

    def train(self, number: int, training: Training, out: Path) -> None:
        self._work()
        self.trained.append((number, training))
        out.mkdir()
        (out / RECORD).write_text("{}")

    def paint(self, case: Case, lora: Path | None) -> np.ndarray:  # type: ignore[type-arg]
        assert (lora is None) == (case.way.training is None) and (lora is None or (lora / RECORD).exists())
        self._work()
        self.painted.append(case)
        return np.zeros((8, 8, 3), np.uint8)

    def judge(self, case: Case, picture: np.ndarray) -> Values:  # type: ignore[type-arg]
        right = float(case.place.scene < self._right.get(case.way.name, 0)) if case.edit.changed else None
        return score(
            {"edit_success": right, "attributes_kept": 0.5 + 0.5 * (case.place.subject > 0), "subject_cosine": 0.25,
             "seam_gradient": -1.0}
        )  # fmt: skip

    def _work(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise Killed
