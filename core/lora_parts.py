"""The contents of a LoRA file: its tensors as float32, the scales given with them, and the pairs they form."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.files import read_json
from dreammix_trt.core.lora_names import NETWORKS, join_first
from dreammix_trt.core.tensors import open_tensors

log = logging.getLogger(__name__)

Floats = NDArray[np.float32]
Number = TypeVar("Number", int, float)
#: what PEFT's `save_pretrained` writes into a folder
PEFT_FILES, PEFT_CONFIG = ("adapter_model.safetensors", "adapter_model.bin"), "adapter_config.json"
_REBASED = ("pissa", "olora", "loftq", "corda")  # initialisations that change the base before training


def read_tensors(path: Path) -> tuple[dict[str, Floats], dict[str, str]]:
    """Read a safetensors file, or one of torch (`.bin`, `.pt`, `.ckpt`) without running anything in it.

    Returns (tensors as float32, metadata). Raises `FileFormatError` for any other file or dtype.
    """
    weights = open_tensors(path)
    if not weights:
        raise FileFormatError(f"{path}: holds no tensors")
    return {name: weights.numbers(name) for name in weights}, weights.metadata


@dataclass
class AdapterScales:
    """The scale alpha / rank of each module; 1 where nothing is given.

    The source is the `lora_adapter_metadata` in newer diffusers files, or the adapter_config.json that PEFT writes
    beside its adapter_model.safetensors. The rank is that of the factor; an adapter_config.json must agree with it.

    alphas: by network.
    patterns: by network: regular expression -> alpha, as PEFT reads them: the first that matches the whole name, or its
        end after a dot, applies.
    by_root: by network: whether it is rsLoRA, which has alpha / sqrt(rank).
    peft: whether the source is an adapter_config.json, which does not name the network.
    rank, ranks: of adapter_config.json; ranks by regular expression.
    used: patterns that `scale` has used.
    """

    alphas: dict[str, float]
    patterns: dict[str, dict[str, float]]
    by_root: dict[str, bool]
    peft: bool = False
    rank: int = 0
    ranks: dict[str, int] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, str]) -> AdapterScales:
        """Read the scales from a file's metadata, else from the PEFT config beside it.

        path: the LoRA file.
        metadata: of its safetensors header.

        Raises `FileFormatError` for DoRA and for other adapters that only look like LoRA.
        """
        config = path.with_name(PEFT_CONFIG)
        peft = "lora_adapter_metadata" not in metadata and path.name in PEFT_FILES and config.is_file()
        told = _read_peft_config(config) if peft else {}
        try:
            fields: dict[str, Any] = {f"{network}.{key}": told[key] for network in NETWORKS for key in told}
            fields |= json.loads(metadata.get("lora_adapter_metadata", "{}"))
            found = {network: fields.get(f"{network}.lora_alpha") for network in NETWORKS}
            scales = cls(
                {network: float(alpha) for network, alpha in found.items() if alpha is not None},
                {network: _read_patterns(fields.get(f"{network}.alpha_pattern"), float) for network in NETWORKS},
                {network: bool(fields.get(f"{network}.use_rslora")) for network in NETWORKS},
                peft,
                int(told.get("r") or 0),
                _read_patterns(told.get("rank_pattern"), int),
            )
        except (ValueError, TypeError, OverflowError, RecursionError, re.error) as error:
            raise FileFormatError(f"{path}: {_source(peft)} is not what PEFT writes ({error})") from error
        if any(fields.get(f"{network}.use_dora") for network in NETWORKS):
            raise FileFormatError(f"{path}: a DoRA file; only plain LoRA can be used, train without use_dora")
        return scales

    def scale(self, path: Path, network: str, module: str, rank: int) -> float:
        """The factor of B A for one module. Raises `FileFormatError` when the rank is not the one in the config.

        path: the LoRA file, for the message.
        rank: of the module's factors.
        """
        told = self.ranks.get(_find_pattern(self.ranks, module), self.rank)
        if told and told != rank:
            raise FileFormatError(
                f"{path}: {network}.{module} has rank {rank}, but {_source(self.peft)} says {told}; "
                "the files do not belong together"
            )
        pattern = _find_pattern(self.patterns[network], module)
        self.used.add(pattern)
        alpha = self.patterns[network].get(pattern, self.alphas.get(network))
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.by_root[network] else rank)

    def tell_unused(self, path: Path) -> None:
        """Warn of alphas that no call of `scale` has used. PEFT leaves them alone, too."""
        idle = {pattern for patterns in self.patterns.values() for pattern in patterns} - self.used
        if idle:
            log.warning(
                "%s: %s has alphas for modules that the file lacks: %s",
                path,
                _source(self.peft),
                join_first(list(idle)),
            )


def _read_patterns(told: Any, kind: type[Number]) -> dict[str, Number]:
    """Regular expression -> number. Raises what `AdapterScales.of` names for anything else."""
    patterns = {str(pattern): kind(value) for pattern, value in dict(told or {}).items()}
    for pattern in patterns:
        re.compile(pattern)
    return patterns


def _find_pattern(patterns: Iterable[str], module: str) -> str:
    """The first pattern that applies to a module; "" for none."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), "")


