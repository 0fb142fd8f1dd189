"""The queue: order, back-pressure, every way a request can end, and that no way of ending harms another request."""

from __future__ import annotations

import asyncio
import gc
import queue as queues
import random
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreammix_trt.core.errors import (
    Cancelled,
    DeviceError,
    DreamMixError,
    EngineError,
    InputError,
    OutOfMemoryError,
    QueueFull,
    TimedOut,
)
from dreammix_trt.core.request import Request
from dreammix_trt.engine import DreamMix, RequestQueue, StepEvent, Ticket
from dreammix_trt.engine.requests import keeper, line, tickets
from dreammix_trt.engine.requests import queue as request_queue
from dreammix_trt.engine.result import Result

STEPS = 3
LONG = 30  # seconds after which a test has failed; nothing waits that long otherwise


class Fake:
    """A painter of STEPS steps. It takes one per `step()`, or all at once when `free`.

    acts: prompt -> called with the number of each of its steps, may raise. began: prompts as their work starts; left:
    as their iteration is left, in whatever way.
    """

    def __init__(self, free: bool = True, acts: dict[str, Callable[[int], object]] | None = None) -> None:
        self.free, self.acts = free, acts or {}
        self.began: queues.Queue[str] = queues.Queue()
        self.left: list[str] = []
        self.closed, self.name = False, ""
        self._told, self._alone = threading.Semaphore(0), threading.Lock()

    def request(self, prompt: str, **fields: Any) -> Request:
        return Request.of(**{"num_inference_steps": STEPS, "prompt": prompt, **fields})

    def step(self, count: int = 1) -> None:
        self._told.release(count)

    def iterate(self, image: Any, mask_image: Any, request: Request, /, **options: Any) -> Iterator[StepEvent]:
        assert (image, mask_image) == ("image", "mask") and set(options) == {"noise", "keep_stages"}
        return self._events(request)

    def close(self) -> None:
        assert not self._alone.locked()
        self.closed = True

    def _events(self, request: Request) -> Iterator[StepEvent]:
        assert self._alone.acquire(blocking=False), "two requests at a time"
        nothing: Any = None
        try:
            self.began.put(request.prompt)
            for k in range(request.steps):
                assert self.free or self._told.acquire(timeout=LONG)
                self.acts.get(request.prompt, lambda k: None)(k)
                result = Result([], request, (request.seed or 0,), nothing, {}) if k + 1 == request.steps else None
                yield StepEvent(k, request.steps, "lcg", 0, look=nothing, result=result)
        finally:
            self.left.append(request.prompt)
            self._alone.release()


def put(queue: RequestQueue, prompt: str | Request = "a", **options: Any) -> Ticket:
    return queue.submit("image", "mask", prompt, **options)


def await_begun(painter: Fake) -> str:
    return painter.began.get(timeout=LONG)


def wait_until(true: Callable[[], object]) -> None:
    """Wait for what another thread is about to do and tells nobody."""
    for _ in range(LONG * 1000):
        if true():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it never came")


def make_raiser(error: BaseException) -> Callable[[object], None]:
    def act(_: object) -> None:
        raise error

    return act


