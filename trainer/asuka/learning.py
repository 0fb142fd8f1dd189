"""The loop that all three parts of ASUKA share: rows, a lesson's loss, steps of the optimizer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dreammix_trt.trainer.asuka.recipes import PARTS, AsukaRecipe, Part
from dreammix_trt.trainer.checkpoints import Checkpoints, Learner, Progressed
from dreammix_trt.trainer.hardware import Hardware
from dreammix_trt.trainer.preparing import Progress
from dreammix_trt.trainer.processes import Processes
from dreammix_trt.trainer.row_reader import Row, RowReader
from dreammix_trt.trainer.stepping import Stepper

_RECENT = 20  # steps whose mean loss is shown


class Lesson(Protocol):
    """What is learnt from one row of pictures to the next.

    part: its name.
    """

    @property
    def part(self) -> Part: ...

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that learn, by their names in the part's file."""

    def draw(self, rng: np.random.Generator) -> Row:
        """One row: arrays of numbers by name; called by several threads."""

    def loss(self, rows: Mapping[str, Tensor], step: int) -> Tensor:
        """The mean loss of rows, stacked under their names, on the CPU. step: 0-based."""


@dataclass(frozen=True)
class Course:
    """How a lesson is learnt. seed: of everything that is drawn."""

    recipe: AsukaRecipe
    hardware: Hardware
    checkpoints: Checkpoints
    seed: int
    processes: Processes
    progress: Progress


def learn(lesson: Lesson, course: Course, *, resume: bool) -> Progressed:
    """Take all steps. Raises InputError for a loss or gradients that are not finite, BuildError for a full disk."""
    recipe, hardware, own = course.recipe, course.hardware, course.processes
    begun, trained = time.monotonic(), lesson.trained()
    optimizer = hardware.make_optimizer(trained.values(), recipe.learning_rate, recipe.betas, recipe.decay)
    learner = Learner(trained, optimizer, hardware.make_scaler())
    before = course.checkpoints.restore(learner) if resume else Progressed([], 0.0)
    history, done = list(before.history), before
    stepper = Stepper(learner, list(trained.values()), lambda: _advise(course), before.skipped)
    rows = range(own.index * recipe.batch, (own.index + 1) * recipe.batch)
    with RowReader(lesson.draw, (course.seed, PARTS.index(lesson.part)), rows) as reader:
        for step in range(len(history), recipe.steps):
            history.append(_take_step(lesson, learner, stepper, course, reader, step))
            recent = history[-_RECENT:]
            message = f"step {step + 1} of {recipe.steps}, loss {sum(recent) / len(recent):.4f}"
            course.progress(lesson.part, (step + 1) / recipe.steps, message)
            done = Progressed(history, before.seconds + time.monotonic() - begun, stepper.skipped)
            if own.leads:
                course.checkpoints.keep(learner, done)
    stepper.report(recipe.steps)
    return done


def _take_step(
    lesson: Lesson, learner: Learner, stepper: Stepper, course: Course, reader: RowReader, step: int
) -> float:
    recipe, hardware, trained = course.recipe, course.hardware, list(lesson.trained().values())
    for group in learner.optimizer.param_groups:
        group["lr"] = recipe.rate_at(step)
    learner.optimizer.zero_grad()
    total = 0.0
    for part in range(recipe.accumulate):
        rows = reader.take(step * recipe.accumulate + part)
        with torch.autocast(hardware.kind, hardware.products, enabled=hardware.products != torch.float32):
            loss = lesson.loss(rows, step) / recipe.accumulate
        learner.scaler.scale(loss).backward()
        total += float(loss.detach())
    total = course.processes.average(trained, total)
    stepper.check_loss(total, step + 1)
    stepper.take(step + 1)
    return total


def _advise(course: Course) -> str:
    remedy = f"take a smaller learning rate than {course.recipe.learning_rate:g}"
    if course.hardware.products == torch.float16:
        remedy += ", or --precision bf16"
    kept = course.checkpoints.describe()
    return f"the training diverged; begin anew, without --resume: {remedy}{f'; {kept}' if kept else ''}"
