"""What goes along with a training: the memory plan before it, and whoever looks on while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from dreammix_trt.trainer.folder import Factors, TrainRecord
from dreammix_trt.trainer.task import Task

_SMALL_SIDE = 256  # a base up to this side fits everywhere on a CPU


class Watch(Protocol):
    """Whoever looks on: paints what the LoRA can do so far, writes a page at the end."""

    def begin(self, task: Task) -> None:
        """Before anything is loaded; raises InputError for what it cannot do."""

    def after_step(self, step: int, factors: Callable[[], Factors]) -> None:
        """After each step; `factors` gives copies of the LoRA's."""

    def finish(self, folder: Path, record: TrainRecord, history: Sequence[float], plan: Sequence[str]) -> None:
        """Add to the folder that is written. history: the loss of every step. plan: lines of the memory plan."""


class Unwatched:
    """Nobody looks on."""

    def begin(self, task: Task) -> None:
        """Do nothing."""

    def after_step(self, step: int, factors: Callable[[], Factors]) -> None:
        """Do nothing."""

    def finish(self, folder: Path, record: TrainRecord, history: Sequence[float], plan: Sequence[str]) -> None:
        """Do nothing."""


def tell_memory(task: Task, notice: Callable[[str], None]) -> list[str]:
    """Say, and return, what the training will need of a full-size base or a GPU.

    Raises InputError where the GPU has less; it says which settings fit.
    """
    if task.hardware.kind == "cpu" and task.base.native_side <= _SMALL_SIDE:
        return []
    from dreammix_trt.trainer.memory_plan import plan_training

    plan = plan_training(
        task.base,
        precision=task.hardware.weights_name,
        batch=task.recipe.batch,
        accumulate=task.recipe.accumulate,
        rank=task.rank,
        checkpointing=task.recipe.gradient_checkpointing,
        optimizer=task.hardware.optimizer,
        side=task.base.native_side,
        device=task.hardware.kind,
    )
    lines = plan.lines(task.steps)
    for line in lines:
        notice(line)
    free = task.hardware.free_bytes()
    if free is not None:
        plan.check(free)
    return lines
