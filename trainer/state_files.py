"""Tensors kept between runs: safetensors files, which hold numbers alone and so are safe to read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dreammix_trt.core.tensors import map_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor


def write_state(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write float32, float64, int64 or uint8 tensors, whole or not at all."""
    arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}
    write_tensors(file, {name: (array.dtype.name, array.shape) for name, array in arrays.items()}, arrays.__getitem__)


def read_state(file: Path) -> dict[str, Tensor]:
    """What `write_state` wrote. Raises FileFormatError for a file that is missing or damaged."""
    import torch

    return {name: torch.from_numpy(array.copy()) for name, array in map_tensors(file).items()}
