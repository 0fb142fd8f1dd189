"""What TensorBoard is told of a training, read back by its own reader."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

for _name in ("torch", "diffusers", "transformers", "peft", "tensorboard"):
    pytest.importorskip(_name, reason="the trainer, or TensorBoard, needs its extra")

import torch  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

from dreammix_trt.core.checkpoint import BaseFiles  # noqa: E402
from dreammix_trt.core.errors import InputError, MissingExtraError  # noqa: E402
from dreammix_trt.trainer import events as module  # noqa: E402
from dreammix_trt.trainer.checkpoints import Checkpoints, Learner  # noqa: E402
from dreammix_trt.trainer.distill import DistillRecipe, distill_lora  # noqa: E402
from dreammix_trt.trainer.events import Events  # noqa: E402
from dreammix_trt.trainer.hardware import Hardware  # noqa: E402
from dreammix_trt.trainer.processes import Processes  # noqa: E402
from dreammix_trt.trainer.stepping import Course, take_steps  # noqa: E402
from dreammix_trt.trainer.watching import Unwatched  # noqa: E402
from tests.support.asuka_training import train as train_asuka  # noqa: E402
from tests.support.asuka_training import write_pictures  # noqa: E402
from tests.support.training import TINY, train, write_regular  # noqa: E402


def read(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Step and value of every scalar, as TensorBoard shows them."""
    held = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    held.Reload()
    return [(each.step, each.value) for each in held.Scalars(tag)]


def age(folder: Path) -> None:
    """Make the files there those of an earlier second: TensorBoard reads them in the order of the time in their names,
    and a test is quicker than that."""
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(folder / f"events.out.tfevents.{number:010d}.host.0.0")


class StopAt(Unwatched):
    """Stops the program after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def after_step(self, step: int, factors: Callable[[], Any]) -> None:
        if step == self._step:
            raise KeyboardInterrupt


def test_a_training_that_goes_on_tells_every_step_once(base: BaseFiles, photos: Path, tmp_path: Path) -> None:
    """It was stopped after step 3, and its checkpoint is of step 2."""
    out, folder, recipe = tmp_path / "lora", tmp_path / "board", replace(TINY, checkpoint_every=2)
    given: dict[str, Any] = {"recipe": recipe, "steps": 4}
    with pytest.raises(KeyboardInterrupt), Events(folder) as events:
        train(photos, out, base, events=events, watch=StopAt(3), **given)
    told = read(folder, "loss")
    assert [step for step, _ in told] == [1, 2, 3]
    age(folder)
    with Events(folder) as events:
        record = train(photos, out, base, events=events, resume=True, **given)
    assert [step for step, _ in read(folder, "loss")] == [1, 2, 3, 4]
    assert read(folder, "loss")[:3] == told, "the third step is told anew, and is the same"
    assert read(folder, "loss")[-1][1] == pytest.approx(record.loss, rel=1e-6), "the last tenth is the last step"
    rates = [0.01 * recipe.rate_at(step, 4) for step in range(4)]
    assert [value for _, value in read(folder, "learning_rate")] == pytest.approx(rates, rel=1e-6)
    age(folder)
    with Events(folder) as events:
        train(photos, out, base, events=events, recipe=TINY, steps=1)
    assert [step for step, _ in read(folder, "loss")] == [1], "one that begins anew is told from its beginning"


def test_a_distillation_and_asukas_parts_are_told_too(base: BaseFiles, tmp_path: Path) -> None:
    recipe = DistillRecipe(steps=2, learning_rate=0.01, batch=1, views=2, rank=2)
    pictures = write_regular(tmp_path / "regular_mug")
    with Events(tmp_path / "distill") as events:
        distilled = distill_lora(
            tmp_path / "lcm", base=base, pictures=pictures, recipe=recipe, threads=1, events=events
        )
    assert [value for _, value in read(tmp_path / "distill", "loss")] == pytest.approx(
        [distilled.first_loss, distilled.loss], rel=1e-6
    )
    with Events(tmp_path / "prior") as events:
        prior = train_asuka("prior", tmp_path / "asuka", base, write_pictures(tmp_path / "pictures"), events=events)
    told = read(tmp_path / "prior", "loss")
    assert len(told) == prior.steps and told[-1] == (prior.steps, pytest.approx(prior.loss, rel=1e-6))


def test_only_the_process_that_leads_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "average", lambda self, parameters, loss: loss)
    value = torch.zeros(1, requires_grad=True)
    learner = Learner({}, torch.optim.SGD([value], lr=1.0), torch.amp.GradScaler("cpu", enabled=False))

    def add_gradients(step: int) -> float:
        (value * 2).sum().backward()
        return float(step)

    for index in (1, 0):
        checkpoints = Checkpoints(tmp_path / "work", {}, {"steps": 2}, 0)
        with Events(tmp_path / "board") as events:
            course = Course(
                "x", 2, 1.0, lambda _: 0.5, Hardware(), checkpoints, Processes(index, 2), lambda *_: None, events
            )
            take_steps(course, learner, add_gradients, resume=False)
        assert (tmp_path / "board").exists() == (index == 0)
    assert read(tmp_path / "board", "loss") == [(1, 0.0), (2, 1.0)]


def test_pictures_are_told_at_their_steps(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "painted.png")
    with Events(tmp_path / "board") as events:
        events.add_step(1, 0.5, 0.1)
        events.add_picture(1, "room1/a red mug", tmp_path / "painted.png")
    held = EventAccumulator(str(tmp_path / "board"))
    held.Reload()
    (told,) = held.Images("room1/a red mug")
    assert told.step == 1
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(told.encoded_image_string))), pixels)


def test_every_step_is_on_disk_when_it_is_told(tmp_path: Path) -> None:
    """A training that is killed has lost none."""
    with Events(tmp_path / "board") as events:
        for step in (1, 2):
            events.add_step(step, 0.5, 0.1)
            assert [each for each, _ in read(tmp_path / "board", "loss")] == list(range(1, step + 1))


def test_events_that_fail_are_told_once_and_cost_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    with caplog.at_level(logging.WARNING), Events(tmp_path / "board") as events:
        events.add_step(1, 0.5, 0.1)
        monkeypatch.setattr(SummaryWriter, "flush", fail)
        for step in (2, 3):
            events.add_step(step, 0.5, 0.1)
    assert caplog.messages == [f"{tmp_path / 'board'}: no events from step 2 on: no space left"]


def test_what_cannot_be_told_is_refused_first(
    base: BaseFiles, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"folder of TensorBoard's events .* lies in .*, which is replaced at the end"):
        train(photos, tmp_path / "lora", base, events=Events(tmp_path / "lora" / "board"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--tensorboard .* is a file; name a folder"):
        Events(tmp_path / "file")
    monkeypatch.setattr(module, "list_missing", list)
    with pytest.raises(MissingExtraError, match=r"tensorboard is not installed.*dreammix-trt\[train,tensorboard\]"):
        Events(tmp_path / "board")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
