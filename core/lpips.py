"""What every LPIPS (Zhang et al. 2018, version 0.1) shares: how pictures are scaled, and its learnt heads."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

from dreammix_trt.core.torch_weights import load_weights

#: of pictures in [-1, 1]: (x - SHIFT) / SCALE is what the network takes
SHIFT: Final = (-0.030, -0.088, -0.188)
SCALE: Final = (0.458, 0.448, 0.450)
_HEADS: Final = "functional/image/lpips_models"


def find_heads(network: Literal["alex", "vgg"]) -> Path | None:
    """LPIPS' own weights in an installed torchmetrics, which is not imported."""
    spec = find_spec("torchmetrics")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [Path(place) / _HEADS / f"{network}.pth" for place in places]
    return next((file for file in files if file.is_file()), None)


def read_heads(file: Path, widths: Sequence[int]) -> list[Any]:
    """One weight a channel, a torch tensor (C,), for each of the network's layers.

    widths: the layers' channels.

    Raises InputError and FileFormatError as `load_weights` does.
    """
    from torch import nn

    def make_heads() -> Any:
        layers = ([nn.Identity(), nn.Conv2d(width, 1, 1, bias=False)] for width in widths)
        return nn.ModuleDict(
            {f"lin{k}": nn.ModuleDict({"model": nn.ModuleList(pair)}) for k, pair in enumerate(layers)}
        )

    heads = load_weights(make_heads, file, "LPIPS' heads")
    return [weight.flatten() for weight in heads.state_dict().values()]
