"""D_r of eq. 8: pictures of generic members of the subject's class, made by the base itself before training starts.

The base repaints the hole of the subject's own training views with an ordinary "a photo of a red mug". So the LoRA
sees that the attribute word, and the class without the token, keep their meaning; place, mask and masked picture are
those of the subject, and nothing needs decoding. Captions with attributes of one's own come with ADM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dreammix_trt.trainer.data import article

if TYPE_CHECKING:
    from dreammix_trt.trainer.networks import TrainingNetworks

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "black")
STEPS, GUIDANCE, BATCH = 12, 3.0, 4


def captions(class_name: str, count: int) -> list[str]:
    """`count` captions without the subject's token; every third is the class alone."""
    words = [word for index, colour in enumerate(COLOURS) for word in ([colour, ""] if index % 2 else [colour])]
    chosen = [words[index % len(words)] for index in range(count)]
    return [f"a photo of {article(word or class_name)} {word} {class_name}".replace("  ", " ") for word in chosen]


@torch.no_grad()  # type: ignore[untyped-decorator]
def repaint(
    networks: TrainingNetworks,
    latents: Tensor,
    masked: Tensor,
    mask: Tensor,
    prompts: Sequence[str],
    dice: torch.Generator,
    report: Callable[[float], None],
) -> Tensor:
    """The latents (N, 4, h, w) with the masked cells painted anew as the prompts say.

    Deterministic DDIM (Song et al. 2021, eq. 12) with classifier-free guidance; the known cells are put back, with
    fresh noise, at every step's input as in the reference's loop. masked (N, 4, h, w), mask (N, 1, h, w).
    """
    height, width = latents.shape[-2] * 8, latents.shape[-1] * 8
    side = networks.base.native_side
    times = torch.linspace(999, 0, STEPS).round().long().tolist()
    painted = []
    for start in range(0, len(latents), BATCH):
        part = slice(start, start + BATCH)
        clean, count = latents[part], len(latents[part])
        states, pooled = networks.encode_text([""] * count + list(prompts[part]))
        feature = networks.feature(mask[part], masked[part])
        both = None if feature is None else feature.repeat(2, 1, 1, 1)
        rows = torch.tensor([[height, width, 0, 0, side, side]] * (2 * count), dtype=torch.float32)
        x = torch.randn(clean.shape, generator=dice)
        for index, t in enumerate(times):
            signal, noise = networks.signal[t], networks.noise[t]
            known = signal * clean + noise * torch.randn(clean.shape, generator=dice)
            x = x * mask[part] + known * (1 - mask[part])
            when = torch.full((2 * count,), float(t))
            away, towards = networks.predict(x.repeat(2, 1, 1, 1), when, (states, pooled), rows, both).chunk(2)
            eps = away + GUIDANCE * (towards - away)
            x0 = (x - noise * eps) / signal
            after = times[index + 1] if index + 1 < STEPS else None
            x = x0 if after is None else networks.signal[after] * x0 + networks.noise[after] * eps
        painted.append(x * mask[part] + clean * (1 - mask[part]))
        report(min(1.0, (start + count) / len(latents)))
    return torch.cat(painted)
