"""Encoded training views, a row each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from dreammix_trt.trainer.data import TrainingView, latent_mask

if TYPE_CHECKING:
    from torch import Tensor

    from dreammix_trt.trainer.networks import Vae


@dataclass(frozen=True)
class Samples:
    """latents, masked (N, 4, h, w); mask (N, 1, h, w); sharp: sides (N,); captions: their numbers (N,)."""

    latents: Tensor
    masked: Tensor
    mask: Tensor
    sharp: Tensor
    captions: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def rows(self, chosen: Tensor) -> Samples:
        """Those with these numbers; chosen: int64 (M,)."""
        return Samples(*(value[chosen] for value in self._values()))

    def mix_in(self, where: Tensor, other: Samples) -> Samples:
        """These with the rows of `other` where `where`, bool (N,), is true."""
        import torch

        pairs = zip(other._values(), self._values(), strict=True)
        return Samples(*(torch.where(where.reshape(-1, *(1,) * (a.ndim - 1)), a, b) for a, b in pairs))

    def part(self, index: int, count: int) -> Samples:
        """Part number `index` of `count` equal ones."""
        return Samples(*(value.chunk(count)[index] for value in self._values()))

    def _values(self) -> tuple[Tensor, ...]:
        return self.latents, self.masked, self.mask, self.sharp, self.captions


BATCH = 8  # views that are in memory at a time


def encode_views(vae: Vae, views: Iterable[TrainingView]) -> Samples:
    """Views as the UNet sees them, under caption 0. They are taken a few at a time."""
    import torch

    drawn = iter(views)
    parts = [_encode(vae, some)._values() for some in iter(lambda: list(islice(drawn, BATCH)), [])]
    return Samples(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _encode(vae: Vae, views: Sequence[TrainingView]) -> Samples:
    import torch

    from dreammix_trt.trainer.networks import to_latent_range

    pictures = to_latent_range([view.image for view in views])
    holes = np.stack([view.hole for view in views])[:, None]
    cells = torch.from_numpy(np.stack([latent_mask(view.hole) for view in views]))[:, None]
    sharp = torch.tensor([float(view.sharp_side) for view in views])
    # the hole is mid grey, as the head saw it in the base's own training
    masked = vae.encode(np.where(holes, np.float32(0), pictures))
    return Samples(vae.encode(pictures), masked, cells, sharp, torch.zeros(len(views), dtype=torch.long))
