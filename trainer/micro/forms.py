"""A reader of decals' forms in latents, and what the denoiser learns from it.

A decal's form is decided in some thirty cells of the latents, and the error of the noise hardly asks for it: after
11,000 steps of it a wrong form in the caption cost 3.7 % more error at the middle noise levels, where a wrong colour
cost 9.6 %, and decals came out as patches. So a small network learns to read forms off clean, noisy and blurred
latents, and then reads what the denoiser makes of a noisy picture: the cross-entropy of the form that the caption names
joins the loss. (A classifier's gradient on the denoised picture is that of Dhariwal and Nichol, arXiv:2105.05233,
section 4, taken while training instead of while sampling.)
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch.nn import functional

from dreammix_trt.trainer.micro.data import FORMS, Asked, Latents
from dreammix_trt.trainer.micro.loop import save_atomic, take_step
from dreammix_trt.trainer.micro.networks import noise_table

log = logging.getLogger(__name__)

_WEIGHT: Final = 0.03
_FROM: Final = 150  # timestep: below, the noisy picture itself shows the form
_TO: Final = 820  # timestep: from there on nothing can be told of it
_NOISE: Final = 0.6
_BLURRED: Final = 0.25
_HELD_OUT: Final = 12  # one decal in so many tests the reader


class FormReader(torch.nn.Module):  # type: ignore[misc]
    """Latents (N, 4, side, side) around a decal -> logits (N, forms). 0.4 M parameters."""

    def __init__(self, side: int) -> None:
        super().__init__()
        widths = ((4, 64, 1), (64, 64, 1), (64, 96, 2), (96, 96, 1), (96, 128, 2), (128, 128, 1))
        self.body = torch.nn.Sequential(*(make_block(*each) for each in widths))
        self.out = torch.nn.Linear(128 * (-(-side // 4)) ** 2, len(FORMS))

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.out(self.body(latents).flatten(1))
        return logits


def make_block(before: int, after: int, stride: int) -> torch.nn.Sequential:
    """A convolution of a reader, with its norm."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(before, after, 3, stride, 1), torch.nn.GroupNorm(8, after), torch.nn.SiLU()
    )


def train_form_reader(latents: Latents, steps: int, work: Path, seed: int, batch: int = 96) -> float | None:
    """Train a reader on the square scenes' decals and write it to ``work/forms.pt``.

    Returns the share that it reads right of clean decals it was not trained on; None where there are none.
    """
    torch.manual_seed(seed)
    reader, rng = FormReader(latents.reading), np.random.default_rng([seed, 70])
    optimiser = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=max(steps, 4))
    count = latents.count_decals()
    held = np.arange(0, count, _HELD_OUT)
    shown = np.setdiff1d(np.arange(count), held)
    for step in range(steps if len(shown) else 0):
        crops, forms = latents.crop_decals(rng.choice(shown, batch), rng.uniform(-2, 2, (batch, 2)))
        dice = torch.from_numpy(rng.random((3, batch), np.float32))[:, :, None, None, None]
        blurred = functional.avg_pool2d(functional.pad(crops, (1, 1, 1, 1), mode="replicate"), 3, 1)
        crops = torch.where(dice[2] < _BLURRED, blurred, crops)
        crops = crops + torch.randn_like(crops) * dice[0] * _NOISE * (dice[1] < 0.7)
        loss = functional.cross_entropy(reader(crops), forms, label_smoothing=0.05)
        take_step(loss, optimiser, schedule)
        if step % 250 == 249:
            log.info("forms: step %d, loss %.4f", step + 1, loss.item())
    save_atomic(reader.state_dict(), work / "forms.pt")
    if not len(held):
        return None
    with torch.no_grad():
        crops, forms = latents.crop_decals(held, np.zeros((len(held), 2)))
        return float((reader(crops).argmax(1) == forms).float().mean())


class FormLoss:
    """What a trained reader says of denoised latents. side: of what it sees, in cells."""

    def __init__(self, work: Path, side: int, device: str) -> None:
        self._reader, self._side = FormReader(side).to(device), side
        self._reader.load_state_dict(torch.load(work / "forms.pt", map_location=device, weights_only=True))
        self._reader.requires_grad_(False)
        self._signal, self._spread = (table.to(device) for table in noise_table())

    def measure(self, noisy: torch.Tensor, predicted: torch.Tensor, steps: torch.Tensor, asked: Asked) -> torch.Tensor:
        """The weighted cross-entropy of the forms that were asked for; 0 where none was.

        noisy, predicted: latents and noise (N, 4, h, w). steps: int64 (N,).
        """
        inside = (steps[asked.rows] >= _FROM) & (steps[asked.rows] < _TO)
        rows, corners, forms = asked.rows[inside], asked.corners[inside], asked.forms[inside]
        if not len(rows):
            return predicted.new_zeros(())
        at = steps[rows][:, None, None, None]
        clean = (noisy[rows] - self._spread[at] * predicted[rows].float()) / self._signal[at]
        side = self._side
        crops = [part[:, y : y + side, x : x + side] for part, (y, x) in zip(clean, corners.tolist(), strict=True)]
        return _WEIGHT * functional.cross_entropy(self._reader(torch.stack(crops)), forms)
