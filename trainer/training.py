"""The training itself: prepared samples, the adapters, steps of the optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dreammix_trt.core.errors import MissingExtraError
from dreammix_trt.trainer.adapters import adapters_of, add_adapters, copy_factors
from dreammix_trt.trainer.batches import Batch, Draws
from dreammix_trt.trainer.checkpoints import Checkpoints, Learner, Progressed
from dreammix_trt.trainer.folder import lora_tensors
from dreammix_trt.trainer.losses import loss_weights, reweighted_loss
from dreammix_trt.trainer.preparing import Progress, prepare
from dreammix_trt.trainer.processes import Processes
from dreammix_trt.trainer.stepping import Stepper
from dreammix_trt.trainer.task import Task

if TYPE_CHECKING:
    from torch import Tensor

    from dreammix_trt.trainer.networks import TrainingUNet

TARGETS = ("to_k", "to_v", "to_out.0")
AfterStep = Callable[[int, Callable[[], dict[str, tuple["Tensor", "Tensor"]]]], None]


class Training:
    """The LoRA on one base: prepared samples, optimizer, loop."""

    def __init__(
        self, task: Task, checkpoints: Checkpoints, progress: Progress, processes: Processes | None = None
    ) -> None:
        """processes: this one among those that train together; None: it is alone.

        Raises MissingExtraError without the `train` extra.
        """
        try:
            import peft  # noqa: F401
            import torch

            import dreammix_trt.trainer.networks  # noqa: F401
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f"{error.name} is not installed, training needs it: pip install 'dreammix-trt[train]'"
            ) from error
        self._task, self._recipe, self._progress = task, task.recipe, progress
        self._checkpoints, self._processes = checkpoints, processes or Processes()
        self._weights = loss_weights(task.loss)
        self._dice = torch.Generator().manual_seed(task.seed)

    @cached_property
    def _unet(self) -> TrainingUNet:
        from dreammix_trt.trainer.networks import TrainingUNet

        self._progress("train", 0.015, "reading the UNet")
        return TrainingUNet(self._task.base, self._task.hardware, self._task.merged)

    def run(self, work: Path | None = None, *, resume: bool = False, after_step: AfterStep | None = None) -> Progressed:
        """Prepare the samples and take all steps; returns the loss of each.

        work: where prepared samples are kept; None: nowhere.
        resume: go on from the checkpoint.
        after_step: called with a step's number and `factors`.

        Raises InputError for a loss or gradients that are not finite, and where float16 overflowed in nearly all steps.
        """
        begun = time.monotonic()
        self._progress("train", 0.0, "reading the base")
        prepared = prepare(self._task, work, lambda: self._unet, self._dice, self._progress)
        self._draws = Draws(
            prepared, len(self._task.names.prompts), self._recipe, self._task.base.native_side, self._dice
        )
        self._prepared = prepared
        self._add_adapters()
        optimizer = self._task.hardware.make_optimizer(self._trained, self._task.learning_rate)
        learner = Learner(
            lora_tensors(adapters_of(self._unet.unet)), optimizer, self._task.hardware.make_scaler(), self._dice
        )
        before = self._checkpoints.restore(learner) if resume else Progressed([], 0.0)
        before = replace(before, seconds=before.seconds + time.monotonic() - begun)
        return self._take_steps(learner, before, after_step or (lambda *_: None))

    def _take_steps(self, learner: Learner, before: Progressed, after_step: AfterStep) -> Progressed:
        steps, history, begun = self._task.steps, list(before.history), time.monotonic()
        shown = history[-1] if history else None
        stepper = Stepper(learner, self._trained, self._advise, before.skipped)
        for step in range(len(history), steps):
            history.append(self._step(learner, stepper, step))
            shown = history[-1] if shown is None else 0.95 * shown + 0.05 * history[-1]
            spent = time.monotonic() - begun
            left = spent / (len(history) - len(before.history)) * (steps - step - 1)
            self._progress("train", 0.1 + 0.9 * (step + 1) / steps, f"loss {shown:.4f}, {_clock(left)} left")
            if self._processes.leads:
                self._checkpoints.keep(learner, Progressed(history, before.seconds + spent, stepper.skipped))
                after_step(step + 1, self.factors)
        stepper.report(steps)
        return Progressed(history, before.seconds + time.monotonic() - begun, stepper.skipped)

    def _step(self, learner: Learner, stepper: Stepper, step: int) -> float:
        """One step of the optimizer; returns its loss."""
        rate = self._task.learning_rate * self._recipe.rate_at(step, self._task.steps)
        for group in learner.optimizer.param_groups:
            group["lr"] = rate
        learner.optimizer.zero_grad()
        value = self._processes.average(self._trained, self._add_gradients(learner))
        stepper.check_loss(value, step + 1)
        stepper.take(step + 1)
        return value

    def _advise(self) -> str:
        """What to do when it diverged."""
        import torch

        remedy = f"a smaller learning rate than {self._task.learning_rate:g}"
        if self._task.hardware.products == torch.float16:
            remedy += ", or --precision bfloat16"
        kept = self._checkpoints.describe()
        return (
            f"the training diverged. Begin anew, without --resume, with {remedy}"
            f"{f'; {kept} until a checkpoint of the new training replaces it, and can be built' if kept else ''}"
        )

    def _add_gradients(self, learner: Learner) -> float:
        """Draw this process' rows of one step, add up their gradients a batch at a time; returns their loss."""
        recipe, total = self._recipe, 0.0
        for weight, rows in self._draws.draw(recipe.batch * recipe.accumulate * self._processes.count):
            own = rows.part(self._processes.index, self._processes.count)
            for number in range(recipe.accumulate):
                loss = self._loss(own.part(number, recipe.accumulate)) * (weight / recipe.accumulate)
                learner.scaler.scale(loss).backward()
                total += float(loss.detach())
        return total

    def _loss(self, batch: Batch) -> Tensor:
        """Of noise at time t, mixed in by the schedule; the target is the noise."""
        unet, rows = self._unet, batch.samples
        signal, spread = (table[batch.t][:, None, None, None] for table in (unet.signal, unet.noise))
        text = self._prepared.states[rows.captions], self._prepared.pooled[rows.captions]
        noisy = signal * rows.latents + spread * batch.noise
        eps = unet.predict(noisy, batch.t, text, batch.sizes, unet.feature(rows.mask, rows.masked))
        return reweighted_loss(eps, batch.noise.to(eps.device), rows.mask.to(eps.device), self._weights)

    def _add_adapters(self) -> None:
        unet = self._unet.unet
        self._trained = add_adapters(unet, self._task.rank, self._task.seed, TARGETS)
        if self._recipe.gradient_checkpointing:
            unet.enable_gradient_checkpointing()

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(value.numel() for value in self._trained)

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Module by its diffusers name -> copies of (down (rank, in), up (out, rank)), on the CPU."""
        return copy_factors(adapters_of(self._unet.unet))


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
