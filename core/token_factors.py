"""Token adapters written, their LoRA factors read, and a subject's tokens compared with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.factor_names import decode_factors, encode_factors
from dreammix_trt.core.files import atomic_file
from dreammix_trt.core.lora import Factors
from dreammix_trt.core.subject import Subject
from dreammix_trt.core.token_adapter import FACTORS, MARK, PROJECTION, Card, TokenAdapter
from dreammix_trt.core.token_rows import Tokens


def read_factors(adapter: TokenAdapter) -> Factors:
    """An adapter's LoRA by engine network, as a subject has it.

    Raises `FileFormatError` for factors that are not finite or no pairs.
    """
    weights = adapter.factors()
    return decode_factors(adapter.file, {name: weights[name] for name in weights})


def read_as_subject(adapter: TokenAdapter | None) -> Subject:
    """What an adapter learnt to read tokens with, as a subject that can be merged; None: nothing."""
    return Subject("", "", "", read_factors(adapter) if adapter else {})


def check_tokens(tokens: Tokens, adapter: TokenAdapter | None) -> None:
    """Raise `FileFormatError` for tokens that another adapter made than the engine's; None: it has none."""
    made = f"its tokens were made with the token adapter {tokens.adapter[:12]}"
    if adapter is None:
        raise FileFormatError(
            f"{made}, and this engine has none: build it again with `dreammix-trt build --tokens FILE`"
        )
    if tokens.adapter != adapter.sha256:
        raise FileFormatError(
            f"{made}, and this engine has {adapter.sha256[:12]}, whose rows mean something else: enrol the photograph "
            "again with `dreammix-trt enroll`, or build the engine with that adapter (`build --tokens FILE`)"
        )
    if tokens.rows.shape[1] != adapter.config.context_width:
        raise FileFormatError(
            f"its tokens are {tokens.rows.shape[1]} wide, and this base's text condition is "
            f"{adapter.config.context_width}: damaged; enrol the photograph again"
        )


def write_adapter(
    path: str | Path,
    card: Card,
    projection: Mapping[str, NDArray[Any]],
    factors: Factors,
    dtype: Literal["float16", "float32"] = "float16",
) -> None:
    """Write an adapter, whole or not at all.

    card: its rank is that of the factors, whatever it says.
    projection: weights of `TokenProjection` by name.
    factors: by engine network; equal ones of both UNets are written once. Always float16.
    dtype: of the projection.

    Raises `FileFormatError` for values that are not finite or leave float16.
    """
    from safetensors.numpy import save_file

    largest = float(np.finfo(dtype).max)
    tensors: dict[str, NDArray[Any]] = {}
    for name, values in projection.items():
        wide = np.asarray(values, np.float32)
        if not (np.abs(wide) <= largest).all():
            raise FileFormatError(f"{PROJECTION}{name} holds values that are not finite or beyond {dtype}")
        tensors[f"{PROJECTION}{name}"] = np.ascontiguousarray(wide, dtype=dtype)
    tensors |= {f"{FACTORS}{name}": values for name, values in encode_factors(factors).items()}
    rank = max((a.shape[1] for modules in factors.values() for a, _ in modules.values()), default=0)
    with atomic_file(Path(path)) as part:
        save_file(tensors, part, {MARK: replace(card, rank=rank).to_text()})
