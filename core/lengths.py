"""Lengths of the text condition that engines of plans take: each by itself, or all of a span."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from dreammix_trt.core.config_fields import TOKENS

Length = int | tuple[int, int]  # a length, or the first and the last of a span
_LEAST_RUN: Final = 3


def parse_lengths(text: str) -> tuple[Length, ...]:
    """The lengths in "77,78-125". Raises ValueError for anything else."""
    return tuple(_parse_length(part) for part in text.split(","))


def _parse_length(text: str) -> Length:
    low, dash, high = text.partition("-")
    if not dash:
        return int(low)
    if int(low) >= int(high):
        raise ValueError(text)
    return int(low), int(high)


def join_lengths(lengths: Sequence[Length]) -> str:
    """What `parse_lengths` reads."""
    return ",".join(str(each) if isinstance(each, int) else f"{each[0]}-{each[1]}" for each in lengths)


def span_of(length: Length) -> tuple[int, int]:
    """The first and the last length."""
    return (length, length) if isinstance(length, int) else length


def order_length(length: Length) -> tuple[int, int]:
    """A key that puts single lengths before spans, as the first profile that holds a length is taken."""
    low, high = span_of(length)
    return high - low, low


def write_lengths(lengths: Iterable[int], comma: str = ", ") -> str:
    """Show single lengths, as `parse_lengths` reads them: "77, 78-125".

    Lengths that follow one another are a span. Those of a text alone, multiples of 77, stay by themselves: plans of one
    length are faster.
    """
    runs: list[list[int]] = []
    for each in sorted({*lengths}):
        follows = bool(runs) and each == runs[-1][-1] + 1 and each % TOKENS and runs[-1][-1] % TOKENS
        runs[-1].append(each) if follows else runs.append([each])
    found = [[f"{run[0]}-{run[-1]}"] if len(run) >= _LEAST_RUN else map(str, run) for run in runs]
    return comma.join(text for texts in found for text in texts)
