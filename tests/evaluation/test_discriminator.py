"""U-IDS and P-IDS in closed cases: a linear classifier in few dimensions, whose answers can be worked out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dreammix_trt.evaluation.metrics.discriminator import (
    Discriminator,
    PairedScore,
    UnpairedScore,
    reduce_rows,
    score_pairs,
)
from dreammix_trt.evaluation.metrics.metric import Sample

pytest.importorskip("sklearn", reason="needs the extra eval")
SUBJECT: Any = None


def test_equal_sets_cannot_be_told_apart() -> None:
    """The best plane is none: every answer is 0, which is no truth's, and nothing is truer than itself."""
    rows = np.random.default_rng(0).normal(size=(40, 5))
    assert score_pairs(rows, rows, 5) == (0.5, 0.0)
    assert score_pairs(rows, rows, 3) == (0.5, 0.0)


def test_a_planted_shift_is_found() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(300, 4))
    assert score_pairs(rows, rows + np.eye(4)[0] * 9, 4) == (0.0, 0.0)
    some, paired = score_pairs(rows, rng.normal(size=(300, 4)) + np.eye(4)[0], 4)
    assert some == pytest.approx(0.31, abs=0.04), "of normals one deviation apart a plane takes Phi(-1/2) wrongly"
    assert paired == pytest.approx(0.24, abs=0.04), "and Phi(-1/sqrt 2) of the pairs are the other way round"


@pytest.mark.parametrize("swapped", [0, 1, 2, 4])
def test_pairs_that_are_the_other_way_round_count(swapped: int) -> None:
    """Truths at 1 and paintings at -1, `swapped` of ten exchanged: both scores are their share."""
    true = np.ones((10, 1))
    true[:swapped] = -1
    assert score_pairs(true, -true, 1) == pytest.approx((swapped / 10, swapped / 10))


def test_the_machine_solves_the_problem_that_it_should() -> None:
    """N pairs at +a and -a: the minimum of w^2 / 2 + 2 N (1 - w a)^2 is at w = 4 N a / (1 + 4 N a^2)."""
    svm = pytest.importorskip("sklearn.svm")
    count, a = 3, 0.7
    rows = np.repeat([[a], [-a]], count, 0)
    machine = svm.LinearSVC(dual=False, tol=1e-10).fit(rows, np.repeat([1, 0], count))
    assert machine.coef_[0, 0] == pytest.approx(4 * count * a / (1 + 4 * count * a * a))
    assert machine.intercept_[0] == pytest.approx(0, abs=1e-9)


def test_components_keep_what_varies_most() -> None:
    rows = np.random.default_rng(2).normal(size=(50, 6)) * (9, 5, 1, 1, 1, 1) + 100
    reduced = reduce_rows(rows, 2)
    spread = np.linalg.eigvalsh(np.cov(rows.T))[::-1]
    assert np.cov(reduced.T) == pytest.approx(np.diag(spread[:2]), abs=1e-9) and np.allclose(reduced.mean(0), 0)
    assert reduce_rows(rows[:4], 99).shape == (4, 4)


def test_pictures_are_seen_once_for_both_scores_and_task_by_task() -> None:
    asked: list[int] = []

    def extract(picture: Any) -> Any:
        asked.append(1)
        return picture.reshape(-1, 3).mean(0).astype(np.float64)

    discriminator = Discriminator(extract)
    metrics = [UnpairedScore(discriminator), PairedScore(discriminator)]
    rng, mask = np.random.default_rng(4), np.ones((8, 8), bool)
    for _ in range(12):
        truth = rng.integers(0, 256, (8, 8, 3), np.uint8)
        for task, image in (("removal", truth), ("identity", 255 - truth)):
            sample = Sample(image, truth, mask, SUBJECT, "", task, {})
            sample = sample.hold_against_scene() if task == "removal" else sample
            assert [metric.add(sample) for metric in metrics] == [None, None]
    assert len(asked) == 24, "a picture and its truth"
    assert [metric.result("removal") for metric in metrics] == [0.5, 0.0]
    assert [metric.result("identity") for metric in metrics] == [None, None]
