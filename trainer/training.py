"""The training itself: encoded samples, the adapters, steps of the optimizer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dreammix_trt.core.errors import InputError, MissingExtraError
from dreammix_trt.trainer.data import draw_view
from dreammix_trt.trainer.losses import loss_weights, reweighted_loss
from dreammix_trt.trainer.photographs import Album
from dreammix_trt.trainer.samples import Samples, encode_views
from dreammix_trt.trainer.task import Task

if TYPE_CHECKING:
    from torch import Tensor

    from dreammix_trt.trainer.networks import TrainingNetworks

Progress = Callable[[str, float, str], None]

TARGETS = ("to_k", "to_v", "to_out.0")


class Training:
    """The LoRA on one base: prepared samples, optimizer, loop.

    parameters: how many numbers are trained, known once it runs.
    """

    def __init__(self, task: Task, progress: Progress) -> None:
        """Read the base. Raises MissingExtraError without the `train` extra."""
        try:
            import torch
            from peft import LoraConfig

            from dreammix_trt.trainer.networks import TrainingNetworks
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f"{error.name} is not installed, training needs it: pip install 'dreammix-trt[train]'"
            ) from error
        progress("train", 0.0, "reading the base")
        self._networks: TrainingNetworks = TrainingNetworks(task.base)
        self._task, self._recipe, self._progress = task, task.recipe, progress
        self._weights = loss_weights(task.loss)
        self._dice = torch.Generator().manual_seed(task.seed)
        self._config = LoraConfig(
            r=task.rank, lora_alpha=task.rank, init_lora_weights="gaussian", target_modules=list(TARGETS)
        )
        self.parameters = 0

    def run(self) -> list[float]:
        """Prepare the samples and take all steps; returns the loss of each.

        Raises InputError for a loss that is not finite.
        """
        import torch

        self._prepare()
        steps = self._task.steps
        optimizer = torch.optim.AdamW(self._trained, lr=self._task.learning_rate, betas=(0.9, 0.999), weight_decay=1e-4)
        history: list[float] = []
        begun = time.monotonic()
        shown = 0.0
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = self._task.learning_rate * self._recipe.rate_at(step, steps)
            loss = self._loss()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise InputError(
                    f"the loss is {value} at step {step + 1}; the training diverged, "
                    f"take a smaller learning rate than {self._task.learning_rate:g}"
                )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
            optimizer.step()
            history.append(value)
            shown = value if not step else 0.95 * shown + 0.05 * value
            left = (time.monotonic() - begun) / (step + 1) * (steps - step - 1)
            self._progress("train", 0.1 + 0.9 * (step + 1) / steps, f"loss {shown:.4f}, {_clock(left)} left")
        return history

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Module by its diffusers name -> (down (rank, in), up (out, rank))."""
        found = {}
        for name, module in self._networks.unet.named_modules():
            if hasattr(module, "lora_A"):
                down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
                found[name] = (down.detach().clone().contiguous(), up.detach().clone().contiguous())
        return found

    def _prepare(self) -> None:
        """Draw and encode the views, paint the regular pictures, then put the adapters in."""
        import torch

        rng = np.random.default_rng([self._task.seed, 11])
        side, recipe = self._task.base.native_side, self._recipe
        photographs, names = self._task.photographs, self._task.names
        count = max(recipe.views, len(photographs))
        album = Album(photographs)
        views = (draw_view(rng, album.open(n), side) for n in range(count))
        self._progress("train", 0.01, f"encoding {count} views of {len(photographs)} photographs")
        self._subject = encode_views(self._networks, views)
        self._text = [self._networks.encode_text([prompt]) for prompt in names.prompts]
        self._own_captions = len(names.prompts)
        self._regular: Samples | None = None
        if recipe.regular > 0 and recipe.regular_pictures > 0:
            self._regular = self._paint_regular()
        with torch.random.fork_rng():
            torch.manual_seed(self._task.seed)
            self._networks.unet.add_adapter(self._config)
        self._trained = [value for value in self._networks.unet.parameters() if value.requires_grad]
        self.parameters = sum(value.numel() for value in self._trained)

    def _paint_regular(self) -> Samples:
        import torch

        from dreammix_trt.trainer import regular

        count = self._recipe.regular_pictures
        prompts = regular.captions(self._task.names.class_name, count)
        start = self._subject.rows(torch.arange(count) % len(self._subject))

        def report(fraction: float) -> None:
            self._progress("train", 0.02 + 0.08 * fraction, f"painting {count} regular pictures of the class")

        painted = regular.repaint(self._networks, start.latents, start.masked, start.mask, prompts, self._dice, report)
        distinct = list(dict.fromkeys(prompts))
        states, pooled = self._networks.encode_text(distinct)
        self._text += [(states[n : n + 1], pooled[n : n + 1]) for n in range(len(distinct))]
        captions = torch.tensor([self._own_captions + distinct.index(prompt) for prompt in prompts])
        return Samples(painted, start.masked, start.mask, start.sharp, captions)

    def _loss(self) -> Tensor:
        """One batch, each row from D_s or, with the recipe's share, from D_r; t uniform, target the noise."""
        import torch

        dice, count = self._dice, self._recipe.batch
        batch = self._subject.rows(torch.randint(len(self._subject), (count,), generator=dice))
        if self._own_captions > 1:
            named = torch.rand(count, generator=dice) < self._recipe.captioned
            further = torch.randint(1, self._own_captions, (count,), generator=dice)
            batch = replace(batch, captions=torch.where(named, further, batch.captions))
        if self._regular is not None:
            other = self._regular.rows(torch.randint(len(self._regular), (count,), generator=dice))
            batch = batch.mix_in(torch.rand(count, generator=dice) < self._recipe.regular, other)
        noise = torch.randn(batch.latents.shape, generator=dice)
        # stratified over the batch: every row is still uniform, the batch's loss varies less
        places = (torch.randperm(count, generator=dice) + torch.rand(count, generator=dice)) / count
        t = (places * 1000).long().clamp_(max=999)
        signal, spread = (table[t][:, None, None, None] for table in (self._networks.signal, self._networks.noise))
        texts = [self._text[n] for n in batch.captions.tolist()]
        text = torch.cat([states for states, _ in texts]), torch.cat([pooled for _, pooled in texts])
        feature = self._networks.feature(batch.mask, batch.masked)
        noisy = signal * batch.latents + spread * noise
        eps = self._networks.predict(noisy, t, text, self._time_ids(batch), feature)
        return reweighted_loss(eps, noise, batch.mask, self._weights)

    def _time_ids(self, batch: Samples) -> Tensor:
        """(N, 6): original size, no crop offset, target size. A view scaled up keeps its true size; a sharp one varies.

        The loop asks for up to 1.5 times the size, so larger ones must not be news to the LoRA.
        """
        import torch

        side = self._task.base.native_side
        larger = side * (1 + 0.6 * torch.rand(len(batch.sharp), generator=self._dice))
        size = torch.where(batch.sharp < side, batch.sharp, larger).round()
        zero, full = torch.zeros_like(size), torch.full_like(size, float(side))
        return torch.stack([size, size, zero, zero, full, full], 1)


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
