"""LoRA slots: the linear layers of a network that take factors, and the packed row with the factors of all slots.

A packed row has for every slot in order A (inputs, rank) and then B (rank, outputs), flattened. The engine adds
`x @ A @ B` to the layer's output, so zeros switch a slot off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
LORA_SIDES = (".lora_A", ".lora_B")  # the endings of the names of factors that are separate inputs


class Slot(NamedTuple):
    """A linear layer that takes factors A (inputs, rank) and B (rank, outputs).

    module: its torch name.
    """

    module: str
    inputs: int
    outputs: int
    rank: int

    @property
    def factors(self) -> tuple[tuple[str, tuple[int, int]], ...]:
        """Name and shape of A and B as separate inputs, in packed order."""
        shapes = (self.inputs, self.rank), (self.rank, self.outputs)
        return tuple((f"{self.module}{side}", shape) for side, shape in zip(LORA_SIDES, shapes, strict=True))

    @property
    def size(self) -> int:
        """How many numbers this slot takes in the packed row."""
        return (self.inputs + self.outputs) * self.rank


def slots_of(entry: Mapping[str, Any]) -> tuple[Slot, ...]:
    """The slots of a network.

    entry: its `network.json`, with a list "slots" of module, in, out, rank.
    """
    return tuple(Slot(row["module"], row["in"], row["out"], row["rank"]) for row in entry.get("slots", ()))


def packed_size(slots: Sequence[Slot]) -> int:
    """P: how many numbers a packed row has."""
    return sum(slot.size for slot in slots)


def unpack(rows: Floats, slots: Sequence[Slot]) -> dict[str, Floats]:
    """Split packed rows into one array per factor, for engines with separate inputs.

    rows: float32 (N, P).

    Returns "<module>.lora_A" -> (N, in, rank) and "<module>.lora_B" -> (N, rank, out). For one row these are views.
    """
    found, at = {}, 0
    for slot in slots:
        for name, shape in slot.factors:
            size = shape[0] * shape[1]
            found[name] = rows[:, at : at + size].reshape(len(rows), *shape)
            at += size
    return found
