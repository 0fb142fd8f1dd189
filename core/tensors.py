"""Weights in files: read and written one tensor at a time, never held twice.

Formats: safetensors (https://github.com/huggingface/safetensors: 8 bytes of header length, a JSON header, the tensors
without gaps) and torch's zip (`core/torch_zip.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.files import atomic_file, explain_read_errors
from dreammix_trt.core.float8 import to_e4m3
from dreammix_trt.core.foreign_files import describe_foreign
from dreammix_trt.core.stored import FLOATS, LAYOUTS, Array, Floats, MappedFile, Stored, View, check_finite, is_finite
from dreammix_trt.core.torch_zip import MAGIC, read_torch_zip

Change = Callable[[Floats], Floats]
ALIGNMENT = 64

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn",
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # the format's own limit
_MOST_SIDES, _LONGEST_SIDE = 32, 1 << 48  # far beyond any weight, within what numpy takes


class Weights(Mapping[str, Floats]):
    """Tensors by name, as float32 arrays in C order. Each is read at every access and not kept.

    Reading raises `FileFormatError` naming file and tensor when it has NaN or infinity, or is not of a float type.
    """

    def __init__(
        self,
        tensors: Mapping[str, Stored],
        changes: Mapping[str, tuple[Change, ...]] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """tensors: by name, as they are stored.

        changes: functions that a tensor passes through when it is read, in order.
        metadata: a safetensors file's `__metadata__`.
        """
        self._tensors = dict(tensors)
        self._changes = dict(changes or {})
        self.metadata = dict(metadata or {})

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> Weights:
        """Wrap arrays in memory; returns a `Weights` as it is."""
        if isinstance(arrays, Weights):
            return arrays
        return cls({name: _wrap_array(name, np.asarray(array)) for name, array in arrays.items()})

    @classmethod
    def join(cls, parts: list[Weights]) -> Weights:
        """The tensors of several files, such as shards. For equal names the later file is used."""
        tensors = {name: stored for part in parts for name, stored in part._tensors.items()}
        changes = {name: made for part in parts for name, made in part._changes.items()}
        return cls(tensors, changes, parts[0].metadata if parts else None)

    def __getitem__(self, name: str) -> Floats:
        stored = self._tensors[name]
        values = stored.floats()
        if name not in self._changes:
            return values
        for change in self._changes[name]:
            values = change(values)
        if values.shape != stored.shape:
            raise ValueError(f"{name}: a change made {values.shape} of {stored.shape}")
        return check_finite(np.ascontiguousarray(values, np.float32), f"{stored.origin}, once changed,")

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor. Reads nothing."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """The type in which a tensor is stored ("float16", "bfloat16", ...; others as the file names them)."""
        return self._tensors[name].dtype

    def numbers(self, name: str) -> Floats:
        """A tensor as float32 whatever it is, NaN and integers included, without changes; see `Stored.numbers`."""
        return self._tensors[name].numbers()

    def rename(self, new: Callable[[str], str | None]) -> Weights:
        """The same tensors under new names.

        new: old name -> new name; None: omit the tensor.
        """
        names = {name: named for name in self if (named := new(name)) is not None}
        if len(set(names.values())) != len(names):
            raise ValueError("two tensors would have the same name")
        tensors = {names[name]: self._tensors[name] for name in names}
        changes = {names[name]: made for name, made in self._changes.items() if name in names}
        return Weights(tensors, changes, self.metadata)

    def strip_prefix(self, prefix: str) -> Weights:
        """The tensors whose names begin with a prefix, without it."""
        return self.rename(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)

    def arrange(self, plan: Mapping[str, tuple[str, View | None]]) -> Weights:
        """Select tensors under new names, and views of them. Not possible after `change`.

        plan: new name -> (name here, view or None); a view is a slice, transpose or reshape.
        """
        if self._changes:
            raise ValueError("arrange the tensors first, then change them")
        tensors = {
            new: self._tensors[name] if view is None else self._tensors[name].view(view)
            for new, (name, view) in plan.items()
        }
        return Weights(tensors, None, self.metadata)

    def change(self, changes: Mapping[str, Change]) -> Weights:
        """The same tensors, some of which pass through a function when they are read, after earlier changes.

        changes: name -> function of the float32 array, which must keep the shape.

        Raises `KeyError` for a name that is not here.
        """
        absent = [name for name in changes if name not in self._tensors]
        if absent:
            raise KeyError(f"no tensors {', '.join(absent[:4])} to change")
        stacked = {**self._changes, **{name: (*self._changes.get(name, ()), made) for name, made in changes.items()}}
        return Weights(self._tensors, stacked, self.metadata)


def open_tensors(path: str | Path) -> Weights:
    """Open a `.safetensors` or torch file (`.bin`, `.pt`, `.pth`, `.ckpt`). Reads only its header.

    The content decides the format. From a torch file the `state_dict` (or `model`) is taken if it has one, and
    everything that is not a tensor is skipped.

    Raises `FileFormatError` when the file has neither format or is truncated.
    """
    file = MappedFile.open(path)
    with explain_read_errors(file.path), file.path.open("rb") as stream:
        start = stream.read(len(MAGIC))
    if start == MAGIC:
        loaded = read_torch_zip(file.path)
        nested = (loaded.get(name) for name in ("state_dict", "model"))
        state = next((each for each in nested if isinstance(each, dict)), loaded)
        return Weights({str(name): value for name, value in state.items() if isinstance(value, Stored)})
    places, metadata = _read_header(file)
    tensors = {name: file.tensor(name, dtype, shape, offset) for name, (dtype, shape, offset, _) in places.items()}
    return Weights(tensors, None, metadata)


def read_places(path: str | Path) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Read where the tensors of a safetensors file are: name -> (dtype, shape, first byte in the file, bytes)."""
    return _read_header(MappedFile.open(path))[0]


