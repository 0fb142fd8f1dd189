"""A lesson taken step by step: rows that threads draw, the lesson's loss of them, steps of the optimizer.

Every row is drawn by its own number, so a training that goes on draws what it would have drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dreammix_trt.trainer.checkpoints import Learner, Progressed
from dreammix_trt.trainer.row_reader import Row, RowReader
from dreammix_trt.trainer.stepping import Course, take_steps


class Lesson(Protocol):
    """What is learnt from one row to the next."""

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that learn, by their names in the file of what is learnt."""

    def draw(self, rng: np.random.Generator) -> Row:
        """One row: arrays of numbers by name; called by several threads."""

    def loss(self, rows: Mapping[str, Tensor], step: int) -> Tensor:
        """The mean loss of rows, stacked under their names, on the CPU. step: 0-based."""


class Pace(Protocol):
    """Of a recipe, what the loop takes.

    batch: rows in memory at a time; accumulate: such batches in a step. betas, decay: of AdamW.
    """

    @property
    def batch(self) -> int: ...
    @property
    def accumulate(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def decay(self) -> float: ...


def learn(lesson: Lesson, pace: Pace, seeds: Sequence[int], course: Course, *, resume: bool) -> Progressed:
    """Take all steps. seeds: of everything that is drawn. Raises as `take_steps` does."""
    hardware, own, trained = course.hardware, course.processes, lesson.trained()
    optimizer = hardware.make_optimizer(trained.values(), pace.learning_rate, pace.betas, pace.decay)
    learner = Learner(trained, optimizer, hardware.make_scaler())
    rows = range(own.index * pace.batch, (own.index + 1) * pace.batch)
    with RowReader(lesson.draw, seeds, rows) as reader:

        def add_gradients(step: int) -> float:
            total = 0.0
            for part in range(pace.accumulate):
                taken = reader.take(step * pace.accumulate + part)
                with torch.autocast(hardware.kind, hardware.products, enabled=hardware.products != torch.float32):
                    loss = lesson.loss(taken, step) / pace.accumulate
                learner.scaler.scale(loss).backward()
                total += float(loss.detach())
            return total

        return take_steps(course, learner, add_gradients, resume=resume)
