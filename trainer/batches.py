"""What one step of the optimizer learns from: rows of samples with noise, times and told sizes, drawn by one dice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dreammix_trt.trainer.recipes import Recipe
from dreammix_trt.trainer.samples import Samples

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dreammix_trt.trainer.preparing import Prepared


@dataclass(frozen=True)
class Batch:
    """samples: N rows. noise: (N, 4, h, w). t: int64 (N,), 0..999. sizes: (N, 6), SDXL's time ids."""

    samples: Samples
    noise: Tensor
    t: Tensor
    sizes: Tensor

    def part(self, index: int, count: int) -> Batch:
        """Part number `index` of `count` equal ones."""
        own = (value.chunk(count)[index] for value in (self.noise, self.t, self.sizes))
        return Batch(self.samples.part(index, count), *own)


class Draws:
    """Draws the rows of each step."""

    def __init__(self, prepared: Prepared, own_captions: int, recipe: Recipe, side: int, dice: torch.Generator) -> None:
        """own_captions: how many of the texts are the subject's. side: native pixels."""
        self._subject, self._regular = prepared.subject, prepared.regular
        self._own_captions, self._recipe, self._side, self._dice = own_captions, recipe, side, dice

    def draw(self, count: int) -> list[tuple[float, Batch]]:
        """The weighted parts of one step's loss, `count` rows each (eq. 8).

        One part of weight 1, with each row from D_s or, with the probability that follows from beta, from D_r; or both
        parts with the weights 1 and beta.
        """
        recipe = self._recipe
        samples = self._draw_subject(count)
        if self._regular is None:
            return [(1.0, self._finish(samples))]
        other = self._draw_rows(self._regular, count)
        if recipe.beta_as == "loss":
            return [(1.0, self._finish(samples)), (recipe.beta, self._finish(other))]
        import torch

        mixed = samples.mix_in(torch.rand(count, generator=self._dice) < recipe.regular_share, other)
        return [(1.0, self._finish(mixed))]

    def _draw_rows(self, samples: Samples, count: int) -> Samples:
        import torch

        return samples.rows(torch.randint(len(samples), (count,), generator=self._dice))

    def _draw_subject(self, count: int) -> Samples:
        import torch

        samples = self._draw_rows(self._subject, count)
        if self._own_captions < 2:
            return samples
        named = torch.rand(count, generator=self._dice) < self._recipe.captioned
        further = torch.randint(1, self._own_captions, (count,), generator=self._dice)
        return replace(samples, captions=torch.where(named, further, samples.captions))

    def _finish(self, samples: Samples) -> Batch:
        """With noise, times and sizes. Times are uniform, and stratified over the rows: the loss varies less."""
        import torch

        count, dice = len(samples), self._dice
        noise = torch.randn(samples.latents.shape, generator=dice)
        places = (torch.randperm(count, generator=dice) + torch.rand(count, generator=dice)) / count
        t = (places * 1000).long().clamp_(max=999)
        return Batch(samples, noise, t, self._tell_sizes(samples))

    def _tell_sizes(self, samples: Samples) -> Tensor:
        import torch

        return vary_sizes(samples.sharp, torch.rand(len(samples), generator=self._dice), self._side)


def vary_sizes(sharp: Tensor, drawn: Tensor, side: int) -> Tensor:
    """SDXL's time ids (N, 6): original size, no crop offset, target size.

    A view scaled up keeps its true size; a sharp one varies. The loop asks for up to 1.5 times the size, so larger ones
    must not be news to what is learnt.

    sharp: sides (N,) in pixels. drawn: (N,), from 0 to 1. side: of the base, in pixels.
    """
    import torch

    larger = side * (1 + 0.6 * drawn)
    size = torch.where(sharp < side, sharp, larger).round()
    zero, full = torch.zeros_like(size), torch.full_like(size, float(side))
    return torch.stack([size, size, zero, zero, full, full], 1)
