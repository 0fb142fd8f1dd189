"""The random numbers of a picture: counter-based normals, and the providers that the sampling loop draws from.

The numbers are a pure function of (seed, draw, step, element), so picture k of a batch equals that picture alone and
the order of evaluation does not matter. This file is the definition. The C++ kernel (`cpp_ext/philox.hpp`) and the
device repeat it: the integers are identical everywhere, the normals agree within 2e-6.

Element n of an array (C order) is number n % 4 of block b = n // 4. Block b is Philox4x32-10 (Salmon, Moraes, Dror,
Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) of

    counter = (b mod 2^32, b div 2^32, step, draw)        key = (seed mod 2^32, seed div 2^32)

which gives words w0..w3. With u = (w + 0.5) * 2^-32 in double precision (never 0 or 1), Box-Muller makes

    (sqrt(-2 ln u0) cos 2 pi u1,  sqrt(-2 ln u0) sin 2 pi u1,  sqrt(-2 ln u2) cos 2 pi u3,  sqrt(-2 ln u2) sin 2 pi u3)

computed in double precision and rounded to float32.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import InputError

F32 = npt.NDArray[np.float32]
U32 = npt.NDArray[np.uint32]

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

#: The kinds of draws and their fixed numbers. They are part of what a seed means, so never change an entry.
DRAWS: Mapping[str, int] = {
    "init_noise": 0,
    "blend_noise": 1,
    "solver_noise": 2,
    "renoise_switch": 3,
    "vae_noise_lcg_fill": 4,
    "vae_noise_lcg_masked": 5,
    "vae_noise_switch_zG": 6,
    "vae_noise_gch_background": 7,
    "vae_noise_gch_masked": 8,
}


class NoiseProvider(Protocol):
    """The source of the loop's unit normals. A batch has one provider per picture."""

    def draw(self, label: str, shape: Sequence[int], step: int = 0) -> F32:
        """Draw float32 unit normals.

        label: of the draw, as in docs/algorithm.md, 10.2: for example "init_noise" or "blend_noise_step03".
        shape: usually (1, 4, h, w).
        step: 0-based.
        """
        ...


class SeededNoise:
    """The noise of one picture from one seed. Every label has a fixed draw number, see `DRAWS`."""

    def __init__(self, seed: int, generate: Callable[[int, int, int, Sequence[int]], F32] | None = None) -> None:
        """seed: 0 .. 2^64-1.

        generate: makes the numbers; the runtime passes its compiled version of `normals`.
        """
        self.seed = _check_unsigned(seed, 64, "seed")
        self._generate = generate or normals

    def draw(self, label: str, shape: Sequence[int], step: int = 0) -> F32:
        """Draw unit normals. Raises InputError for an unknown label or one that names another step than `step`."""
        kind, named_step = _parts_of(label)
        if kind not in DRAWS:
            raise InputError(f"noise label {label!r} is unknown; known kinds are {', '.join(DRAWS)}")
        if named_step is not None and named_step != step:
            raise InputError(f"noise label {label!r} names step {named_step}, but step {step} was asked for")
        return self._generate(self.seed, DRAWS[kind], step, shape)


class ReplayNoise:
    """Recorded noise: the array stored under the label, for every step."""

    def __init__(self, arrays: Mapping[str, npt.ArrayLike]) -> None:
        self.arrays = {label: np.asarray(array, np.float32) for label, array in arrays.items()}

    def draw(self, label: str, shape: Sequence[int], step: int = 0) -> F32:
        """Copy the recorded array. Raises InputError when there is none or it has another shape."""
        if label not in self.arrays:
            raise InputError(f"no noise was recorded under {label!r}; recorded are {', '.join(sorted(self.arrays))}")
        array = self.arrays[label]
        if array.shape != tuple(shape):
            raise InputError(f"noise recorded under {label!r} has shape {array.shape}, but {tuple(shape)} is needed")
        return array.copy()


def normals(seed: int, draw: int, step: int, shape: Sequence[int]) -> F32:
    """Float32 unit normals of `shape`: the pure function of the arguments that the module describes.

    seed: 0 .. 2^64-1.
    draw: number of the kind of draw, 0 .. 2^32-1.
    step: 0 .. 2^32-1.

    Raises InputError for a number out of range.
    """
    seed, draw, step = (
        _check_unsigned(seed, 64, "seed"),
        _check_unsigned(draw, 32, "draw"),
        _check_unsigned(step, 32, "step"),
    )
    count = math.prod(shape)
    blocks = np.arange((count + 3) // 4, dtype=np.uint64)
    counter = np.empty((len(blocks), 4), np.uint32)
    counter[:, 0] = blocks & _MASK
    counter[:, 1] = blocks >> _SHIFT
    counter[:, 2] = step
    counter[:, 3] = draw
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    unit = (words + 0.5) * 2.0**-32
    radius = np.sqrt(-2.0 * np.log(unit[:, 0::2]))
    angle = 2.0 * math.pi * unit[:, 1::2]
    pairs = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1)
    return pairs.reshape(-1)[:count].astype(np.float32).reshape(tuple(shape))


def philox(counter: U32, key: tuple[int, int]) -> U32:
    """Philox4x32-10.

    counter: uint32 (n, 4).
    key: two 32-bit words.

    Returns uint32 (n, 4).
    """
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(_ROUNDS):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (b >> _SHIFT) ^ c1 ^ np.uint64(k0), b & _MASK, (a >> _SHIFT) ^ c3 ^ np.uint64(k1), a & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3), axis=1).astype(np.uint32)


def _check_unsigned(value: int, bits: int, name: str) -> int:
    if not 0 <= value < 1 << bits:
        raise InputError(f"{name} is {value}; it must lie in 0 .. 2^{bits}-1")
    return int(value)


@functools.cache
def _parts_of(label: str) -> tuple[str, int | None]:
    """The kind and the step in a label: "blend_noise_step03" -> ("blend_noise", 3)."""
    match = re.fullmatch(r"(.+)_step(\d+)", label)
    return (match[1], int(match[2])) if match else (label, None)
