"""The tokens of a subject: rows of the text condition, made of its photographs once (`engine/enrolment.py`).

Kept are the projected rows and not the features that they were made of: so no network runs to use a subject, every back
end paints with the same numbers, and the first K rows are the subject of K tokens. 48 rows of SDXL are 192 KiB, of the
embedded base 15 KiB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.slots import Floats

PART: Final = "tokens"  # of a subject's file
_ROWS: Final = f"{PART}.rows"
_ADAPTER: Final = "tokens_adapter"  # the fact of a subject's file
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Rows that stand beside the text.

    rows: float32 (K, context width), the most discriminative token first.
    adapter: sha256 of the token adapter that made them, and that must be there when they are used.
    """

    rows: Floats
    adapter: str


def encode_tokens(tokens: Tokens) -> tuple[dict[str, NDArray[np.float16]], dict[str, str]]:
    """The tensors and the facts of a file. Raises `FileFormatError` for rows beyond float16."""
    if not (np.abs(tokens.rows) <= _LARGEST).all():
        raise FileFormatError("tokens hold values that are not finite or beyond float16: build with another adapter")
    return {_ROWS: np.ascontiguousarray(tokens.rows, dtype=np.float16)}, {_ADAPTER: tokens.adapter}


def decode_tokens(path: Path, facts: Mapping[str, Any], tensors: Mapping[str, Floats]) -> Tokens:
    """The tokens of a file.

    path: of the file, for the message.
    tensors: those of the part, as float32.

    Raises `FileFormatError` for other tensors than the rows, and for rows that say no adapter or are not finite.
    """
    rows, adapter = tensors.get(_ROWS), facts.get(_ADAPTER)
    if rows is None or len(tensors) > 1 or rows.ndim != 2 or not rows.size or not np.isfinite(rows).all():
        found = ", ".join(f"{name} {values.shape}" for name, values in tensors.items()) or "none"
        raise FileFormatError(
            f"{path}: damaged, its tokens are {found}, expected finite {_ROWS} (K, C); enrol it again"
        )
    if not isinstance(adapter, str) or not adapter:
        raise FileFormatError(f"{path}: damaged, it does not say of which adapter its tokens are; enrol it again")
    return Tokens(rows, adapter)