def _source(peft: bool) -> str:
    return f"{PEFT_CONFIG} beside it" if peft else "its lora_adapter_metadata"


def _read_peft_config(path: Path) -> dict[str, Any]:
    """Read adapter_config.json. Raises `FileFormatError` for another kind of adapter or a base changed beforehand."""
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


def make_pair(
    path: Path, network: str, module: str, parts: Mapping[str, Floats], scales: AdapterScales
) -> tuple[tuple[Floats, Floats], tuple[int, int]]:
    """Make the pair of factors of one module.

    path, network, module: for messages, and to find the module's scale.
    parts: its tensors by role. A linear layer has down (r, in) and up (out, r). A convolution has down (r, in, kh, kw)
        and up (out, r, 1, 1), or with a core `mid` (r, r, kh, kw) down (r, in, 1, 1).
    scales: alpha / rank where the file has no alpha tensor.

    Returns ((A, B), (kh, kw)); (1, 1) for a linear layer. Raises `FileFormatError` for half a pair, for shapes that do
    not fit and for values that are not finite.
    """
    name = f"{network}.{module}"
    missing = {"down", "up"} - parts.keys()
    if missing:
        raise FileFormatError(f"{path}: {name} has no '{min(missing)}' factor; the file is incomplete")
    down, up = _multiply_core(path, name, parts), parts["up"]
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
        raise FileFormatError(f"{path}: {name} has alpha / rank {scale}, which is not a usable scale")
    if scale == 0:
        raise FileFormatError(f"{path}: {name} has alpha 0 (lora_alpha, or .alpha), which turns it off; give its rank")
    kernel = (down.shape[2], down.shape[3]) if down.ndim == 4 else (1, 1)
    a = down.reshape(rank, -1).T
    with np.errstate(over="ignore", invalid="ignore"):
        b = up.reshape(up.shape[:2]).T * np.float32(scale)
    if not np.isfinite([a.max(), a.min(), b.max(), b.min()]).all():
        raise FileFormatError(f"{path}: {name} holds values that are not finite; the training diverged")
    return (a, b), kernel


def _multiply_core(path: Path, name: str, parts: Mapping[str, Floats]) -> Floats:
    """Multiply the core of a Tucker form (down 1x1, mid kh x kw, up 1x1), if there is one, into `down`."""
    down, core = parts["down"], parts.get("mid")
    if core is None:
        return down
    if core.ndim != 4 or core.shape[1] != down.shape[0] or down.ndim != 4 or down.shape[2:] != (1, 1):
        raise FileFormatError(
            f"{path}: {name} has a core of shape {core.shape} and a factor of shape {down.shape}, which do not multiply"
        )
    together: Floats = np.einsum("rskl,si->rikl", core, down[:, :, 0, 0])
    return together
