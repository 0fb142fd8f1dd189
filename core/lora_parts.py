"""What stands in a LoRA file: its tensors as float32, the scales told beside them, and the pairs they make up."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.files import read_json, reading
from dreammix_trt.core.lora_names import NETWORKS, some

Floats = NDArray[np.float32]
#: what PEFT's `save_pretrained` writes into a folder
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_REBASED = ("pissa", "olora", "loftq", "corda")  # trainings whose LoRA belongs to a base changed beforehand
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}


def read_tensors(path: Path) -> tuple[dict[str, Floats], dict[str, str]]:
    """(tensors as float32, metadata) of a safetensors file of any usual type; `FileFormatError` for anything else."""
    from safetensors import SafetensorError, safe_open

    with reading(path), path.open("rb"):  # only the attempt tells whether we may
        pass
    try:
        with safe_open(path, framework="numpy") as file:  # checks names, shapes, places; cannot read bfloat16
            metadata = dict(file.metadata() or {})
        data = np.memmap(path, np.uint8, mode="r")
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{path}: truncated, or not a safetensors file ({error})") from error
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:start]))
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise FileFormatError(f"{path}: {name} is of type {entry['dtype']}; save the LoRA as fp16, bf16 or fp32")
        first, end = entry["data_offsets"]
        try:
            numbers = data[start + first : start + end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        except ValueError as error:  # more sides than numpy has
            raise FileFormatError(f"{path}: {name} cannot be read ({error})") from error
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinity, which `pair_of` names
            tensors[name] = _from_bfloat16(numbers) if entry["dtype"] == "BF16" else np.array(numbers, np.float32)
    if not tensors:
        raise FileFormatError(f"{path}: holds no tensors")
    return tensors, metadata


def _from_bfloat16(bits: NDArray[np.uint16]) -> Floats:
    """numpy has no bfloat16; it is float32 without its lower 16 bits."""
    wide = np.array(bits, np.uint32)
    wide <<= 16
    return wide.view(np.float32)


@dataclass
class AdapterScales:
    """alpha / rank by the `lora_adapter_metadata` that newer diffusers files carry, or by the adapter_config.json that
    PEFT writes beside its adapter_model.safetensors; absent: 1.

    The rank is the factor's own, which an adapter_config.json must agree with. An `alpha_pattern` names a module by its
    end, in whole words, the longest first; PEFT takes regular expressions there, refused for matching nothing.
    """

    alphas: dict[str, float]  # by network
    patterns: dict[str, float]  # by "<network>.<end of module>"
    by_root: dict[str, bool]  # rsLoRA networks: alpha / sqrt(rank)
    peft: bool = False  # told by an adapter_config.json, which does not say which network it means
    ranks: dict[str, int] = field(default_factory=dict)  # of adapter_config.json, by end of module; "": of all others
    used: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, str]) -> AdapterScales:
        """Of a file's metadata, else of the PEFT config beside it; DoRA is refused, as is what only looks like LoRA."""
        config = path.with_name(PEFT_CONFIG)
        peft = "lora_adapter_metadata" not in metadata and path.name == PEFT_FILE and config.is_file()
        told = _peft_config(config) if peft else {}
        try:
            fields: dict[str, Any] = {f"{network}.{key}": told[key] for network in NETWORKS for key in told}
            fields |= json.loads(metadata.get("lora_adapter_metadata", "{}"))
            found = {network: fields.get(f"{network}.lora_alpha") for network in NETWORKS}
            scales = cls(
                {network: float(alpha) for network, alpha in found.items() if alpha is not None},
                {
                    f"{network}.{end}": float(alpha)
                    for network in NETWORKS
                    for end, alpha in dict(fields.get(f"{network}.alpha_pattern") or {}).items()
                },
                {network: bool(fields.get(f"{network}.use_rslora")) for network in NETWORKS},
                peft,
                {end: int(r) for end, r in {"": told.get("r"), **(told.get("rank_pattern") or {})}.items() if r},
            )
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise FileFormatError(f"{path}: {_source(peft)} is not what PEFT writes ({error})") from error
        if any(fields.get(f"{network}.use_dora") for network in NETWORKS):
            raise FileFormatError(f"{path}: a DoRA file; only plain LoRA can be used, train without use_dora")
        return scales

    def scale(self, path: Path, network: str, module: str, rank: int) -> float:
        """What B A is multiplied with; `FileFormatError` where the rank is not the one told."""
        told = next((self.ranks[end] for end in (*_ends(module), "") if end in self.ranks), rank)
        if told != rank:
            raise FileFormatError(
                f"{path}: {network}.{module} has rank {rank}, by {_source(self.peft)} {told}; "
                "the files do not belong together"
            )
        alpha = self.alphas.get(network)
        for pattern in (f"{network}.{end}" for end in _ends(module)):
            if pattern in self.patterns:
                self.used.add(pattern)
                alpha = self.patterns[pattern]
                break
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.by_root[network] else rank)

    def check_used(self, path: Path) -> None:
        """Raise `FileFormatError` for alphas that `scale` was never asked for."""
        idle = self.patterns.keys() - self.used
        if self.peft:
            met = {pattern.partition(".")[2] for pattern in self.used}
            idle = {end for pattern in idle if (end := pattern.partition(".")[2]) not in met}
        if idle:
            raise FileFormatError(
                f"{path}: {_source(self.peft)} has alphas for modules that the file lacks: {some(sorted(idle))}"
            )


