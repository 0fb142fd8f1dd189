"""D_r of eq. 8: pictures of generic members of the subject's class, made by the base itself before training starts.

The base repaints the hole of the subject's own training views with an ordinary "a photo of a red mug". So the LoRA
sees that the attribute word, and the class without the token, keep their meaning; place, mask and masked picture are
those of the subject, and nothing needs decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dreammix_trt.trainer.networks import SMALL_SIDE

if TYPE_CHECKING:
    from dreammix_trt.trainer.networks import TrainingUNet
    from dreammix_trt.trainer.samples import Samples

STEPS, GUIDANCE, BATCH = 12, 3.0, 4


def count_at_once(native_side: int) -> int:
    """How many are painted together: of a large base one, which takes less memory than a training step of one."""
    return BATCH if native_side <= SMALL_SIDE else 1


@torch.no_grad()  # type: ignore[untyped-decorator]
def repaint(
    unet: TrainingUNet,
    start: Samples,
    texts: Sequence[tuple[Tensor, Tensor]],
    dice: torch.Generator,
    report: Callable[[float], None],
) -> Tensor:
    """The latents (N, 4, h, w) of `start` with the masked cells painted anew as the texts say.

    Deterministic DDIM (Song et al. 2021, eq. 12) with classifier-free guidance; the known cells are put back, with
    fresh noise, at every step's input as in the reference's loop.

    texts: for each `count_at_once` of samples the states and pooled states of as many empty prompts, then of its own.
    """
    side = unet.base.native_side
    painted, at_once = [], count_at_once(side)
    for number, text in enumerate(texts):
        part = start.rows(torch.arange(number * at_once, min((number + 1) * at_once, len(start))))
        height, width = part.latents.shape[-2] * 8, part.latents.shape[-1] * 8
        clean, mask, count = part.latents, part.mask, len(part)
        feature = unet.feature(mask, part.masked)
        both = None if feature is None else feature.repeat(2, 1, 1, 1)
        rows = torch.tensor([[height, width, 0, 0, side, side]] * (2 * count), dtype=torch.float32)
        x = torch.randn(clean.shape, generator=dice)
        times = torch.linspace(999, 0, STEPS).round().long().tolist()
        for index, t in enumerate(times):
            signal, noise = unet.signal[t], unet.noise[t]
            known = signal * clean + noise * torch.randn(clean.shape, generator=dice)
            x = x * mask + known * (1 - mask)
            when = torch.full((2 * count,), float(t))
            away, towards = unet.predict(x.repeat(2, 1, 1, 1), when, text, rows, both).cpu().chunk(2)
            eps = away + GUIDANCE * (towards - away)
            x0 = (x - noise * eps) / signal
            after = times[index + 1] if index + 1 < STEPS else None
            x = x0 if after is None else unet.signal[after] * x0 + unet.noise[after] * eps
        painted.append(x * mask + clean * (1 - mask))
        report((number + 1) / len(texts))
    return torch.cat(painted)
