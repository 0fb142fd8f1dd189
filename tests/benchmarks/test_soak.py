"""The soak on a fake painter's service, and what it makes of services that lose, mix up or invent jobs."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _soak_overhead as overhead
import _soak_report as report
import numpy as np
import pytest
import soak
from _common import Benchmark
from _soak_clients import Clients, Outcome
from _soak_orders import DEATH, SIZES, Order, Variant, decode, draw_orders, draw_variants, encode, write_subjects
from _soak_server import Mortal

from dreammix_trt.core.errors import DeviceError
from dreammix_trt.core.subject import open_subject
from tests.support.fake_service import FakePainter, Running, paint_plainly


class Slow(FakePainter):
    """Takes 10 ms a step; `Mortal` when it is asked to be. swaps: paints the seed after the one that was asked for."""

    def __init__(self, swaps: bool = False) -> None:
        super().__init__()
        self._swaps = swaps

    def _paint(self, source: Any, mask: Any, request: Any) -> Iterator[Any]:
        if self._swaps and request.seed == 3:
            request = request.replace(seed=4)
        for event in super()._paint(source, mask, request):
            time.sleep(0.01)
            yield event


def make_crowd(count: int, kills: bool = True) -> soak.Crowd:
    small = [Variant(each.picture[::4, ::4], each.mask[::4, ::4], each.fields) for each in draw_variants(8)]
    variants = [Variant(np.ascontiguousarray(each.picture), each.mask.copy(), each.fields) for each in small]
    expected = [paint_plainly(each.picture, each.mask, each.fields["seed"]) for each in variants]
    return soak.Crowd(variants, expected, count, kills)


def run_soak(crowd: soak.Crowd, tmp_path: Path, *painters: Any) -> dict[str, Any]:
    """The rows of a run against a service of these painters."""
    bench = Benchmark("none")
    with Running(*painters, waiting=4) as service:
        asyncio.run(soak.run(bench, service.url, write_subjects(tmp_path), crowd))
    return {row["metric"]: row for row in bench.rows}


def test_a_service_that_does_its_work_passes(tmp_path: Path) -> None:
    crowd = make_crowd(120)
    rows = run_soak(crowd, tmp_path, Mortal(Slow()), Mortal(Slow()))
    assert all(row["pass"] for row in rows.values() if row["bound"]), rows
    assert rows["requests sent"]["value"] == 120 and rows["failed, for their clients"]["value"] == 1
    assert rows["refused, for their clients"]["value"] > 0, "four times too much finds no room"
    assert rows["pictures compared with those painted alone"]["value"] > 10
    assert len(rows[report.SERVICE]["value"].split()) == report.QUANTILES
    assert rows["sent a second, times what was done a second in the run"]["value"] > 1
    assert "memory, growth from 10 % to the end (medians of tenths)" in rows


def test_pictures_that_are_mixed_up_are_seen(tmp_path: Path) -> None:
    crowd = make_crowd(40, kills=False)
    with pytest.raises(SystemExit, match=r"that of variant 4|of no request"):
        run_soak(crowd, tmp_path, Slow(swaps=True))


def test_orders_are_the_same_again_and_of_the_shares_that_are_told() -> None:
    orders = draw_orders(2000, 24)
    assert orders == draw_orders(2000, 24) != draw_orders(2000, 24, seed=1)
    assert Counter(each.fate for each in orders) == {"stays": 1699, "cancels": 200, "vanishes": 100, "kills": 1}
    assert {each.door for each in orders if each.fate == "vanishes"} == {"openai"}
    assert {each.door for each in orders if each.fate in ("cancels", "kills")} == {"native"}
    assert orders[1000].fate == "kills" and len({each.door for each in orders}) == 3
    assert np.mean(np.diff([each.start for each in orders])) == pytest.approx(1, abs=0.1)
    assert min(Counter(each.variant for each in orders).values()) > 40


def test_variants_are_mixed_and_subjects_fit_the_embedded_base(tmp_path: Path) -> None:
    variants = draw_variants(24)
    kinds = {(each.picture.shape[:2], each.fields["subject"], each.fields["num_inference_steps"]) for each in variants}
    assert {size for size, *_ in kinds} == set(SIZES) and len(kinds) == 12
    assert {steps for *_, steps in kinds} == {2, 3, 4} and {subject for _, subject, _ in kinds} == {
        "cup",
        "vase",
        "bowl",
    }
    for each in variants:
        assert each.mask.shape == each.picture.shape[:2] and 0 < each.mask.mean() < 128
        assert np.array_equal(decode(encode(each.picture)), each.picture)
    for name, file in write_subjects(tmp_path).items():
        subject = open_subject(file, name=name)
        assert subject.name == name and subject.factors


def test_a_mortal_painter_dies_of_one_prompt_alone() -> None:
    painter = Mortal(FakePainter())
    crowd = make_crowd(20)
    each = crowd.variants[0]
    request = painter.request("a mug", seed=0)
    images = {"noise": None, "keep_stages": False}
    events = list(painter.iterate(each.picture, each.mask, request, **images))
    assert len(events) == 4 and events[-1].result
    events = painter.iterate(each.picture, each.mask, request.replace(prompt=DEATH), **images)
    assert next(events).index == 0
    with pytest.raises(DeviceError) as caught:
        next(events)
    assert caught.value.lost


def tell(ends: dict[str, int], service: dict[str, int], problems: int = 0) -> dict[str, Any]:
    """The rows of ends that clients saw and a service counted."""
    order = Order(0, 0, "native", "stays", 0.0, 0.0)
    outcomes = [Outcome(order, end, compared=end == "done") for end, count in ends.items() for _ in range(count)]  # type: ignore[arg-type]
    outcomes[:problems] = [Outcome(order, each.end, "wrong", each.compared) for each in outcomes[:problems]]
    bench = Benchmark("none")
    report.add_ends(bench, outcomes, service)
    return {row["metric"]: row["pass"] for row in bench.rows if row["bound"]}


def test_every_kind_of_loss_misses_a_bound() -> None:
    ends = {"done": 5, "cancelled": 2, "vanished": 3, "refused": 9}
    assert all(tell(ends, {"done": 6, "cancelled": 4}).values())
    lost, invented = tell(ends, {"done": 6, "cancelled": 3}), tell(ends, {"done": 6, "cancelled": 5})
    assert not lost["accepted jobs that the service did not end exactly once"]
    assert not invented["accepted jobs that the service did not end exactly once"]
    assert not tell(ends, {"done": 4, "cancelled": 6})["ends that differ between clients and service"]
    failed = tell(ends, {"done": 5, "cancelled": 4, "failed": 1})
    assert not failed["jobs that failed beside those of the killed worker"]
    wrong = tell(ends, {"done": 6, "cancelled": 4}, problems=1)
    assert not wrong["pictures that differ"] and not wrong["answers that should not have been"]


def test_memory_that_grows_behind_a_lost_worker_is_seen() -> None:
    """By hand: 100 MiB, at 30 % 104, then half of it, which grows by a tenth."""
    sizes = [(k / 100, 100 if k < 30 else 104 if k < 50 else 50 if k < 80 else 55) for k in range(1, 101)]
    bench = Benchmark("none")
    report.add_memory(bench, [(share, size * 2.0**20) for share, size in sizes], goal=True)
    rows = {row["metric"]: (row["value"], row["pass"]) for row in bench.rows}
    assert rows["memory, growth from 10 % to the end (medians of tenths)"] == (-0.45, True)
    assert rows["memory, growth before a worker is lost (medians of tenths)"] == (0.04, True)
    assert rows["memory, growth after it (medians of tenths)"] == (0.1, False)
    assert rows["memory, the least and the most from 10 % on [MiB]"][0] == "50.0 104.0"


def test_overhead_is_of_ratios_within_a_round() -> None:
    """The second round is slow for both; medians of seconds would say 0, medians of ratios do not."""
    turns = [{"queue": (q, 1.0), "queue and PNG": (q, 1.05), "http": (1.02 * q, 1.1)} for q in (1.0, 9.0, 1.0)]
    bench = Benchmark("none")
    overhead.add_turns(bench, turns, 30)
    rows = {row["metric"]: (row["value"], row["pass"]) for row in bench.rows}
    assert rows["http over queue, median of the rounds' ratios less 1, clock"] == (0.02, True)
    assert rows["http over queue, median of the rounds' ratios less 1, processor, both ends"] == (0.1, None)
    assert rows["http over queue, its 95 % interval, clock"][0] == "0.0200 to 0.0200"
    median, low, high = report.find_interval(list(np.random.default_rng(0).normal(1, 0.1, 100)))
    assert low < median < high and high - low == pytest.approx(2 * 1.96 * 1.2533 * 0.1 / 10, rel=0.3)  # of a normal one


def test_works_take_turns_from_both_ends() -> None:
    told: list[str] = []
    found = overhead.take_turns({name: lambda name=name: told.append(name) for name in "ab"}, 3)  # type: ignore[misc]
    assert told == list("abbaab") and [set(costs) for costs in found] == [{"a", "b"}] * 3


def test_both_ways_of_the_overhead_give_the_same_picture() -> None:
    variant = draw_variants(1)[0]
    with overhead.serve_here(FakePainter()) as (served, url), overhead.httpx.Client(base_url=url) as client:
        files, fields = (encode(variant.picture), encode(variant.mask)), {"prompt": "a mug", "seed": 5}
        got = overhead.ask(client, *files, fields)
        alone = served.queue.submit(*files, served.make_request(fields)).result().images[0]
    assert np.array_equal(got, np.asarray(alone))


def test_a_client_notices_a_picture_of_somebody_else() -> None:
    crowd = make_crowd(20)
    clients = Clients(None, crowd.variants, crowd.expected)  # type: ignore[arg-type]
    order = Order(0, 1, "native", "stays", 0.0, 0.0)
    assert not clients._compare(order, encode(crowd.expected[1])).problem
    assert "that of variant 5" in clients._compare(order, encode(crowd.expected[5])).problem
    assert "of no request" in clients._compare(order, encode(crowd.variants[1].picture)).problem