def _source(peft: bool) -> str:
    return f"{PEFT_CONFIG} beside it" if peft else "its lora_adapter_metadata"


def _peft_config(path: Path) -> dict[str, Any]:
    """adapter_config.json; `FileFormatError` for another kind of adapter, or one for a base changed beforehand."""
    config = read_json(path)
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise FileFormatError(f"{path}: peft_type is {kind!r}; only plain LoRA can be used")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_REBASED):
        raise FileFormatError(
            f"{path}: init_lora_weights is {start!r}: the LoRA belongs to a base that its training changed; "
            "save it converted to a plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        )
    return config


def _ends(module: str) -> Iterator[str]:
    """`a.b.c` -> `a.b.c`, `b.c`, `c`."""
    while module:
        yield module
        module = module.partition(".")[2]


def pair_of(
    path: Path, network: str, module: str, parts: Mapping[str, Floats], scales: AdapterScales
) -> tuple[tuple[Floats, Floats], tuple[int, int]]:
    """((A, B), (kh, kw)) of one module from its tensors by role; (1, 1) for a linear layer.

    Linear: down (r, in), up (out, r). Convolution: down (r, in, kh, kw), up (out, r, 1, 1), or with a core `mid`
    (r, r, kh, kw) down (r, in, 1, 1). Raises `FileFormatError` for half a pair, other shapes, values not finite.
    """
    name = f"{network}.{module}"
    missing = {"down", "up"} - parts.keys()
    if missing:
        raise FileFormatError(f"{path}: {name} has no '{min(missing)}' factor; the file is incomplete")
    down, up = _with_core(path, name, parts), parts["up"]
    two = down.ndim in (2, 4) and up.ndim in (2, 4) and up.shape[2:] in ((), (1, 1))
    if not two or down.shape[0] != up.shape[1] or 0 in (*down.shape, *up.shape):
        raise FileFormatError(
            f"{path}: {name} has factors of shapes {down.shape} and {up.shape}, which do not multiply"
        )
    rank = down.shape[0]
    scale = scales.scale(path, network, module, rank)
    if "alpha" in parts:
        if parts["alpha"].size != 1:
            raise FileFormatError(f"{path}: {name} has an alpha of shape {parts['alpha'].shape}, expected one number")
        scale = float(parts["alpha"].flat[0]) / rank
    if not math.isfinite(scale):
        raise FileFormatError(f"{path}: {name} has alpha / rank {scale}, which is no number to scale with")
    if scale == 0:
        raise FileFormatError(f"{path}: {name} has alpha 0 (lora_alpha, or .alpha), which turns it off; give its rank")
    kernel = (down.shape[2], down.shape[3]) if down.ndim == 4 else (1, 1)
    a = down.reshape(rank, -1).T
    with np.errstate(over="ignore", invalid="ignore"):
        b = up.reshape(up.shape[:2]).T * np.float32(scale)
    if not np.isfinite([a.max(), a.min(), b.max(), b.min()]).all():
        raise FileFormatError(f"{path}: {name} holds values that are not finite; the training diverged")
    return (a, b), kernel


def _with_core(path: Path, name: str, parts: Mapping[str, Floats]) -> Floats:
    """`down`, with the core of a Tucker form (down 1x1, mid kh x kw, up 1x1) multiplied in."""
    down, core = parts["down"], parts.get("mid")
    if core is None:
        return down
    if core.ndim != 4 or core.shape[1] != down.shape[0] or down.ndim != 4 or down.shape[2:] != (1, 1):
        raise FileFormatError(
            f"{path}: {name} has a core of shape {core.shape} and a factor of shape {down.shape}, which do not multiply"
        )
    together: Floats = np.einsum("rskl,si->rikl", core, down[:, :, 0, 0])
    return together
