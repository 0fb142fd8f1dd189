"""The training itself: prepared samples, the adapters, steps of the optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dreammix_trt.core.errors import MissingExtraError
from dreammix_trt.trainer.adapters import adapters_of, add_adapters, copy_factors
from dreammix_trt.trainer.batches import Batch, Draws
from dreammix_trt.trainer.checkpoints import Checkpoints, Learner, Progressed
from dreammix_trt.trainer.events import Events
from dreammix_trt.trainer.folder import lora_tensors
from dreammix_trt.trainer.losses import loss_weights, reweighted_loss
from dreammix_trt.trainer.preparing import Progress, prepare
from dreammix_trt.trainer.processes import Processes
from dreammix_trt.trainer.stepping import Course, take_steps
from dreammix_trt.trainer.task import Task

if TYPE_CHECKING:
    from torch import Tensor

    from dreammix_trt.trainer.networks import TrainingUNet

TARGETS = ("to_k", "to_v", "to_out.0")
AfterStep = Callable[[int, Callable[[], dict[str, tuple["Tensor", "Tensor"]]]], None]


class Training:
    """The LoRA on one base: prepared samples, optimizer, loop."""

    def __init__(
        self,
        task: Task,
        checkpoints: Checkpoints,
        progress: Progress,
        processes: Processes | None = None,
        events: Events | None = None,
    ) -> None:
        """processes: this one among those that train together; None: it is alone. events: as `Course` has them.

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
        self._checkpoints, self._processes, self._events = checkpoints, processes or Processes(), events
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

        def tell(step: int) -> None:
            if after_step is not None:
                after_step(step, self.factors)

        def add_gradients(_step: int) -> float:
            return self._add_gradients(learner)

        return take_steps(self._course(), learner, add_gradients, resume=resume, begun=begun, after_step=tell)

    def _course(self) -> Course:
        task, recipe = self._task, self._recipe
        return Course(
            "train",
            task.steps,
            task.learning_rate,
            lambda step: task.learning_rate * recipe.rate_at(step, task.steps),
            task.hardware,
            self._checkpoints,
            self._processes,
            lambda name, share, said: self._progress(name, 0.1 + 0.9 * share, said),
            self._events,
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
