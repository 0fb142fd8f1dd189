"""What `vs_diffusers.py` makes of rounds: medians of ratios, and goals for ours alone."""

from __future__ import annotations

import _cpu_peers as peers
import pytest
import vs_diffusers as race
from _common import Benchmark


def test_ratios_are_taken_round_by_round() -> None:
    """The second round is slow for all; medians of seconds would say 1, medians of ratios do not."""
    bench = Benchmark("none")
    rounds = {peers.EAGER: [4.0, 40.0, 5.0], peers.COMPILED: [1.0, 10.0, 1.0], peers.PLAIN: [2.0, 5.0, 2.0]}
    race.report(bench, "work", rounds, goals=True)
    rows = {row["metric"]: (row["value"], row["bound"], row["pass"]) for row in bench.rows}
    assert rows[f"work, {peers.EAGER} [s]"] == (5.0, None, None)
    assert rows[f"work, {peers.PLAIN}: times as fast as {peers.EAGER}"] == (2.5, ">= 2.2", True)
    assert rows[f"work, {peers.PLAIN}: times as fast as {peers.COMPILED}"] == (0.5, ">= 1", False)
    assert len(rows) == 5


def test_a_small_run_is_not_held_to_goals() -> None:
    bench = Benchmark("none")
    race.report(bench, "work", {peers.EAGER: [1.0], peers.PLAIN: [2.0]}, goals=False)
    assert [row["pass"] for row in bench.rows] == [None, None, None]


def test_works_take_turns_after_a_round_that_does_not_count() -> None:
    called: list[str] = []
    rounds = race.take_turns({name: lambda name=name: called.append(name) for name in "ab"}, repeats=2)  # type: ignore[misc]
    assert called == list("ababab") and {name: len(spent) for name, spent in rounds.items()} == {"a": 2, "b": 2}


def test_what_cannot_be_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    absent = peers.find_absent(compiled=False)
    assert absent.keys() == {peers.COMPILED, peers.OPTIMUM, peers.HALF}
    assert "transformers < 4.58" in absent[peers.OPTIMUM] and absent[peers.HALF] == "openvino is not installed"
