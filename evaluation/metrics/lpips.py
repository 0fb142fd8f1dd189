"""LPIPS (Zhang et al. 2018): AlexNet's features, normalised, squared differences weighed by learnt heads, v0.1.

torchmetrics has the heads in it and the same network, but takes AlexNet from the internet; here it comes from a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.lpips import SCALE, SHIFT, find_heads, read_heads
from dreammix_trt.core.torch_weights import load_weights
from dreammix_trt.evaluation.metrics.metric import U8, Metric, Sample

_WIDTHS: Final = (64, 192, 384, 256, 256)
_LEAST: Final = 32  # pixels: of smaller pictures AlexNet leaves nothing


class Lpips(Metric):
    """LPIPS with AlexNet, of the picture with `Sample.target` in place of what is not compared."""

    name, better = "lpips", "lower"
    about = "learned perceptual distance (AlexNet, v0.1)"

    def __init__(self, file: Path, heads: Path | None = None) -> None:
        """file: AlexNet's weights as torchvision names them (alexnet-owt-7be5be79.pth).

        heads: LPIPS' own weights; None: those in torchmetrics.

        Raises InputError and FileFormatError for files that are missing or of another network.
        """
        self._net = load_weights(make_alexnet, file, "--lpips", ignored=("classifier.",))
        found = heads or find_heads("alex")
        if found is None:
            raise FileFormatError("torchmetrics has no LPIPS heads in it; install the extra again: dreammix-trt[eval]")
        self._heads = read_heads(found, _WIDTHS)

    def add(self, sample: Sample) -> float | None:
        if not sample.region.any() or min(sample.mask.shape) < _LEAST:
            return None
        return self.measure(sample.compared, sample.target)

    def measure(self, one: U8, other: U8) -> float:
        """Distance of two pictures, uint8 (H, W, 3), at least 32 pixels a side."""
        import torch

        shift, scale = (torch.tensor(each).reshape(3, 1, 1) for each in (SHIFT, SCALE))
        with torch.inference_mode():
            pair = torch.stack([torch.from_numpy(each.copy()).permute(2, 0, 1) for each in (one, other)])
            x, total = (pair.float() / 127.5 - 1 - shift) / scale, 0.0
            layers = iter(self._heads)
            for layer in self._net.features:
                x = layer(x)
                if isinstance(layer, torch.nn.ReLU):
                    unit = x / torch.sqrt((x * x).sum(1, keepdim=True) + 1e-8)
                    total += float((((unit[0] - unit[1]) ** 2).sum((1, 2)) * next(layers)).sum() / x[0, 0].numel())
        return total


def make_alexnet() -> Any:
    """The features of AlexNet (Krizhevsky 2014), under torchvision's names: `features.0.weight`, ..."""
    from torch import nn

    first, second, third, fourth, fifth = _WIDTHS
    layers = [
        *(nn.Conv2d(3, first, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(first, second, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(second, third, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(third, fourth, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(fourth, fifth, 3, padding=1), nn.ReLU()),
    ]
    net = nn.Module()
    net.features = nn.Sequential(*layers)
    return net
