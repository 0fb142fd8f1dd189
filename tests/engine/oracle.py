"""The sampling loop once more, in double precision and straight from its equations: what the runtime's is held against.

It shares no code with the runtime: sigmas, timesteps and solver are written out here from docs/algorithm.md, 6 and 7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any
Draw = Callable[[str, int], Array]
Predict = Callable[[Array, float, str], tuple[Array, Array]]  # (x_in, sigma, stage) -> eps of negative, positive rows


def sample_exactly(
    steps: int,
    local: int,
    z: Array,
    masks: Array,
    hand_over: Callable[[Array], Array],
    predict: Predict,
    draw: Draw,
    *,
    guidance: float = 4.0,
    rescale: float = 0.0,
    sharpness: float = 0.0,
    fixed: bool = False,
    blends: bool = False,
) -> list[tuple[Array, Array, Array]]:
    """(x_in, x0, x_out) of every step. z, masks: by stage; hand_over: last local x0 -> latent of the global stage."""
    high, low = 14.6146 ** (1 / 7), 0.0292 ** (1 / 7)
    s = [(high + i / max(steps - 1, 1) * (low - high)) ** 7 for i in range(steps)] + [0.0]
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    table = np.log(np.sqrt(1 / np.cumprod(1 - beta) - 1))
    stage = "lcg" if local else "gch"
    x, old, told = z[stage] + draw("init_noise", 0) * np.sqrt(1 + s[0] ** 2), None, []
    for i in range(steps):
        if i == local and local:
            stage = "gch"
            x, old = hand_over(old) + s[i] * draw("renoise_switch", 0), None
        m = masks[stage]
        x = x * m + (z[stage] + s[i] * draw("blend_noise", 0 if fixed else i)) * (1 - m)
        negative, positive = (s[i] * eps for eps in predict(x, s[i], stage))
        a = 0.001 * sharpness * (1 - np.abs(table - np.log(s[i])).argmin() / 999)
        if a > 0:
            positive = a * blur(positive, x - positive) + (1 - a) * positive
        e = negative + guidance * (positive - negative) if guidance > 1 else positive
        if guidance > 1 and rescale:
            e = e * (1 - rescale + rescale * measure_spread(positive) / measure_spread(e))
        x0 = (x - e) * m + z[stage] * (1 - m) if blends else x - e
        x_in, x = x, x0
        if s[i + 1] > 0:
            h = np.log(s[i] / s[i + 1])
            gain = 1 - np.exp(-2 * h)
            x = s[i + 1] / s[i] * np.exp(-h) * x_in + gain * x0 + draw("solver_noise", i) * s[i + 1] * np.sqrt(gain)
            if old is not None:
                x = x + 0.5 * gain * h / np.log(s[i - 1] / s[i]) * (x0 - old)
        old = x0
        told.append((x_in, x0, x))
    return told


def measure_spread(x: Array) -> Array:
    return x.std((1, 2, 3), ddof=1, keepdims=True)


def blur(e: Array, guide: Array) -> Array:
    """B(e; guide): 13 x 13, edges reflected."""
    g = (guide - guide.mean((1, 2, 3), keepdims=True)) / (measure_spread(guide) + 1e-5)
    wide = ((0, 0), (0, 0), (6, 6), (6, 6))
    pe, pg, (h, w) = np.pad(e, wide, "reflect"), np.pad(g, wide, "reflect"), e.shape[2:]
    total, weights = 0.0, 0.0
    for dy in range(13):
        for dx in range(13):
            d = np.abs(pg[..., dy : dy + h, dx : dx + w] - g).sum(1, keepdims=True)
            weight = np.exp(-(d**2) / 18) * np.exp(-((dy - 6) ** 2 + (dx - 6) ** 2) / 18)
            total, weights = total + weight * pe[..., dy : dy + h, dx : dx + w], weights + weight
    return total / weights
