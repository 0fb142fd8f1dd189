"""The networks of one base on OpenVINO, from the same parts as on ONNX Runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import EngineError
from dreammix_trt.core.openvino_runtime import import_openvino
from dreammix_trt.core.store import Store
from dreammix_trt.engine.backends.onnxruntime.binding import BoundInputs
from dreammix_trt.engine.backends.onnxruntime.engine_set import REBUILD, Call, EngineSet, Sides
from dreammix_trt.engine.backends.openvino.compiling import Compiler

Array = npt.NDArray[Any]


class OpenVinoSet(EngineSet):
    """A base's networks on a device that OpenVINO knows. A network is compiled for each of the sides it is called with.

    compiler: how.
    """

    compiler = Compiler()

    @classmethod
    def open(
        cls,
        parts: str | Path | Mapping[str, Path],
        threads: int | None = None,
        shelf: Store | None = None,
        *,
        device: str = "CPU",
        precision: str = "float32",
    ) -> Self:
        """Open the parts of a base; see `EngineSet.load`.

        shelf: where what was compiled is kept; None: nowhere.
        device: as OpenVINO names it ("CPU", "GPU", "AUTO").
        precision: "bfloat16" where the device has it, or "float32"; inputs and outputs are float32 either way.

        Also raises InputError for a device that is not here, MissingExtraError where OpenVINO is not installed.
        """
        opened = cls.load(parts, threads, shelf)
        opened.compiler = Compiler(device, precision, opened.threads)
        opened.compiler.check()
        return opened

    def _fixes_sides(self, name: str) -> bool:
        return True  # it is slower with sides that it does not know

    def _open(self, name: str, sides: Sides) -> Callable[[], Call]:
        """Compile a network for inputs of these sides."""
        entry, folder = self._entry(name), self.parts[name]
        try:
            shelf = self.shelf if self.is_kept(name) else None
            compiled = self.compiler.compile(name, folder, entry, dict(sides), shelf)
        except RuntimeError as error:
            said = [line.strip() for line in str(error).splitlines() if not line.startswith("Exception from")]
            why = " ".join(filter(None, said))
            raise EngineError(f"{folder / entry['graph']}: {name} cannot be compiled ({why}); {REBUILD}") from error
        return lambda: _Request(compiled)


class _Request:
    """One thread's use of a compiled network."""

    def __init__(self, compiled: Any) -> None:
        self._tensor, self._compiled = import_openvino().Tensor, compiled
        self._inputs = BoundInputs()
        self._begin()

    def run(self, given: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run it; see `Call`."""
        self._inputs.renew(given, self._bind, self._begin)
        self._request.infer()
        return [np.array(self._request.get_tensor(name).data) for name in outputs]

    def _begin(self) -> None:
        """Take a request to which nothing is bound."""
        self._request = self._compiled.create_infer_request()

    def _bind(self, name: str, array: Array) -> None:
        self._request.set_tensor(name, self._tensor(_see_memory(array), shared_memory=True))


def _see_memory(array: Array) -> Array:
    """The same memory, which this keeps from no one, as writable: OpenVINO takes no other, and writes to no input."""
    if not array.nbytes:
        return array
    memory = (ctypes.c_byte * array.nbytes).from_address(array.ctypes.data)
    return np.ctypeslib.as_array(memory).view(array.dtype).reshape(array.shape)
