"""The factors of a runtime's subjects: kept by the host, the most recent ones on the device as well.

On the device a slot has `left` (rows, rank) and `right` (rank, columns), float32, of the weight as it is stored: A and
B, or B^T and A^T where it is stored transposed. A subject's strength is not in them, so they serve every strength.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.files import size_text
from dreammix_trt.core.seam import Array
from dreammix_trt.core.slots import Floats, Slot
from dreammix_trt.engine.device.transfers import Uploads

Key = tuple[str, int]  # a network, and the number of a slot there
_EACH = 16  # bytes to which every factor is aligned


class Factor(NamedTuple):
    """A slot's factors on the device.

    left, right: addresses.
    """

    left: int
    right: int
    rank: int


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

    def stored(self) -> Iterator[npt.NDArray[np.uint8]]:
        """The bytes of left and right, with what aligns them."""
        left, right = (self.b.T, self.a.T) if self.slot.flipped else (self.a, self.b)
        for part in (left, right):
            flat = np.ascontiguousarray(part, np.float32).reshape(-1).view(np.uint8)
            yield flat
            yield np.zeros(_align(flat.nbytes) - flat.nbytes, np.uint8)


Pairs = Mapping[Key, Pair]


class Factors:
    """See the module. `region` bounds what is on the device; the least recently used subjects leave it."""

    def __init__(self, region: Array, uploads: Uploads) -> None:
        self._region, self._uploads = region, uploads
        self._known: dict[str, Pairs] = {}
        self._resident: OrderedDict[str, int] = OrderedDict()  # name -> where it begins

    @property
    def resident(self) -> tuple[str, ...]:
        """The subjects whose factors are on the device now, the least recently used first."""
        return tuple(self._resident)

    def add(self, name: str, pairs: Pairs) -> None:
        """Make a subject's factors known, and resident where they fit. They replace those of the same name.

        Raises InputError for a slot whose factors alone do not fit; then, and after any other error, nothing changes
        but what is resident.
        """
        for key, pair in pairs.items():
            if sum(pair.sizes) > self._region.nbytes:
                size, room = size_text(sum(pair.sizes)), size_text(self._region.nbytes)
                raise InputError(
                    f"subject {name!r}: the factors of {pair.slot.module} in {key[0]} take {size} and this runtime has "
                    f"{room} for factors: load it with more `subjects`"
                )
        self._resident.pop(name, None)
        if pairs and _measure(pairs) <= self._region.nbytes:
            self._settle(name, pairs)
        self._known[name] = pairs

    def remove(self, name: str) -> None:
        """Forget a subject's factors."""
        self._resident.pop(name, None)
        self._known.pop(name, None)

    def slots_of(self, name: str, network: str) -> set[int]:
        """The numbers of the slots of a network that a subject changes."""
        return {number for where, number in self._known.get(name, ()) if where == network}

    def bring(self, name: str, keys: Collection[Key]) -> Iterator[dict[Key, Factor]]:
        """Bring a subject's factors of some slots to the device, where they are not.

        Yields them all at once where the whole subject fits, else in pieces; what uses a piece must be enqueued before
        the next one is asked for.
        """
        pairs = self._known.get(name, {})
        if not keys:
            return
        if _measure(pairs) <= self._region.nbytes:
            if name not in self._resident:
                self._settle(name, pairs)
            self._resident.move_to_end(name)
            found = _place(pairs, self._region.pointer + self._resident[name])
            yield {key: found[key] for key in keys}
            return
        self._resident.clear()
        for piece in _cut({key: pairs[key] for key in pairs if key in set(keys)}, self._region.nbytes):
            self._send(piece, 0)
            yield _place(piece, self._region.pointer)

    def _settle(self, name: str, pairs: Pairs) -> None:
        """Put a whole subject where there is room, or where the least recently used ones were."""
        size = _measure(pairs)
        while (start := self._find_gap(size)) is None:
            self._resident.popitem(last=False)
        self._send(pairs, start)
        self._resident[name] = start

    def _find_gap(self, size: int) -> int | None:
        at = 0
        for start, name in sorted((start, name) for name, start in self._resident.items()):
            if start - at >= size:
                return at
            at = start + _measure(self._known[name])
        return at if self._region.nbytes - at >= size else None

    def _send(self, pairs: Pairs, start: int) -> None:
        parts = (part for pair in pairs.values() for part in pair.stored())
        self._uploads.send(self._region.part(start, _measure(pairs)), parts)


def _align(size: int) -> int:
    return -(-size // _EACH) * _EACH


def _measure(pairs: Pairs) -> int:
    return sum(sum(pair.sizes) for pair in pairs.values())


def _place(pairs: Pairs, at: int) -> dict[Key, Factor]:
    found = {}
    for key, pair in pairs.items():
        left, right = pair.sizes
        found[key] = Factor(at, at + left, pair.rank)
        at += left + right
    return found


def _cut(pairs: Pairs, room: int) -> Iterator[Pairs]:
    """Split factors into pieces of at most `room` bytes."""
    piece: dict[Key, Pair] = {}
    taken = 0
    for key, pair in pairs.items():
        size = sum(pair.sizes)
        if taken + size > room:
            yield piece
            piece, taken = {}, 0
        piece[key], taken = pair, taken + size
    yield piece
