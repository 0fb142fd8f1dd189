"""A session's inputs, bound once and kept: a step costs what changes between steps, however many weights there are."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnxruntime

Array = npt.NDArray[Any]


class Binding:
    """One call's worth of bound inputs. Two calls at once need two.

    It keeps no array from being freed: a subject's merged weights go when nobody else wants them.
    """

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session, self._binding = session, session.io_binding()
        # ONNX Runtime reads the arrays where they are: these, and contiguous copies where it needs some
        self._held: dict[str, tuple[weakref.ref[Array], Array | None]] = {}

    def run(self, given: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run the session.

        given: arrays of the inputs' dtypes, by name. One that is given again stays bound, all others are forgotten.
        outputs: the wanted ones.

        Returns them in that order.
        """
        if self._held.keys() - given.keys():
            self._binding.clear_binding_inputs()  # memory of what is not given may be gone
            self._held.clear()
        for name, array in given.items():
            held = self._held.get(name)
            if held is None or held[0]() is not array:
                whole = np.ascontiguousarray(array)
                self._binding.bind_input(name, "cpu", 0, whole.dtype.type, whole.shape, whole.ctypes.data)
                self._held[name] = weakref.ref(array), None if whole is array else whole
        self._binding.clear_binding_outputs()  # else it would write into the former ones
        for name in outputs:
            self._binding.bind_output(name)
        self._session.run_with_iobinding(self._binding)
        return [value.numpy() for value in self._binding.get_outputs()]


class Unbound:
    """Calls of a session whose inputs are others each time."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session

    def run(self, given: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run the session; see `Binding.run`."""
        found: list[Array] = self._session.run(list(outputs), dict(given))
        return found
