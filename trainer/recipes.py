"""How long, how gently and on what a base's LoRA is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from dreammix_trt.core.errors import InputError
from dreammix_trt.trainer.data import CROP_SHARE
from dreammix_trt.trainer.losses import regular_probability

BetaAs = Literal["probability", "loss"]


@dataclass(frozen=True)
class Recipe:
    """What suits a base: small ones train for less time with larger steps and batches.

    rank: of the LoRA's factors.
    batch: pictures that a device holds at a time. accumulate: such batches whose gradients make one step.
    beta: weight of the regular pictures (eq. 8). beta_as: "probability": each sample is a regular one with the
        probability `beta / (1 + beta)`, as in the authors' code; "loss": each step sums both losses, as in the paper,
        and computes twice as much.
    regular_pictures: how many of them the base paints first, where no folder of them is given.
    views: training views drawn of all photographs together. crop_share: of them, that are crops as the local stage
        makes them; the others show the whole photograph.
    constant: share of the steps at the full learning rate, which then falls to zero in a straight line (1.0: never, as
        in the reference).
    captioned: share of the subject's samples that are trained under one of the further captions, where there are some.
    checkpoint_every: steps between two checkpoints; 0: none, and nothing is kept beside the LoRA.
    gradient_checkpointing: whether the UNet's inner values are computed twice instead of kept.
    """

    steps: int
    learning_rate: float
    batch: int
    views: int
    beta: float
    regular_pictures: int
    accumulate: int = 1
    rank: int = 4
    beta_as: BetaAs = "probability"
    crop_share: float = CROP_SHARE
    constant: float = 1.0
    captioned: float = 0.5
    checkpoint_every: int = 0
    gradient_checkpointing: bool = False

    @property
    def regular_share(self) -> float:
        """The probability that a sample is a regular one, where beta is one."""
        return regular_probability(self.beta)

    def check(self) -> None:
        """Raise InputError for a value out of range."""
        regular_probability(self.beta)
        if self.beta_as not in get_args(BetaAs):
            raise InputError(f"beta_as is {self.beta_as!r}; choose one of {', '.join(get_args(BetaAs))}")
        if not 0 <= self.crop_share <= 1:
            raise InputError(f"crop share is {self.crop_share}; it must be 0 to 1")
        for name in ("batch", "accumulate", "views"):
            if not 1 <= getattr(self, name) <= 4096:
                raise InputError(f"{name} is {getattr(self, name)}; it must be 1 to 4096")
        if self.checkpoint_every < 0:
            raise InputError(f"checkpoint_every is {self.checkpoint_every}; give a number of steps, or 0 for none")

    def rate_at(self, step: int, steps: int) -> float:
        """The factor of the learning rate at a step, 0-based."""
        left = (steps - step) / steps
        return 1.0 if self.constant >= 1 else min(1.0, left / (1 - self.constant))


# Of the embedded model's first edition: without regular pictures "a green sks mug" broke up into the subject's own
# tones, with three in ten the subject itself was learnt too weakly. Of the second: after 400 steps feet and decals
# still took any colour, after 1000 "a photo of a sks mug" kept all parts (four rooms). Rank 16 keeps more of a
# subject's parts than 4, and so do 1600 steps than 1000 (docs/evidence.md, the trainer's beta, rank and steps).
SMALL = Recipe(
    steps=1600, learning_rate=2e-3, batch=4, views=60, beta=1 / 9, regular_pictures=12, rank=16, constant=0.5
)
# The reference's numbers: one picture at a time, four to a step, a share of 0.3, a checkpoint every 250 steps.
FULL = Recipe(
    steps=1000,
    learning_rate=1e-4,
    batch=1,
    accumulate=4,
    views=60,
    beta=3 / 7,
    regular_pictures=24,
    checkpoint_every=250,
    gradient_checkpointing=True,
)


def warm_then_cosine(step: int, steps: int, warmup: int) -> float:
    """The factor of the learning rate at a step, 0-based: it rises from zero, then falls in half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise InputError for a value out of range, or not finite. name: of the field."""
    if not low <= value <= high:
        raise InputError(f"{name.replace('_', ' ')} is {value}; it must be {low} to {high}")


def recipe_for(native_side: int) -> Recipe:
    """What suits a base that was trained at so many pixels."""
    return SMALL if native_side <= 256 else FULL
