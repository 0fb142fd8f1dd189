"""The two files of Fooocus' inpainting: the patch (an 8-bit weight delta under sgm names) and the head.

The formats are described in words after lllyasviel/Fooocus, `modules/inpaint_worker.py` and `modules/patch.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.stored import Floats, Stored
from dreammix_trt.core.tensors import Change, Weights, open_tensors
from dreammix_trt.core.torch_zip import read_torch_zip

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PatchEntry:
    """One quantised delta.

    codes: uint8, of the weight's shape.
    low, high: the values of code 0 and 255, float16 of shape () or (out, 1, ...).
    """

    codes: NDArray[np.uint8]
    low: NDArray[np.float16]
    high: NDArray[np.float16]

    def delta(self) -> Floats:
        """The delta `half(codes/255 * (high - low) + low)` as float32, rounded to half as the reference does."""
        low, high = self.low.astype(np.float32), self.high.astype(np.float32)
        exact = self.codes.astype(np.float32)  # in place: at full size this is 50 MB
        exact /= np.float32(255)
        exact *= high - low
        exact += low
        with np.errstate(over="ignore"):
            return exact.astype(np.float16).astype(np.float32)


class Patch(Mapping[str, PatchEntry]):
    """A patch file: sgm name (`diffusion_model....weight|bias`) -> `PatchEntry`.

    An entry is read at every access and not kept. Reading raises `FileFormatError` for a range that is not finite.
    """

    def __init__(self, entries: Mapping[str, tuple[Stored, Stored, Stored]]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, key: str) -> PatchEntry:
        codes, low, high = self._entries[key]
        return PatchEntry(codes.raw(), low.floats().astype(np.float16), high.floats().astype(np.float16))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a delta. Reads nothing."""
        return self._entries[key][0].shape


def read_patch(path: str | Path) -> Patch:
    """Open a `*.fooocus.patch` file. Reads only its list of tensors and does not need torch.

    Raises `FileFormatError` for another kind of file and for ranges that do not fit their tensor.
    """
    entries = {str(key): _check_entry(Path(path), key, value) for key, value in read_torch_zip(path).items()}
    if not entries:
        log.warning("%s: the patch is empty; patched and raw UNet will be the same", path)
    return Patch(entries)


def apply_patch(
    state: Mapping[str, Floats],
    patch: Mapping[str, PatchEntry],
    names: Mapping[str, str],
    *,
    biases: bool = False,
    alpha: float = 1.0,
) -> Weights:
    """Patch a UNet: a tensor in the patch becomes `W + alpha * delta` when it is read, the others stay as they are.

    state: the UNet's weights, diffusers name -> float32.
    patch: deltas by sgm name, for any subset of the tensors.
    names: sgm name -> diffusers name, from `keymap.sgm_to_diffusers(config)`.
    biases: whether to apply the deltas of `.bias` tensors. False: only those of `.weight`, as in the reference
        (docs/algorithm.md, 11.1).
    alpha: factor of the deltas.

    Raises `FileFormatError` listing the names that the UNet does not have and the shapes that differ. This is checked
    before anything is read.
    """
    weights = Weights.of(state)
    known = {key: names[key] for key in patch if names.get(key) in weights}
    unknown = [key for key in patch if key not in known]
    differing = [
        f"{key}: {_shape(patch, key)} against {weights.shape(name)}"
        for key, name in known.items()
        if _shape(patch, key) != weights.shape(name)
    ]
    complaints = [f"it names {_join_first(unknown)}, which this base does not have"] if unknown else []
    complaints += [f"shapes differ ({_join_first(differing)})"] if differing else []
    if complaints:
        raise FileFormatError(f"the patch is for another UNet: {'; '.join(complaints)}")
    used = {key: name for key, name in known.items() if biases or key.endswith(".weight")}
    log.info(
        "patch: %d tensors applied, %d biases skipped; %d of the UNet's %d are not in the patch",
        len(used),
        len(known) - len(used),
        len(weights) - len(known),
        len(weights),
    )
    scale = np.float32(alpha)
    changes: dict[str, Change] = {name: partial(_add_delta, patch, key, scale) for key, name in used.items()}
    return weights.change(changes)


def read_head(path: str | Path) -> Floats:
    """Read the inpaint head: float32 (C, 5, 3, 3), input channels [mask, masked latent x 4], no bias.

    path: torch's `.pth` ({"head": tensor}, possibly a strided view) or a `.safetensors` with a tensor named `head`.

    Raises `FileFormatError` when there is no such tensor.
    """
    weights = open_tensors(path)
    if "head" not in weights or len(weights.shape("head")) != 4 or weights.shape("head")[1:] != (5, 3, 3):
        raise FileFormatError(f"{path}: no tensor 'head' of shape (channels, 5, 3, 3); is this an inpaint head file?")
    return weights["head"]


def _check_entry(path: Path, key: Any, value: Any) -> tuple[Stored, Stored, Stored]:
    parts = value if isinstance(value, tuple | list) else ()
    if len(parts) != 3 or not all(isinstance(part, Stored) for part in parts) or parts[0].dtype != "uint8":
        raise FileFormatError(f"{path}: {key!r} is not (uint8 tensor, min, max); is this a *.fooocus.patch file?")
    codes, low, high = parts
    if not _spans(low.shape, codes.shape) or not _spans(high.shape, codes.shape):
        raise FileFormatError(
            f"{path}: {key!r} has ranges of shape {low.shape} and {high.shape}, "
            f"which do not fit its tensor of shape {codes.shape}"
        )
    return codes, low, high


def _add_delta(patch: Mapping[str, PatchEntry], key: str, scale: np.float32, weight: Floats) -> Floats:
    delta = patch[key].delta()
    delta *= scale
    delta += weight
    return delta


def _shape(patch: Mapping[str, PatchEntry], key: str) -> tuple[int, ...]:
    return patch.shape(key) if isinstance(patch, Patch) else patch[key].codes.shape


def _spans(limits: tuple[int, ...], codes: tuple[int, ...]) -> bool:
    """Whether a range is one number, or one number per output channel."""
    return set(limits) <= {1} or limits == codes[:1] + (1,) * (len(codes) - 1)


def _join_first(items: list[str], most: int = 8) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
