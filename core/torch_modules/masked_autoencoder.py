"""A masked auto-encoder (He et al. 2022) that sees any mask at static shapes, as ASUKA uses it.

Every token stays in the batch. Tokens of the hole are hidden as keys, so the visible ones get exactly what an encoder
gets that was given these alone. Parameter names are those of the authors' checkpoint.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from dreammix_trt.core.asuka import IMAGENET_MEAN, IMAGENET_STD, PriorConfig
from dreammix_trt.core.torch_modules.attention import Attending

#: hides a key: exp(-30000) is 0, and the number fits float16
HIDDEN = -30000.0
_MLP = 4  # a block's hidden layer is so many times wider
_EPS = 1e-6


class MaskedAutoencoder(nn.Module):
    """Picture and mask -> a feature of every patch, and the picture that the known pixels let expect."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        width, inner, patch = config.width, config.decoder_width, config.patch
        self.patch_embed = _PatchEmbed(3, width, config)
        self.pos_embed = _positions(width, config.grid)
        self.blocks = nn.ModuleList(_Block(width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, _EPS)
        self.decoder_embed = nn.Linear(width, inner)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, inner))
        self.decoder_patch_embed = _PatchEmbed(4, inner, config)
        self.alpha = nn.Parameter(torch.ones(()))
        self.decoder_pos_embed = _positions(inner, config.grid)
        self.decoder_blocks = nn.ModuleList(_Block(inner, config.decoder_heads) for _ in range(config.decoder_layers))
        self.decoder_norm = nn.LayerNorm(inner, _EPS)
        self.decoder_pred = nn.Linear(inner, 3 * patch * patch)

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """image: (B, 3, S, S), normalised by `normalise`.

        mask: (B, 1, S, S), 1 in the hole and 0 elsewhere.

        Returns the feature (B, T, D) and the picture (B, 3, S, S), normalised. Both are zeros where no patch is
        visible.
        """
        image = image * (1 - mask)
        touched = self._mark_patches(mask)
        seen = self.encode(image, touched)
        x = self.decoder_embed(seen) * (1 - touched) + self.mask_token * touched
        x = self._add_partial(x, image, mask, touched) + self.decoder_pos_embed
        feature = x
        for number, block in enumerate(self.decoder_blocks, 1):
            x = block(x)
            if number == self.config.feature_layer:
                feature = x
        visible = (1 - touched).amax(1, keepdim=True)
        patches = self.decoder_pred(self.decoder_norm(x)) * visible
        return feature * visible, self._join_patches(patches)

    def encode(self, image: Tensor, touched: Tensor) -> Tensor:
        """Encode the patches; those touched by the hole are seen by none.

        image: (B, 3, S, S), 0 in the hole.
        touched: (B, T, 1), 1 or 0.

        Returns (B, T, width), of which the untouched rows mean something.
        """
        x = self.patch_embed(image) + self.pos_embed
        bias = touched.reshape(-1, 1, 1, self.config.tokens) * HIDDEN
        for block in self.blocks:
            x = block(x, bias)
        encoded: Tensor = self.norm(x)
        return encoded

    def _add_partial(self, x: Tensor, image: Tensor, mask: Tensor, touched: Tensor) -> Tensor:
        """Mix what is known of patches that the hole covers in part into their tokens."""
        covered = -self._mark_patches(-mask)
        embedded = self.decoder_patch_embed(torch.cat([image, mask], 1))
        share = (touched - covered) * (1 - self.alpha.clamp(0.0, 1.0))
        return x + share * (embedded - x)

    def _mark_patches(self, mask: Tensor) -> Tensor:
        """(B, 1, S, S) -> (B, T, 1): the largest value in each patch."""
        largest = nn.functional.max_pool2d(mask, self.config.patch)
        return largest.reshape(-1, self.config.tokens, 1)

    def _join_patches(self, patches: Tensor) -> Tensor:
        """(B, T, patch * patch * 3) -> (B, 3, S, S)."""
        grid, patch, side = self.config.grid, self.config.patch, self.config.grid * self.config.patch
        cells = patches.reshape(-1, grid, grid, patch, patch, 3).permute(0, 5, 1, 3, 2, 4)
        return cells.reshape(-1, 3, side, side)


def normalise(image: Tensor) -> Tensor:
    """(B, 3, H, W) from [-1, 1] to what the auto-encoder takes: ImageNet's mean is 0 and its deviation 1."""
    parts = zip(torch.split(image, 1, 1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.cat([part * (0.5 / std) + (0.5 - mean) / std for part, mean, std in parts], 1)


def denormalise(image: Tensor) -> Tensor:
    """The inverse of `normalise`."""
    parts = zip(torch.split(image, 1, 1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.cat([part * (2 * std) + (2 * mean - 1) for part, mean, std in parts], 1)


def make_positions(width: int, grid: int) -> np.ndarray:
    """Fixed positions of a grid's cells: (grid * grid, width) float32. One half tells the column, one the row."""
    rates = 10000.0 ** -(np.arange(width // 4) / (width / 4))
    angles = np.arange(grid)[:, None] * rates
    line = np.concatenate([np.sin(angles), np.cos(angles)], 1)
    cells = np.concatenate([np.tile(line, (grid, 1)), np.repeat(line, grid, 0)], 1)
    return np.asarray(cells, np.float32)


def _positions(width: int, grid: int) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(make_positions(width, grid))[None], requires_grad=False)


class _PatchEmbed(nn.Module):
    def __init__(self, channels: int, width: int, config: PriorConfig) -> None:
        super().__init__()
        self.width, self.tokens = width, config.tokens
        self.proj = nn.Conv2d(channels, width, config.patch, config.patch)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, T, width)."""
        found: Tensor = self.proj(image).reshape(-1, self.width, self.tokens).transpose(1, 2)
        return found


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, _EPS)
        self.attn = _SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, _EPS)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, _MLP * width), "fc2": nn.Linear(_MLP * width, width)})

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), bias)
        hidden = nn.functional.gelu(self.mlp["fc1"](self.norm2(x)))
        result: Tensor = x + self.mlp["fc2"](hidden)
        return result


class _SelfAttention(Attending):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = torch.split(self.qkv(x), self.width, -1)
        result: Tensor = self.proj(self.attend(q, k, v, self.heads, bias))
        return result
