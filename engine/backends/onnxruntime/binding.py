"""A network's inputs, bound once and kept: a step costs what changes between steps, however many weights there are."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnxruntime

Array = npt.NDArray[Any]


class BoundInputs:
    """Which arrays a back end reads where they are. An array that is given again stays bound.

    It keeps no array from being freed: a subject's merged weights go when nobody else wants them.
    """

    def __init__(self) -> None:
        # those that are bound, and contiguous copies of those that are not contiguous
        self._held: dict[str, tuple[weakref.ref[Array], Array | None]] = {}

    def renew(self, given: Mapping[str, Array], bind: Callable[[str, Array], None], forget: Callable[[], None]) -> None:
        """Bind what is given; all others are forgotten, as their memory may be gone.

        bind: (input, contiguous array) binds it.
        forget: unbinds all.
        """
        if self._held.keys() - given.keys():
            forget()
            self._held.clear()
        for name, array in given.items():
            held = self._held.get(name)
            if held is None or held[0]() is not array:
                whole = np.ascontiguousarray(array)
                bind(name, whole)
                self._held[name] = weakref.ref(array), None if whole is array else whole


class Binding:
    """One call's worth of bound inputs. Two calls at once need two."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session, self._binding = session, session.io_binding()
        self._inputs = BoundInputs()

    def run(self, given: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run the session.

        given: arrays of the inputs' dtypes, by name; see `BoundInputs`.
        outputs: the wanted ones.

        Returns them in that order.
        """
        self._inputs.renew(given, self._bind, self._binding.clear_binding_inputs)
        self._binding.clear_binding_outputs()  # else it would write into the former ones
        for name in outputs:
            self._binding.bind_output(name)
        self._session.run_with_iobinding(self._binding)
        return [value.numpy() for value in self._binding.get_outputs()]

    def _bind(self, name: str, array: Array) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


class Unbound:
    """Calls of a session whose inputs are others each time."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session

    def run(self, given: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run the session; see `Binding.run`."""
        found: list[Array] = self._session.run(list(outputs), dict(given))
        return found
