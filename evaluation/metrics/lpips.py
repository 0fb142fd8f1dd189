"""LPIPS (Zhang et al. 2018): AlexNet's features, normalised, squared differences weighed by learnt heads, v0.1.

torchmetrics has the heads in it and the same network, but takes AlexNet from the internet; here it comes from a file.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.evaluation.metrics.metric import U8, Metric, Sample
from dreammix_trt.evaluation.metrics.weights import load_weights

_WIDTHS: Final = (64, 192, 384, 256, 256)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_HEADS: Final = Path("functional/image/lpips_models/alex.pth")
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
        self._heads = _read_heads(heads or find_heads())

    def add(self, sample: Sample) -> float | None:
        if not sample.region.any() or min(sample.mask.shape) < _LEAST:
            return None
        return self.measure(sample.compared, sample.target)

    def measure(self, one: U8, other: U8) -> float:
        """Distance of two pictures, uint8 (H, W, 3), at least 32 pixels a side."""
        import torch

        shift, scale = (torch.tensor(each).reshape(3, 1, 1) for each in (_SHIFT, _SCALE))
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


def find_heads() -> Path | None:
    """LPIPS' own weights in an installed torchmetrics, which is not imported."""
    spec = find_spec("torchmetrics")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    return next((Path(place) / _HEADS for place in places if (Path(place) / _HEADS).is_file()), None)


def _read_heads(file: Path | None) -> list[Any]:
    """One weight a channel, for each of the five layers."""
    from torch import nn

    if file is None:
        raise FileFormatError("torchmetrics has no LPIPS heads in it; install the extra again: dreammix-trt[eval]")

    def make_heads() -> Any:
        layers = ([nn.Identity(), nn.Conv2d(width, 1, 1, bias=False)] for width in _WIDTHS)
        return nn.ModuleDict(
            {f"lin{k}": nn.ModuleDict({"model": nn.ModuleList(pair)}) for k, pair in enumerate(layers)}
        )

    heads = load_weights(make_heads, file, "LPIPS' heads")
    return [weight.flatten() for weight in heads.state_dict().values()]


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
