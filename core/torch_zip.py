"""Reading tensors from `torch.save` files without torch, and without running what a pickle asks for.

A `torch.save` file is a zip: `<name>/data.pkl` describes the objects, `<name>/data/<key>` has raw storages. They are
not compressed, so they can be mapped in place. The reader below accepts only the few globals that a plain dict of
tensors needs and refuses all others, so the worst that a hostile file can do is be rejected. (Format:
torch/serialization.py, `_save` and `torch/_utils.py`, `_rebuild_tensor_v2`.)
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.files import explain_read_errors
from dreammix_trt.core.foreign_files import describe_foreign
from dreammix_trt.core.stored import LAYOUTS, Array, MappedFile, Stored

MAGIC = b"PK\x03\x04"
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ByteStorage": "uint8",
}
_LOCAL_HEADER = 30  # bytes before a zip member's name


def read_torch_zip(path: str | Path) -> dict[str, Any]:
    """Read the dict in a `torch.save` file, with every tensor as a `Stored`. Reads only the description.

    Values may be nested in tuples, lists and dicts.

    Raises `FileFormatError` for a missing or truncated file, another format (also the pre-2020 non-zip format), or a
    pickle that names anything other than tensors.
    """
    file = MappedFile.open(path)
    if not _starts_as_zip(file.path):
        raise FileFormatError(f"{file.path}: not a file written by torch.save: {describe_foreign(file.path)}")
    try:
        with zipfile.ZipFile(file.path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                held = ", ".join(archive.namelist()[:3]) or "nothing"
                raise FileFormatError(f"a zip archive of {held}, not a torch.save file; unpack it first")
            root = pickles[0].removesuffix("data.pkl")
            members = {item.filename.removeprefix(f"{root}data/"): item for item in archive.infolist()}
            with archive.open(pickles[0]) as stream:
                reader = _TensorUnpickler(stream, lambda key: _locate(file, members[key]))
                loaded = _insert_tensors(reader.load(), reader.tensors, file, "")
    except FileFormatError as error:
        raise FileFormatError(f"{file.path}: {error}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise FileFormatError(f"{file.path}: truncated, or not a file written by torch.save ({error})") from error
    if not isinstance(loaded, dict):
        raise FileFormatError(f"{file.path}: holds a {type(loaded).__name__}, expected a dict of tensors")
    return loaded


def _starts_as_zip(path: Path) -> bool:
    with explain_read_errors(path), path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


class _Storage(str):
    """The name of an allowed storage class, in place of the class."""


class _Nothing:
    """In the place of a training's options, which lie beside the tensors. It takes nothing in."""

    __slots__ = ()

    def __setstate__(self, _state: object) -> None:
        """Forget it."""


class _Number(int):
    """The number of a tensor. A pickle gets nothing else, since it may set attributes of the objects it gets."""


class _Flat(NamedTuple):
    """A storage: its dtype, first byte and length in numbers."""

    dtype: str
    offset: int
    length: int


class _View(NamedTuple):
    """A tensor: a storage, and offset, shape and stride in numbers."""

    flat: _Flat
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _TensorUnpickler(pickle.Unpickler):
    """Knows only tensors and dicts. `place(key)` gives a storage's first byte and its number of bytes."""

    def __init__(self, stream: Any, place: Callable[[str], tuple[int, int]]) -> None:
        super().__init__(stream)
        self._locate = place
        self._storages: list[_Flat] = []
        self.tensors: list[_View] = []

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_unused: tensor
        if (module, name) == ("argparse", "Namespace"):
            return _Nothing
        if module == "torch" and name in _STORAGES:
            return _Storage(name)
        raise FileFormatError(f"the file names {module}.{name}, which a dict of tensors never does; it is not read")

    def persistent_load(self, pid: Any) -> int:
        kind, storage, key, _device, count = pid
        if kind != "storage" or not isinstance(storage, _Storage):
            raise FileFormatError(f"unexpected reference {pid!r}")
        dtype = _STORAGES[str(storage)]
        offset, size = self._locate(key)
        if size != count * LAYOUTS[dtype].itemsize:
            raise FileFormatError(f"storage {key} holds {size // LAYOUTS[dtype].itemsize} numbers, expected {count}")
        self._storages.append(_Flat(dtype, offset, count))
        return len(self._storages) - 1

    def _rebuild_tensor(
        self, storage: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_unused: Any
    ) -> _Number:
        flat, shape, stride = self._storages[storage], tuple(map(int, shape)), tuple(map(int, stride))
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        inside = min((offset, *shape, *stride)) >= 0 and (0 in shape or last < flat.length)
        if not inside or math.prod(shape) > flat.length:
            raise FileFormatError(f"a tensor of shape {shape} reaches outside its storage of {flat.length} numbers")
        self.tensors.append(_View(flat, int(offset), shape, stride))
        return _Number(len(self.tensors) - 1)


def _insert_tensors(value: Any, tensors: list[_View], file: MappedFile, name: str) -> Any:
    """Copy the unpickled value to plain dicts, lists and tuples, and put tensors in place of their numbers."""
    if isinstance(value, _Number):
        view = tensors[value]
        return Stored(f"{file.path}: tensor {name!r}", view.flat.dtype, view.shape, lambda: _read_strided(file, view))
    if isinstance(value, dict):
        return {key: _insert_tensors(item, tensors, file, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_insert_tensors(item, tensors, file, name) for item in value)
    return value


def _read_strided(file: MappedFile, view: _View) -> Array:
    if 0 in view.shape:
        return np.empty(view.shape, LAYOUTS[view.flat.dtype])
    last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.stride, strict=True))
    size = LAYOUTS[view.flat.dtype].itemsize
    flat = file.numbers(view.flat.dtype, view.flat.offset + view.offset * size, last - view.offset + 1)
    return np.lib.stride_tricks.as_strided(flat, view.shape, [s * size for s in view.stride])


def _locate(file: MappedFile, member: zipfile.ZipInfo) -> tuple[int, int]:
    """Find the first byte and the number of bytes of a storage in the file."""
    if member.compress_type != zipfile.ZIP_STORED:
        raise FileFormatError(f"{member.filename} is compressed, which torch.save never does; save the file again")
    with file.path.open("rb") as stream:
        stream.seek(member.header_offset)
        header = stream.read(_LOCAL_HEADER)
    if not header.startswith(MAGIC) or len(header) < _LOCAL_HEADER:
        raise FileFormatError(f"{member.filename} is not where the file's directory says; the file is damaged")
    offset = (
        member.header_offset + _LOCAL_HEADER + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    )
    if offset + member.file_size > file.size:
        raise FileFormatError(f"{member.filename} reaches beyond the end; the file is truncated")
    return offset, member.file_size
