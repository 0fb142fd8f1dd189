"""U-IDS and P-IDS (Zhao et al. 2021): how well a linear classifier of Inception's features tells painted from true.

As ASUKA measures them: the features of both are reduced together to as many principal components as the picture's side
has pixels, a support vector machine learns them, and is asked about the same features again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.evaluation.metrics.metric import U8, Metric, Sample

Features = NDArray[np.float64]
PACKAGE: Final = "sklearn"


@dataclass
class _Pairs:
    """Features of a task's pictures, in float32: 16 KB a pair."""

    true: list[NDArray[np.float32]] = field(default_factory=list)
    painted: list[NDArray[np.float32]] = field(default_factory=list)
    side: int = 0


class Discriminator:
    """Gathers the features of pairs for both scores, and learns once for both.

    extract: uint8 (H, W, 3) -> features (D,).
    """

    def __init__(self, extract: Callable[[U8], Features]) -> None:
        self._extract = extract
        self._pairs: dict[str, _Pairs] = {}
        self._sample: Sample | None = None
        self._scores: dict[str, tuple[int, tuple[float, float]]] = {}

    def see(self, sample: Sample) -> None:
        """Add a picture and its truth, once, however often it is shown."""
        if sample is self._sample or sample.truth is None:
            return
        self._sample = sample
        pairs = self._pairs.setdefault(sample.task, _Pairs())
        pairs.side = pairs.side or min(sample.mask.shape)
        pairs.painted.append(self._extract(sample.image).astype(np.float32))
        pairs.true.append(self._extract(sample.truth).astype(np.float32))

    def score(self, task: str) -> tuple[float, float] | None:
        """(U-IDS, P-IDS) of a task; None: it has no pairs."""
        pairs = self._pairs.get(task)
        if pairs is None:
            return None
        count, scores = self._scores.get(task, (0, (0.0, 0.0)))
        if count != len(pairs.true):
            scores = score_pairs(np.stack(pairs.true), np.stack(pairs.painted), pairs.side)
            self._scores[task] = len(pairs.true), scores
        return scores


class UnpairedScore(Metric):
    """U-IDS: the share of pictures that the classifier takes for the other kind; 0.5 where it cannot tell."""

    name = "u_ids"
    about = "share of true and painted pictures that a linear classifier takes for the other kind; 0.5: it cannot tell"

    def __init__(self, discriminator: Discriminator) -> None:
        self._discriminator = discriminator

    def add(self, sample: Sample) -> float | None:
        self._discriminator.see(sample)
        return None

    def result(self, task: str) -> float | None:
        scores = self._discriminator.score(task)
        return None if scores is None else scores[0]


class PairedScore(UnpairedScore):
    """P-IDS: the share of pictures that the classifier finds truer than their own truth."""

    name = "p_ids"
    about = "share of painted pictures that the same classifier finds truer than their own truth"

    def result(self, task: str) -> float | None:
        scores = self._discriminator.score(task)
        return None if scores is None else scores[1]


IDS: Final[tuple[type[UnpairedScore], ...]] = (UnpairedScore, PairedScore)


def score_pairs(true: NDArray[Any], painted: NDArray[Any], components: int) -> tuple[float, float]:
    """(U-IDS, P-IDS) of features, each (N, D), in the order of the pairs.

    components: to which the features are reduced; D or more: they are not.

    The classifier is scikit-learn's LinearSVC with squared hinge loss, C = 1, solved in the primal.
    """
    from sklearn.svm import LinearSVC

    rows = np.concatenate([true, painted]).astype(np.float64)
    if components < rows.shape[1]:
        rows = reduce_rows(rows, components)
    is_true = np.repeat([1, 0], [len(true), len(painted)])
    machine = LinearSVC(dual=False).fit(rows, is_true)
    truer = machine.decision_function(rows)
    right = (truer > 0) == (is_true == 1)
    return float(1 - right.mean()), float((truer[len(true) :] > truer[: len(true)]).mean())


def reduce_rows(rows: Features, components: int) -> Features:
    """The first principal components of rows, (N, D) -> (N, min(components, N, D)), centred."""
    centred = rows - rows.mean(0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    return np.asarray((left * sizes)[:, :components])
