"""Subjects on the device: packed factors that stay there, and the buffer to which the engines are bound.

A resident subject is one row: its factors at one strength for every network, in packed order, in the engines' type.
With one picture a batch the bound buffer has the same layout, so a swap is one copy. With several pictures, each
factor's entries of all pictures are side by side, and one kernel copies a row into its places. Nothing else in a
captured graph changes with the subject.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dreammix_trt.core.errors import EngineError
from dreammix_trt.core.networks import names_of_group, unets_of
from dreammix_trt.core.packing import place_factors
from dreammix_trt.core.seam import Array, DeviceNetworks, Stream
from dreammix_trt.core.slots import Slot, packed_size
from dreammix_trt.core.subject import NOBODY, Role, Subject
from dreammix_trt.engine.device.arena import ALIGNMENT, Arena, Regions
from dreammix_trt.engine.device.records import FACTOR, SEGMENT
from dreammix_trt.engine.drivers.device import Device, put
from dreammix_trt.engine.runtime import find_subject


class FactorInput(NamedTuple):
    """One LoRA input of a network.

    shape: for one picture.
    packed_at: its place in the network's packed row.
    start: its place in our row.
    """

    tensor: str
    shape: tuple[int, ...]
    packed_at: int
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Layout:
    """The place of each network's factors in a row: the UNets first, then the text encoders, each input aligned.

    pictures: the largest batch.
    numbers: of a whole row.
    unet_numbers: of the row's UNet part.
    dtype: of the LoRA inputs.
    inputs: network -> its LoRA inputs.

    In a batch of N everything of the UNets is N times as far from the beginning, and every input holds N entries.
    """

    def __init__(self, networks: DeviceNetworks, pictures: int) -> None:
        self.pictures = pictures
        names = [name for name in (*unets_of("both"), *names_of_group("text")) if name in networks]
        self.slots: dict[str, tuple[Slot, ...]] = {name: networks.slots(name) for name in names}
        dtypes = {name: {tensor.name: tensor.dtype for tensor in networks.inputs(name)} for name in names}
        found = {
            dtypes[name][tensor]
            for name in names
            for tensor, _ in _list_inputs(dtypes[name], self.slots[name])
            if tensor in dtypes[name]
        }
        self.dtype = found.pop() if found else "float32"
        if found:
            raise EngineError("the networks take LoRA factors in different types; build the base again as a whole")
        self.inputs: dict[str, list[FactorInput]] = {}
        self.numbers = self.unet_numbers = 0
        for name in names:
            self.inputs[name] = self._place_inputs(_list_inputs(dtypes[name], self.slots[name]), dtypes[name])
            if name in unets_of("both"):
                self.unet_numbers = self.numbers

    def list_regions(self, subjects: int) -> Regions:
        """Memory for `subjects` resident rows (and the zeros), the bound buffer, and packing."""
        numbers = max(self.numbers, 1)
        factors = 2 * sum(map(len, self.slots.values()))
        return {
            "subject rows": ((subjects + 1, numbers), self.dtype),
            "bound factors": ((self.pictures * self.unet_numbers + numbers - self.unet_numbers,), self.dtype),
            "raw factors": ((numbers,), "float32"),
            "factor table": ((max(factors, 1) * FACTOR.itemsize,), "uint8"),
            "segments": ((max(len(self.make_segments()), 1) * SEGMENT.itemsize,), "uint8"),
        }

    def make_segments(self) -> np.ndarray:
        """SEGMENT records: what `place_factors` copies of a row's UNet part; the same for every batch size."""
        unets = [entry for name in unets_of("both") for entry in self.inputs.get(name, ())]
        return np.array([(entry.start, entry.start, entry.size) for entry in unets], SEGMENT)

    def find_target(self, name: str, at: int) -> int | None:
        """The place in our row of number `at` of a network's packed row; None: the network has no input for it."""
        entries = self.inputs[name]
        before = bisect_right(entries, at, key=lambda entry: entry.packed_at)
        entry = entries[before - 1] if before else None
        if entry is None or at >= entry.packed_at + entry.size:
            return None
        return entry.start + at - entry.packed_at

    def cut_arrays(self, name: str, bound: Array, pictures: int) -> dict[str, Array]:
        """The LoRA inputs of a network as parts of the bound buffer.

        bound: the buffer.
        pictures: of the batch; text encoders always have 1.
        """
        on_unet = name in unets_of("both")
        count = pictures if on_unet else 1
        shift = 0 if on_unet else (self.pictures - 1) * self.unet_numbers
        return {
            entry.tensor: bound.part(shift + entry.start * count, count * entry.size).reshape((count, *entry.shape))
            for entry in self.inputs.get(name, ())
        }

    def _place_inputs(self, inputs: list[tuple[str, tuple[int, ...]]], known: Collection[str]) -> list[FactorInput]:
        """Place the inputs that the network has, after those placed already.

        Engines lack the factors of a layer whose output nothing reads; the packed row has them.
        """
        each = ALIGNMENT // np.dtype(self.dtype).itemsize
        entries, packed_at = [], 0
        for tensor, shape in inputs:
            size = math.prod(shape)
            if tensor in known:
                entries.append(FactorInput(tensor, shape, packed_at, self.numbers))
                self.numbers += -(-size // each) * each
            packed_at += size
        return entries


def _list_inputs(known: Mapping[str, str], slots: Sequence[Slot]) -> list[tuple[str, tuple[int, ...]]]:
    """The LoRA inputs of slots in packed order, with their shapes for one picture.

    known: all inputs of the network.
    """
    if "lora" in known:
        return [("lora", (packed_size(slots),))]
    return [factor for slot in slots for factor in slot.factors]


class Subjects:
    """The subjects of one runtime. `most` are resident, each strength as one; others are packed again when needed.

    wait: waits for everything in the stream.
    """

    def __init__(self, device: Device, stream: Stream, layout: Layout, arena: Arena, wait: Callable[[], None]) -> None:
        self._device, self._stream, self._layout, self._arena, self._wait = device, stream, layout, arena, wait
        self._known: dict[str, Subject] = {}
        self._resident: OrderedDict[Role, int] = OrderedDict()
        self._entered: tuple[Role, ...] | None = None
        self._in_text: Role | None = None
        self._segments = len(layout.make_segments())
        device.clear(arena["subject rows"][0], stream)
        device.clear(arena["bound factors"], stream)
        if self._segments:
            self._upload("segments", layout.make_segments().view(np.uint8))
        wait()

    @property
    def most(self) -> int:
        """How many are resident at once."""
        return self._arena["subject rows"].shape[0] - 1

    def add(self, name: str, subject: Subject) -> None:
        """Make a subject known and resident. Waits for the device, as factors come from the host.

        Raises FileFormatError where it does not fit the base, DeviceError; then the earlier subject keeps the name.
        """
        table, raw = self._pack(subject)
        self._forget(name)
        self._place(Role(name), table, raw)
        self._known[name] = subject

    def remove(self, name: str) -> None:
        """Forget a subject at all its strengths; its rows are free. What the engines are bound to stays."""
        del self._known[name]
        self._forget(name)

    def enter(self, roles: Sequence[Role]) -> None:
        """Draw picture k of the batch with roles[k]. For resident ones it only enqueues."""
        chosen = tuple(roles)
        if self._entered == chosen:
            return
        before = (
            self._entered if self._entered is not None and len(self._entered) == len(chosen) else (None,) * len(chosen)
        )
        self._entered = None  # until all of them are in
        for picture, role in enumerate(chosen):
            if before[picture] != role:
                self._enter(picture, len(chosen), role)
        self._entered = chosen

    def enter_text(self, role: Role) -> None:
        """Give a subject's factors to the text encoders."""
        if self._layout.pictures == 1 and self._entered != (role,):
            self.enter((role,))
        if self._in_text == role or self._layout.pictures == 1:
            return
        first = self._layout.unet_numbers
        count = self._layout.numbers - first
        if count:
            bound = self._arena["bound factors"].part(
                self._layout.pictures * first, count
            )  # behind all pictures' UNets
            self._device.copy(bound, self._find_row(role).part(first, count), self._stream)
        self._in_text = role

    def _enter(self, picture: int, pictures: int, role: Role) -> None:
        row, bound = self._find_row(role), self._arena["bound factors"]
        if self._layout.pictures == 1:
            self._device.copy(bound.part(0, self._layout.numbers), row.part(0, self._layout.numbers), self._stream)
        elif self._segments:
            self._device.launch_kernel(
                "place_factors",
                self._stream,
                row=row,
                segments=self._arena["segments"],
                count=self._segments,
                out=bound,
                pictures=pictures,
                picture=picture,
                half=bound.half,
            )

    def _find_row(self, role: Role) -> Array:
        rows = self._arena["subject rows"]
        if role == NOBODY:
            return rows[0]
        if role not in self._resident:
            self._place(role, *self._pack(find_subject(self._known, role)))
        self._resident.move_to_end(role)
        return rows[self._resident[role]]

    def _place(self, role: Role, table: np.ndarray, raw: np.ndarray) -> None:
        """Pack a subject into a row of its own. Where all rows are taken, it replaces the least recently used one."""
        free = set(range(1, self.most + 1)) - set(self._resident.values())
        index = min(free) if free else self._resident.popitem(last=False)[1]
        row = self._arena["subject rows"][index]
        self._device.clear(row, self._stream)
        if len(table):
            self._upload("factor table", table.view(np.uint8))
            self._upload("raw factors", raw)
            self._device.launch_kernel(
                "pack_factors",
                self._stream,
                raw=self._arena["raw factors"],
                factors=self._arena["factor table"],
                count=len(table),
                out=row,
                raw_half=False,
                out_half=row.half,
            )
        self._wait()
        self._resident[role] = index

    def _pack(self, subject: Subject) -> tuple[np.ndarray, np.ndarray]:
        """FACTOR records of a subject and the numbers to which they refer, float32."""
        found, values, source = [], [np.zeros(0, np.float32)], 0
        for network, slots in self._layout.slots.items():
            for each in place_factors(subject.factors_for(network), slots, subject.scale):
                target = self._layout.find_target(network, each.at)
                if target is None:
                    continue
                found.append((source, target, *each.values.shape, *each.shape, each.scale, 0))
                values.append(np.ravel(each.values))
                source += each.values.size
        return np.array(found, FACTOR), np.concatenate(values).astype(np.float32, copy=False)

    def _upload(self, region: str, data: np.ndarray) -> None:
        put(self._device, self._arena[region], data, self._stream, self._wait)

    def _forget(self, name: str) -> None:
        """Free the rows of this name, and note that the bound buffer no longer holds its factors."""
        for role in [role for role in self._resident if role.name == name]:
            del self._resident[role]
        if self._entered and name in [role.name for role in self._entered]:
            self._entered = None
        if self._in_text is not None and self._in_text.name == name:
            self._in_text = None


def resident_bytes(layout: Layout) -> Mapping[str, int]:
    """What a swap copies: bytes of a whole row, and of its UNet part."""
    each = np.dtype(layout.dtype).itemsize
    return {"row": layout.numbers * each, "unets": layout.unet_numbers * each}
