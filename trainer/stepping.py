"""The steps of every training here, from the first or a checkpoint to the last, and the optimizer's step in them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from dreammix_trt.core.errors import InputError
from dreammix_trt.trainer.checkpoints import Checkpoints, Learner, Progressed
from dreammix_trt.trainer.events import Events
from dreammix_trt.trainer.hardware import Hardware
from dreammix_trt.trainer.preparing import Progress
from dreammix_trt.trainer.processes import Processes

log = logging.getLogger(__name__)

MOST_IN_A_ROW = 32  # the scale of 65536 is halved each time: below 1/65536 it is not the scale that overflows
_LEAST_SHARE = 0.1  # of the steps must be taken
_RECENT = 20  # steps whose mean loss is shown
_REMEDY = "begin anew, without --resume, with --precision bfloat16 or float32"


@dataclass(frozen=True)
class Course:
    """What the steps of one training have in common, whatever is learnt.

    name: of what is done, for progress.
    steps: of the optimizer. learning_rate: the highest. rate_at: the rate of a step, 0-based.
    events: gets the loss and the rate of every step.
    """

    name: str
    steps: int
    learning_rate: float
    rate_at: Callable[[int], float]
    hardware: Hardware
    checkpoints: Checkpoints
    processes: Processes
    progress: Progress
    events: Events | None = None

    def advise(self) -> str:
        """What to do when it diverged."""
        import torch

        remedy = f"a smaller learning rate than {self.learning_rate:g}"
        if self.hardware.products == torch.float16:
            remedy += ", or --precision bfloat16"
        kept = self.checkpoints.describe()
        return (
            f"the training diverged. Begin anew, without --resume, with {remedy}"
            f"{f'; {kept} until a checkpoint of the new training replaces it' if kept else ''}"
        )


def take_steps(
    course: Course,
    learner: Learner,
    add_gradients: Callable[[int], float],
    *,
    resume: bool,
    begun: float | None = None,
    after_step: Callable[[int], None] | None = None,
) -> Progressed:
    """Take all steps, or with `resume` those after the checkpoint; returns the loss of each.

    add_gradients: called with the number of a step, 0-based; adds its scaled gradients, returns its loss.
    begun: `time.monotonic()` when the training began; None: it begins now.
    after_step: called in the process that leads, with how many steps were taken.

    Raises InputError for a loss or gradients that are not finite, and where float16 overflowed in nearly all steps;
    BuildError for a full disk.
    """
    begun, entered = time.monotonic() if begun is None else begun, time.monotonic()
    before = course.checkpoints.restore(learner) if resume else Progressed([], 0.0)
    history, done, steps = list(before.history), before, course.steps
    stepper = Stepper(learner, course.advise, before.skipped)
    for step in range(len(history), steps):
        rate = course.rate_at(step)
        for group in learner.optimizer.param_groups:
            group["lr"] = rate
        learner.optimizer.zero_grad()
        loss = course.processes.average(learner.trained, add_gradients(step))
        stepper.check_loss(loss, step + 1)
        stepper.take(step + 1)
        history.append(loss)
        now = time.monotonic()
        left = (now - entered) / (len(history) - len(before.history)) * (steps - len(history))
        recent = history[-_RECENT:]
        said = f"step {step + 1} of {steps}, loss {sum(recent) / len(recent):.4f}, {_clock(left)} left"
        course.progress(course.name, (step + 1) / steps, said)
        done = Progressed(history, before.seconds + now - begun, stepper.skipped)
        if course.processes.leads:
            course.checkpoints.keep(learner, done)
            if course.events is not None:
                course.events.add_step(step + 1, loss, rate)
            if after_step is not None:
                after_step(step + 1)
    stepper.report(steps)
    return done


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


class Stepper:
    """Takes the steps of one training.

    skipped: steps that float16's scaler left out until now, since their gradients overflowed.
    """

    def __init__(self, learner: Learner, advise: Callable[[], str], skipped: int = 0) -> None:
        """advise: what to do about a training that diverged, for errors."""
        self._learner, self._advise = learner, advise
        self.skipped, self._in_a_row = skipped, 0

    def check_loss(self, value: float, step: int) -> None:
        """Raise InputError for a loss that is not finite."""
        if not math.isfinite(value):
            raise InputError(f"the loss is {value} at step {step}; {self._advise()}")

    def take(self, step: int) -> None:
        """Clip the gradients to a norm of 1 and take the step.

        In float16 gradients that overflow leave everything as it is, and the next ones are scaled less.

        Raises InputError for gradients that are not finite: with a scaler when scaling less does not help.
        """
        import torch

        scaler, optimizer = self._learner.scaler, self._learner.optimizer
        scaler.unscale_(optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self._learner.trained, 1.0))
        overflows = not math.isfinite(norm)
        if overflows and not scaler.is_enabled():  # the LoRA, and its checkpoint, would be lost
            raise InputError(f"the norm of the gradients is {norm} at step {step}; {self._advise()}")
        scaler.step(optimizer)
        scaler.update()
        self.skipped += overflows
        self._in_a_row = self._in_a_row + 1 if overflows else 0
        if self._in_a_row == MOST_IN_A_ROW:
            raise InputError(
                f"the gradients overflow float16 in the {MOST_IN_A_ROW} steps up to step {step}, whatever they are "
                f"scaled by: nothing is learnt any more; {_REMEDY}"
            )

    def report(self, steps: int) -> None:
        """Say how many of all steps were left out. Raises InputError where hardly any was taken."""
        said = f"{self.skipped} of {steps} steps changed nothing, since their gradients overflowed float16"
        if steps - self.skipped < _LEAST_SHARE * steps:
            raise InputError(f"{said}: nothing was learnt; {_REMEDY}, or with more steps")
        if self.skipped:
            log.warning("%s", said)
