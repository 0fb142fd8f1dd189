"""Reading tensors out of `torch.save` files without torch, and without ever running what a pickle asks for.

A `torch.save` file is a zip: `<name>/data.pkl` describes the objects, `<name>/data/<key>` holds raw storages. The
reader below lets the pickle name exactly the few globals a plain dict of tensors needs and refuses all others, so a
hostile file can at worst be rejected. (Format: torch/serialization.py, `_save` and `torch/_utils.py`,
`_rebuild_tensor_v2`.)
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.errors import FileFormatError

Array = NDArray[Any]
_DTYPES = {"FloatStorage": np.float32, "HalfStorage": np.float16, "ByteStorage": np.uint8}


def read_torch_zip(path: Path) -> dict[str, Any]:
    """The dict a `torch.save` file holds, tensors as contiguous numpy arrays (float32, float16 or uint8).

    Values may be nested in tuples, lists and dicts. Raises `FileFormatError` for a missing or truncated file, another
    format (the pre-2020 non-zip format too), or a pickle that names anything but tensors of these three types.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise FileFormatError(f"{path}: not a torch.save file (no data.pkl inside)")
            root = pickles[0].removesuffix("data.pkl")
            with archive.open(pickles[0]) as stream:
                loaded = _TensorUnpickler(stream, lambda key: archive.read(f"{root}data/{key}")).load()
    except FileNotFoundError as error:
        raise FileFormatError(f"{path}: no such file") from error
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise FileFormatError(f"{path}: truncated, or not a file written by torch.save ({error})") from error
    if not isinstance(loaded, dict):
        raise FileFormatError(f"{path}: holds a {type(loaded).__name__}, expected a dict of tensors")
    return loaded


class _Storage(str):
    """The name of an allowed storage class, standing in for the class."""


class _TensorUnpickler(pickle.Unpickler):
    """Knows tensors and dicts, nothing else; `read(key)` gives a storage's bytes."""

    def __init__(self, stream: Any, read: Callable[[str], bytes]) -> None:
        super().__init__(stream)
        self._read = read
        self._storages: dict[str, Array] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch" and name in _DTYPES:
            return _Storage(name)
        raise FileFormatError(
            f"the file names {module}.{name}, which a dict of float, half or uint8 tensors never does"
        )

    def persistent_load(self, pid: Any) -> Array:
        kind, storage, key, _device, count = pid
        if kind != "storage" or not isinstance(storage, _Storage):
            raise FileFormatError(f"unexpected reference {pid!r}")
        if key not in self._storages:
            flat = np.frombuffer(self._read(key), np.dtype(_DTYPES[storage]).newbyteorder("<"))
            if flat.size != count:
                raise FileFormatError(f"storage {key} holds {flat.size} numbers, expected {count}")
            self._storages[key] = flat
        return self._storages[key]


def _rebuild_tensor(
    storage: Array, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_unused: Any
) -> Array:
    """A contiguous copy of the view (offset, shape, stride: in elements) into a flat storage."""
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    inside = min((offset, *shape, *stride)) >= 0 and (0 in shape or last < storage.size)
    if not inside or math.prod(shape) > storage.size:
        raise FileFormatError(f"a tensor of shape {shape} reaches outside its storage of {storage.size} numbers")
    view = np.lib.stride_tricks.as_strided(storage[offset:], shape, [s * storage.itemsize for s in stride])
    return view.astype(storage.dtype.newbyteorder("="), order="C")
