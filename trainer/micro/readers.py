"""What the readers of forms and of parts share: a small network on latents, its training, and its loss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from dreammix_trt.trainer.micro.loop import save_atomic, take_step
from dreammix_trt.trainer.micro.networks import noise_table
from dreammix_trt.trainer.micro.reading import UNASKED

log = logging.getLogger(__name__)

WEIGHT: Final = 0.03  # of a reader's cross-entropy beside the error of the noise
_FROM: Final = 150  # timestep: below, the noisy picture itself shows what is asked for
_TO: Final = 820  # timestep: from there on the picture is a guess, and the gradient of one bad guess drowns all others
_NOISE: Final = 0.6
_HELD_OUT: Final = 12  # one in so many tests the reader


class LatentReader(torch.nn.Module):  # type: ignore[misc]
    """Latents (N, 4, side, side) -> logits (N, answers). 0.4 M parameters and more."""

    def __init__(self, side: int, answers: int) -> None:
        super().__init__()
        widths = ((4, 64, 1), (64, 64, 1), (64, 96, 2), (96, 96, 1), (96, 128, 2), (128, 128, 1))
        self.body = torch.nn.Sequential(*(_make_block(*each) for each in widths))
        self.out = torch.nn.Linear(128 * (-(-side // 4)) ** 2, answers)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.out(self.body(latents).flatten(1))
        return logits


def _make_block(before: int, after: int, stride: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Conv2d(before, after, 3, stride, 1), torch.nn.GroupNorm(8, after), torch.nn.SiLU()
    )


def fit_reader(
    reader: LatentReader,
    count: int,
    steps: int,
    batch: int,
    rng: np.random.Generator,
    loss_of: Callable[[NDArray[Any]], torch.Tensor],
    path: Path,
) -> NDArray[Any]:
    """Train a reader on `count` examples and write it; returns the numbers of those that were held out.

    loss_of: called with the numbers of a batch.
    """
    optimiser = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=max(steps, 4))
    held = np.arange(0, count, _HELD_OUT)
    shown = np.setdiff1d(np.arange(count), held)
    for step in range(steps if len(shown) else 0):
        loss = loss_of(rng.choice(shown, batch))
        take_step(loss, optimiser, schedule)
        if step % 250 == 249:
            log.info("%s: step %d, loss %.4f", path.stem, step + 1, loss.item())
    save_atomic(reader.state_dict(), path)
    return held


def blur(latents: torch.Tensor) -> torch.Tensor:
    """The means of 3x3 cells."""
    return functional.avg_pool2d(functional.pad(latents, (1, 1, 1, 1), mode="replicate"), 3, 1)


def add_noise(latents: torch.Tensor, much: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Most with noise. much, chosen: uniform in 0..1, of a row each."""
    return latents + torch.randn_like(latents) * much * _NOISE * (chosen < 0.7)


def ask_all(given: Sequence[torch.Tensor], answers: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """The sum over the questions of their mean cross-entropies; a question that nobody asks counts for nothing."""
    losses = [
        functional.cross_entropy(logits, answers[:, n], ignore_index=UNASKED, label_smoothing=smoothing)
        for n, logits in enumerate(given)
        if bool((answers[:, n] != UNASKED).any())
    ]
    return torch.stack(losses).sum() if losses else given[0].new_zeros(())


class Denoised:
    """A trained reader, and what it sees of noisy latents."""

    def __init__(self, reader: LatentReader, path: Path, device: str) -> None:
        self.reader = reader.to(device)
        self.reader.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        self.reader.requires_grad_(False)
        self._signal, self._spread = (table.to(device) for table in noise_table())

    def can_read(self, steps: torch.Tensor) -> torch.Tensor:
        """At which timesteps, int64 (N,), a reader is asked; bool (N,)."""
        return (steps >= _FROM) & (steps < _TO)

    def clean(self, noisy: torch.Tensor, predicted: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """What latents (N, 4, h, w) are without the predicted noise."""
        at = steps[:, None, None, None]
        return (noisy - self._spread[at] * predicted.float()) / self._signal[at]
