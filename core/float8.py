"""E4M3, the eight-bit float of quantised networks: conversion from and to float32, and scales.

A code has a sign, 4 bits of exponent and 3 of fraction (Micikevicius et al. 2022, "FP8 formats for deep learning", the
variant that ONNX calls float8_e4m3fn): no infinity, one NaN of each sign, the largest number is 448, the smallest
2^-9. A quantised number is a code times a scale.

All scales are powers of two. Dividing by one loses nothing, so a number is rounded once, and a scale is exact in
float16. It costs no accuracy: the format is a float, so a scale moves no number between its bits of fraction; it only
decides what saturates and what falls below the smallest normal number (2^-6; 15 binades lie above it).
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

LARGEST: Final = 448.0
#: how much larger than in the base a weight may become, once a subject is merged into it
HEADROOM: Final = 2.0


def to_e4m3(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Round to the nearest code, ties to the even one. What is larger than 448 becomes 448, NaN stays NaN.

    values: floats of any shape, already divided by their scale; computed as float32.
    """
    wide = np.ascontiguousarray(values, np.float32)
    bits = wide.view(np.uint32)
    sign, magnitude = (bits >> 24 & 0x80).astype(np.uint8), bits & 0x7FFFFFFF
    rounded = magnitude + np.uint32(0x0007FFFF) + (magnitude >> 20 & 1)  # to 3 bits of fraction
    normal = np.minimum((rounded >> 20) - np.uint32((127 - 7) << 3), 0x7E)  # wraps around below, where `tiny` is taken
    with np.errstate(invalid="ignore"):
        shifted = magnitude.view(np.float32) + np.float32(1 << 14)  # the last bit of this sum is 2^-9
    tiny = shifted.view(np.uint32) & 0x0F
    codes = np.where(magnitude < 0x3C800000, tiny, normal)  # below 2^-6
    codes = np.where(magnitude > 0x43E00000, 0x7E, codes)  # above 448, infinity too
    codes = np.where(magnitude > 0x7F800000, 0x7F, codes)
    return sign | codes.astype(np.uint8)


def from_e4m3(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The numbers that codes stand for, without their scale; the same shape."""
    return _NUMBERS[codes]


def scale_for(largest: float, headroom: float = 1.0) -> float:
    """The smallest power of two as a scale with which `headroom * largest` does not saturate.

    largest: the largest magnitude of the numbers; for 0 the scale is 1.
    """
    if not largest > 0:
        return 1.0
    return 2.0 ** max(math.ceil(math.log2(headroom * largest / LARGEST)), -14)  # float16 holds no smaller normal one


def _list_numbers() -> NDArray[np.float32]:
    codes = np.arange(256)
    exponent, fraction = codes >> 3 & 0xF, codes & 7
    magnitude = np.where(exponent > 0, (8 + fraction) * 2.0 ** (exponent - 10), fraction * 2.0**-9)
    magnitude = np.where(codes & 0x7F == 0x7F, np.nan, magnitude)
    return np.where(codes & 0x80, -magnitude, magnitude).astype(np.float32)


_NUMBERS: Final = _list_numbers()
