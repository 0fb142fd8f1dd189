"""What goes along with a training: the memory plan before it, pictures while it runs, a page at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dreammix_trt.core.errors import InputError
from dreammix_trt.trainer.folder import Factors, TrainRecord
from dreammix_trt.trainer.task import Task


@dataclass(frozen=True)
class Validation:
    """Pictures painted while it trains.

    every: steps between them; 0: none. prompts: what is painted; (): the subject's own prompt, and in red.
    engine: of the same base, that paints them; None: as the validator finds one.
    """

    every: int = 0
    prompts: Sequence[str] = ()
    engine: str | Path | None = None

    def check(self) -> None:
        """Raise InputError for a number below 0, and for prompts of no pictures."""
        if self.every < 0:
            raise InputError(f"validate_every is {self.every}; give a number of steps, or 0 for none")
        if not self.every and (self.prompts or self.engine):
            raise InputError("prompts or an engine for validation are given, but --validate-every is not")


def tell_memory(task: Task, notice: Callable[[str], None]) -> None:
    """Say what the training will need of a full-size base or a GPU; InputError where the GPU has less."""
    if task.hardware.kind == "cpu" and task.base.native_side <= 256:
        return
    module = _find("memory_plan")
    if module is None:
        return
    plan = module.plan_training(
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
    for line in plan.lines():
        notice(line)
    free = task.hardware.free_bytes()
    if free is not None:
        plan.check(free)


class Watch:
    """Paints what the LoRA can do so far, every few steps."""

    def __init__(self, task: Task, validation: Validation) -> None:
        self.pictures: list[Any] = []
        self._every, self._validator = validation.every, None
        module = _find("validation") if validation.every else None
        if module is not None:
            names = task.names
            prompts = tuple(validation.prompts) or (names.prompt, f"a photo of a red {names.token} {names.class_name}")
            self._validator = module.Validator(validation.engine, task.base, prompts, validation.every, task.seed)

    def after_step(self, step: int, factors: Callable[[], Factors]) -> None:
        """Paint if it is time."""
        if self._validator is not None and step % self._every == 0:
            self.pictures.append(self._validator.paint(step, factors()))


def write_page(folder: Path, record: TrainRecord, history: Sequence[float], watch: Watch) -> None:
    """Write train.html: the losses, and the pictures that were painted."""
    module = _find("train_report")
    if module is not None:
        module.write_report(folder, record, history, watch.pictures)


def _find(name: str) -> Any:
    full = f"dreammix_trt.trainer.{name}"
    return import_module(full) if find_spec(full) else None
