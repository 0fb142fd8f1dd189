"""LoRA slots: the linear layers of a network whose weights are inputs of its graph, so that a subject can change them.

Without a subject a slot's input is the base's own weight, W. With one it is W + A B, merged when the subject is chosen
(merging.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class Slot(NamedTuple):
    """A linear layer whose weight W (inputs, outputs) is an input of the graph, or a part of one.

    module: its torch name.
    weight: the name of the input.
    at: the number in the input at which W begins.
    stride: numbers from one row to the next, in the order in which they are stored.
    flipped: whether W is stored transposed, (outputs, inputs).
    scale: what the numbers in the input are multiplied with: 1, or a power of two where it holds E4M3 codes
        (float8.py).
    """

    module: str
    inputs: int
    outputs: int
    weight: str
    at: int
    stride: int
    flipped: bool = False
    scale: float = 1.0

    @classmethod
    def of(cls, module: str, inputs: int, outputs: int) -> Slot:
        """A slot whose input is W alone."""
        return cls(module, inputs, outputs, f"{module}.weight", 0, outputs)

    def as_float8(self, scale: float) -> Slot:
        """The same slot as E4M3 codes in an input of its own, (outputs, inputs)."""
        return self._replace(weight=f"{self.module}.weight", at=0, stride=self.inputs, flipped=True, scale=scale)

    def view(self, weight: NDArray[Any]) -> NDArray[Any]:
        """W (inputs, outputs) in an array of the whole input; a view."""
        flat = weight.reshape(-1)[self.at :]
        rows, columns = (self.outputs, self.inputs) if self.flipped else (self.inputs, self.outputs)
        assert len(flat) >= (rows - 1) * self.stride + columns, f"{self.module} is not in {weight.shape}"
        stored = as_strided(flat, (rows, columns), (self.stride * flat.itemsize, flat.itemsize))
        return stored.T if self.flipped else stored

    def describe(self) -> dict[str, Any]:
        """Its entry in `network.json`."""
        scale = {} if self.scale == 1 else {"scale": self.scale}
        return dict(zip(_WORDS, self[:-1], strict=True)) | scale


_WORDS = ("module", "in", "out", "weight", "at", "stride", "flipped")


def slots_of(entry: Mapping[str, Any]) -> tuple[Slot, ...]:
    """The slots of a network.

    entry: its `network.json`, with a list "slots".
    """
    rows = entry.get("slots", ())
    return tuple(Slot(*(row[word] for word in _WORDS))._replace(scale=float(row.get("scale", 1))) for row in rows)


def names_of_weights(slots: Sequence[Slot]) -> tuple[str, ...]:
    """The inputs of a graph that hold the slots' weights, each once, in the order of the slots."""
    return tuple(dict.fromkeys(slot.weight for slot in slots))


def gather_weight(name: str, shape: tuple[int, ...], slots: Sequence[Slot], weights: Mapping[str, Floats]) -> Floats:
    """Make an input of the graph from the base's weights, float32.

    name, shape: of the input.
    slots: of the network.
    weights: torch name -> (outputs, inputs), as torch has them.
    """
    whole = np.zeros(shape, np.float32)
    for slot in slots:
        if slot.weight == name:
            slot.view(whole)[...] = weights[f"{slot.module}.weight"].T
    return whole
