"""A reader of things' parts in latents, and what the denoiser learns from it.

As with the forms of decals (`forms.py`): the error of the noise asks little for a part's colour or pattern where nearly
all is noise, which is where they are decided. A small network learns to read everything that a caption can say of a
thing off clean, noisy and blurred latents; then it reads what the denoiser makes of a noisy picture, and the
cross-entropy of what the caption does say joins the loss.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from dreammix_trt.trainer.micro.data import Latents, Told
from dreammix_trt.trainer.micro.forms import make_block
from dreammix_trt.trainer.micro.loop import save_atomic, take_step
from dreammix_trt.trainer.micro.networks import noise_table
from dreammix_trt.trainer.micro.reading import QUESTIONS, UNASKED

log = logging.getLogger(__name__)

_SIDE: Final = 16  # cells, to which a thing's box is scaled
_MARGIN: Final = 0.06  # of the box's sides, around it
_WEIGHT: Final = 0.03
_FROM: Final = 150  # timestep: below, the noisy picture itself shows the parts
_TO: Final = 820  # timestep: from there on the picture is a guess, and the gradient of one bad guess drowns all others
_NOISE: Final = 0.6
_SMOOTHED: Final = 0.4  # share of the latents that are blurred once or more
_HELD_OUT: Final = 12  # one thing in so many tests the reader


class PartReader(torch.nn.Module):  # type: ignore[misc]
    """Latents (N, 4, 16, 16) of a thing -> logits (N, answers) for each of QUESTIONS. 0.5 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((4, 64, 1), (64, 64, 1), (64, 96, 2), (96, 96, 1), (96, 128, 2), (128, 128, 1))
        self.body = torch.nn.Sequential(*(make_block(*each) for each in widths))
        self._counts = [len(words) for words in QUESTIONS.values()]
        self.out = torch.nn.Linear(128 * (_SIDE // 4) ** 2, sum(self._counts))

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits: tuple[torch.Tensor, ...] = self.out(self.body(latents).flatten(1)).split(self._counts, 1)
        return logits


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
    reader, rng = PartReader(), np.random.default_rng([seed, 71])
    optimiser = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=max(steps, 4))
    count = latents.count_things()
    held = np.arange(0, count, _HELD_OUT)
    shown = np.setdiff1d(np.arange(count), held)
    for step in range(steps if len(shown) else 0):
        pictures, told = latents.read_things(rng.choice(shown, batch))
        sides = (told.boxes[:, 2:] - told.boxes[:, :2]).repeat(1, 2)
        moved = told.boxes + sides * torch.from_numpy(rng.uniform(-0.08, 0.08, (batch, 4)).astype(np.float32))
        crops = _spoil(frame_things(pictures, moved), rng)
        loss = _ask_all(reader(crops), told.answers, smoothing=0.05) / len(QUESTIONS)
        take_step(loss, optimiser, schedule)
        if step % 250 == 249:
            log.info("parts: step %d, loss %.4f", step + 1, loss.item())
    save_atomic(reader.state_dict(), work / "parts.pt")
    return _test_reader(reader, latents, held) if len(held) else {}


def _spoil(crops: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Some blurred, once to three times, and most with noise."""
    dice = torch.from_numpy(rng.random((4, len(crops)), np.float32))[:, :, None, None, None]
    blurred = crops
    for times in range(3):
        smooth = functional.avg_pool2d(functional.pad(blurred, (1, 1, 1, 1), mode="replicate"), 3, 1)
        blurred = torch.where(dice[3] * 3 >= times, smooth, blurred)
    crops = torch.where(dice[2] < _SMOOTHED, blurred, crops)
    return crops + torch.randn_like(crops) * dice[0] * _NOISE * (dice[1] < 0.7)


def _ask_all(given: tuple[torch.Tensor, ...], answers: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """The sum over the questions of their mean cross-entropies; a question that nobody asks counts for nothing."""
    losses = [
        functional.cross_entropy(logits, answers[:, n], ignore_index=UNASKED, label_smoothing=smoothing)
        for n, logits in enumerate(given)
        if bool((answers[:, n] != UNASKED).any())
    ]
    return torch.stack(losses).sum() if losses else given[0].new_zeros(())


@torch.no_grad()  # type: ignore[untyped-decorator]
def _test_reader(reader: PartReader, latents: Latents, held: NDArray[Any]) -> dict[str, float]:
    pictures, told = latents.read_things(held)
    given = reader(frame_things(pictures, told.boxes))
    shares: dict[str, float] = {}
    for n, (name, logits) in enumerate(zip(QUESTIONS, given, strict=True)):
        asked = told.answers[:, n] != UNASKED
        if bool(asked.any()):
            shares[name] = float((logits.argmax(1) == told.answers[:, n])[asked].float().mean())
    return shares


class PartLoss:
    """What a trained reader says of denoised latents."""

    def __init__(self, work: Path, device: str) -> None:
        self._reader = PartReader().to(device)
        self._reader.load_state_dict(torch.load(work / "parts.pt", map_location=device, weights_only=True))
        self._reader.requires_grad_(False)
        self._signal, self._spread = (table.to(device) for table in noise_table())

    def measure(self, noisy: torch.Tensor, predicted: torch.Tensor, steps: torch.Tensor, told: Told) -> torch.Tensor:
        """The weighted cross-entropy of all that captions say; 0 where they say nothing.

        noisy, predicted: latents and noise (N, 4, h, w). steps: int64 (N,).
        """
        rows = torch.nonzero((steps >= _FROM) & (steps < _TO))[:, 0]
        if not len(rows):
            return predicted.new_zeros(())
        at = steps[rows][:, None, None, None]
        clean = (noisy[rows] - self._spread[at] * predicted[rows].float()) / self._signal[at]
        return _WEIGHT * _ask_all(self._reader(frame_things(clean, told.boxes[rows])), told.answers[rows])
