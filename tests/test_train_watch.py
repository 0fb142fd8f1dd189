"""What looks on while a LoRA is trained never costs it."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dreammix_trt import train_report, train_watch
from dreammix_trt.core.errors import InputError
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
    watch.begin(SimpleNamespace(photographs=(), names=names, base=None, seed=0))  # type: ignore[arg-type]
    assert (noted[0]["image"], noted[0]["mask"]) == (tmp_path / "room.png", tmp_path / "hole.png")
