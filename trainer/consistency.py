"""Latent consistency distillation (Luo et al. 2310.04378, algorithm 1; as a LoRA: 2311.05556).

A consistency function f(x, t) = c_skip(t) x + c_out(t) x0(x, t) gives the end of the teacher's guided path through x at
once. The student learns it from itself: what it says at t must be what it says a step of the teacher's solver further
on. Latents are variance-preserving here, x = signal x0 + noise n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dreammix_trt.core.request import Request
from dreammix_trt.core.schedule import LCM_SIGMA_DATA, LCM_TIMESTEP_SCALING

if TYPE_CHECKING:
    from torch import Tensor

HUBER = 0.001  # of the loss sqrt(d^2 + c^2) - c, as in the authors' training
OUTSIDE = 0.1  # weight of latent cells outside the hole; the loop puts the picture's own there
_TIMES = 1000
_LOOP = Request("")  # its defaults for what the UNet is told of sizes
#: (latents, timesteps (N,), told sizes (N, 6)) -> noise prediction
Predict = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]


@dataclass(frozen=True)
class Tables:
    """signal, noise: (1000,), sqrt(alpha-bar) and sqrt(1 - alpha-bar) by timestep."""

    signal: Tensor
    noise: Tensor

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(signal, noise) of timesteps (N,), as (N, 1, 1, 1)."""
        return self.signal[t][:, None, None, None], self.noise[t][:, None, None, None]

    def predict_original(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x0 of latents with a noise prediction."""
        signal, noise = self.at(t)
        return (x - noise * eps) / signal

    def step(self, x: Tensor, eps: Tensor, t: Tensor, after: Tensor) -> Tensor:
        """DDIM's step from t to `after` (Song et al. 2021, eq. 12)."""
        signal, noise = self.at(after)
        return signal * self.predict_original(x, eps, t) + noise * eps

    def consistency(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """f(x, t), as the sampler "lcm" has it; f(x, 0) is x."""
        scaled = (t.to(x.dtype) * LCM_TIMESTEP_SCALING)[:, None, None, None]
        total = scaled * scaled + LCM_SIGMA_DATA * LCM_SIGMA_DATA
        skip = LCM_SIGMA_DATA * LCM_SIGMA_DATA / total
        return skip * x + scaled / total.sqrt() * self.predict_original(x, eps, t)


def consistency_target(
    tables: Tables,
    teacher: tuple[Tensor, Tensor],
    student: Predict,
    x: Tensor,
    times: tuple[Tensor, Tensor],
    guidance: Tensor,
    side: int,
) -> Tensor:
    """What f(x, t) must be: f at the point to which one guided step of the teacher leads.

    teacher: its noise predictions at t without and with the text.
    student: predicts with the text.
    x: (N, 4, h, w). times: t and the earlier timesteps, (N,) each. guidance: (N,). side: the base's native pixels.
    """
    (t, after), (away, towards) = times, teacher
    eps = away + guidance[:, None, None, None] * (towards - away)
    nearer = tables.step(x, eps, t, after)
    return tables.consistency(nearer, student(nearer, after, tell_sizes(x, after, side)), after)


def tell_sizes(x: Tensor, t: Tensor, side: int, *, positive: bool = True) -> Tensor:
    """SDXL's time ids (N, 6), as the loop tells them at timesteps (N,): its factors on the size are learnt too."""
    import torch

    factor = _LOOP.size_guidance_positive if positive else _LOOP.size_guidance_negative
    early = t >= 1000 * (1 - _LOOP.size_guidance_end)
    scale = torch.where(early, factor, 1.0).to(x.dtype)
    height, width = (length * 8 * scale for length in x.shape[-2:])
    zero, full = torch.zeros_like(scale), torch.full_like(scale, float(side))
    return torch.stack([height, width, zero, zero, full, full], 1)


def spread_times(drawn: Tensor) -> Tensor:
    """Timesteps, int64 (N,), uniform, and one in each N-th of them, so that the loss varies less.

    drawn: (N,), from 0 to 1.
    """
    import torch

    order = torch.arange(len(drawn), device=drawn.device)
    return ((order + drawn) / len(drawn) * _TIMES).long().clamp_(max=_TIMES - 1)


def huber_loss(found: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The mean of sqrt(d^2 + c^2) - c over cells, those outside the hole weighted by OUTSIDE; mask (N, 1, h, w)."""
    weight = OUTSIDE + (1 - OUTSIDE) * mask
    each = ((found - target).square() + HUBER * HUBER).sqrt() - HUBER
    return (each * weight).mean() / weight.mean()
