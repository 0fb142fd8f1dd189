"""ASUKA's prior: what a masked auto-encoder expects in the hole, as a condition for a base's UNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dreammix_trt.core.asuka import PriorConfig
from dreammix_trt.core.torch_modules.attention import Attending
from dreammix_trt.core.torch_modules.masked_autoencoder import MaskedAutoencoder, denormalise, normalise

_MLP = 4  # a block's hidden layer is so many times wider
_EPS = 1e-6


class AsukaPrior(nn.Module):
    """Picture and mask at the prior's own side -> condition.

    mae: the auto-encoder; alignment: its feature to the base's condition.
    """

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        self.mae = MaskedAutoencoder(config)
        self.alignment = Alignment(config)

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """image: (B, 3, S, S) in [-1, 1]; pixels of the hole have no effect.

        mask: (B, 1, S, S), 1 in the hole and 0 elsewhere.

        Returns context (B, T, D), pooled (B, Dp), and the auto-encoder's picture (B, 3, S, S) in about [-1, 1].
        """
        feature, picture = self.mae(normalise(image), mask)
        context, pooled = self.alignment(feature)
        return context, pooled, denormalise(picture)


class Alignment(nn.Module):
    """The auto-encoder's feature -> a base's condition of the same length: each row describes its place."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        width = config.align_width
        self.embed = nn.Linear(config.decoder_width, width)
        self.blocks = nn.ModuleList(
            _ParallelBlock(width, config.align_head, config.tokens) for _ in range(config.align_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.context = _project(width, config.context_width)
        self.pooled = _project(width, config.pooled_width)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, decoder_width) -> context (B, T, D) and pooled (B, Dp)."""
        x = self.embed(feature)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.context(x), self.pooled(x.mean(1))


def _project(source: int, target: int) -> nn.Module:
    """Nothing where the widths agree, as in the authors' alignment."""
    return nn.Identity() if source == target else nn.Linear(source, target)


class _ParallelBlock(Attending):
    """Attention and hidden layer side by side (Dehghani et al. 2023); parameter names are those of FLUX."""

    def __init__(self, width: int, head: int, tokens: int) -> None:
        super().__init__()
        self.width, self.head, self.tokens = width, head, tokens
        self.pre_norm = nn.LayerNorm(width, _EPS, elementwise_affine=False)
        self.linear1 = nn.Linear(width, (3 + _MLP) * width)
        self.norm = nn.ModuleDict({"query_norm": RootMeanSquareNorm(head), "key_norm": RootMeanSquareNorm(head)})
        self.linear2 = nn.Linear((1 + _MLP) * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.width, self.width, self.width, _MLP * self.width]
        q, k, v, hidden = torch.split(self.linear1(self.pre_norm(x)), parts, -1)
        q, k = self._scale_heads(q, "query_norm"), self._scale_heads(k, "key_norm")
        attended = self.attend(q, k, v, self.width // self.head, None)
        hidden = nn.functional.gelu(hidden, approximate="tanh")
        result: Tensor = x + self.linear2(torch.cat([attended, hidden], -1))
        return result

    def _scale_heads(self, x: Tensor, norm: str) -> Tensor:
        heads = x.reshape(-1, self.tokens, self.width // self.head, self.head)
        return self.norm[norm](heads).reshape(-1, self.tokens, self.width)


class RootMeanSquareNorm(nn.Module):
    """Scales the last axis to a mean square of 1, times a learned scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()  # squares of a few hundred leave float16
        scaled = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + _EPS)
        return scaled.to(x.dtype) * self.scale
