"""A session's inputs, bound once and kept: a step costs what changes between steps, however many weights there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.onnx_runtime import import_onnxruntime

if TYPE_CHECKING:
    import onnxruntime

Array = npt.NDArray[Any]


class Binding:
    """One call's worth of bound inputs. Two calls at once need two."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._ort, self._session, self._binding = import_onnxruntime(), session, session.io_binding()
        self._held: dict[str, tuple[Array, Any]] = {}  # ONNX Runtime reads the arrays where they are

    def run(self, given: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run the session.

        given: contiguous arrays of the inputs' dtypes, by name. They stay bound until others are given.
        outputs: the wanted ones.

        Returns them in that order.
        """
        for name, array in given.items():
            held = self._held.get(name)
            if held is None or held[0] is not array:
                value = self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
                self._binding.bind_ortvalue_input(name, value)
                self._held[name] = array, value
        self._binding.clear_binding_outputs()  # else it would write into the former ones
        for name in outputs:
            self._binding.bind_output(name)
        self._session.run_with_iobinding(self._binding)
        return [value.numpy() for value in self._binding.get_outputs()]
