"""DreamMix' reweighted loss (paper, eq. 7) and its balance between the subject and regular pictures (eq. 8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dreammix_trt.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LossWeights:
    """Factors of the squared error inside and outside the latent mask."""

    inside: float
    outside: float


# The reference scales prediction and target by 1.5 and 0.6 before the mean squared error, so its weights are squares.
LOSSES = {"paper": LossWeights(1.5, 0.7), "reference": LossWeights(1.5**2, 0.6**2)}


def loss_weights(name: str) -> LossWeights:
    """The weights of `--loss paper|reference`; InputError for another name."""
    if name not in LOSSES:
        raise InputError(f"loss is {name!r}; choose one of {', '.join(LOSSES)}")
    return LOSSES[name]


def reweighted_loss(prediction: Tensor, target: Tensor, mask: Tensor, weights: LossWeights) -> Tensor:
    """Eq. 7 as a mean: tau1 * m * (eps_theta - eps)^2 + tau2 * (1 - m) * (eps_theta - eps)^2, over all elements.

    prediction, target: float (N, C, h, w); mask: float (N, 1, h, w) in 0..1, 1 where the model repaints; returns a
    scalar.
    """
    square = (prediction - target).square()
    return (square * (weights.inside * mask + weights.outside * (1 - mask))).mean()


def regular_probability(beta: float) -> float:
    """How often to draw a regular sample so that the expected loss has eq. 8's balance, as the reference does.

    A sample costs L_s with probability 1 - p and L_r with p: odds p / (1 - p) = beta, so beta 0.43 is p = 0.3.
    """
    if not 0 <= beta < float("inf"):
        raise InputError(f"beta is {beta}; it must be 0 or more")
    return beta / (1 + beta)
