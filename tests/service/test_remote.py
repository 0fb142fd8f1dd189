"""Painters whose work is done elsewhere: what they tell, and what happens when a replica dies. Without Ray."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from dreammix_trt.core.errors import (
    Cancelled,
    DeviceError,
    DreamMixError,
    EngineError,
    FileFormatError,
    InputError,
    NotFiniteError,
    TimedOut,
)
from dreammix_trt.core.seam import BaseFacts
from dreammix_trt.core.subject import Subject
from dreammix_trt.engine import DreamMix, RequestQueue, StepEvent
from dreammix_trt.engine.result import Result
from dreammix_trt.serve_on_ray import open_painters
from dreammix_trt.service.fleet import Bounds
from dreammix_trt.service.loading import Loading
from dreammix_trt.service.remote import RayPainter, RemoteEngine, ReplicaDied
from dreammix_trt.service.replicas import Desk, Painter
from dreammix_trt.service.wire import Begun, Facts, Failed, Guest, Item, Order, Shown, Stepped
from tests.engine.conftest import make_scene as make_small_scene
from tests.service.test_native import finish, post, wait_until
from tests.support.fake_service import LONG, FakePainter, Running, make_scene, paint_plainly

PICTURE, MASK = make_scene()
Act = Callable[[Order], Iterator[Item]]


class FakeLink:
    """Replicas that are generators in this process, one act for each attempt; the last one is repeated."""

    def __init__(self, *acts: Act) -> None:
        self.orders: list[Order] = []
        self.routed: list[str] = []
        self.guests: Sequence[Guest] = ()
        self.cancelled: list[str] = []
        self.wishes: list[str] = []
        self.reports: dict[str, DreamMixError] = {}
        self.calls: list[str] = []
        self.adapter = True
        self._acts = list(acts or (paint,))

    def paint(self, order: Order, guests: Sequence[Guest], subject: str) -> Any:
        act = self._acts.pop(0) if len(self._acts) > 1 else self._acts[0]
        self.orders.append(order)
        self.routed.append(subject)
        self.guests = guests
        return _Stream(act(order), lambda: self.cancelled.append(order.id))

    def call(self, method: str, *arguments: Any) -> Any:
        self.calls.append(method)
        if method == "describe":
            subjects = (Subject("mug", "sks", "mug"),)
            return Facts(BaseFacts(128, 8, 0.13, 8), None, self.adapter, {"num_inference_steps": 4}, subjects)
        if method == "enroll":
            return Subject(arguments[2], "", arguments[3]), None
        if any(guest.subject.class_name == "misfit" for guest in arguments[0]):
            return None, Failed(FileFormatError("it does not fit this base"))
        return (), None

    def share(self, subject: Subject) -> Any:
        return subject

    def ask_preview(self, id: str, whole: bool) -> None:
        self.wishes.append(id)

    def forget(self, id: str) -> None:
        pass

    def take_report(self, id: str) -> DreamMixError | None:
        return self.reports.get(id)


class _Stream:
    def __init__(self, items: Iterator[Item], cancel: Callable[[], object]) -> None:
        self._items, self.cancel = items, cancel

    def __iter__(self) -> Iterator[Item]:
        return self._items


def paint(order: Order, dies_after: int | None = None, look: Callable[[int], bool] = lambda step: False) -> Any:
    """What a replica reports of an order that a `FakePainter` paints."""
    yield Begun(("the prompt is odd",))
    painter = FakePainter()
    for event in painter.iterate(order.image, order.mask_image, order.request, noise=None, keep_stages=False):
        if event.index == dies_after:
            raise ReplicaDied("killed")
        yield Stepped(event.index, event.total, event.stage, event.picture, event.result)
        if look(event.index) and event.result is None:
            yield Shown(event.preview())


def dying(after: int) -> Act:
    return lambda order: paint(order, after)


def open_queue(*acts: Act, painters: int = 1, **options: Any) -> tuple[FakeLink, RequestQueue]:
    link = FakeLink(*acts)
    engine = RemoteEngine(link)
    return link, RequestQueue([RayPainter(engine) for _ in range(painters)], owned=True, **options)


def test_a_request_is_told_step_by_step_as_its_replica_paints_it() -> None:
    link, queue = open_queue()
    events: list[StepEvent] = []
    with queue:
        result = queue.submit(PICTURE, MASK, "a mug", seed=3, on_step=events.append).result(LONG)
        queue.submit(PICTURE, MASK, "a mug", subject="").result(LONG)
    assert [(event.index, event.total, event.retry) for event in events] == [(k, 4, "") for k in range(4)]
    assert np.array_equal(np.asarray(result.images[0]), paint_plainly(PICTURE, MASK, 3))
    assert link.routed == ["mug", ""] and not link.cancelled and not link.wishes


def test_after_a_death_the_same_request_is_painted_again_and_told_on_from_where_it_was() -> None:
    link, queue = open_queue(dying(2), paint)
    events: list[StepEvent] = []
    with queue:
        ticket = queue.submit(PICTURE, MASK, "a mug", on_step=events.append)
        result = ticket.result(LONG)
    assert [(event.index, bool(event.retry)) for event in events] == [
        (0, False), (1, False), (1, True), (2, False), (3, False),
    ]  # fmt: skip
    assert events[2].retry == "the worker that painted it died"
    first, second = link.orders
    assert first.id != second.id and first.request == second.request  # the seed was drawn once
    assert result.seeds == (first.request.seed,) and ticket.steps == (4, 4)


def test_a_second_death_ends_the_request_and_not_the_queue() -> None:
    _, queue = open_queue(dying(0), dying(1), paint)
    with queue:
        with pytest.raises(EngineError, match="died, and so did the one before: the request is not tried a third"):
            queue.submit(PICTURE, MASK, "a mug").result(LONG)
        assert queue.workers == 1
        assert queue.submit(PICTURE, MASK, "a mug").result(LONG).images


def test_a_lost_device_is_told_as_the_reason() -> None:
    link = FakeLink(dying(1), paint)
    link.take_report = lambda id: DeviceError("CUDA error 700")  # type: ignore[method-assign]
    events = list(RayPainter(RemoteEngine(link)).iterate(PICTURE, MASK, make_request(), keep_stages=False))
    assert events[1].retry == "the worker that painted it died: CUDA error 700"


def test_a_replica_whose_device_is_lost_leaves_word_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process: what else runs in it is lost with the device."""
    left: list[tuple[str, str]] = []
    ended: list[int] = []
    replica = object.__new__(Painter)
    report = SimpleNamespace(remote=lambda id, error: left.append((id, str(error))))
    replica._desk = SimpleNamespace(report=report)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda ref, timeout: ref))
    monkeypatch.setattr(os, "_exit", ended.append)

    def fail(lost: bool) -> None:
        error = DeviceError("CUDA error 700")
        error.lost = lost
        raise error

    _, failed = replica._try("order", fail, False)
    assert failed is not None and not failed.place and not ended and not left
    replica._try("order", fail, True)
    assert ended == [1] and left == [("order", "CUDA error 700")]
    _, failed = replica._try("order", lambda: {}["prompt"])
    assert failed is not None and "KeyError" in str(failed.error) and "prompt" not in str(failed.error)
    assert "test_remote.py" in failed.place


