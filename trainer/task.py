"""What a training is asked for, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import InputError
from dreammix_trt.trainer.data import article
from dreammix_trt.trainer.losses import loss_weights
from dreammix_trt.trainer.photographs import PhotographFile
from dreammix_trt.trainer.recipes import Recipe

MOST_RANK = 256


@dataclass(frozen=True)
class Names:
    """What the subject is called: its token and class, and the captions that hold the token."""

    token: str
    class_name: str
    prompt: str
    captions: tuple[str, ...]

    @classmethod
    def of(cls, token: str, class_name: str, prompt: str | None, captions: Sequence[str]) -> Names:
        """With the usual prompt where none is given. Raises InputError for a caption without the token."""
        prompt = (prompt or f"a photo of {article(token)} {token} {class_name}").strip()
        names = cls(token, class_name, prompt, tuple(caption.strip() for caption in captions))
        for text in names.prompts:
            if token not in text.lower().split():
                raise InputError(f"the prompt {text!r} lacks the token {token!r}; without it the subject has no name")
        return names

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt, then the further captions."""
        return self.prompt, *self.captions


@dataclass(frozen=True)
class Task:
    """A subject to learn on a base; loss: the name of one."""

    base: BaseFiles
    photographs: Sequence[PhotographFile]
    names: Names
    recipe: Recipe
    rank: int
    steps: int
    learning_rate: float
    loss: str
    seed: int


def check_options(
    class_name: str,
    token: str,
    loss: str,
    rank: int,
    steps: int | None,
    rate: float | None,
    seed: int,
    threads: int | None,
) -> None:
    """Raise InputError for what no training can have, before anything is read."""
    loss_weights(loss)
    if not class_name:
        raise InputError("the class name is empty; say what the subject is, for example: mug")
    if not token or len(token.split()) != 1:
        raise InputError(f"the token {token!r} must be one word, for example: sks")
    if not 1 <= rank <= MOST_RANK:
        raise InputError(f"rank is {rank}; it must be 1 to {MOST_RANK}")
    if steps is not None and not 1 <= steps <= 100_000:
        raise InputError(f"steps is {steps}; it must be 1 to 100000")
    if rate is not None and not (math.isfinite(rate) and 0 < rate <= 1):
        raise InputError(f"learning rate is {rate}; it must be above 0 and at most 1")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}; it must be 0 to 2^63 - 1")
    if threads is not None and not 1 <= threads <= 1024:
        raise InputError(f"threads is {threads}; it must be 1 to 1024")
