"""LoRA factors laid out as the packed row for the slots of one network (see slots.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.lora import describe_other_base
from dreammix_trt.core.lora_names import join_first
from dreammix_trt.core.slots import Floats, Slot, packed_size


class Placed(NamedTuple):
    """One factor and its place in the packed row: `values * scale` in the upper left corner, zeros elsewhere.

    values: float32 (rows, columns).
    at: the number in the row at which the slot's factor begins.
    shape: (rows, columns) of the slot's factor.
    scale: factor of the values.
    """

    values: Floats
    at: int
    shape: tuple[int, int]
    scale: float


def place_factors(
    factors: Mapping[str, tuple[Floats, Floats]], slots: Sequence[Slot], scale: float = 1.0
) -> Iterator[Placed]:
    """Give the factors of one network their places, in the order of the packed row.

    factors: module -> (A float32 (in, r), B float32 (r, out)).
    slots: of the network, in packed order.
    scale: multiplies B.

    Raises `FileFormatError` listing the modules that have another shape (a LoRA for another base) or a kind without
    slots (feed-forward, convolution), and when the rank exceeds that of the slots.
    """
    _check_modules(factors, slots)
    by_module = {slot.module: slot for slot in slots}
    rank = max((a.shape[1] for a, _ in factors.values()), default=0)
    room = min((by_module[module].rank for module in factors), default=rank)
    if rank > room:
        raise FileFormatError(
            f"this LoRA has rank {rank}, the engine's slots take {room} (ranks of several LoRAs on one layer add up); "
            f"rebuild with `dreammix-trt build --slot-rank {rank}`"
        )
    return _place(factors, slots, scale)


class Misfits(NamedTuple):
    """The layers of a LoRA that slots do not take, each with its shape.

    homeless: of a kind that no slot takes: feed-forward, projections, convolutions.
    foreign: those that the base lacks or has in another shape.
    """

    homeless: list[str]
    foreign: list[str]

    @property
    def homeless_kinds(self) -> list[str]:
        """The kinds of layers that no slot takes, such as "net.proj"."""
        return sorted({".".join(_kind(text.split(" ")[0])) for text in self.homeless})


def find_misfits(factors: Mapping[str, tuple[Floats, Floats]], slots: Sequence[Slot]) -> Misfits:
    """Find the layers that slots do not take; factors, slots: as for `place_factors`."""
    by_module, kinds = {slot.module: slot for slot in slots}, {_kind(slot.module) for slot in slots}
    found = Misfits([], [])
    for module, (a, b) in sorted(factors.items()):
        here, shape = by_module.get(module), (a.shape[0], b.shape[1])
        if here is None:
            group = found.foreign if _kind(module) in kinds else found.homeless
            group.append(f"{module} ({shape[0]} -> {shape[1]}, no such slot)")
        elif shape != here[1:3]:
            found.foreign.append(f"{module} ({shape[0]} -> {shape[1]}, here {here.inputs} -> {here.outputs})")
    return found


def pack(factors: Mapping[str, tuple[Floats, Floats]], slots: Sequence[Slot], scale: float = 1.0) -> Floats:
    """Make the packed `lora` row of one picture, float32 (P,): per slot A (in, rank), then B (rank, out), zero-padded.

    factors, slots, scale: as for `place_factors`, which also names the errors.
    """
    row = np.zeros(packed_size(slots), np.float32)
    for values, at, shape, times in place_factors(factors, slots, scale):
        rows, columns = values.shape
        row[at : at + shape[0] * shape[1]].reshape(shape)[:rows, :columns] = values * np.float32(times)
    return row


def _place(factors: Mapping[str, tuple[Floats, Floats]], slots: Sequence[Slot], scale: float) -> Iterator[Placed]:
    at = 0
    for slot in slots:
        if slot.module in factors:
            a, b = factors[slot.module]
            yield Placed(a, at, (slot.inputs, slot.rank), 1.0)
            yield Placed(b, at + slot.inputs * slot.rank, (slot.rank, slot.outputs), scale)
        at += slot.size


def _check_modules(factors: Mapping[str, tuple[Floats, Floats]], slots: Sequence[Slot]) -> None:
    homeless, foreign = find_misfits(factors, slots)
    if foreign:
        base, wrong = describe_other_base(factors, {slot.module: slot.inputs for slot in slots}), foreign + homeless
        raise FileFormatError(f"this LoRA is for {base}; {len(wrong)} modules do not fit: {join_first(wrong, 8)}")
    if homeless:
        raise FileFormatError(
            "merge this LoRA into the weights of an engine of its own: `dreammix-trt build --lora FILE --merge --out "
            f"DIR`; {len(homeless)} of its {len(factors)} layers have no slots, which attention alone has: "
            f"{join_first(homeless)}"
        )


def _kind(module: str) -> tuple[str, ...]:
    """The kind of a layer: the last two words of its name without numbers ("attn1", "to_out")."""
    return tuple([word for word in module.split(".") if not word.isdigit()][-2:])
