"""ASUKA's decoder: a VAE decoder that also sees the known pixels and the mask, so that no seam is left.

At five places what a condition encoder makes of the known pixels replaces the stream wherever the hole is not. So known
places never depend on the latent: the decoder makes them from themselves.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn

from dreammix_trt.core.asuka import LEVELS, DecoderConfig


class AsukaDecoder(nn.Module):
    """Latent, picture and mask -> picture.

    decoder, post_quant_conv: as in diffusers' AutoencoderKL, with its parameter names, so a base's VAE can start them.
    condition: the condition encoder.
    injections: where it enters, in the order of the stream.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.decoder = Decoder(
            in_channels=latent,
            out_channels=3,
            up_block_types=("UpDecoderBlock2D",) * LEVELS,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
        )
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else None
        self.condition = ConditionEncoder(config.block_out_channels)
        self.injections = nn.ModuleList(Injection() for _ in range(LEVELS + 1))

    def forward(self, latent: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        """latent: (B, C, h, w), already divided by the scaling factor.

        image: (B, 3, 8h, 8w) in [-1, 1]; pixels of the hole have no effect.
        mask: (B, 1, 8h, 8w), 1 in the hole and 0 elsewhere.

        Returns (B, 3, 8h, 8w) in about [-1, 1].
        """
        known, holes = self.trace_condition(image, mask)
        x = self._begin(latent)
        for inject, block, condition, hole in zip(
            self.injections[:-1], self.decoder.up_blocks, known[:-1], holes[:-1], strict=True
        ):
            x = block(inject(x, condition, hole))
        x = self.injections[-1](x, known[-1], holes[-1])
        picture: Tensor = self.decoder.conv_out(self.decoder.conv_act(self.decoder.conv_norm_out(x)))
        return picture

    def trace_condition(self, image: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What each injection takes where the hole is not, (B, C, H, W), and the hole there, (B, 1, H, W)."""
        return self.condition(image, mask)[::-1], [*_shrink(mask)[::-1], mask]

    def trace_latent(self, latent: Tensor) -> list[Tensor]:
        """What reaches each injection when none takes place, (B, C, H, W)."""
        found = [self._begin(latent)]
        for block in self.decoder.up_blocks:
            found.append(block(found[-1]))
        return found

    def _begin(self, latent: Tensor) -> Tensor:
        x = latent if self.post_quant_conv is None else self.post_quant_conv(latent)
        begun: Tensor = self.decoder.mid_block(self.decoder.conv_in(x))
        return begun


class ConditionEncoder(nn.Module):
    """The known pixels and the mask at every level of a decoder.

    layers: from the finest to the coarsest; the last three halve the picture's sides.
    """

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        widths = (4, *channels, channels[-1])
        steps = list(pairwise(widths))
        self.layers = nn.ModuleList(
            nn.Conv2d(source, target, 3, 1, 1) if number < 2 else nn.Conv2d(source, target, 4, 2, 1)
            for number, (source, target) in enumerate(steps)
        )

    def forward(self, image: Tensor, mask: Tensor) -> list[Tensor]:
        """image (B, 3, H, W) and mask (B, 1, H, W) -> what enters before the last layer, the last block, ... the first.

        Each is taken before its ReLU.
        """
        x, found = torch.cat([image * (1 - mask), mask], 1), []
        for layer in self.layers:
            found.append(layer(x))
            x = nn.functional.relu(found[-1])
        return found


class Injection(nn.Module):
    """Keeps the stream in the hole and takes the condition elsewhere."""

    def forward(self, x: Tensor, condition: Tensor, hole: Tensor) -> Tensor:
        """x, condition: (B, C, H, W); hole: (B, 1, H, W)."""
        return torch.where(hole > 0, x, condition)


def _shrink(mask: Tensor) -> list[Tensor]:
    """The mask at the sides of a decoder's blocks, the last block's first: any touched cell is of the hole."""
    found = [mask]
    for _ in range(LEVELS - 1):
        found.append(nn.functional.max_pool2d(found[-1], 2))
    return found
