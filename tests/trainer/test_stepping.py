"""Steps that float16 cannot take are counted, and a training of hardly any others fails."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

for _name in ("torch", "diffusers", "transformers", "peft"):
    pytest.importorskip(_name, reason="the trainer needs its extra")

from dreammix_trt.core.checkpoint import BaseFiles  # noqa: E402
from dreammix_trt.core.errors import InputError  # noqa: E402
from dreammix_trt.trainer import training  # noqa: E402
from dreammix_trt.trainer.checkpoints import Learner  # noqa: E402
from dreammix_trt.trainer.lora import Hardware  # noqa: E402
from dreammix_trt.trainer.stepping import MOST_IN_A_ROW, Stepper  # noqa: E402
from tests.support.training import TINY, train  # noqa: E402

HALF = Hardware(precision="float16")


def overflow_in(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Let the gradients of these steps, 0-based, overflow."""
    honest, calls = training.reweighted_loss, iter(range(100))

    def lose(prediction: Any, *given: Any) -> Any:
        if next(calls) in steps:
            prediction.register_hook(lambda grad: grad * float("inf"))
        return honest(prediction, *given)

    monkeypatch.setattr(training, "reweighted_loss", lose)


def test_a_float16_training_that_took_no_step_fails(
    base: BaseFiles, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow_in(monkeypatch, {0, 1, 2})
    with pytest.raises(InputError, match=r"3 of 3 steps changed nothing.*overflowed float16.*--precision bfloat16"):
        train(photos, tmp_path / "lora", base, hardware=HALF)
    assert not (tmp_path / "lora").exists()


def test_steps_that_were_left_out_are_told_and_stand_in_the_card(
    base: BaseFiles, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also those before a stop."""
    given: dict[str, Any] = {"hardware": HALF, "recipe": replace(TINY, checkpoint_every=2)}

    def stop(_name: str, fraction: float, _message: str) -> None:
        if fraction >= 1:
            raise KeyboardInterrupt

    overflow_in(monkeypatch, {0})
    with pytest.raises(KeyboardInterrupt):
        train(photos, tmp_path / "lora", base, progress=stop, **given)
    with caplog.at_level(logging.WARNING):
        record = train(photos, tmp_path / "lora", base, resume=True, **given)
    assert record.skipped == json.loads((tmp_path / "lora" / "subject.json").read_text())["skipped_steps"] == 1
    assert "1 of 3 steps changed nothing" in caplog.text
    assert train(photos, tmp_path / "other", base).skipped == 0


@pytest.fixture
def take() -> Callable[[float], Any]:
    """Takes a step of one number with this gradient."""
    import torch

    value = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([value], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    stepper = Stepper(Learner({}, optimizer, scaler, torch.Generator()), lambda: "")
    steps = iter(range(1, 10_000))

    def step(gradient: float) -> Stepper:
        optimizer.zero_grad()
        scaler.scale((value * gradient).sum()).backward()
        stepper.take(next(steps))
        return stepper

    return step


def test_a_training_that_overflows_for_long_ends_early(take: Callable[[float], Stepper]) -> None:
    for _ in range(MOST_IN_A_ROW - 1):
        take(float("inf"))
    assert take(1.0).skipped == MOST_IN_A_ROW - 1, "one good step, and the count in a row begins anew"
    for _ in range(MOST_IN_A_ROW - 1):
        take(float("inf"))
    with pytest.raises(InputError, match=rf"{MOST_IN_A_ROW} steps up to step {2 * MOST_IN_A_ROW}.*bfloat16"):
        take(float("inf"))


def test_hardly_any_step_is_none(take: Callable[[float], Stepper], caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(9):
        stepper = take(float("inf"))
    stepper.report(10)
    assert "9 of 10 steps" in caplog.text
    with pytest.raises(InputError, match="9 of 9 steps"):
        stepper.report(9)
