"""How long, how gently and on what a token adapter is trained, after DreamInpainter (Xie et al. 2023).

docs/tokens.md says which of this is the paper's and which is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from dreammix_trt.core.attributes import with_article
from dreammix_trt.core.errors import InputError
from dreammix_trt.trainer.data import CROP_SHARE
from dreammix_trt.trainer.recipes import check_range, warm_then_cosine

SMALL_SIDE = 256
_MOST = 10_000_000
#: the paper's number of tokens
USUAL_TOKENS: Final = 24
_USUAL: Final = 0.5  # of the batches have that many


@dataclass(frozen=True)
class TokenRecipe:
    """Raises InputError for a value out of range.

    steps: of the optimizer. batch: rows in memory at a time; accumulate: such batches in a step.
    rank: of the LoRA factors.
    objects: how many are rendered where no folder is given.
    views: of an object, at least: pictures to paint it in, and as many references. crop_share: of them, that are crops
        as the local stage makes them; the others show the whole photograph.
    decoupling: share of the rows that take the regularised path: all of the picture is hole, and the text is its
        caption. The others: the hole is over the object, and the text is its class.
    no_text: share of the rows without text, so that guidance has its other branch.
    words: share of the rows that learn from the base when it is told of the object in words, instead of from the noise:
        see `lesson`. 0 for the paper's loss alone.
    emphasis: what words do to a prediction counts so many times, as under that guidance.
    heaviest: a row's error weighs 1 / alpha-bar, at most this: the error of the velocity and not of the noise. Which
        part has which colour is decided where nearly all is noise, and there the noise is easy to predict without
        knowing it.
    warmup: steps in which the learning rate rises from zero; then it falls in half a cosine.
    betas, decay: of AdamW.
    """

    steps: int
    learning_rate: float
    batch: int
    rank: int
    objects: int
    views: int
    accumulate: int = 1
    crop_share: float = CROP_SHARE
    decoupling: float = 0.5
    no_text: float = 0.1
    words: float = 0.0
    emphasis: float = 3.0
    heaviest: float = 10.0
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    decay: float = 0.01
    checkpoint_every: int = 200
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "objects"):
            check_range(name, getattr(self, name), 1, _MOST)
        for name in ("warmup", "checkpoint_every"):
            check_range(name, getattr(self, name), 0, _MOST)
        check_range("rank", self.rank, 1, 256)
        check_range("views", self.views, 1, 64)
        for name in ("crop_share", "decoupling", "no_text", "words"):
            check_range(name, getattr(self, name), 0, 1)
        check_range("emphasis", self.emphasis, 0, 100)
        check_range("heaviest", self.heaviest, 1, 1000)
        if not (math.isfinite(self.learning_rate) and 0 < self.learning_rate <= 1):
            raise InputError(f"learning rate is {self.learning_rate}; it must be above 0 and at most 1")

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, 0-based."""
        return self.learning_rate * warm_then_cosine(step, self.steps, self.warmup)


def draw_count(rng: np.random.Generator, most: int) -> int:
    """How many tokens a batch has: half of the time the paper's 24, else 1 to all, so that a request may have any."""
    return min(USUAL_TOKENS, most) if rng.random() < _USUAL else int(rng.integers(1, most + 1))


def name_class(class_name: str) -> str:
    """The text of the main path."""
    return f"a photo of {with_article(class_name)}"


#: for the embedded base, within an hour on one core, a third of which is rendering and encoding
SMALL = TokenRecipe(
    steps=5000, learning_rate=2e-3, batch=8, rank=16, objects=2500, views=2, words=0.9, emphasis=4.0
)  # fmt: skip
#: nothing was trained at full size: the paper tells neither steps nor batch nor rate
FULL = TokenRecipe(
    steps=50_000, learning_rate=1e-4, batch=1, accumulate=16, rank=16, objects=1, views=1, warmup=500,
    checkpoint_every=500, gradient_checkpointing=True,
)  # fmt: skip


def recipe_for(native_side: int) -> TokenRecipe:
    """What suits a base that was trained at so many pixels."""
    return SMALL if native_side <= SMALL_SIDE else FULL
