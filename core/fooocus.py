"""The two files of Fooocus' inpainting: the patch (an 8-bit weight delta under sgm names) and the head.

Facts of both formats: lllyasviel/Fooocus, `modules/inpaint_worker.py` and `modules/patch.py`, described in words.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.torch_zip import read_torch_zip

log = logging.getLogger(__name__)
Floats = NDArray[np.float32]
State = dict[str, Floats]


@dataclass(frozen=True)
class PatchEntry:
    """One quantised delta: codes uint8 of the weight's shape; low, high float16 of shape () or (out, 1, ...)."""

    codes: NDArray[np.uint8]
    low: NDArray[np.float16]
    high: NDArray[np.float16]

    def delta(self) -> Floats:
        """`half(codes/255 * (high - low) + low)` as float32, rounded to half as the reference does."""
        low, high = self.low.astype(np.float32), self.high.astype(np.float32)
        exact = self.codes.astype(np.float32) / np.float32(255) * (high - low) + low
        return exact.astype(np.float16).astype(np.float32)


def read_patch(path: str | Path) -> dict[str, PatchEntry]:
    """A `*.fooocus.patch` file: sgm name (`diffusion_model....weight|bias`) -> `PatchEntry`. Needs no torch."""
    path = Path(path)
    patch = {}
    for key, value in read_torch_zip(path).items():
        parts = value if isinstance(value, tuple | list) else ()
        if len(parts) != 3 or not all(isinstance(part, np.ndarray) for part in parts) or parts[0].dtype != np.uint8:
            raise FileFormatError(f"{path}: {key!r} is not (uint8 tensor, min, max); is this a *.fooocus.patch file?")
        if not _spans(parts[1], parts[0]) or not _spans(parts[2], parts[0]):
            raise FileFormatError(
                f"{path}: {key!r} has ranges of shape {parts[1].shape} and {parts[2].shape}, "
                f"which do not fit its tensor of shape {parts[0].shape}"
            )
        patch[str(key)] = PatchEntry(*parts)
    if not patch:
        log.warning("%s: the patch is empty; patched and raw UNet will be the same", path)
    return patch


def apply_patch(
    state: Mapping[str, Floats],
    patch: Mapping[str, PatchEntry],
    names: Mapping[str, str],
    *,
    biases: bool = False,
    alpha: float = 1.0,
) -> State:
    """The patched UNet, float32: `W + alpha * delta` for each tensor in the patch, the others unchanged (not copied).

    state: diffusers name -> float32; names: `keymap.sgm_to_diffusers(config)`. Any subset of the tensors may be
    patched. biases False: only names ending in `.weight` count, as in the reference (reference/dreammix.md 3.3).
    Raises `FileFormatError` listing names the UNet does not have and shapes that differ.
    """
    known = {key: names[key] for key in patch if names.get(key) in state}
    unknown = [key for key in patch if key not in known]
    differing = [
        f"{key}: {patch[key].codes.shape} against {state[name].shape}"
        for key, name in known.items()
        if patch[key].codes.shape != state[name].shape
    ]
    complaints = [f"it names {_some(unknown)}, which this base does not have"] if unknown else []
    complaints += [f"shapes differ ({_some(differing)})"] if differing else []
    if complaints:
        raise FileFormatError(f"the patch is for another UNet: {'; '.join(complaints)}")
    used = {key: name for key, name in known.items() if biases or key.endswith(".weight")}
    log.info(
        "patch: %d tensors applied, %d biases left out, of %d in the UNet",
        len(used),
        len(known) - len(used),
        len(state),
    )
    scale = np.float32(alpha)
    return {**state, **{name: state[name] + scale * patch[key].delta() for key, name in used.items()}}


def read_head(path: str | Path) -> Floats:
    """The inpainting head: float32 (C, 5, 3, 3), input channels [mask, masked latent x 4], no bias.

    path: torch's `.pth` ({"head": tensor}, possibly a strided view) or a `.safetensors` with a tensor named `head`.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            loaded: Mapping[str, Any] = load_file(path)
        except (SafetensorError, OSError) as error:
            raise FileFormatError(f"{path}: not a readable safetensors file ({error})") from error
    else:
        loaded = read_torch_zip(path)
    head = loaded.get("head")
    if not isinstance(head, np.ndarray) or head.ndim != 4 or head.shape[1:] != (5, 3, 3):
        raise FileFormatError(f"{path}: no tensor 'head' of shape (channels, 5, 3, 3); is this an inpaint head file?")
    return np.ascontiguousarray(head, dtype=np.float32)


def _spans(limits: NDArray[Any], codes: NDArray[Any]) -> bool:
    """Whether a range is one number or one per output channel."""
    return limits.size == 1 or limits.shape == (codes.shape[0],) + (1,) * (codes.ndim - 1)


def _some(items: list[str], most: int = 8) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