def make_request() -> Any:
    return FakePainter().request("a mug")


def test_errors_of_a_replica_are_the_requests(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(order: Order) -> Iterator[Item]:
        yield Failed(InputError("mask is empty"))

    def fail(order: Order) -> Iterator[Item]:
        yield Begun(())
        yield Failed(EngineError("the service failed (KeyError); its log says more"), "  File engine.py, line 1")

    _, queue = open_queue(refuse, fail, paint)
    with queue:
        with pytest.raises(InputError, match="mask is empty"):
            queue.submit(PICTURE, MASK, "a mug").result(LONG)
        with pytest.raises(EngineError, match="KeyError"):
            queue.submit(PICTURE, MASK, "a mug").result(LONG)
        assert queue.submit(PICTURE, MASK, "a mug").result(LONG).images
    assert "File engine.py, line 1" in caplog.text
    with pytest.raises(InputError, match="noise"):
        RayPainter(RemoteEngine(FakeLink())).iterate(PICTURE, MASK, make_request(), noise=[], keep_stages=False)  # type: ignore[arg-type]


def wait_forever(order: Order) -> Iterator[Item]:
    yield Begun(())
    threading.Event().wait()


def test_cancelling_and_deadlines_do_not_wait_for_a_replica_that_says_nothing() -> None:
    link, queue = open_queue(wait_forever, wait_forever, wait_forever, paint)
    with queue:
        ticket = queue.submit(PICTURE, MASK, "a mug")
        wait_until(lambda: len(link.orders) == 1)
        assert ticket.cancel()
        with pytest.raises(Cancelled):
            ticket.result(LONG)
        with pytest.raises(TimedOut):
            queue.submit(PICTURE, MASK, "a mug", timeout=0.2).result(LONG)
        ticket = queue.submit(PICTURE, MASK, "a mug")
        wait_until(lambda: len(link.orders) == 3)
        queue.close()
        assert ticket.state == "cancelled"
    assert link.cancelled == [order.id for order in link.orders]


def test_a_preview_is_asked_for_and_no_step_is_lost_meanwhile() -> None:
    link = FakeLink(lambda order: paint(order, look=lambda step: bool(link.wishes) and step == 2))
    shown: list[Image.Image] = []
    events: list[StepEvent] = []

    def look(event: StepEvent) -> None:
        events.append(event)
        if event.index == 0:
            shown.append(event.preview())

    with RequestQueue([RayPainter(RemoteEngine(link))], owned=True) as queue:
        queue.submit(PICTURE, MASK, "a slow mug", seed=3, on_step=look).result(LONG)
    assert [event.index for event in events] == [0, 1, 2, 3] and len(link.wishes) == 1
    assert np.array_equal(np.asarray(shown[0]), paint_plainly(PICTURE, MASK, 3))
    with pytest.raises(EngineError, match="after the end"):
        events[-1].preview()


def test_a_death_while_a_preview_is_awaited_costs_the_preview_alone() -> None:
    link = FakeLink(dying(1), paint)
    steps: list[tuple[int, bool]] = []
    for event in RayPainter(RemoteEngine(link)).iterate(PICTURE, MASK, make_request(), keep_stages=False):
        steps.append((event.index, bool(event.retry)))
        if event.index == 0 and not event.retry:
            with pytest.raises(EngineError, match="no preview"):
                event.preview()
    assert steps == [(0, False), (0, True), (1, False), (2, False), (3, False)]


def test_a_jobs_history_tells_the_retry_and_its_watchers_see_each_step_once() -> None:
    link = FakeLink(
        lambda order: paint(order, 2, lambda step: True), lambda order: paint(order, look=lambda step: True)
    )
    with Running(RayPainter(RemoteEngine(link))) as service, httpx.Client(base_url=service.url) as client:  # type: ignore[arg-type]
        job = post(client, num_inference_steps=5, prompt="a slow mug").json()
        with client.stream("GET", f"{job['links']['self']}/events?previews=1") as stream:
            lines = list(stream.iter_lines())
        names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
        facts = finish(client, job["id"])
    assert [each["event"] for each in facts["history"]] == ["accepted", "started", "retried", "done"]
    assert facts["history"][2]["why"] == "the worker that painted it died"
    times = [each["at"] for each in facts["history"]]
    assert times == sorted(times) and times[0] == facts["created"]
    assert facts["step"] == 5 and names.count("preview") <= 4 and names[-1] == "done"


def test_a_history_without_ray() -> None:
    with Running() as service, httpx.Client(base_url=service.url) as client:
        done = finish(client, post(client).json()["id"])
        failed = finish(client, post(client, prompt="break").json()["id"])
        first = post(client, prompt="hold").json()
        assert service.painters[0].held.wait(LONG)
        waiting = post(client).json()
        client.delete(waiting["links"]["self"])
        dropped = finish(client, waiting["id"])
        service.painters[0].let_go.set()
        finish(client, first["id"])
    assert [(each["event"], each["why"]) for each in done["history"]] == [
        ("accepted", None), ("started", None), ("done", None),
    ]  # fmt: skip
    assert failed["history"][-1]["event"] == "failed" and failed["history"][-1]["why"] == failed["error"]["message"]
    assert [each["event"] for each in dropped["history"]] == ["accepted", "cancelled"]


def test_a_subject_is_shared_once_by_all_painters_and_a_misfit_by_none() -> None:
    link = FakeLink()
    engine = RemoteEngine(link)
    first, second = RayPainter(engine), RayPainter(engine)
    cup, misfit = Subject("cup", "ohwx", "cup"), Subject("odd", "ohwx", "misfit")
    assert [painter.add_subject(cup) for painter in (first, second)] == ["cup", "cup"]
    assert second.subjects == ("mug", "cup") and len(engine.guests) == 1
    with pytest.raises(FileFormatError, match="does not fit"):
        first.add_subject(misfit)
    assert first.subjects == ("mug", "cup")
    made = [painter.enroll([b"png"], [None], class_name="jar", name="jar") for painter in (first, second)]
    assert made[0] is made[1] and link.calls.count("enroll") == 1 and second.list_subjects()[-1] is made[0]
    with pytest.raises(InputError, match="jar"):  # whose fake replica knows the mug alone
        list(first.iterate(PICTURE, MASK, make_request().replace(subject="jar"), keep_stages=False))
    assert link.routed == ["jar"] and [guest.name for guest in link.guests] == ["cup", "jar"]
    for painter in (first, second):
        if "cup" in painter.subjects:
            painter.remove_subject("cup")
    again = Subject("cup", "ohwx", "cup")
    second.add_subject(again)
    assert [guest.name for guest in engine.guests] == ["jar", "cup"] and engine.guests[-1].number == 4


@pytest.mark.parametrize("tells", [True, False])
def test_the_log_quotes_requests_only_where_it_may(tells: bool, caplog: pytest.LogCaptureFixture) -> None:
    painter = RayPainter(RemoteEngine(FakeLink(), tells))
    with caplog.at_level(logging.WARNING):
        list(painter.iterate(PICTURE, MASK, make_request(), keep_stages=False))
    assert ("the prompt is odd" in caplog.text) is tells


def test_a_desk_tells_replicas_what_is_wished_until_the_order_ends() -> None:
    async def use() -> list[bool | None]:
        desk = Desk()
        await desk.ask_preview("a", True)
        first = await desk.wait_for_wish("a")
        waiting = asyncio.create_task(desk.wait_for_wish("a"))
        await asyncio.sleep(0)
        await desk.forget("a")
        await desk.report("a", EngineError("lost"))
        assert str(await desk.take_report("a")) == "lost" and await desk.take_report("a") is None
        return [first, await waiting]

    assert asyncio.run(use()) == [True, None]


def test_everything_a_result_holds_survives_the_way(mug_engine: Path) -> None:
    picture, mask = make_small_scene()
    image = Image.fromarray(picture).convert("RGBA")
    image.info |= {"dpi": (300, 300), "icc_profile": b"profile"}
    with DreamMix.load(mug_engine, threads=1) as dm:
        options: Any = {"seed": 7, "num_inference_steps": 2, "keep_stages": True, "num_images_per_prompt": 2}
        before = dm.inpaint(image, Image.fromarray(mask), "a red sks mug", **options)
    after: Result = pickle.loads(pickle.dumps(before))
    for left, right in zip(
        [*before.images, *before.stages.values()], [*after.images, *after.stages.values()], strict=True
    ):
        assert left.mode == right.mode and left.info == right.info and left.tobytes() == right.tobytes()
    assert list(before.stages) == list(after.stages) and before.to_bytes() == after.to_bytes()
    for name in ("request", "seeds", "schedule", "timings", "origin", "warnings"):
        assert getattr(before, name) == getattr(after, name), name
    lost = DeviceError("gone")
    lost.lost = True
    there: Any = pickle.loads(pickle.dumps((lost, NotFiniteError("infinite", "unet"))))
    assert there[0].lost and there[1].network == "unet" and str(there[1]) == "infinite"


@pytest.mark.parametrize("text", ["0", "3:2", "a", "1:", ":2", "1:2:3", "-1:2", "1:2000"])
def test_replicas_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--ray-replicas"):
        Bounds.read(text)
    assert Bounds.read("1:4") == Bounds(1, 4) and Bounds.read("2") == Bounds(2, 2)


def test_what_does_not_go_together_is_told_before_anything_starts(mug_engine: Path, tmp_path: Path) -> None:
    for loading, said in (
        (Loading(mug_engine, workers=2), "--ray-replicas 2"),
        (Loading(tmp_path / "nothing"), "nothing"),
    ):
        with (
            pytest.raises(DreamMixError, match=said),
            open_painters({"mug": loading}, None, None, seconds=60, tells=False),
        ):
            pass
