"""The loop of a distillation: rows, the student's loss, steps of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreammix_trt.trainer.adapters import adapters_of, add_adapters, copy_factors
from dreammix_trt.trainer.checkpoints import Checkpoints, Learner, Progressed
from dreammix_trt.trainer.consistency import Tables, consistency_target, huber_loss, tell_sizes
from dreammix_trt.trainer.distill_task import GRID, DistillTask
from dreammix_trt.trainer.events import Events
from dreammix_trt.trainer.folder import lora_tensors
from dreammix_trt.trainer.preparing import Progress
from dreammix_trt.trainer.processes import Processes
from dreammix_trt.trainer.samples import Samples
from dreammix_trt.trainer.stepping import Course, take_steps

if TYPE_CHECKING:
    from torch import Tensor

#: modules that get adapters, by the ends of their names: those of the published LCM-LoRAs
LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
_STRIDE = GRID[1] - GRID[0]


@dataclass(frozen=True)
class Rows:
    """What one batch is made of. t: int64 (N,), of GRID. guidance: (N,)."""

    samples: Samples
    noise: Tensor
    t: Tensor
    guidance: Tensor

    def part(self, index: int, count: int) -> Rows:
        """Part number `index` of `count` equal ones."""
        own = (value.chunk(count)[index] for value in (self.noise, self.t, self.guidance))
        return Rows(self.samples.part(index, count), *own)


def draw_rows(samples: Samples, count: int, guidance: tuple[float, float], dice: Any) -> Rows:
    """`count` rows; their times are spread evenly over GRID, so that the loss varies less."""
    import torch

    chosen = samples.rows(torch.randint(len(samples), (count,), generator=dice))
    noise = torch.randn(chosen.latents.shape, generator=dice)
    places = (torch.randperm(count, generator=dice) + torch.rand(count, generator=dice)) / count
    t = torch.tensor(GRID)[(places * len(GRID)).long().clamp_(max=len(GRID) - 1)]
    low, high = guidance
    return Rows(chosen, noise, t, low + (high - low) * torch.rand(count, generator=dice))


class Distiller:
    """The loop on one base."""

    def __init__(self, task: DistillTask, work: Path, progress: Progress) -> None:
        import torch

        from dreammix_trt.trainer.networks import TrainingUNet

        self._task, self._recipe, self._progress = task, task.recipe, progress
        self._dice = torch.Generator().manual_seed(task.seed)
        progress("distill", 0.0, f"encoding {task.recipe.views} pictures")
        self._scenes = task.scenes(work)
        self._unet = TrainingUNet(task.base, task.hardware)
        self._tables = Tables(self._unet.signal.to(self._unet.device), self._unet.noise.to(self._unet.device))
        self._trained = add_adapters(self._unet.unet, task.recipe.rank, task.seed, LAYERS)
        if task.recipe.gradient_checkpointing:
            self._unet.unet.enable_gradient_checkpointing()

    def run(self, checkpoints: Checkpoints, *, resume: bool, events: Events | None = None) -> Progressed:
        """Take all steps. Raises InputError as `take_steps` does."""
        recipe, hardware = self._recipe, self._task.hardware
        optimizer = hardware.make_optimizer(self._trained, recipe.learning_rate)
        learner = Learner(lora_tensors(adapters_of(self._unet.unet)), optimizer, hardware.make_scaler(), self._dice)
        given = hardware, checkpoints, Processes(), self._progress, events
        course = Course("distill", recipe.steps, recipe.learning_rate, recipe.rate_at, *given)
        return take_steps(course, learner, lambda _: self._add_gradients(learner), resume=resume)

    def _add_gradients(self, learner: Learner) -> float:
        """Draw the rows of one step, add up their gradients a batch at a time; returns their loss."""
        recipe, total = self._recipe, 0.0
        rows = draw_rows(self._scenes.samples, recipe.batch * recipe.accumulate, recipe.guidance, self._dice)
        for number in range(recipe.accumulate):
            loss = self.loss(rows.part(number, recipe.accumulate)) / recipe.accumulate
            learner.scaler.scale(loss).backward()
            total += float(loss.detach())
        return total

    def loss(self, rows: Rows) -> Tensor:
        """Of f(x, t) against the consistency target."""
        import torch

        unet, samples, device = self._unet, rows.samples, self._unet.device
        side, tables = self._task.base.native_side, self._tables
        t, mask = rows.t.to(device), samples.mask.to(device)
        after = (t - self._recipe.skip * _STRIDE).clamp(min=0)
        signal, noise = tables.at(t)
        x = signal * samples.latents.to(device) + noise * rows.noise.to(device)
        feature = unet.feature(samples.mask, samples.masked)
        empty = self._scenes.text(torch.zeros_like(samples.captions))
        text = self._scenes.text(samples.captions)

        def student(latents: Tensor, when: Tensor, sizes: Tensor) -> Tensor:
            return unet.predict(latents, when, text, sizes, feature)

        def without(latents: Tensor, when: Tensor, sizes: Tensor) -> Tensor:
            return unet.predict(latents, when, empty, sizes, feature)

        with torch.no_grad():
            unet.unet.disable_adapters()
            teacher = without(x, t, tell_sizes(x, t, side, positive=False)), student(x, t, tell_sizes(x, t, side))
            unet.unet.enable_adapters()
            target = consistency_target(tables, teacher, student, x, (t, after), rows.guidance.to(device), side)
        found = tables.consistency(x, student(x, t, tell_sizes(x, t, side)), t)
        return huber_loss(found, target, mask)

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Module by its diffusers name -> copies of (down, up), on the CPU."""
        return copy_factors(adapters_of(self._unet.unet))
