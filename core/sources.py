"""What a picture may be given as beside a path and a PIL image: bytes, an open file, arrays and tensors.

Tensors come through DLPack (https://dmlc.github.io/dlpack), so no library that makes them is imported.
"""

from __future__ import annotations

import io
import os
from typing import IO, Any, Protocol, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from dreammix_trt.core.errors import InputError

U8 = npt.NDArray[np.uint8]


class SupportsDLPack(Protocol):
    """A tensor of torch, JAX, CuPy, TensorFlow, ..."""

    def __dlpack__(self, *, stream: Any = ...) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, Any]: ...


Source = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | IO[bytes]
    | Image.Image
    | npt.NDArray[Any]
    | SupportsDLPack
)

_CHANNELS = (1, 3, 4)
_ON_HOST = (1, 3, 11)  # DLPack's device types: CPU, and memory that CUDA or ROCm has pinned
_ROUNDING = 1e-5  # by which float values may leave [0, 1]
_SHAPES = "(H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels"


def as_bytes(source: object, label: str) -> bytes | None:
    """The contents of an encoded picture that is in memory or in an open file; None for any other source.

    source: a file is read from its beginning where it can be rewound, else from where it stands.
    label: what errors call it.

    Raises InputError for a file that is open as text, is empty, or cannot be read.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if not hasattr(source, "read") or isinstance(source, os.PathLike):
        return None
    if isinstance(source, io.TextIOBase):
        raise InputError(f"{label} is a file that is open as text: open it with mode 'rb'")
    try:
        if hasattr(source, "seek"):
            source.seek(0)
    except (OSError, ValueError):  # a pipe; a closed file says so below
        pass
    try:
        data = source.read()
    except (OSError, ValueError) as error:
        raise InputError(f"{label} is a file that cannot be read: {error}") from error
    if not isinstance(data, bytes):
        raise InputError(f"{label} has a read() that gives {type(data).__name__}: give bytes or a binary file")
    return data


def as_picture_array(source: object, label: str) -> U8 | None:
    """An array or tensor as uint8 (H, W), (H, W, 3) or (H, W, 4); None for any other source.

    source: a numpy array, or anything with DLPack in the host's memory. (H, W), (H, W, C) or (C, H, W), with a leading
        axis of 1 or none; where both could be meant, C is last in numpy and first in torch. uint8 0..255, bool, or
        floats 0..1: 1.0 is white.
    label: what errors call it.

    Raises InputError for other shapes and types, NaN, floats outside 0..1, and tensors on a GPU.
    """
    if isinstance(source, np.ndarray):
        array = source
    elif isinstance(source, Image.Image) or not hasattr(source, "__dlpack__"):
        return None
    else:
        array = _from_dlpack(source, label)
    return _to_levels(_order_axes(array, label, first=_is_torch(source)), label)


def _is_torch(source: object) -> bool:
    return type(source).__module__.partition(".")[0] == "torch"


def _from_dlpack(source: Any, label: str) -> npt.NDArray[Any]:
    """A tensor as a numpy array, without a copy where that is possible."""
    name = f"{type(source).__module__.partition('.')[0]}.{type(source).__name__}"
    try:
        kind, _ = source.__dlpack_device__()
        if int(kind) not in _ON_HOST:
            raise InputError(f"{label} is a {name} on a GPU: give it in the host's memory, with .cpu()")
        if _is_torch(source):
            source = source.detach()
            source = source.float() if "bfloat16" in str(source.dtype) else source  # numpy has no bfloat16
        return cast(npt.NDArray[Any], np.from_dlpack(source))
    except (RuntimeError, TypeError, ValueError, BufferError, AttributeError) as error:
        raise InputError(f"{label} is a {name} that numpy cannot read ({error}): give a numpy array") from error


def _order_axes(array: npt.NDArray[Any], label: str, *, first: bool) -> npt.NDArray[Any]:
    """The array as (H, W), (H, W, 3) or (H, W, 4).

    first: whether channels come first where both ends could be channels.
    """
    shape = array.shape
    if array.ndim == 4 and shape[0] > 1:
        raise InputError(f"{label} has shape {shape}, which is {shape[0]} pictures: give one, such as x[0]")
    if array.ndim == 4 and shape[0] == 1:
        array = array[0]
    if array.ndim == 3:
        leads, ends = (array.shape[axis] in _CHANNELS for axis in (0, 2))
        if leads and (first or not ends):
            array = np.moveaxis(array, 0, 2)
        if array.shape[2] == 1:
            array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in _CHANNELS)) or array.size == 0:
        raise InputError(f"{label} has shape {shape}: give {_SHAPES}")
    return array


def _to_levels(array: npt.NDArray[Any], label: str) -> U8:
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return np.ascontiguousarray(array.astype(np.uint8) * np.uint8(255))
    if array.dtype.kind != "f":
        raise InputError(
            f"{label} is a {array.dtype} array: give uint8 values 0..255 (a.astype(np.uint8)), or floats 0..1"
        )
    least, most = float(array.min()), float(array.max())
    if not np.isfinite([least, most]).all():  # a NaN anywhere makes both of them NaN
        raise InputError(f"{label} has values that are not numbers (NaN or infinity): floats must be 0..1")
    if least < -_ROUNDING or most > 1 + _ROUNDING:
        raise InputError(
            f"{label} has floats from {least:.6g} to {most:.6g}; they must be 0..1, with 1.0 as white"
            f"{_remedy(least, most)}"
        )
    return np.ascontiguousarray(np.rint(np.clip(array, 0, 1) * np.float32(255)).astype(np.uint8))


def _remedy(least: float, most: float) -> str:
    if least >= 0 and 2 < most <= 255:
        return ": divide them by 255"
    return ": give (x + 1) / 2" if least >= -1 and most <= 1 else ": scale or clip them"
