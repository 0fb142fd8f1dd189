"""Numbers in a file that are read when they are needed, by mapping only their bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.files import explain_read_errors

Array = NDArray[Any]
Floats = NDArray[np.float32]
View = Callable[[Array], Array]

#: dtype name -> numpy dtype in the file; numpy has no bfloat16, whose 16 bits are the upper half of a float32,
#: and no E4M3 (core/float8.py)
LAYOUTS: dict[str, np.dtype[Any]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "uint8": np.dtype("u1"),
    "float8_e4m3fn": np.dtype("u1"),
}
FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Stored:
    """A tensor as it is stored.

    origin: where it is, for messages.
    dtype: a key of `LAYOUTS`, or the file's name for a type that cannot be read.
    raw: gives its numbers as `LAYOUTS[dtype]`, mapped or as a view, with any strides.
    """

    origin: str
    dtype: str
    shape: tuple[int, ...]
    raw: Callable[[], Array]

    def view(self, view: View) -> Stored:
        """The same numbers through a view (slice, transpose, reshape), which is applied when they are read."""
        mould = np.broadcast_to(np.zeros((), np.bool_), self.shape)  # finds the shape without using memory
        return Stored(self.origin, self.dtype, view(mould).shape, lambda: view(self.raw()))

    def floats(self) -> Floats:
        """Read the numbers as a new float32 array in C order. Raises `FileFormatError` for NaN, infinity, integers."""
        if self.dtype not in FLOATS:
            raise FileFormatError(f"{self.origin} is stored as {self.dtype}; save the weights as fp16, bf16 or fp32")
        return check_finite(self.numbers(), self.origin)

    def numbers(self) -> Floats:
        """As `floats`, but with NaN, infinity and integers of 32 and 64 bits."""
        if self.dtype not in (*FLOATS, "int64", "int32"):
            raise FileFormatError(f"{self.origin} is of type {self.dtype}; save it as fp16, bf16 or fp32")
        with np.errstate(over="ignore", invalid="ignore"):  # a float64 beyond float32 becomes infinity
            if self.dtype == "bfloat16":
                bits = self.raw().astype(np.uint32, order="C")
                bits <<= 16
                wide: Floats = bits.view(np.float32)
            else:
                wide = self.raw().astype(np.float32, order="C")
        return wide


def is_finite(values: Array) -> bool:
    """Whether floats hold neither NaN nor infinity."""
    if values.dtype.itemsize == 2:  # numpy is slow at finding extremes of halves
        return bool(np.isfinite(values).all())
    with np.errstate(invalid="ignore"):  # extremes propagate NaN and need no memory
        return not values.size or bool(np.isfinite(values.min()) and np.isfinite(values.max()))


def check_finite(values: Floats, origin: str) -> Floats:
    """Return the values. Raises `FileFormatError` naming their origin when one is NaN or infinite."""
    if not is_finite(values):
        raise FileFormatError(
            f"{origin} holds NaN or infinite values: the file is damaged, or was saved in a precision too small for it"
        )
    return values


@dataclass(frozen=True)
class MappedFile:
    """A file whose parts are mapped one at a time, so that no memory and no handle is held in between.

    size, changed: its bytes and modification time (ns) when it was opened. A file that changed since is not read.
    """

    path: Path
    size: int
    changed: int

    @classmethod
    def open(cls, path: str | Path) -> MappedFile:
        """Open a file. Raises `FileFormatError` when it does not exist, is a directory or cannot be read."""
        path = Path(path)
        with explain_read_errors(path):
            if not path.is_file():
                raise FileFormatError(f"{path}: {'a directory, expected a file' if path.is_dir() else 'no such file'}")
            with path.open("rb"):  # opening it is the only reliable test of permission
                status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)

    def numbers(self, dtype: str, offset: int, count: int) -> Array:
        """Map `count` numbers from byte `offset` on, read-only, flat. Raises `FileFormatError` if the file changed."""
        try:
            status = self.path.stat()
            if (status.st_size, status.st_mtime_ns) != (self.size, self.changed):
                raise FileFormatError(f"{self.path}: changed while it was being read; start again")
            if not count:
                return np.empty(0, LAYOUTS[dtype])
            return np.asarray(np.memmap(self.path, LAYOUTS[dtype], "r", offset, (count,)))
        except (OSError, ValueError) as error:
            raise FileFormatError(f"{self.path}: cannot be read any more ({error})") from error

    def tensor(self, name: str, dtype: str, shape: tuple[int, ...], offset: int) -> Stored:
        """A tensor in C order from byte `offset` on."""
        count = math.prod(shape)
        return Stored(
            f"{self.path}: tensor {name!r}", dtype, shape, lambda: self.numbers(dtype, offset, count).reshape(shape)
        )
