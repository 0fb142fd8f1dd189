"""Perceptual distances that a decoder learns by: LPIPS with VGG-16 from local files; without them, slopes at scales."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from dreammix_trt.core.errors import FileFormatError, MissingExtraError

SCALES: Final = 3
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_WIDTHS: Final = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_HEADS: Final = Path("functional/image/lpips_models/vgg.pth")


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
        self.heads = nn.ParameterList(_read_heads(heads or _find_heads()))
        self.register_buffer("shift", torch.tensor(_SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(_SCALE)[:, None, None])
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
    weights, number, stages = _read_state(file), 0, []
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


def _find_heads() -> Path:
    spec = find_spec("torchmetrics")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    found = next((Path(place) / _HEADS for place in places if (Path(place) / _HEADS).is_file()), None)
    if found is None:
        raise MissingExtraError(
            "torchmetrics is not installed, --perceptual takes LPIPS' heads from it: pip install 'dreammix-trt[eval]'"
        )
    return found


def _read_heads(file: Path) -> list[nn.Parameter]:
    """One weight a channel, (C, 1, 1), of each stage."""
    weights, found = _read_state(file), []
    for index, widths in enumerate(_WIDTHS):
        head = nn.Parameter(torch.empty(1, widths[-1], 1, 1))
        _fill(head, weights, f"lin{index}.model.1.weight", file)
        found.append(nn.Parameter(head.detach()[0]))
    return found


def _read_state(file: Path) -> Mapping[str, Tensor]:
    """The tensors of a file. torchvision's are in torch's old format, which torch itself reads without running it."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(file))
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds, by torch's version
        raise FileFormatError(f"--perceptual {file}: cannot be read as weights ({error}); fetch it again") from error
    return state if isinstance(state, Mapping) else {}


@torch.no_grad()  # type: ignore[untyped-decorator]
def _fill(target: Tensor | None, weights: Mapping[str, Tensor], name: str, file: Path) -> None:
    assert target is not None
    if name not in weights or weights[name].shape != target.shape:
        what = f"{name} is {tuple(weights[name].shape)}" if name in weights else f"it lacks {name}"
        raise FileFormatError(f"--perceptual {file}: is not VGG-16's ({what}); give torchvision's vgg16-397923af.pth")
    target.copy_(weights[name])
