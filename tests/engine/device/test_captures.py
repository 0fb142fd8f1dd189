"""Graphs of phases on the simulated device: what is captured, tried again, counted and told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from dreammix_trt.core.errors import DeviceError, EngineError, OutOfMemoryError
from dreammix_trt.core.seam import Array
from dreammix_trt.engine.device import phases
from dreammix_trt.engine.device.captures import TRIES, Failure, Graphs, Statistics, Tally
from dreammix_trt.engine.drivers.simulated import SimulatedDevice


@dataclass
class Stage:
    """Plays phases that clear four bytes.

    error: raised in a capture. obstacle: why a back end does not let them be captured.
    """

    device: SimulatedDevice = field(default_factory=lambda: SimulatedDevice(1 << 20))
    tally: Tally = field(default_factory=Tally)
    error: Exception | None = None
    obstacle: str | None = None

    def __post_init__(self) -> None:
        self.stream, self.place = self.device.make_stream(), Array(self.device.allocate(4).pointer, (4,), "uint8")
        self.graphs = Graphs(self.device, self.tally)

    def play(self, phase: Any = "a step", *, capture: bool = True) -> None:
        before = len([entry for entry in self.device.record if entry.kind == "clear"])
        self.graphs.play(phase, self.record, self.stream, capture=capture, find_obstacle=lambda: self.obstacle)
        assert len([entry for entry in self.device.record if entry.kind == "clear"]) == before + 1, "it ran once"

    def record(self) -> None:
        self.device.clear(self.place, self.stream)
        if self.error is not None and self.device._capturing is not None:
            raise self.error


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage()
    with made.device:
        yield made
        made.graphs.close()


def test_a_phase_runs_plainly_once_and_is_replayed_from_then_on(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(4):
        stage.play()
    stage.play("another")
    assert stage.tally.statistics == Statistics(captured=2, replayed=3, plain=2)
    assert not caplog.records


def test_what_may_not_be_captured_is_counted_as_plain(stage: Stage) -> None:
    for _ in range(3):
        stage.play(capture=False)
    assert stage.tally.statistics == Statistics(plain=3)
    stage.play()
    stage.play(capture=False)
    assert stage.tally.statistics == Statistics(captured=1, replayed=1, plain=4)


@pytest.mark.parametrize("error", [EngineError("not permitted"), RuntimeError("not permitted"), RuntimeError()])
def test_a_capture_that_fails_is_told_once_and_not_tried_for_ever(
    stage: Stage, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    stage.error = error
    for _ in range(TRIES + 4):
        stage.play()
    reason = str(error) or "RuntimeError"
    assert stage.tally.statistics == Statistics(plain=TRIES + 4, failed={"a step": Failure(TRIES, reason)})
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(f"a step cannot be captured ({reason}): it runs plainly, and is tried again")
    stage.error = None
    stage.play()
    assert stage.tally.statistics.captured == 0, "no more tries"


def test_a_capture_that_fails_at_first_is_made_after_a_later_run(stage: Stage) -> None:
    stage.error = RuntimeError("busy")
    stage.play()
    stage.error, stage.obstacle = None, "unet is not ready"
    stage.play()
    stage.obstacle = None
    for _ in range(3):
        stage.play()
    assert stage.tally.statistics == Statistics(
        captured=1, replayed=2, plain=3, failed={"a step": Failure(2, "unet is not ready")}
    )


def test_tries_are_a_rooms_and_the_log_is_the_runtimes(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.obstacle = "unet is not ready"
    for _ in range(TRIES + 1):
        stage.play()
    other = Stage(stage.device, stage.tally)
    other.play()
    other.play()
    assert stage.tally.statistics == Statistics(
        captured=1, replayed=1, plain=TRIES + 2, failed={"a step": Failure(TRIES, "unet is not ready")}
    )
    stage.play("another")
    assert len(caplog.records) == 2
    other.graphs.close()


@pytest.mark.parametrize(
    "make", [lambda: OutOfMemoryError("none left"), lambda: MemoryError("none left"), lambda: make_lost()]
)
def test_errors_that_end_a_request_are_no_failures_to_capture(stage: Stage, make: Callable[[], Exception]) -> None:
    stage.error = make()
    with pytest.raises(type(stage.error)):
        stage.play()
    assert stage.tally.statistics == Statistics(plain=1)


def make_lost() -> DeviceError:
    error = DeviceError("the device has not answered")
    error.lost = True
    return error


def test_phases_have_names_for_people() -> None:
    """The texts' name is in the statistics of a studio (test_studio_faults)."""
    named: list[tuple[phases.Phase, str]] = [
        (phases.Start(1, "lcg", True, False), "start of picture 1 (lcg)"),
        (phases.TakeStep("unet_raw"), "a step on unet_raw"),
        (phases.DecodeLocal(0, "x"), "local result of picture 0"),
        (phases.HandOver(0, True), "hand-over of picture 0"),
        (phases.Finish(2, True, True), "finish of picture 2"),
    ]
    for phase, name in named:
        assert str(phase) == name