class FakeTime:
    """The queue's clock, which stands still until told."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def pass_time(self, queue: RequestQueue, seconds: float) -> None:
        with queue._line.lock:
            self.now += seconds
            queue._keeper.wake()
            queue._line._room.notify_all()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    for module in (keeper, line, request_queue, tickets):
        monkeypatch.setattr(module, "time", fake)
    return fake


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert not [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("dreammix-")]


def test_requests_are_served_in_their_order() -> None:
    painter = Fake()
    with RequestQueue([painter]) as queue:
        tickets = [put(queue, f"{k}", seed=k) for k in range(10)]
        results = [ticket.result(LONG) for ticket in reversed(tickets)]
    assert [result.request.seed for result in reversed(results)] == list(range(10))
    assert painter.left == [f"{k}" for k in range(10)]
    assert {ticket.state for ticket in tickets} == {"done"} and not painter.closed


def test_a_free_worker_takes_the_next_request() -> None:
    slow, fast = Fake(free=False), Fake()
    with RequestQueue([slow, fast]) as queue:
        first = put(queue, "first")
        wait_until(lambda: not queue._line._waiting)
        others = [put(queue, f"{k}") for k in range(4)]
        if slow.began.empty():  # the other worker took it: then block that one
            assert await_begun(fast) == "first" and first.result(LONG)
            slow.step(5 * STEPS)
        else:
            for ticket in others:
                ticket.result(LONG)
            assert fast.left == ["0", "1", "2", "3"] and first.state == "running"
            slow.step(STEPS)
        assert first.result(LONG).request.prompt == "first"


def test_a_ticket_tells_how_far_it_is(clock: FakeTime) -> None:
    painter = Fake(free=False)
    with RequestQueue([painter]) as queue:
        first, second = put(queue), put(queue, num_images_per_prompt=2)
        await_begun(painter)
        assert (first.state, second.state, first.done()) == ("running", "waiting", False)
        assert (first.steps, second.steps) == ((0, STEPS), (0, 2 * STEPS))
        clock.pass_time(queue, 2)
        painter.step()
        wait_until(lambda: first.steps.done == 1)
        with pytest.raises(TimeoutError):
            first.result(0)
        painter.step(2)
        first.result(LONG)
        await_begun(painter)
        clock.pass_time(queue, 5)
        assert (first.waited, first.ran, second.waited, second.ran) == (0, 2, 2, 5)
        assert second.cancel() and second.state == "running"
        painter.step()
    assert (second.state, second.ran, first.steps, first.done()) == ("cancelled", 5, (STEPS, STEPS), True)


def test_a_full_queue_refuses() -> None:
    painter = Fake(free=False)
    with RequestQueue([painter], waiting=2) as queue:
        tickets = [put(queue) for _ in range(3)]  # one runs, or is about to
        for _ in range(2):
            with pytest.raises(QueueFull, match=r"\d requests wait"):
                put(queue)
        with pytest.raises(QueueFull):
            put(queue, wait=0.01)
        assert tickets[2].cancel()
        tickets[2] = put(queue)
        painter.step(3 * STEPS)
    assert {ticket.state for ticket in tickets} == {"done"}


def test_no_waiting_at_all_means_a_free_worker_or_nothing() -> None:
    with RequestQueue([Fake()], waiting=0) as queue:
        for _ in range(50):
            put(queue).result(LONG)
    painter = Fake(free=False)
    with RequestQueue([painter], waiting=0) as queue:
        put(queue)
        with pytest.raises(QueueFull):
            put(queue)
        painter.step(STEPS)


@pytest.mark.parametrize("wait", [None, LONG])
def test_submitting_waits_for_room_in_turn(wait: float | None) -> None:
    painter = Fake(free=False)
    with RequestQueue([painter], waiting=0) as queue, ThreadPoolExecutor(3) as pool:
        put(queue, "first")
        calls = []
        for k in range(3):
            calls.append(pool.submit(put, queue, f"{k}", wait=wait))
            wait_until(lambda count=k + 1: len(queue._line._doors) == count)  # type: ignore[misc]
        painter.step(4 * STEPS)
        assert [call.result(LONG).result(LONG).request.prompt for call in calls] == ["0", "1", "2"]
    assert painter.left == ["first", "0", "1", "2"]


def test_closing_sends_those_away_who_wait_for_room() -> None:
    painter = Fake(free=False)
    with ThreadPoolExecutor(2) as pool:
        queue = RequestQueue([painter], waiting=0)
        first = put(queue)
        await_begun(painter)
        call = pool.submit(put, queue, wait=None)
        wait_until(lambda: queue._line._doors)
        closing = pool.submit(queue.close)
        with pytest.raises(EngineError, match="queue was closed"):
            call.result(LONG)
        painter.step()
        closing.result(LONG)
    assert first.state == "cancelled"


def test_bad_fields_are_refused_at_once() -> None:
    with RequestQueue([Fake()]) as queue:
        for fields, named in (
            ({"sed": 1}, "no field sed"),
            ({"seed": -1}, "seed is -1"),
            ({"timeout": -1}, "timeout is -1"),
            ({"timeout": "1"}, "timeout is '1'"),
            ({"wait": float("nan")}, "wait is nan"),
            ({"wait": True}, "wait is True"),
        ):
            with pytest.raises(InputError, match=named):
                put(queue, **fields)
        given = Request("whole", num_inference_steps=2)
        assert put(queue, given, seed=4).result(LONG).request == given.replace(seed=4)
        assert sum(queue.statistics()[:5]) == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"painters": []}, "painters: 0"),
        ({"painters": [Fake()] * 2}, "each of them once"),
        ({"waiting": -1}, "waiting is -1"),
        ({"waiting": 1.5}, "waiting is 1.5"),
        ({"timeout": float("nan")}, "timeout is nan"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        RequestQueue(**{"painters": [Fake()], **options})


def test_a_waiting_request_that_is_cancelled_never_starts() -> None:
    painter = Fake(free=False)
    with RequestQueue([painter]) as queue:
        put(queue, "first")
        await_begun(painter)
        second = put(queue, "second")
        assert second.cancel() and second.cancel() and second.state == "cancelled" and second.ran == 0
        with pytest.raises(Cancelled, match="was cancelled"):
            second.result()
        painter.step(STEPS)
    assert painter.left == ["first"]


def test_a_running_request_stops_after_its_step() -> None:
    painter = Fake(free=False)
    seen: list[int] = []
    with RequestQueue([painter]) as queue:
        first, second = put(queue, "first", on_step=lambda event: seen.append(event.index)), put(queue, "second")
        painter.step()
        wait_until(lambda: seen)
        assert first.cancel() and not first.done()
        painter.step()
        with pytest.raises(Cancelled):
            first.result(LONG)
        assert seen == [0] and first.steps.done == 2 and painter.left == ["first"]
        painter.step(STEPS)
        assert second.result(LONG)
        assert not second.cancel()
    assert second.state == "done"


@pytest.mark.parametrize("fails", [False, True])
def test_cancelling_holds_in_the_last_step_and_in_one_that_fails(fails: bool) -> None:
    with RequestQueue([Fake()]) as queue:
        mine: list[Ticket] = []
        ready = threading.Event()

        def last(event: StepEvent) -> None:
            assert ready.wait(LONG)
            if event.result:
                assert mine[0].cancel()
                make_raiser(ValueError("v"))(0) if fails else None

        mine.append(put(queue, on_step=last))
        ready.set()
        with pytest.raises(Cancelled):
            mine[0].result(LONG)
        assert mine[0].steps == (STEPS, STEPS) and put(queue).result(LONG)


def test_a_deadline_counts_from_submit(clock: FakeTime) -> None:
    painter = Fake(free=False)
    with RequestQueue([painter], timeout=10) as queue:
        running, waiting, patient, own = put(queue), put(queue), put(queue, timeout=None), put(queue, timeout=11)
        await_begun(painter)
        clock.pass_time(queue, 9.9)
        assert not running.done() and not waiting.done()
        clock.pass_time(queue, 0.1)
        with pytest.raises(TimedOut, match=r"had 10 s, of which it waited 0.000 s, and took 0 of 3 steps"):
            running.result(LONG)
        with pytest.raises(TimedOut, match=r"of which it waited 10.000 s.*submit fewer"):
            waiting.result(LONG)
        assert (running.state, waiting.state, own.state, patient.state) == ("failed", "failed", "waiting", "waiting")
        assert queue.statistics().running == 1  # its worker is still in that step
        clock.pass_time(queue, 1)
        with pytest.raises(TimedOut):
            own.result(LONG)
        assert not running.cancel()
        painter.step()
        assert await_begun(painter) == "a"
        clock.pass_time(queue, 1e9)
        painter.step(STEPS)
        assert patient.result(LONG)
    assert len(painter.left) == 2


def test_a_deadline_passes_while_waiting_for_room(clock: FakeTime) -> None:
    painter = Fake(free=False)
    with RequestQueue([painter], waiting=0) as queue, ThreadPoolExecutor(1) as pool:
        put(queue)
        call = pool.submit(put, queue, wait=None, timeout=5)
        wait_until(lambda: queue._line._doors)
        clock.pass_time(queue, 5)
        with pytest.raises(TimedOut):
            call.result(LONG)
        painter.step(STEPS)


def test_the_keeper_wakes_by_itself() -> None:
    painter = Fake(free=False)
    with RequestQueue([painter]) as queue:
        put(queue)
        await_begun(painter)
        late, soon = put(queue, timeout=1e300), put(queue, timeout=0.05)
        with pytest.raises(TimedOut):
            soon.result(LONG)
        assert not late.done() and put(queue, timeout=0).state in ("waiting", "failed")
        painter.step(2 * STEPS)
        assert late.result(LONG)


ERRORS: list[BaseException] = [
    ValueError("v"),
    InputError("i"),
    OutOfMemoryError("o"),
    DeviceError("d"),
    StopIteration(),
    MemoryError(),
]
STOPS: list[BaseException] = [KeyboardInterrupt(), SystemExit(3), GeneratorExit(), asyncio.CancelledError()]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("where", ["iterate", "callback"])
def test_a_failed_request_harms_no_other(error: Exception, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    painter = Fake()
    if where == "iterate":
        whole = painter.iterate
        monkeypatch.setattr(
            painter, "iterate", lambda *a, **o: make_raiser(error)(0) if a[2].prompt == "bad" else whole(*a, **o)
        )
    with RequestQueue([painter]) as queue:
        bad = put(queue, "bad", on_step=make_raiser(error) if where == "callback" else None)
        good = put(queue, "good")
        assert good.result(LONG).request.prompt == "good"
        with pytest.raises(type(error)) as raised:
            bad.result(LONG)
        assert raised.value is error and bad.state == "failed"
        assert queue.statistics()[2:5] == (1, 1, 0)


@pytest.mark.parametrize("error", STOPS, ids=repr)
@pytest.mark.parametrize("where", ["step", "callback"])
def test_what_would_end_a_thread_ends_the_request_alone(error: BaseException, where: str) -> None:
    painter = Fake(acts={"bad": make_raiser(error)} if where == "step" else {})
    with RequestQueue([painter]) as queue:
        bad = put(queue, "bad", on_step=make_raiser(error) if where == "callback" else None)
        assert put(queue, "good").result(LONG)
        with pytest.raises(Cancelled, match=type(error).__name__) as raised:
            bad.result(LONG)
        assert raised.value.__cause__ is error and bad.state == "cancelled"


def test_an_error_in_a_step_leaves_the_iteration() -> None:
    painter = Fake(acts={"bad": make_raiser(OutOfMemoryError("no room"))})
    with RequestQueue([painter]) as queue:
        with pytest.raises(OutOfMemoryError, match="no room"):
            put(queue, "bad").result(LONG)
        with pytest.raises(KeyError):
            put(queue, "callback", on_step=make_raiser(KeyError("k"))).result(LONG)
        assert painter.left == ["bad", "callback"]


def test_a_painter_that_gives_no_result_is_named() -> None:
    painter = Fake()
    painter.iterate = lambda *a, **o: iter(())  # type: ignore[method-assign]
    with RequestQueue([painter]) as queue, pytest.raises(EngineError, match="without a result"):
        put(queue).result(LONG)


def make_lost_error() -> DeviceError:
    error = DeviceError("the device fell off")
    error.lost = True
    return error


def test_another_worker_takes_over_from_a_lost_device() -> None:
    dead, alive = Fake(free=False, acts={"a": make_raiser(make_lost_error())}), Fake(free=False)
    with RequestQueue([dead, alive]) as queue:
        tickets = [put(queue) for _ in range(2)]
        await_begun(dead), await_begun(alive)
        tickets += [put(queue, f"{k}") for k in range(3)]
        dead.step()
        wait_until(lambda: queue._line.workers == 1)
        alive.step(4 * STEPS)
        assert all(ticket.result(LONG) for ticket in tickets[2:])
        assert sorted(ticket.state for ticket in tickets[:2]) == ["done", "failed"]
        put(queue).cancel()
        alive.step(STEPS)
    with pytest.raises(EngineError, match="closed"):
        put(queue)


def test_the_last_lost_device_fails_what_waits() -> None:
    error = make_lost_error()
    painter = Fake(free=False, acts={"a": make_raiser(error)})
    with RequestQueue([painter], waiting=2) as queue, ThreadPoolExecutor(1) as pool:
        tickets = [put(queue) for _ in range(3)]
        outside = pool.submit(put, queue, wait=None)
        wait_until(lambda: queue._line._doors)
        painter.step()
        calls = [*(ticket.result for ticket in tickets), outside.result, lambda _: put(queue), lambda _: put(queue)]
        for call in calls:
            with pytest.raises(DeviceError, match="the device fell off") as raised:
                call(LONG)
            assert raised.value.lost
        assert queue.statistics()[:5] == (0, 0, 0, 3, 0)
    assert len(painter.left) == 1
    assert not DeviceError("d").lost and not OutOfMemoryError("o").lost


@pytest.mark.parametrize("finish", [False, True])
def test_closing(finish: bool) -> None:
    painter = Fake(free=False)
    queue = RequestQueue([painter], owned=finish)
    tickets = [put(queue) for _ in range(3)]
    await_begun(painter)
    if finish:
        painter.step(3 * STEPS)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(queue.close, finish=finish) for _ in range(2)]
        if not finish:
            with pytest.raises(Cancelled, match="closed"):
                tickets[2].result(LONG)
            assert not any(call.done() for call in calls)
            painter.step()
        for call in calls:
            call.result(LONG)
    queue.close()
    assert [ticket.state for ticket in tickets] == ["done" if finish else "cancelled"] * 3
    assert painter.closed is finish and len(painter.left) == (3 if finish else 1)
    with pytest.raises(EngineError, match="closed"):
        put(queue, wait=None)


def test_an_error_in_the_block_cancels_and_closing_again_stops_finishing() -> None:
    painter = Fake(free=False)
    with pytest.raises(KeyError), RequestQueue([painter]) as queue:
        tickets = [put(queue) for _ in range(2)]
        await_begun(painter)
        painter.step()
        wait_until(lambda: tickets[0].steps.done)
        painter.step()
        raise KeyError
    assert [ticket.state for ticket in tickets] == ["cancelled"] * 2
    queue = RequestQueue([painter := Fake(free=False)])
    first, second = put(queue), put(queue)
    await_begun(painter)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(queue.close, finish=True)]
        wait_until(lambda: queue._line._closing)
        assert not second.done()
        calls.append(pool.submit(queue.close))
        with pytest.raises(Cancelled):
            second.result(LONG)
        painter.step()
        assert all(call.result(LONG) is None for call in calls)
    assert first.state == "cancelled"


def test_callbacks_never_wait_for_their_own_worker() -> None:
    painters = [Fake(), Fake()]
    queue = RequestQueue(painters, waiting=0, owned=True)
    together = threading.Barrier(2)
    heard: list[type] = []

    def both_close(event: StepEvent) -> None:
        together.wait(LONG)
        for attempt in (lambda: put(queue, wait=None), lambda: tickets[0].result()):
            try:
                attempt()
            except (QueueFull, EngineError, TimeoutError) as error:
                heard.append(type(error))
        together.wait(LONG)
        queue.close(finish=True)

    tickets: list[Ticket] = []
    with queue._line.lock:  # neither begins before both are there
        tickets += [put(queue, seed=k, num_inference_steps=1, on_step=both_close) for k in range(2)]
    assert [ticket.result(LONG).seeds for ticket in tickets] == [(0,), (1,)]
    queue.close()
    assert Counter(heard) == {QueueFull: 2, TimeoutError: 2} and all(painter.closed for painter in painters)


def test_owned_painters_are_closed_in_reverse_order_when_all_work_is_done() -> None:
    closed: list[str] = []

    class Named(Fake):
        def close(self) -> None:
            super().close()
            closed.append(self.name)

    painters = [Named() for _ in range(3)]
    for painter, name in zip(painters, "abc", strict=True):
        painter.name = name
    with RequestQueue(painters, owned=True) as queue:
        for _ in range(9):
            put(queue)
    assert closed == ["c", "b", "a"]


def test_closing_from_a_callback_cancels_its_own_request() -> None:
    queue = RequestQueue([Fake()])
    ticket = put(queue, on_step=lambda event: queue.close())
    with pytest.raises(Cancelled, match="closed"):
        ticket.result(LONG)
    assert ticket.steps.done == 1
    queue.close()


def test_statistics(clock: FakeTime) -> None:
    painter = Fake(free=False, acts={"bad": make_raiser(ValueError("b"))})
    tickets = []
    with RequestQueue([painter]) as queue:
        assert queue.statistics() == (0, 0, 0, 0, 0, None, None)
        for k in range(7):
            pair = [put(queue, num_inference_steps=1), put(queue, num_inference_steps=1)]
            for ticket in pair:
                await_begun(painter)
                clock.pass_time(queue, 1 + k * k % 5)
                painter.step()
                ticket.result(LONG)
            tickets += pair
        bad, late = put(queue, "bad"), put(queue, timeout=1)
        await_begun(painter)
        put(queue).cancel()
        put(queue)
        clock.pass_time(queue, 1)
        with pytest.raises(TimedOut):
            late.result(LONG)
        found = queue.statistics()
        assert found[:5] == (1, 1, 14, 1, 1)
        for mine, name in ((found.waited, "waited"), (found.ran, "ran")):
            oracle = np.percentile([getattr(each, name) for each in tickets], (50, 90, 99), method="inverted_cdf")
            assert mine is not None and len(set(mine)) > 1
            np.testing.assert_allclose(mine, oracle)
        painter.step(1 + STEPS)
        wait_until(bad.done)
    assert queue.statistics()[:5] == (0, 0, 15, 2, 1)


def test_the_history_is_bounded() -> None:
    with RequestQueue([Fake()], waiting=10**6) as queue:
        for _ in range(1100):
            put(queue, num_inference_steps=1)
    assert queue.statistics().done == 1100 and len(queue._line._tally._history) == 1024


def test_tickets_in_asyncio() -> None:
    painter = Fake(free=False, acts={"bad": make_raiser(ValueError("bad"))})

    async def app(queue: RequestQueue) -> None:
        first, bad, other = put(queue, "first"), put(queue, "bad"), put(queue, "other")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(first), 0.01)
        assert not first.done()  # a shield lets it go on
        painter.step(2 * STEPS + 1)
        results = await asyncio.wait_for(asyncio.gather(first, bad, other, first, return_exceptions=True), LONG)
        assert [getattr(each, "request", each) and type(each) for each in results] == [
            Result,
            ValueError,
            Result,
            Result,
        ]
        assert (await other).request.prompt == "other"
        cancelled = put(queue)
        asyncio.get_running_loop().call_soon(lambda: cancelled.cancel() and painter.step())
        with pytest.raises(Cancelled):
            await cancelled

    with RequestQueue([painter]) as queue:
        asyncio.run(app(queue))


def test_files_may_be_closed_after_submit(tmp_path: Path) -> None:
    """Open files are read and pictures decoded by `submit`; nothing else is touched."""
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    picture.save(tmp_path / "a.png")
    seen: list[Any] = []

    class Reader(Fake):
        def iterate(self, image: Any, mask_image: Any, request: Request, /, **options: Any) -> Iterator[StepEvent]:
            seen.extend((image, mask_image))
            return self._events(request)

    with RequestQueue([painter := Reader(free=False)]) as queue:
        put(queue, "first")
        await_begun(painter)
        with (tmp_path / "a.png").open("rb") as file, Image.open(tmp_path / "a.png") as opened:
            waiting = queue.submit(file, opened, "second")
        with (tmp_path / "a.png").open() as text, pytest.raises(InputError, match=r"mask_image is a file.*'rb'"):
            queue.submit("image", text, "third")  # type: ignore[arg-type]
        painter.step(2 * STEPS)
        waiting.result(LONG)
    assert seen[2] == (tmp_path / "a.png").read_bytes()
    np.testing.assert_array_equal(np.asarray(seen[3]), np.asarray(picture))


@pytest.mark.parametrize("way", ["cancel", "wait_for", "end of the loop"])
def test_leaving_an_await_cancels_the_request(way: str) -> None:
    """Both the one that runs and the one that waits; the next request is served."""

    async def leave(*tickets: Ticket) -> None:
        tasks = [asyncio.ensure_future(ticket) for ticket in tickets]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        if way == "wait_for":
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.gather(*tasks), 0.01)
        for task in tasks if way == "cancel" else []:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    with RequestQueue([painter := Fake(free=False)]) as queue:
        running, waiting = put(queue, "running"), put(queue, "waiting")
        await_begun(painter)
        asyncio.run(leave(running, waiting))
        assert waiting.state == "cancelled"
        painter.step()
        wait_until(running.done)
        assert running.state == "cancelled" and running.steps == (1, STEPS)
        painter.step(STEPS)
        assert put(queue, "next").result(LONG) and "waiting" not in painter.left


def test_a_ticket_that_nobody_awaits_any_more_outlives_its_loop() -> None:
    async def shields() -> None:
        task = asyncio.ensure_future(asyncio.shield(left))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        task.cancel()
        raise KeyError

    with RequestQueue([painter := Fake(free=False)]) as queue:
        left = put(queue)
        with pytest.raises(KeyError):
            asyncio.run(shields())  # its loop ends, and cancels all that waits in it
        painter.step(STEPS)
        wait_until(left.done)
        assert left.state == "cancelled"


@pytest.mark.parametrize("prompt", ["good", "bad"])
def test_an_ended_request_is_let_go(prompt: str) -> None:
    """Without the garbage collector: large pictures cannot wait for it."""

    class Picture(str):
        pass

    def fails(k: int) -> None:
        raise ValueError(k)

    with RequestQueue([Fake(acts={"bad": fails})]) as queue:
        gc.collect()
        gc.disable()
        try:
            picture = Picture("image")
            held = weakref.ref(picture)
            ticket = queue.submit(picture, "mask", prompt)
            del picture
            wait_until(ticket.done)
            if prompt == "good":  # else it is in the error's traceback
                wait_until(lambda: held() is None)
            known = weakref.ref(ticket)
            del ticket
            wait_until(lambda: known() is None and held() is None)
        finally:
            gc.enable()


def test_a_worker_that_ends_against_its_nature_leaves_no_ticket(monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = threading.Event()

    def ends(self: line.Line, painter: Any) -> None:
        assert submitted.wait(LONG)
        raise SystemExit

    monkeypatch.setattr(line.Line, "take", ends)
    monkeypatch.setattr(threading, "excepthook", lambda told: None)
    with RequestQueue([Fake()]) as queue:
        ticket = put(queue)
        submitted.set()
        with pytest.raises(EngineError, match="workers ended"):
            ticket.result(LONG)
        with pytest.raises(EngineError, match="closed"):
            put(queue, wait=None)


def test_threads_that_cannot_start_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    start, count = threading.Thread.start, iter(range(9))

    def second_fails(self: threading.Thread) -> None:
        if next(count) == 1:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", second_fails)
    with pytest.raises(RuntimeError, match="new thread"):
        RequestQueue([Fake(), Fake()])


def test_hammering() -> None:
    """Five threads, 500 requests, three workers, chance at every turn: every ticket ends, in a way it was led to."""
    acts = {
        "bad": make_raiser(ValueError("bad")),
        "memory": make_raiser(OutOfMemoryError("o")),
        "stop": make_raiser(SystemExit()),
    }
    painters = [Fake(acts=acts) for _ in range(3)]
    tickets: list[tuple[Ticket, set[str]]] = []

    def user(seed: int, queue: RequestQueue) -> None:
        chance = random.Random(seed)
        for _ in range(100):
            prompt = chance.choice(["good"] * 5 + list(acts))
            timeout = chance.choice([None, None, LONG, 0.001, 0.0])
            callback = make_raiser(KeyError("k")) if chance.random() < 0.1 else None
            may = {"good": "done", "stop": "cancelled"}.get(prompt, "failed")
            try:
                ticket = put(queue, prompt, timeout=timeout, wait=None, on_step=callback, seed=seed)
            except TimedOut:
                assert timeout is not None
                continue
            ends = {may} | ({"failed"} if callback or timeout in (0.001, 0.0) else set())
            if chance.random() < 0.3:
                ends |= {"cancelled"}
                ticket.cancel()
            tickets.append((ticket, ends))

    with RequestQueue(painters, waiting=8) as queue, ThreadPoolExecutor(5) as pool:
        for call in [pool.submit(user, seed, queue) for seed in range(5)]:
            call.result(LONG)
        for ticket, ends in tickets:
            wait_until(ticket.done)
            assert ticket.state in ends
            if ticket.state == "done":
                assert ticket.result().request is ticket.request
    counted = Counter(ticket.state for ticket, _ in tickets)
    assert queue.statistics()[:5] == (0, 0, counted["done"], counted["failed"], counted["cancelled"])
    assert counted["done"] > 50 and counted["cancelled"] > 50 and counted["failed"] > 50
    assert not (queue._line._waiting or queue._line._running or queue._line._doors)


LEFT_OPEN = """
import threading
from dreammix_trt.engine import Request, RequestQueue

