"""What looks on while a LoRA is trained never costs it."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from dreammix_trt import train_report, train_watch
from dreammix_trt.core.errors import InputError
from dreammix_trt.train_validation import Painted
from dreammix_trt.train_watch import TrainWatch


@pytest.mark.parametrize("error", [InputError("it is odd"), FileNotFoundError("it is gone")])
def test_pictures_and_pages_that_fail_are_told(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    watch = TrainWatch(tmp_path, every=2)
    watch._validator = SimpleNamespace(paint=fail)  # type: ignore[assignment]
    monkeypatch.setattr(train_report, "write_report", fail)
    for step in (1, 2, 3):
        watch.after_step(step, dict)
    watch.finish(tmp_path, SimpleNamespace(), [0.5], [])  # type: ignore[arg-type]
    told = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert told == [f"no pictures of step 2: {error}", f"train.html is not made: {error}"]


@pytest.mark.parametrize("option", ["prompts", "engine", "image", "mask"])
def test_options_of_pictures_that_are_not_wanted_are_refused(option: str, tmp_path: Path) -> None:
    watch = TrainWatch(tmp_path, **{option: Path("x")})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--validation-image and --validation-mask need --validate-every"):
        watch.begin(SimpleNamespace(photographs=()))  # type: ignore[arg-type]


def test_a_place_of_the_users_own_reaches_the_painter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[dict[str, Any]] = []
    monkeypatch.setattr(train_watch, "Validator", lambda *_, **given: noted.append(given))
    watch = TrainWatch(tmp_path, 5, image=tmp_path / "room.png", mask=tmp_path / "hole.png")
    names = SimpleNamespace(prompt="a sks mug", token="sks", class_name="mug")
    given = {"photographs": (), "names": names, "base": None, "base_loras": ("style",), "seed": 0}
    watch.begin(SimpleNamespace(**given))  # type: ignore[arg-type]
    assert (noted[0]["image"], noted[0]["mask"]) == (tmp_path / "room.png", tmp_path / "hole.png")
    assert noted[0]["base_loras"] == ("style",)


class Brush:
    """Paints a file a step."""

    def __init__(self, work: Path) -> None:
        self._work = work

    def paint(self, step: int, _factors: Any) -> list[Painted]:
        file = self._work / "validation" / f"{step:06d}-room1-1.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(file)
        return [Painted(step, "a sks mug", "room1", file)]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The steps of the pictures on each page that is written."""
    noted: list[list[int]] = []
    monkeypatch.setattr(
        train_report, "write_report", lambda _f, _r, _h, painted, **_: noted.append([each.step for each in painted])
    )
    return noted


def train(work: Path, steps: range, every: int, *, finish: bool = True) -> None:
    watch = TrainWatch(work, every)
    watch._validator = Brush(work) if every else None  # type: ignore[assignment]
    for step in steps:
        watch.after_step(step, dict)
    if finish:
        watch.finish(work, SimpleNamespace(), [0.5], [])  # type: ignore[arg-type]


def test_pictures_are_told_to_tensorboard(tmp_path: Path) -> None:
    told: list[tuple[Any, ...]] = []
    watch = TrainWatch(tmp_path, 2, events=SimpleNamespace(add_picture=lambda *each: told.append(each)))  # type: ignore[arg-type]
    watch._validator = Brush(tmp_path)  # type: ignore[assignment]
    for step in (1, 2, 3):
        watch.after_step(step, dict)
    assert told == [(2, "room1/a sks mug", tmp_path / "validation" / "000002-room1-1.png")]


@pytest.mark.parametrize(("every", "expected"), [(2, [2, 4, 6]), (3, [2, 6]), (0, [2])])
def test_a_resumed_training_shows_the_pictures_before_its_stop(
    every: int, expected: list[int], tmp_path: Path, shown: list[list[int]]
) -> None:
    """It was stopped after step 5, and its checkpoint is of step 3: what was painted at step 4 is another's."""
    train(tmp_path, range(1, 6), 2, finish=False)
    train(tmp_path, range(4, 7), every)
    assert shown == [expected]


@pytest.mark.parametrize("every", [0, 3])
def test_a_training_that_begins_anew_shows_its_own_pictures_alone(
    every: int, tmp_path: Path, shown: list[list[int]]
) -> None:
    train(tmp_path, range(1, 7), 2)
    train(tmp_path, range(1, 4), every, finish=False)
    train(tmp_path, range(4, 7), every)
    assert shown == [[2, 4, 6], [3, 6] if every else []]
    assert (tmp_path / "validation" / "000004-room1-1.png").is_file(), "nothing is deleted"


def test_pictures_that_were_deleted_are_left_out(tmp_path: Path, shown: list[list[int]]) -> None:
    train(tmp_path, range(1, 5), 2, finish=False)
    (tmp_path / "validation" / "000002-room1-1.png").unlink()
    train(tmp_path, range(5, 7), 2)
    assert shown == [[4, 6]]


def test_a_damaged_list_costs_the_earlier_pictures_alone(
    tmp_path: Path, shown: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, range(1, 5), 2, finish=False)
    (tmp_path / "validation" / "painted.json").write_text('{"painted": [{}]}')
    train(tmp_path, range(5, 7), 2)
    assert shown == [[6]] and "painted.json: damaged" in caplog.text
