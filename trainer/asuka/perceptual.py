"""Perceptual distances that a decoder learns by: LPIPS with VGG-16 from local files; without them, slopes at scales."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from dreammix_trt.core.errors import FileFormatError, MissingExtraError
from dreammix_trt.core.lpips import SCALE, SHIFT, find_heads, read_heads
from dreammix_trt.core.torch_weights import read_state

SCALES: Final = 3
_WIDTHS: Final = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def slope_distance(found: Tensor, wanted: Tensor) -> Tensor:
    """The mean difference of horizontal and vertical slopes, of pictures (N, 3, H, W) and of twice their halves.

    It serves where no weights for a perceptual distance are at hand. L1 alone blurs; edges cost where they are missing,
    and coarse scales make a shift of colours cost at the border between known and made.
    """
    total, error = found.new_zeros(()), found - wanted
    for scale in range(SCALES):
        if scale:
            error = nn.functional.avg_pool2d(error, 2)
        total = total + (error[..., 1:] - error[..., :-1]).abs().mean()
        total = total + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return total / SCALES


class VggDistance(nn.Module):
    """LPIPS 0.1 (Zhang et al. 2018) with VGG-16: unit features, squared differences weighed by learnt heads."""

    def __init__(self, file: Path, heads: Path | None = None) -> None:
        """file: VGG-16's weights as torchvision names them (vgg16-397923af.pth).

        heads: LPIPS' own; None: those in torchmetrics.

        Raises FileFormatError for a file that cannot be read or is another network's, MissingExtraError.
        """
        super().__init__()
        self.stages = nn.ModuleList(_read_stages(file))
        self.heads = nn.ParameterList(_read_heads(heads or find_heads("vgg")))
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])
        self.eval().requires_grad_(False)

    def forward(self, found: Tensor, wanted: Tensor) -> Tensor:
        """The mean distance of pictures (N, 3, H, W) in [-1, 1]."""
        x = (torch.cat([found, wanted]) - self.shift) / self.scale
        total = found.new_zeros(())
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x)
            unit = x / ((x * x).sum(1, keepdim=True) + 1e-10).sqrt()
            one, other = unit.chunk(2)
            total = total + ((one - other).square() * head).sum(1).mean()
        return total


def _read_stages(file: Path) -> list[nn.Sequential]:
    """VGG-16 up to the last ReLU of each of its five stages; numbers are torchvision's."""
    weights, number, stages = read_state(file, "--perceptual"), 0, []
    for index, widths in enumerate(_WIDTHS):
        layers: list[nn.Module] = []
        if index:
            layers.append(nn.MaxPool2d(2))
            number += 1
        for source, target in pairwise((3 if not index else _WIDTHS[index - 1][-1], *widths)):
            layer = nn.Conv2d(source, target, 3, padding=1)
            _fill(layer.weight, weights, f"features.{number}.weight", file)
            _fill(layer.bias, weights, f"features.{number}.bias", file)
            layers += [layer, nn.ReLU()]
            number += 2
        stages.append(nn.Sequential(*layers))
    return stages


def _read_heads(file: Path | None) -> list[nn.Parameter]:
    """One weight a channel, (C, 1, 1), of each stage."""
    if file is None:
        raise MissingExtraError(
            "torchmetrics is not installed, --perceptual takes LPIPS' heads from it: pip install 'dreammix-trt[eval]'"
        )
    found = read_heads(file, [widths[-1] for widths in _WIDTHS])
    return [nn.Parameter(head[:, None, None]) for head in found]


@torch.no_grad()  # type: ignore[untyped-decorator]
def _fill(target: Tensor | None, weights: Mapping[str, Tensor], name: str, file: Path) -> None:
    assert target is not None
    if name not in weights or weights[name].shape != target.shape:
        what = f"{name} is {tuple(weights[name].shape)}" if name in weights else f"it lacks {name}"
        raise FileFormatError(f"--perceptual {file}: is not VGG-16's ({what}); give torchvision's vgg16-397923af.pth")
    target.copy_(weights[name])
