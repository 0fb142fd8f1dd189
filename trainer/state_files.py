"""Tensors kept between runs: safetensors files, which hold numbers alone and so are safe to read.

A tensor comes back with the bits, the layout and the alignment that it had: on a CPU the last bits of what is computed
from it depend on all three.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.tensors import map_tensors, open_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
_CHANNELS_LAST = "channels_last"


def write_state(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write float32, float64, int64 or uint8 tensors, whole or not at all."""
    import torch

    last = [
        name
        for name, value in tensors.items()
        if not value.is_contiguous() and value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
    ]
    arrays = {name: value.detach().cpu().contiguous().numpy() for name, value in tensors.items()}
    shapes = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    write_tensors(file, shapes, arrays.__getitem__, {_CHANNELS_LAST: json.dumps(last)})


def keep_tensors(
    file: Path | None, names: Collection[str], make: Callable[[], Mapping[str, Tensor]]
) -> Mapping[str, Tensor]:
    """The tensors of a file; where there is none, or a damaged one, they are made and written.

    file: None: nowhere. names: of the tensors; a file that lacks one is damaged.
    """
    if file is not None and file.exists():
        try:
            held = read_state(file)
            missing = [name for name in names if name not in held]
            if not missing:
                return held
            log.warning("%s is damaged (it lacks %s); what it held is made again", file, missing[0])
        except FileFormatError as error:
            log.warning("%s is damaged (%s); what it held is made again", file, error)
    made = make()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_state(file, made)
    return made


def read_state(file: Path) -> dict[str, Tensor]:
    """What `write_state` wrote. Raises FileFormatError for a file that is missing or damaged."""
    import torch

    held = {name: torch.tensor(array) for name, array in map_tensors(file).items()}
    for name in json.loads(open_tensors(file).metadata.get(_CHANNELS_LAST, "[]")):
        held[name] = held[name].contiguous(memory_format=torch.channels_last)
    return held
