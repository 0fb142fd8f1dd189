"""The MERGE records of a network's slots: made once, as addresses never change; a swap fills in what differs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.seam import Array
from dreammix_trt.engine.device.factors import Placed
from dreammix_trt.engine.device.records import MERGE, MERGE_KINDS
from dreammix_trt.engine.device.slot_layout import SlottedNetwork

Numbers = NDArray[np.int64]  # of slots
Addresses = NDArray[np.uint64]


class SlotRecords:
    """See the module.

    merged: the inputs to which the network is bound.
    """

    def __init__(self, network: SlottedNetwork, merged: Mapping[str, Array]) -> None:
        slots, pristine = network.slots, network.pristine.arrays
        self._ready = np.zeros(len(slots), MERGE)
        self._inputs = list(pristine)
        self._input_of = np.array([self._inputs.index(slot.weight) for slot in slots])
        self._flipped = np.array([slot.flipped for slot in slots])
        self._starts = np.array([slot.at * np.dtype(pristine[slot.weight][1]).itemsize for slot in slots], np.uint64)
        for record, slot in zip(self._ready, slots, strict=True):
            target = merged[slot.weight]
            record["target"] = target.pointer + slot.at * np.dtype(target.dtype).itemsize
            record["stride"] = slot.stride
            sides = (slot.outputs, slot.inputs) if slot.flipped else (slot.inputs, slot.outputs)
            record["rows"], record["columns"] = sides
            record["kind"] = MERGE_KINDS[pristine[slot.weight][1], network.types[slot.weight]]
            record["left_scale"] = record["right_scale"] = 1
            record["out_scale"] = 1 / slot.scale

    def locate(self, arrays: Mapping[str, Array]) -> Addresses:
        """Where each slot's pristine weight begins; meaningless for slots of inputs that are not among the arrays."""
        places = [arrays[name].pointer if name in arrays else 0 for name in self._inputs]
        found: Addresses = np.array(places, np.uint64)[self._input_of] + self._starts
        return found

    def restore(self, numbers: Numbers, sources: Addresses) -> NDArray[np.void]:
        """Records that copy pristine weights, but for those that are in their place already."""
        table: NDArray[np.void] = self._ready[numbers]
        table["source"] = sources[numbers]
        elsewhere: NDArray[np.void] = table[table["source"] != table["target"]]
        return elsewhere

    def merge(self, placed: Placed, sources: Addresses, start: int, scale: float) -> NDArray[np.void]:
        """Records that merge factors.

        placed: where they are, from the address `start` on.
        scale: a subject's strength.
        """
        table: NDArray[np.void] = self._ready[placed.numbers]
        table["source"] = sources[placed.numbers]
        table["left"], table["right"] = placed.left + np.uint64(start), placed.right + np.uint64(start)
        table["rank"] = placed.ranks
        flipped = self._flipped[placed.numbers]
        table["left_scale"], table["right_scale"] = np.where(flipped, scale, 1), np.where(flipped, 1, scale)
        return table