def map_tensors(path: str | Path) -> dict[str, Array]:
    """Map a safetensors file into memory: name -> array, not to be written. Pages are read when they are used.

    Raises `FileFormatError` for a file that is missing, truncated or of another format, and for bfloat16.
    """
    file = MappedFile.open(path)
    places, whole, found = _read_header(file)[0], file.numbers("uint8", 0, file.size), {}
    for name, (dtype, shape, offset, size) in places.items():
        if dtype == "bfloat16":
            raise FileFormatError(f"{path}: tensor {name!r} is bfloat16, which numpy does not have; save it as float32")
        found[name] = whole[offset : offset + size].view(LAYOUTS[dtype]).reshape(shape)
    return found


def plan_places(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """What `read_places` will return for a file that `write_tensors` makes of these tensors without metadata."""
    header, order = _lay_out(tensors, None)
    places, at = {}, len(header)
    for name in order:
        dtype, shape = tensors[name]
        size = LAYOUTS[dtype].itemsize * math.prod(shape)
        places[name] = (dtype, tuple(shape), at, size)
        at += size
    return places


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    read: Callable[[str], NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file with one tensor in memory at a time. The file appears when it is complete.

    Tensors are sorted by the power of two, up to 64, that divides their sizes. So every tensor whose size is a multiple
    of 64 bytes begins at a multiple of 64.

    tensors: name -> (dtype of `LAYOUTS`, shape), known before anything is read.
    read: name -> the numbers, of that shape and any dtype; for E4M3 divided by their scale.
    metadata: the file's `__metadata__`.

    Raises `FileFormatError` naming a tensor that does not fit its dtype, and `ValueError` when `read` gives another
    shape.
    """
    header, order = _lay_out(tensors, metadata)
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        stream.write(header)
        for name in order:
            dtype, shape = tensors[name]
            values = np.asarray(read(name))
            if values.shape != tuple(shape):
                raise ValueError(f"{name} is {values.shape}, announced as {tuple(shape)}")
            stream.write(_encode(values, dtype, f"{path}: tensor {name!r}").data)
            del values  # before the next one is read


def _lay_out(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, list[str]]:
    """Lay out a file: the header with its length in front, and the tensor names in file order."""
    sizes = {name: LAYOUTS[dtype].itemsize * math.prod(shape) for name, (dtype, shape) in tensors.items()}
    order = sorted(tensors, key=lambda name: (-math.gcd(sizes[name], ALIGNMENT), name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        begin, end = end, end + sizes[name]
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)  # the format allows blanks at the end
    return len(text).to_bytes(8, "little") + text, order


def _encode(values: Array, dtype: str, origin: str) -> Array:
    """Convert numbers to what the file has, in C order. Raises `FileFormatError` when they do not fit."""
    if dtype == "float8_e4m3fn":
        return to_e4m3(check_finite(np.asarray(values, np.float32), origin))
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "bfloat16":
            stored = np.ascontiguousarray(values, LAYOUTS[dtype])
            fits = dtype not in FLOATS or is_finite(stored)
        else:
            bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
            stored = ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype("<u2")  # to nearest, ties to even
            fits = not bool((stored & 0x7F80 == 0x7F80).any()) and is_finite(values)
    if not fits:
        check_finite(values, origin)
        raise FileFormatError(f"{origin} reaches {float(np.abs(values).max()):.6g}, too large for {dtype}")
    return stored


def _read_header(file: MappedFile) -> tuple[dict[str, tuple[str, tuple[int, ...], int, int]], dict[str, str]]:
    """Read the tensors and metadata of a safetensors file, and check them against its size."""
    with explain_read_errors(file.path), file.path.open("rb") as stream:
        first = stream.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or not 2 <= length <= _LONGEST_HEADER:
            raise FileFormatError(f"{file.path}: {describe_foreign(file.path)}")
        if 8 + length > file.size:
            raise FileFormatError(f"{file.path}: {_describe_cut(file, 8 + length)}")
        text = stream.read(length)
    try:
        entries = json.loads(text)
        metadata = {str(key): _text(value) for key, value in (entries.pop("__metadata__", None) or {}).items()}
        places = {name: _parse_entry(entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise FileFormatError(f"{file.path}: not a safetensors file, or damaged ({error})") from error
    end = max((offset + size for _, _, offset, size in places.values()), default=0)
    if end > file.size:
        raise FileFormatError(f"{file.path}: {_describe_cut(file, end)}")
    return places, metadata


def _text(value: Any) -> str:
    """A value of the metadata, which the format wants to be text; some tools write numbers, lists and objects."""
    return value if isinstance(value, str) else json.dumps(value)


def _parse_entry(entry: Mapping[str, Any], data: int) -> tuple[str, tuple[int, ...], int, int]:
    shape = tuple(int(side) for side in entry["shape"])
    begin, end = (int(offset) for offset in entry["data_offsets"])
    dtype = _DTYPES.get(entry["dtype"], str(entry["dtype"]))
    if min(begin, end - begin, *shape) < 0 or len(shape) > _MOST_SIDES or max((0, *shape)) > _LONGEST_SIDE:
        raise ValueError(f"a tensor of shape {shape} from byte {begin} to {end}")
    if dtype in LAYOUTS and end - begin != math.prod(shape) * LAYOUTS[dtype].itemsize:
        raise ValueError(f"a {dtype} tensor of shape {shape} in {end - begin} bytes")
    return dtype, shape, data + begin, end - begin


def _describe_cut(file: MappedFile, wanted: int) -> str:
    return f"truncated: {file.size} bytes, its header describes {wanted}; copy or download it again"


def _wrap_array(name: str, array: Array) -> Stored:
    dtype = array.dtype.name
    return Stored(f"tensor {name!r}", dtype, array.shape, lambda: array)
