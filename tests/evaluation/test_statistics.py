"""Means over subjects and their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from dreammix_trt.evaluation.statistics import Tally, bootstrap_interval


def test_every_subject_counts_once() -> None:
    tally = Tally()
    for value in (1.0, 2.0, 3.0):
        tally.add("mug", "identity", {"psnr": value, "fid": None})
    tally.add("jar", "identity", {"psnr": 10.0})
    tally.add("jar", "editing", {"psnr": 99.0})
    mug, both = tally.of_subject("mug", "identity", "psnr"), tally.over_subjects("identity", "psnr")
    assert mug is not None and both is not None
    assert (mug.mean, mug.pictures) == (2.0, 3)
    assert (both.mean, both.pictures) == (6.0, 4)  # not the 4.0 of the pictures
    assert tally.of_subject("mug", "identity", "fid") is None and tally.over_subjects("editing", "ssim") is None


def test_an_interval_has_the_width_of_the_means_own_error() -> None:
    means = np.random.default_rng(1).normal(0.5, 0.1, 40)
    low, high = bootstrap_interval(list(means)) or (0, 0)
    error = means.std() / np.sqrt(len(means))
    assert low == pytest.approx(means.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(means.mean() + 1.96 * error, abs=0.2 * error)
    assert bootstrap_interval(list(means)) == (low, high), "seeded"
    assert bootstrap_interval([0.3]) is None
    assert bootstrap_interval([0.3, 0.3]) == (pytest.approx(0.3), pytest.approx(0.3))


def test_sums_do_not_grow_with_pictures() -> None:
    tally = Tally()
    for _ in range(100):
        tally.add("mug", "identity", {"psnr": 1.0})
    assert len(tally._sums) == 1
