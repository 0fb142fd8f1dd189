"""The simulated line against formulas, and what `capacity.py` makes of service times."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import _queue_model as model
import capacity
import numpy as np
import pytest
from _common import Benchmark
from _soak_report import SERVICE

EXPONENTIAL = -np.log1p(-np.linspace(0, 0.99999, 20_001))  # quantiles of the exponential distribution of mean 1


def erlang_c(servers: int, load: float) -> float:
    """The probability that an arrival of M/M/k waits. load: rate times mean service."""
    terms = [load**n / math.factorial(n) for n in range(servers)]
    last = load**servers / math.factorial(servers) * servers / (servers - load)
    return last / (sum(terms) + last)


@pytest.mark.parametrize(("servers", "load"), [(1, 0.7), (2, 1.4), (5, 3.5)])
def test_exponential_service_waits_as_erlang_says(servers: int, load: float) -> None:
    waits = model.predict(load, EXPONENTIAL, servers, count=300_000)
    waiting = erlang_c(servers, load)
    assert (waits.seconds > 1e-12).mean() == pytest.approx(waiting, rel=0.03)
    assert waits.mean == pytest.approx(waiting / (servers - load), rel=0.05)
    assert waits.find(99) == pytest.approx(math.log(waiting / 0.01) / (servers - load), rel=0.08)
    assert waits.refused == 0


def test_constant_service_waits_half_as_long() -> None:
    """Pollaczek and Khinchine: M/D/1."""
    waits = model.predict(0.8, [1.0, 1.0], 1, count=300_000)
    assert waits.mean == pytest.approx(0.8 / (2 * (1 - 0.8)), rel=0.05)


def test_without_room_they_are_refused_as_erlang_says() -> None:
    """Erlang B: two servers, nobody may wait."""
    load = 1.5
    blocked = load**2 / 2 / (1 + load + load**2 / 2)
    waits = model.predict(load, EXPONENTIAL, 2, room=0, count=200_000)
    assert waits.refused == pytest.approx(blocked, rel=0.02) and waits.seconds.max() == 0


def test_room_for_one_by_hand() -> None:
    """One server, 10 s each: the second waits, the third finds no room, the fourth comes as the second begins."""
    found = model.simulate(np.array([0.0, 1.0, 2.0, 10.0]), np.full(4, 10.0), 1, room=1)
    assert found.seconds.tolist() == [0.0, 9.0, 10.0] and found.refused == 0.25


def test_a_plan_ends_two_rows_after_enough() -> None:
    rows = model.plan(3.0, EXPONENTIAL, longest=1.0)
    assert [row.servers for row in rows] == list(range(rows[0].servers, rows[0].servers + len(rows)))
    enough = [model.is_enough(row, 1.0) for row in rows]
    assert enough == sorted(enough) and sum(enough) == 3
    assert rows[0].waits.find(99) == math.inf and rows[0].busy == 1.0  # two or three servers for a load of three
    first = rows[enough.index(True)]
    assert math.log(erlang_c(first.servers, 3.0) / 0.01) / (first.servers - 3.0) < 1.05
    assert math.log(erlang_c(first.servers - 1, 3.0) / 0.01) / (first.servers - 4.0 or 1e-9) > 0.95


def test_a_line_that_behaves_as_the_model_is_within_the_bounds() -> None:
    """And one that waits half as long again is not."""
    rng = np.random.default_rng(1)
    arrivals, ran = model.draw_arrivals(0.7, 200, rng), rng.uniform(0.8, 1.2, 200)
    waited = model.simulate(arrivals, ran, 1).seconds
    for factor, fine in ((1.0, True), (1.5, False)):
        bench = Benchmark("none")
        capacity.compare(bench, arrivals, factor * waited, ran, 1)
        kept = [row["pass"] for row in bench.rows if row["bound"]]
        assert len(kept) == 4 and all(kept) == fine and any(kept) == fine


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["capacity", *words])
    return capacity.main()


def test_the_command_tells_how_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    soak = tmp_path / "soak.json"
    soak.write_text(json.dumps({"rows": [{"metric": SERVICE, "value": "0.9 1 1.1"}]}))
    assert run(monkeypatch, "--soak", str(soak), "--rate", "0.5", "--rate", "2", "--wait", "2", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    least = {rate: min(row["replicas"] for row in rows if row["rate"] == rate and row["enough"]) for rate in (0.5, 2)}
    assert least == {0.5: 2, 2: 3}
    times = tmp_path / "times.txt"
    times.write_text("1\n1\n")
    assert run(monkeypatch, "--seconds", str(times), "--wait", "9") == 0
    told = capsys.readouterr().out
    assert "mean 1 s" in told and "enough" in told and "inf" in told


@pytest.mark.parametrize("text", ["", "1", "1 x", "1 -1", "1 inf", "1 nan"])
def test_bad_times_are_told(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    file = tmp_path / "times.txt"
    file.write_text(text)
    assert run(monkeypatch, "--seconds", str(file)) == 2 and "--seconds FILE" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--rate", "0"], ["--busy", "1"], ["--wait", "-1"]])
def test_bad_options_are_named(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, *words)
    assert words[0] in capsys.readouterr().err
