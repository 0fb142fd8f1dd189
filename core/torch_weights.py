"""Reads weights of torch from a user's file without running what may be in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dreammix_trt.core.errors import FileFormatError, InputError


def load_weights(make: Callable[[], Any], file: Path, option: str, *, ignored: tuple[str, ...] = ()) -> Any:
    """Make a torch module with a file's tensors as its weights, in float32 and for inference.

    make: makes the module; it is given no memory of its own for weights.
    file: .safetensors, or what `torch.save` wrote of a state dict.
    option: what errors call it.
    ignored: how names begin that the module does not have.

    Raises InputError for a file that is missing, FileFormatError for another format, missing tensors and other shapes.
    """
    import torch

    state = read_state(file, option)
    with torch.device("meta"):
        module = make()
    kept = {name: value for name, value in state.items() if not name.startswith(ignored or ("\0",))}
    wanted = {name for name in module.state_dict() if not name.endswith("num_batches_tracked")}
    missing = sorted(wanted - kept.keys())
    if missing:
        raise FileFormatError(
            f"{option} {file}: is of another network: it lacks {missing[0]} and {len(missing) - 1} more"
        )
    try:
        module.load_state_dict({name: kept[name].float() for name in wanted}, strict=False, assign=True)
    except RuntimeError as error:
        raise FileFormatError(
            f"{option} {file}: is of another network ({str(error).splitlines()[-1].strip()})"
        ) from error
    return module.eval().requires_grad_(False)


def read_state(file: Path, option: str) -> dict[str, Any]:
    """The tensors of a file by name. Raises InputError and FileFormatError as `load_weights` does."""
    import torch

    if not file.is_file():
        raise InputError(f"{option} {file}: no such file")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(file))
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds, by torch's version
        raise FileFormatError(f"{option} {file}: cannot be read as weights ({error}); fetch it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise FileFormatError(f"{option} {file}: holds no plain state dict; save one with torch.save(net.state_dict())")
    return state
