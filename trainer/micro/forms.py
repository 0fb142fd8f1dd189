"""A reader of decals' forms in latents, and what the denoiser learns from it.

A decal's form is decided in some thirty cells of the latents, and the error of the noise hardly asks for it: after
11,000 steps of it a wrong form in the caption cost 3.7 % more error at the middle noise levels, where a wrong colour
cost 9.6 %, and decals came out as patches. So a small network learns to read forms off clean, noisy and blurred
latents, and then reads what the denoiser makes of a noisy picture: the cross-entropy of the form that the caption names
joins the loss. (A classifier's gradient on the denoised picture is that of Dhariwal and Nichol, arXiv:2105.05233,
section 4, taken while training instead of while sampling.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from dreammix_trt.trainer.micro.data import FORMS, Asked, Latents
from dreammix_trt.trainer.micro.readers import WEIGHT, Denoised, LatentReader, add_noise, blur, fit_reader

_BLURRED: Final = 0.25


def train_form_reader(latents: Latents, steps: int, work: Path, seed: int, batch: int = 96) -> float | None:
    """Train a reader on the square scenes' decals and write it to ``work/forms.pt``.

    Returns the share that it reads right of clean decals it was not trained on; None where there are none.
    """
    torch.manual_seed(seed)
    reader, rng = LatentReader(latents.reading, len(FORMS)), np.random.default_rng([seed, 70])

    def loss_of(numbers: NDArray[Any]) -> torch.Tensor:
        crops, forms = latents.crop_decals(numbers, rng.uniform(-2, 2, (batch, 2)))
        dice = torch.from_numpy(rng.random((3, batch), np.float32))[:, :, None, None, None]
        crops = add_noise(torch.where(dice[2] < _BLURRED, blur(crops), crops), dice[0], dice[1])
        return functional.cross_entropy(reader(crops), forms, label_smoothing=0.05)

    held = fit_reader(reader, latents.count_decals(), steps, batch, rng, loss_of, work / "forms.pt")
    if not len(held):
        return None
    with torch.no_grad():
        crops, forms = latents.crop_decals(held, np.zeros((len(held), 2)))
        return float((reader(crops).argmax(1) == forms).float().mean())


class FormLoss:
    """What a trained reader says of denoised latents. side: of what it sees, in cells."""

    def __init__(self, work: Path, side: int, device: str) -> None:
        self._denoised, self._side = Denoised(LatentReader(side, len(FORMS)), work / "forms.pt", device), side

    def measure(self, noisy: torch.Tensor, predicted: torch.Tensor, steps: torch.Tensor, asked: Asked) -> torch.Tensor:
        """The weighted cross-entropy of the forms that were asked for; 0 where none was.

        noisy, predicted: latents and noise (N, 4, h, w). steps: int64 (N,).
        """
        inside = self._denoised.can_read(steps[asked.rows])
        rows, corners, forms = asked.rows[inside], asked.corners[inside], asked.forms[inside]
        if not len(rows):
            return predicted.new_zeros(())
        clean, side = self._denoised.clean(noisy[rows], predicted[rows], steps[rows]), self._side
        crops = [part[:, y : y + side, x : x + side] for part, (y, x) in zip(clean, corners.tolist(), strict=True)]
        return WEIGHT * functional.cross_entropy(self._denoised.reader(torch.stack(crops)), forms)
