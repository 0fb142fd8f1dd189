"""Factors in a file of ours: named by network and module, balanced and rounded to float16.

`<network>.<module>.A` (in, r) and `.B` (r, out), alpha / rank folded in; `unets` stands for what both UNets share. The
columns of A and the rows of B are scaled to equal norms before rounding. So none leaves float16's range, not even those
of a weak LoRA stacked beside a strong one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.lora import Factors, Target
from dreammix_trt.core.networks import KINDS, unets_of
from dreammix_trt.core.slots import Floats

_BOTH: Final = "unets"
_LARGEST = float(np.finfo(np.float16).max)


def encode_factors(factors: Factors) -> dict[str, NDArray[np.float16]]:
    """The tensors of a file. Raises `FileFormatError` for factors that are too large all the same."""
    tensors = {}
    for name, pair in _name_factors(factors):
        for side, factor in zip("AB", _balance(*pair), strict=True):
            if not np.abs(factor).max(initial=0) <= _LARGEST:
                raise FileFormatError(f"{name} has factors beyond float16; the LoRA is damaged")
            tensors[f"{name}.{side}"] = np.ascontiguousarray(factor, dtype=np.float16)
    return tensors


def decode_factors(path: Path, tensors: Mapping[str, Floats], unet_means: Target | None = None) -> Factors:
    """The factors in a file's tensors, by engine network.

    path: of the file, for the message.
    tensors: by the names of `encode_factors`, as float32.
    unet_means: which UNets "unet" stands for; None: the patched one, and "unets" for both.

    Raises `FileFormatError` for what is no pair of factors.
    """
    places = _list_places() | ({"unet": unets_of(unet_means)} if unet_means else {})
    factors: Factors = {}
    for name in sorted({key.removesuffix(".A").removesuffix(".B") for key in tensors}):
        stored, _, module = name.partition(".")
        a, b = tensors.get(f"{name}.A"), tensors.get(f"{name}.B")
        if stored not in places or a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise FileFormatError(f"{path}: {name} is not a pair of factors of {', '.join(places)}")
        for network in places[stored]:
            factors.setdefault(network, {})[module] = (a, b)
    return factors


def _list_places() -> dict[str, tuple[str, ...]]:
    """Network in the file -> engine networks that take its factors."""
    places: dict[str, tuple[str, ...]] = {
        kind.name: (kind.name,) for kind in KINDS if kind.factors and not kind.factors_of
    }
    return {**places, _BOTH: unets_of("both")}


def _name_factors(factors: Factors) -> Iterator[tuple[str, tuple[Floats, Floats]]]:
    """(name in the file, factors); what both UNets share is written once."""
    for network, modules in factors.items():
        for module, pair in modules.items():
            unets = unets_of("both")
            others = [factors.get(name, {}).get(module) for name in unets if network in unets and name != network]
            if not any(other is not None and all(map(np.array_equal, pair, other)) for other in others):
                yield f"{network}.{module}", pair
            elif network == unets[0]:
                yield f"{_BOTH}.{module}", pair


def _balance(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """The same product with column j of A and row j of B of equal norm; a rank without effect becomes zeros."""
    norms_a, norms_b = (np.linalg.norm(each.astype(np.float64), axis=axis) for each, axis in ((a, 0), (b, 1)))
    live = (norms_a > 0) & (norms_b > 0)
    ratio = np.sqrt(np.divide(norms_b, norms_a, out=np.ones_like(norms_a), where=live))
    up, down = ratio * live, live / ratio
    return (a * up).astype(np.float32), (b * down[:, None]).astype(np.float32)