class Painter:
    began = threading.Event()
    def request(self, prompt):
        return Request(prompt)
    def iterate(self, *_, **options):
        self.began.set()
        while True:
            threading.Event().wait(0.001)
            yield type("Event", (), {"index": 0, "total": 9, "result": None})

queue = RequestQueue([Painter()], owned=False)
running, waiting = queue.submit(0, 0, "a"), queue.submit(0, 0, "a", timeout=1e6)
Painter.began.wait()
import atexit
atexit._run_exitfuncs()
print(running.state, waiting.state, threading.active_count())
queue = RequestQueue([Painter()])
queue.submit(0, 0, "a")
"""


def test_an_open_queue_does_not_keep_the_interpreter() -> None:
    done = subprocess.run([sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, timeout=2 * LONG)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cancelled cancelled 1\n", "")


def test_the_embedded_model_behind_a_queue(mug_engine: Path) -> None:
    pixels = np.random.default_rng(3).integers(0, 255, (60, 80, 3), np.uint8)
    image, mask = (
        Image.fromarray(pixels),
        Image.fromarray(np.pad(np.full((30, 30), 255, np.uint8), ((10, 20), (20, 30)))),
    )
    asked = [{"prompt": "a red sks mug", "seed": k, "num_inference_steps": 2 + k} for k in range(3)]
    begin = threading.Barrier(3)

    def user(queue: RequestQueue, fields: dict[str, Any]) -> bytes:
        begin.wait(LONG)
        return queue.submit(image, mask, **fields).result(60).images[0].tobytes()

    with DreamMix.load(mug_engine, threads=1) as one, DreamMix.load(mug_engine, threads=1) as two:
        direct = [one.inpaint(image, mask, **fields).images[0].tobytes() for fields in asked]
        with RequestQueue([one, two]) as queue, ThreadPoolExecutor(3) as pool:
            bad = queue.submit(image, Image.new("L", image.size), "a mug")
            stopped: list[Ticket] = []
            there = threading.Event()
            stopped.append(
                queue.submit(image, mask, "a mug", on_step=lambda event: there.wait(LONG) and stopped[0].cancel())
            )
            there.set()
            assert [call.result(LONG) for call in [pool.submit(user, queue, fields) for fields in asked]] == direct
            with pytest.raises(InputError, match="repaints nothing"):
                bad.result(LONG)
            with pytest.raises(Cancelled):
                stopped[0].result(LONG)
            assert stopped[0].steps == (1, 30)
            assert queue.statistics()[:5] == (0, 0, 3, 1, 1)
        assert one.inpaint(image, mask, **asked[0]).images[0].tobytes() == direct[0]


def test_the_exit_codes_differ() -> None:
    assert (QueueFull.exit_code, TimedOut.exit_code) == (75, 124)
    assert len({kind.exit_code for kind in (DreamMixError, Cancelled, QueueFull, TimedOut)}) == 4


def test_what_is_no_list_of_painters_is_refused(mug_engine: Path) -> None:
    with DreamMix.load(mug_engine, threads=1) as dm:
        with pytest.raises(InputError, match=r"painters is a DreamMix: give a list"):
            RequestQueue(dm)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"painters\[0\] is a int"):
            RequestQueue([1])  # type: ignore[list-item]


# Position, and errands between requests


def test_a_ticket_knows_its_place() -> None:
    painter = Fake(free=False)
    with RequestQueue([painter]) as queue:
        first, second, third = (put(queue, prompt) for prompt in "abc")
        assert await_begun(painter) == "a"
        assert (first.position, second.position, third.position) == (None, 1, 2)
        second.cancel()
        assert (second.position, third.position) == (None, 1)
        painter.step(2 * STEPS)
        third.result(LONG)
        assert third.position is None


def test_an_errand_runs_in_each_worker_between_two_requests_before_those_that_wait() -> None:
    painters = [Fake(free=False), Fake(free=False)]
    seen: list[tuple[str, bool]] = []

    def look(painter: Fake) -> int:
        seen.append((threading.current_thread().name, painter._alone.locked()))
        return id(painter)

    with RequestQueue(painters) as queue:
        tickets_ = [put(queue, prompt) for prompt in "abc"]
        for painter in painters:
            await_begun(painter)
        with ThreadPoolExecutor(1) as pool:
            visit = pool.submit(queue.visit, look)
            wait_until(lambda: sum(map(len, queue._line._errands.values())) == 2)
            assert not seen and painters[0].began.empty() and painters[1].began.empty()
            for painter in painters:
                painter.step(STEPS)
            assert visit.result(LONG) == [id(painter) for painter in painters]
        for painter in painters:
            painter.step(STEPS)
        tickets_[2].result(LONG)
    assert len({name for name, _ in seen}) == 2 and not any(busy for _, busy in seen)


def test_an_errand_that_fails_harms_nobody_and_reaches_the_other_painters() -> None:
    painters, visited = [Fake(), Fake()], []

    def fail_once(painter: Fake) -> None:
        visited.append(painter)
        if painter is painters[0]:
            raise InputError("no")

    with RequestQueue(painters) as queue:
        with pytest.raises(InputError, match="no"):
            queue.visit(fail_once)
        assert len(visited) == 2
        put(queue).result(LONG)
        caught: list[BaseException] = []

        def visit(event: StepEvent) -> None:
            try:
                queue.visit(lambda painter: None)
            except EngineError as error:
                caught.append(error)

        put(queue, on_step=visit).result(LONG)
        assert len(caught) == STEPS
    with pytest.raises(EngineError, match="closed"):
        queue.visit(lambda painter: None)


def test_errands_go_to_the_painters_that_are_left() -> None:
    painters = [Fake(acts={"a": make_raiser(make_lost())}), Fake(acts={"a": make_raiser(make_lost())})]
    with RequestQueue(painters) as queue:
        with pytest.raises(DeviceError):
            put(queue).result(LONG)
        wait_until(lambda: queue._line.workers == 1)
        assert len(queue.visit(lambda painter: painter)) == 1


def make_lost() -> DeviceError:
    error = DeviceError("gone")
    error.lost = True
    return error
