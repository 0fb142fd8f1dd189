"""The factors of a runtime's subjects: kept by the host, the most recent ones on the device as well.

On the device a slot has `left` (rows, rank) and `right` (rank, columns), float32, of the weight as it is stored: A and
B, or B^T and A^T where it is stored transposed. A subject's strength is not in them, so they serve every strength.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.files import size_text
from dreammix_trt.core.seam import Array
from dreammix_trt.core.slots import Floats, Slot
from dreammix_trt.engine.device.transfers import Uploads

Key = tuple[str, int]  # a network, and the number of a slot there
_EACH = 16  # bytes to which every factor is aligned


class Pair(NamedTuple):
    """A slot's factors on the host.

    a: float32 (inputs, rank).
    b: float32 (rank, outputs).
    """

    slot: Slot
    a: Floats
    b: Floats

    @property
    def sizes(self) -> tuple[int, int]:
        """Aligned bytes of left and right."""
        left, right = (self.b, self.a) if self.slot.flipped else (self.a, self.b)
        return _align(left.nbytes), _align(right.nbytes)

    @property
    def rank(self) -> int:
        return int(self.a.shape[1])

    def stored(self) -> Iterator[NDArray[np.uint8]]:
        """The bytes of left and right, with what aligns them."""
        left, right = (self.b.T, self.a.T) if self.slot.flipped else (self.a, self.b)
        for part in (left, right):
            flat = np.ascontiguousarray(part, np.float32).reshape(-1).view(np.uint8)
            yield flat
            yield np.zeros(_align(flat.nbytes) - flat.nbytes, np.uint8)


Pairs = Mapping[Key, Pair]


@dataclass(frozen=True)
class Placed:
    """Factors of one network's slots, counted from where all of them begin.

    numbers: of the slots.
    left, right: bytes, uint64.
    """

    numbers: NDArray[np.int64]
    left: NDArray[np.uint64]
    right: NDArray[np.uint64]
    ranks: NDArray[np.int32]

    def among(self, wanted: NDArray[np.bool_]) -> Placed:
        """Those of wanted slots.

        wanted: for each slot of the network.
        """
        chosen = wanted[self.numbers]
        return Placed(self.numbers[chosen], self.left[chosen], self.right[chosen], self.ranks[chosen])


class FactorSet:
    """Factors that are sent to the device together, one behind the other: a subject's, or a piece of them.

    name: the subject's.
    number: of this set alone. A subject that replaces another of its name has another set.
    placed: by network.
    """

    _count = itertools.count(1)

    def __init__(self, name: str, pairs: Pairs) -> None:
        self.name, self.pairs, self.number = name, pairs, next(self._count)
        rows: dict[str, list[tuple[int, int, int, int]]] = {}
        at = 0
        for (network, number), pair in pairs.items():
            left, right = pair.sizes
            rows.setdefault(network, []).append((number, at, at + left, pair.rank))
            at += left + right
        self.nbytes = at
        self.placed = {network: _place(*zip(*each, strict=True)) for network, each in rows.items()}

    def touches(self, network: str, count: int) -> NDArray[np.bool_]:
        """For each of the network's `count` slots, whether it is changed."""
        found = np.zeros(count, np.bool_)
        if network in self.placed:
            found[self.placed[network].numbers] = True
        return found

    def cut(self, wanted: Mapping[str, NDArray[np.bool_]], room: int) -> Iterator[FactorSet]:
        """Split the factors of wanted slots into pieces of at most `room` bytes.

        wanted: for each slot of some networks.
        """
        piece: dict[Key, Pair] = {}
        taken = 0
        for (network, number), pair in self.pairs.items():
            if network not in wanted or not wanted[network][number]:
                continue
            size = sum(pair.sizes)
            if taken + size > room:
                yield FactorSet(self.name, piece)
                piece, taken = {}, 0
            piece[network, number], taken = pair, taken + size
        yield FactorSet(self.name, piece)


class Factors:
    """See the module. `region` bounds what is on the device; the least recently used subjects leave it."""

    def __init__(self, region: Array, uploads: Uploads) -> None:
        self._region, self._uploads = region, uploads
        self._known: dict[str, FactorSet] = {}
        self._resident: OrderedDict[FactorSet, int] = OrderedDict()  # where each begins

    @property
    def resident(self) -> tuple[str, ...]:
        """The subjects whose factors are on the device now, the least recently used first."""
        return tuple(each.name for each in self._resident if self._known.get(each.name) is each)

    def find(self, name: str) -> FactorSet:
        """A known subject's factors."""
        return self._known[name]

    def add(self, name: str, pairs: Pairs) -> None:
        """Make a subject's factors known, and resident where they fit. They replace those of the same name.

        Raises InputError for a slot whose factors alone do not fit; then, and after any other error, nothing changes
        but what is resident.
        """
        added = self.make(name, pairs)
        if name in self._known:
            self._resident.pop(self._known[name], None)
        if pairs and added.nbytes <= self._region.nbytes:
            self._settle(added)
        self._known[name] = added

    def make(self, name: str, pairs: Pairs) -> FactorSet:
        """Make a set that `bring` takes, without making it known. Raises InputError as `add` does."""
        for key, pair in pairs.items():
            if sum(pair.sizes) > self._region.nbytes:
                size, room = size_text(sum(pair.sizes)), size_text(self._region.nbytes)
                raise InputError(
                    f"subject {name!r}: the factors of {pair.slot.module} in {key[0]} take {size} and this runtime has "
                    f"{room} for factors: load it with more `subjects`"
                )
        return FactorSet(name, pairs)

    def remove(self, name: str) -> None:
        """Forget a subject's factors. Whoever has the set can still bring it."""
        self._resident.pop(self._known.pop(name), None)

    def bring(self, factors: FactorSet, wanted: Mapping[str, NDArray[np.bool_]]) -> Iterator[tuple[FactorSet, int]]:
        """Bring factors to the device, where they are not.

        wanted: for each slot of some networks.

        Yields the set and its address where the whole of it fits, else pieces of what is wanted; what uses a piece must
        be enqueued before the next one is asked for.
        """
        if factors.nbytes <= self._region.nbytes:
            if factors not in self._resident:
                self._settle(factors)
            self._resident.move_to_end(factors)
            yield factors, self._region.pointer + self._resident[factors]
            return
        self._resident.clear()
        for piece in factors.cut(wanted, self._region.nbytes):
            self._send(piece, 0)
            yield piece, self._region.pointer

    def _settle(self, factors: FactorSet) -> None:
        """Put a whole subject where there is room, or where the least recently used ones were."""
        while (start := self._find_gap(factors.nbytes)) is None:
            self._resident.popitem(last=False)
        self._send(factors, start)
        self._resident[factors] = start

    def _find_gap(self, size: int) -> int | None:
        at = 0
        for each, start in sorted(self._resident.items(), key=lambda item: item[1]):
            if start - at >= size:
                return at
            at = start + each.nbytes
        return at if self._region.nbytes - at >= size else None

    def _send(self, factors: FactorSet, start: int) -> None:
        parts = (part for pair in factors.pairs.values() for part in pair.stored())
        self._uploads.send(self._region.part(start, factors.nbytes), parts)


def _align(size: int) -> int:
    return -(-size // _EACH) * _EACH


def _place(numbers: Sequence[int], left: Sequence[int], right: Sequence[int], ranks: Sequence[int]) -> Placed:
    return Placed(
        np.array(numbers, np.int64), np.array(left, np.uint64), np.array(right, np.uint64), np.array(ranks, np.int32)
    )
