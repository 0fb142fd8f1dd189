"""How long, how gently and on what each part of ASUKA is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dreammix_trt.core.errors import InputError
from dreammix_trt.trainer.recipes import check_range, warm_then_cosine

Part = Literal["prior", "align", "decoder"]
PARTS: tuple[Part, ...] = ("prior", "align", "decoder")
SMALL_SIDE = 256
_MOST = 10_000_000


@dataclass(frozen=True)
class AsukaRecipe:
    """Raises InputError for a value out of range.

    steps: of the optimizer. batch: pictures in memory at a time; accumulate: such batches in a step.
    side: of the pictures in pixels, a multiple of 8. crop: the least and the most that a picture shows of the one it is
        cut from, as shares of its largest square by area.
    warmup: steps in which the learning rate rises from zero; then it falls in half a cosine.
    betas, decay: of AdamW.
    revealed: of the alignment: how often the prior is told of an empty hole, at first and at last; reveal_steps: until
        it is at the latter.
    rooms: how many are rendered where no folder of pictures is given.
    heaviest: of the alignment: a row's error weighs 1 / alpha-bar, at most this: the error of the velocity and not of
        the noise. Whether a thing stands in the hole is decided where nearly all is noise. 1: all rows weigh alike, as
        in the paper.
    jitter: of the decoder: how far colours are moved, as a share of the paper's amounts.
    guess_times: of the decoder: the timesteps that pictures are guessed from, the first and the one after the last.
    views: of the alignment: pictures with holes that are encoded before the first step and drawn from ever after; 0:
        each is drawn anew and encoded in its step.
    """

    steps: int
    learning_rate: float
    batch: int
    side: int
    accumulate: int = 1
    crop: tuple[float, float] = (1.0, 1.0)
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    decay: float = 0.05
    revealed: tuple[float, float] = (1.0, 0.1)
    reveal_steps: int = 2000
    heaviest: float = 1.0
    jitter: float = 1.0
    guess_times: tuple[int, int] = (500, 900)
    rooms: int = 1200
    views: int = 0
    checkpoint_every: int = 200
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "reveal_steps", "batch", "accumulate", "rooms"):
            check_range(name, getattr(self, name), 1, _MOST)
        for name in ("warmup", "views", "checkpoint_every"):
            check_range(name, getattr(self, name), 0, _MOST)
        check_range("side", self.side, 64, 4096)
        if self.side % 64:
            raise InputError(f"side is {self.side}; it must be a multiple of 64, for the base's own cells")
        if not (math.isfinite(self.learning_rate) and 0 < self.learning_rate <= 1):
            raise InputError(f"learning rate is {self.learning_rate}; it must be above 0 and at most 1")
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise InputError(f"crop is {self.crop[0]:g} to {self.crop[1]:g}; give 0 to 1, the smaller one first")
        if not 0 <= self.guess_times[0] < self.guess_times[1] <= 1000:
            first, last = self.guess_times
            raise InputError(f"guess times are {first} to {last}; give timesteps of 0 to 1000, the smaller one first")
        if not all(0 <= share <= 1 for share in self.revealed):
            raise InputError(f"revealed is {self.revealed[0]:g} to {self.revealed[1]:g}; give shares of 0 to 1")

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, 0-based."""
        return self.learning_rate * warm_then_cosine(step, self.steps, self.warmup)

    def revealed_at(self, step: int) -> float:
        """With which probability a row's prior is told of an empty hole at a step, 0-based."""
        first, last = self.revealed
        return first + (last - first) * min(1.0, step / self.reveal_steps)


#: for the embedded base: within an hour on two cores, the decoder beside the other two
SMALL: dict[Part, AsukaRecipe] = {
    "prior": AsukaRecipe(steps=2000, learning_rate=1.5e-3, batch=32, side=256, warmup=200),
    "align": AsukaRecipe(
        steps=1600, learning_rate=1e-3, batch=8, side=256, warmup=50, revealed=(1.0, 1.0), decay=0.01, views=1600,
        heaviest=25.0,
    ),
    "decoder": AsukaRecipe(
        steps=4000, learning_rate=2e-4, batch=4, side=128, crop=(0.25, 0.25), betas=(0.9, 0.999), decay=0.01,
        jitter=0.33, guess_times=(200, 600),
    ),
}  # fmt: skip
# The papers' numbers where they stand there. The prior: MAE-FAR's recipe (1.5e-4 for each 256 of the batch) at ASUKA's
# batch of 1024, 300 epochs of Places2. The alignment: the paper prints a learning rate of 5e-2, with which one step of
# AdamW moves a weight further than it is large at first; this rate is ours, as are batch and length, which it does not
# tell. The decoder: 50,000 steps of 40 pictures at 8e-5.
FULL: dict[Part, AsukaRecipe] = {
    "prior": AsukaRecipe(
        steps=500_000, learning_rate=6e-4, batch=64, accumulate=16, side=256, crop=(0.2, 1.0), warmup=17_000,
        checkpoint_every=1000,
    ),
    "align": AsukaRecipe(
        steps=50_000, learning_rate=1e-4, batch=4, accumulate=8, side=512, crop=(0.5, 1.0), warmup=500, decay=0.01,
        checkpoint_every=500, gradient_checkpointing=True,
    ),
    "decoder": AsukaRecipe(
        steps=50_000, learning_rate=8e-5, batch=4, accumulate=10, side=512, crop=(0.25, 1.0), betas=(0.9, 0.99),
        warmup=0, decay=0.0, checkpoint_every=500,
    ),
}  # fmt: skip


def recipe_for(part: Part, native_side: int) -> AsukaRecipe:
    """What suits a part, for a base that was trained at so many pixels."""
    return (SMALL if native_side <= SMALL_SIDE else FULL)[part]
