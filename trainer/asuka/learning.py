"""The loop that all three parts of ASUKA share: rows, a lesson's loss, steps of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dreammix_trt.trainer.asuka.recipes import PARTS, AsukaRecipe, Part
from dreammix_trt.trainer.checkpoints import Learner, Progressed
from dreammix_trt.trainer.row_reader import Row, RowReader
from dreammix_trt.trainer.stepping import Course, take_steps


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


def learn(lesson: Lesson, recipe: AsukaRecipe, seed: int, course: Course, *, resume: bool) -> Progressed:
    """Take all steps. seed: of everything that is drawn. Raises as `take_steps` does."""
    hardware, own, trained = course.hardware, course.processes, lesson.trained()
    optimizer = hardware.make_optimizer(trained.values(), recipe.learning_rate, recipe.betas, recipe.decay)
    learner = Learner(trained, optimizer, hardware.make_scaler())
    rows = range(own.index * recipe.batch, (own.index + 1) * recipe.batch)
    with RowReader(lesson.draw, (seed, PARTS.index(lesson.part)), rows) as reader:

        def add_gradients(step: int) -> float:
            total = 0.0
            for part in range(recipe.accumulate):
                taken = reader.take(step * recipe.accumulate + part)
                with torch.autocast(hardware.kind, hardware.products, enabled=hardware.products != torch.float32):
                    loss = lesson.loss(taken, step) / recipe.accumulate
                learner.scaler.scale(loss).backward()
                total += float(loss.detach())
            return total

        return take_steps(course, learner, add_gradients, resume=resume)
