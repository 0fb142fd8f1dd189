"""A reader of things' parts in latents, and what the denoiser learns from it.

As with the forms of decals (`forms.py`): the error of the noise asks little for a part's colour or pattern where nearly
all is noise, which is where they are decided. A small network learns to read everything that a caption can say of a
thing off clean, noisy and blurred latents; then it reads what the denoiser makes of a noisy picture, and the
cross-entropy of what the caption does say joins the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from dreammix_trt.trainer.micro.data import Latents, Told
from dreammix_trt.trainer.micro.readers import WEIGHT, Denoised, LatentReader, add_noise, ask_all, blur, fit_reader
from dreammix_trt.trainer.micro.reading import QUESTIONS, UNASKED

_SIDE: Final = 16  # cells, to which a thing's box is scaled
_MARGIN: Final = 0.06  # of the box's sides, around it
_SMOOTHED: Final = 0.4  # share of the latents that are blurred once or more
_ANSWERS: Final = [len(words) for words in QUESTIONS.values()]


def frame_things(latents: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """The things' boxes in latents (N, 4, h, w), scaled to (N, 4, 16, 16). boxes: (N, 4) in cells."""
    height, width = latents.shape[-2:]
    low, high = boxes[:, :2], boxes[:, 2:]
    middle, half = (low + high) / 2, (high - low) * (0.5 + _MARGIN)
    scale = torch.tensor([width, height], dtype=boxes.dtype, device=boxes.device)
    shift, stretch = 2 * middle / scale - 1, 2 * half / scale
    theta = torch.zeros(len(boxes), 2, 3, dtype=latents.dtype, device=latents.device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = stretch[:, 0], stretch[:, 1], shift
    grid = functional.affine_grid(theta, [len(boxes), latents.shape[1], _SIDE, _SIDE], align_corners=False)
    framed: torch.Tensor = functional.grid_sample(latents, grid, padding_mode="border", align_corners=False)
    return framed


def train_part_reader(latents: Latents, steps: int, work: Path, seed: int, batch: int = 96) -> dict[str, float]:
    """Train a reader on the square scenes' things and write it to ``work/parts.pt``.

    Returns for each question the share that it reads right of clean things it was not trained on.
    """
    torch.manual_seed(seed)
    reader, rng = _make_reader(), np.random.default_rng([seed, 71])

    def loss_of(numbers: NDArray[Any]) -> torch.Tensor:
        pictures, told = latents.read_things(numbers)
        sides = (told.boxes[:, 2:] - told.boxes[:, :2]).repeat(1, 2)
        moved = told.boxes + sides * torch.from_numpy(rng.uniform(-0.08, 0.08, (batch, 4)).astype(np.float32))
        crops = _spoil(frame_things(pictures, moved), rng)
        return ask_all(_read(reader, crops), told.answers, smoothing=0.05) / len(QUESTIONS)

    held = fit_reader(reader, latents.count_things(), steps, batch, rng, loss_of, work / "parts.pt")
    return _test_reader(reader, latents, held) if len(held) else {}


def _make_reader() -> LatentReader:
    return LatentReader(_SIDE, sum(_ANSWERS))


def _read(reader: LatentReader, crops: torch.Tensor) -> Sequence[torch.Tensor]:
    """The logits (N, answers) of each of QUESTIONS."""
    answers: Sequence[torch.Tensor] = reader(crops).split(_ANSWERS, 1)
    return answers


def _spoil(crops: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Some blurred, once to three times, and most with noise."""
    dice = torch.from_numpy(rng.random((4, len(crops)), np.float32))[:, :, None, None, None]
    blurred = crops
    for times in range(3):
        blurred = torch.where(dice[3] * 3 >= times, blur(blurred), blurred)
    return add_noise(torch.where(dice[2] < _SMOOTHED, blurred, crops), dice[0], dice[1])


@torch.no_grad()  # type: ignore[untyped-decorator]
def _test_reader(reader: LatentReader, latents: Latents, held: NDArray[Any]) -> dict[str, float]:
    pictures, told = latents.read_things(held)
    given = _read(reader, frame_things(pictures, told.boxes))
    shares: dict[str, float] = {}
    for n, (name, logits) in enumerate(zip(QUESTIONS, given, strict=True)):
        asked = told.answers[:, n] != UNASKED
        if bool(asked.any()):
            shares[name] = float((logits.argmax(1) == told.answers[:, n])[asked].float().mean())
    return shares


class PartLoss:
    """What a trained reader says of denoised latents."""

    def __init__(self, work: Path, device: str) -> None:
        self._denoised = Denoised(_make_reader(), work / "parts.pt", device)

    def measure(self, noisy: torch.Tensor, predicted: torch.Tensor, steps: torch.Tensor, told: Told) -> torch.Tensor:
        """The weighted cross-entropy of all that captions say; 0 where they say nothing.

        noisy, predicted: latents and noise (N, 4, h, w). steps: int64 (N,).
        """
        rows = torch.nonzero(self._denoised.can_read(steps))[:, 0]
        if not len(rows):
            return predicted.new_zeros(())
        clean = self._denoised.clean(noisy[rows], predicted[rows], steps[rows])
        given = _read(self._denoised.reader, frame_things(clean, told.boxes[rows]))
        return WEIGHT * ask_all(given, told.answers[rows])
