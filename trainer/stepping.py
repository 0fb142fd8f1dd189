"""The optimizer's step, with clipped gradients; it knows the steps that float16 cannot take."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dreammix_trt.core.errors import InputError
from dreammix_trt.trainer.checkpoints import Learner

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

MOST_IN_A_ROW = 32  # the scale of 65536 is halved each time: below 1/65536 it is not the scale that overflows
_LEAST_SHARE = 0.1  # of the steps must be taken
_REMEDY = "begin anew, without --resume, with --precision bfloat16 or float32"


class Stepper:
    """Takes the steps of one training.

    skipped: steps that float16's scaler left out until now, since their gradients overflowed.
    """

    def __init__(
        self, learner: Learner, trained: Sequence[Tensor], advise: Callable[[], str], skipped: int = 0
    ) -> None:
        """advise: what to do about a training that diverged, for errors."""
        self._learner, self._trained, self._advise = learner, trained, advise
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
        norm = float(torch.nn.utils.clip_grad_norm_(self._trained, 1.0))
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
