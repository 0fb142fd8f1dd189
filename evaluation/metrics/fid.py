"""Fréchet Inception Distance by running sums: constant memory for any number of pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.errors import InputError
from dreammix_trt.evaluation.metrics.metric import U8, Metric, Sample

Features = NDArray[np.float64]
#: fewer pictures than features leave the covariance singular, and the distance far too large
ENOUGH: Final = 2048


@dataclass
class Moments:
    """Running mean and covariance of features (Welford's update, float64)."""

    count: int = 0
    mean: Features = field(default_factory=lambda: np.zeros(0))
    _spread: Features = field(default_factory=lambda: np.zeros((0, 0)))

    def add(self, features: Features) -> None:
        """Add one picture's features (D,)."""
        if not self.count:
            self.mean, self._spread = np.zeros(len(features)), np.zeros((len(features), len(features)))
        self.count += 1
        before = features - self.mean
        self.mean = self.mean + before / self.count
        self._spread += np.outer(before, features - self.mean)

    @property
    def covariance(self) -> Features:
        """Of a sample: divided by count - 1. Needs two pictures."""
        return self._spread / (self.count - 1)


def frechet_distance(one: Moments, other: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2) (Heusel et al. 2017, eq. 6). Each needs two pictures."""
    first, second = one.covariance, other.covariance
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.linalg.eigvalsh(root @ second @ root)  # similar to C1 C2, and symmetric
    apart = one.mean - other.mean
    crossed = np.sqrt(np.maximum(shared, 0)).sum()
    return float(apart @ apart + np.trace(first) + np.trace(second) - 2 * crossed)


class Fid(Metric):
    """FID of the pictures of a task against real ones.

    extract: uint8 (H, W, 3) -> features (D,).
    origin: whose features these are, for people to read.
    """

    name, better = "fid", "lower"

    def __init__(self, extract: Callable[[U8], Features], real: Iterable[U8], origin: str = "") -> None:
        self._extract = extract
        self._real, self._painted = Moments(), dict[str, Moments]()
        for picture in real:
            self._real.add(extract(picture))
        if self._real.count < 2:
            raise InputError(
                f"FID has {self._real.count} real pictures to compare with; --real needs a folder of two or more"
            )
        features = f" by {origin}" if origin else ""
        self.about = f"Fréchet distance to {self._real.count} real pictures{features}; biased below {ENOUGH} pictures"

    def add(self, sample: Sample) -> float | None:
        self._painted.setdefault(sample.task, Moments()).add(self._extract(sample.image))
        return None

    def result(self, task: str) -> float | None:
        painted = self._painted.get(task)
        return frechet_distance(painted, self._real) if painted and painted.count > 1 else None


def read_pictures(folder: Path) -> Iterable[U8]:
    """The pictures of a folder of real ones, in order of their names, one at a time."""
    from dreammix_trt.core.pictures import read_image
    from dreammix_trt.trainer.listing import is_picture

    if not folder.is_dir():
        raise InputError(f"--real {folder}: no such folder; give one of real pictures")
    for file in sorted(file for file in folder.iterdir() if is_picture(file)):
        yield read_image(file, name="real picture").seen
