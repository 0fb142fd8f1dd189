"""How long and how gently a base's LoRA is trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What suits a base: small ones train for less time with larger steps and batches.

    regular: share of regular samples (eq. 8); regular_pictures: how many of them the base paints first; views: training
    views drawn of all photographs together; constant: share of the steps at the full learning rate, which then falls
    to zero in a straight line (1.0: never, as in the reference); captioned: share of the subject's samples that are
    trained under one of the further captions, where there are some.
    """

    steps: int
    learning_rate: float
    batch: int
    views: int
    regular: float
    regular_pictures: int
    constant: float = 1.0
    captioned: float = 0.5

    def rate_at(self, step: int, steps: int) -> float:
        """The factor of the learning rate at a step, 0-based."""
        left = (steps - step) / steps
        return 1.0 if self.constant >= 1 else min(1.0, left / (1 - self.constant))


# Of the embedded model's first edition: without regular pictures "a green sks mug" broke up into the subject's own
# tones, with three in ten the subject itself was learnt too weakly. Of the second: after 400 steps feet and decals
# still took any colour, after 1000 "a photo of a sks mug" kept all parts (four rooms).
SMALL = Recipe(steps=1000, learning_rate=2e-3, batch=4, views=60, regular=0.1, regular_pictures=12, constant=0.5)
FULL = Recipe(steps=1000, learning_rate=1e-4, batch=4, views=60, regular=0.3, regular_pictures=24)


def recipe_for(native_side: int) -> Recipe:
    """What suits a base that was trained at so many pixels."""
    return SMALL if native_side <= 256 else FULL
