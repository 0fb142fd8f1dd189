"""The weights of LoRA slots on a device: merged with a subject's factors when it is chosen, always from pristine ones.

Networks are bound to the merged weights, so captured graphs serve every subject. Only what the last or the present
subject touches is written, with one launch of `merge_weights`. Where a network's pristine weights are on the device, a
swap moves nothing over the bus but a table of records. Where they are not, the inputs touched come from the host's file
again and are merged where they are. Either way a subject that comes back gives the same bits.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from dreammix_trt.core.axes import FLOAT8
from dreammix_trt.core.errors import EngineError
from dreammix_trt.core.merging import check_fit
from dreammix_trt.core.networks import kind_of, networks_of_factors
from dreammix_trt.core.seam import Array, DeviceNetworks, Stream
from dreammix_trt.core.subject import NOBODY, Role, Subject
from dreammix_trt.engine.device.arena import Arena, Pieces
from dreammix_trt.engine.device.factors import Factor, Factors, Key, Pair, Pairs
from dreammix_trt.engine.device.records import MERGE, MERGE_KINDS
from dreammix_trt.engine.device.slot_layout import (
    PIECES,
    SHARED,
    Pristine,
    SlottedNetwork,
    keeps_pristine,
    measure_turns,
)
from dreammix_trt.engine.device.transfers import Uploads
from dreammix_trt.engine.drivers.device import Device
from dreammix_trt.engine.runtime import find_subject

_KIND_SIZES: Final = [(np.dtype(a).itemsize, 1 if b == FLOAT8 else np.dtype(b).itemsize) for a, b in MERGE_KINDS]


@dataclass
class MergeCount:
    """What merging has taken since the runtime was made; sizes in bytes.

    launches: of `merge_weights`.
    slots: merged or restored.
    read, written: within the device.
    uploaded: over the bus: pristine weights and tables; factors are not counted.
    """

    launches: int = 0
    slots: int = 0
    read: int = 0
    written: int = 0
    uploaded: int = 0

    def add(self, table: np.ndarray) -> None:
        """Count a launch with these MERGE records."""
        sizes = table["rows"].astype(np.int64) * table["columns"]
        factors = table["rank"].astype(np.int64) * (table["rows"] + table["columns"])
        read, written = (np.array(each)[table["kind"]] for each in zip(*_KIND_SIZES, strict=True))
        self.launches += 1
        self.slots += len(table)
        self.read += int((sizes * read + 4 * factors).sum())
        self.written += int((sizes * written).sum())
        self.uploaded += table.nbytes


@dataclass
class _Held:
    """What a network's merged weights hold.

    merged: its inputs.
    pristine: the copies beside them; None: the host has the only ones.
    role: whose they are; None: nobody knows, or other weights are there.
    touched: the slots that may differ from pristine.
    """

    network: SlottedNetwork
    merged: dict[str, Array]
    pristine: dict[str, Array] | None
    role: Role | None = None
    touched: set[int] = field(default_factory=set)

    def lose(self) -> None:
        """Note that all of it is to be written again."""
        self.role, self.touched = None, set(range(len(self.network.slots)))


class DeviceWeights:
    """See the module.

    networks: where the pristine weights come from.
    slotted: those with slots.
    turns: whether the networks of each phase take turns in one region; then `enter` brings them.
    pristine: where the base's own weights are.
    count: what merging has taken so far.
    """

    def __init__(
        self,
        device: Device,
        stream: Stream,
        networks: DeviceNetworks,
        slotted: Mapping[str, SlottedNetwork],
        arena: Arena,
        uploads: Uploads,
        *,
        turns: bool,
        pristine: Pristine,
    ) -> None:
        self._device, self._stream, self._networks, self._arena, self._uploads = (
            device,
            stream,
            networks,
            arena,
            uploads,
        )
        self._slotted, self._turns, self.count = slotted, turns, MergeCount()
        self._gpu = importlib.import_module("dreammix_trt._cpp").gpu
        self._known: dict[str, Subject] = {}
        self._factors = Factors(arena["factors"], uploads)
        self._held = {name: self._make_held(network, pristine) for name, network in slotted.items()}
        if not turns:
            for held in self._held.values():
                if held.pristine is not None:
                    self._upload(held, held.network.pristine.arrays, held.pristine)
            self.enter(NOBODY, self._held)

    @property
    def resident(self) -> tuple[str, ...]:
        """The subjects whose factors are on the device now."""
        return self._factors.resident

    def arrays(self, name: str) -> Mapping[str, Array]:
        """The merged weights of a network by input, at addresses that never change; none for one without slots."""
        return self._held[name].merged if name in self._held else {}

    def add(self, name: str, subject: Subject) -> None:
        """Make a subject known, and its factors resident.

        Raises FileFormatError where it does not fit the base, InputError, DeviceError; then the earlier subject keeps
        the name.
        """
        check_subject(subject, self._networks)
        self._factors.add(name, self._list_pairs(subject))
        self._forget(name)
        self._known[name] = subject

    def remove(self, name: str) -> None:
        """Forget a subject. What is merged stays until another role is entered."""
        del self._known[name]
        self._factors.remove(name)
        self._forget(name)

    def enter(self, role: Role, names: Iterable[str]) -> None:
        """Let networks hold a role; those without slots and those that hold it already are passed over.

        With pristine weights and factors on the device it only enqueues. After an error what the networks hold is
        written anew by the next call.
        """
        role = role if role.name else NOBODY
        todo = [self._held[name] for name in names if name in self._held and self._held[name].role != role]
        if not todo:
            return
        scale = 0.0 if role == NOBODY else find_subject(self._known, role).scale
        changed = {
            (held.network.name, number)
            for held in todo
            if scale != 0
            for number in self._factors.slots_of(role.name, held.network.name)
        }
        for held in todo:
            self._begin(held, changed)
        for sources in self._bring_sources(todo):
            self._merge(role, np.float32(scale), sources, [key for key in sources if key in changed])
        for held in todo:
            held.role, held.touched = role, {number for name, number in changed if name == held.network.name}

    # -- parts of them ------------------------------------------------------------------------------------------------

    def _make_held(self, network: SlottedNetwork, pristine: Pristine) -> _Held:
        name = network.name
        if self._turns:
            sizes = measure_turns(self._slotted)[kind_of(name).group]
            before = sum(size for other, size in sizes.items() if list(sizes).index(other) < list(sizes).index(name))
            held = _Held(network, network.merged.cut(self._arena[SHARED], before), None)
        else:
            copy = network.pristine.cut(self._arena[f"{name} pristine"]) if keeps_pristine(name, pristine) else None
            held = _Held(network, network.merged.cut(self._arena[f"{name} slots"]), copy)
        held.lose()
        return held

    def _list_pairs(self, subject: Subject) -> Pairs:
        found = {}
        for name, network in self._slotted.items():
            factors = subject.factors_for(name)
            for number, slot in enumerate(network.slots):
                if slot.module in factors:
                    found[name, number] = Pair(slot, *factors[slot.module])
        return found

    def _begin(self, held: _Held, changed: Collection[Key]) -> None:
        """Note what will be written, before anything is."""
        held.role = None
        held.touched |= {number for name, number in changed if name == held.network.name}
        if self._turns:
            for other in self._held.values():
                if kind_of(other.network.name).group != kind_of(held.network.name).group:
                    other.lose()

    def _bring_sources(self, todo: Iterable[_Held]) -> Iterator[dict[Key, Array]]:
        """Bring the pristine inputs of touched slots to the device, where they are not.

        Yields slot -> the input to read. What reads it must be enqueued before the next is asked for.
        """
        found: dict[Key, Array] = {}
        staged = []
        for held in todo:
            inputs = {held.network.slots[number].weight for number in held.touched}
            if held.pristine is None and held.network.in_place:
                self._upload(held, inputs, held.merged)
            elif held.pristine is None:
                staged.append((held, inputs))
                continue
            source = held.pristine or held.merged
            found |= {(held.network.name, n): source[held.network.slots[n].weight] for n in held.touched}
        if found:
            yield found
        for held, inputs in staged:
            for there in self._list_pieces(held.network, inputs):
                self._upload(held, there, there)
                slots = held.network.slots
                yield {(held.network.name, n): there[slots[n].weight] for n in held.network.numbers_of(there)}

    def _list_pieces(self, network: SlottedNetwork, inputs: Collection[str]) -> Iterator[dict[str, Array]]:
        """Divide inputs among pieces that fit the region for them; each piece's arrays."""
        region = self._arena[PIECES]
        piece: dict[str, tuple[tuple[int, ...], str]] = {}
        for name, array in network.pristine.arrays.items():
            if name not in inputs:
                continue
            if piece and Pieces({**piece, name: array}).nbytes > region.nbytes:
                yield Pieces(piece).cut(region)
                piece = {}
            piece[name] = array
        if piece:
            yield Pieces(piece).cut(region)

    def _merge(self, role: Role, scale: np.float32, sources: Mapping[Key, Array], changed: Collection[Key]) -> None:
        """Enqueue the merging of slots whose sources are there; those not `changed` are copied."""
        records = [
            self._make_record(key, source, None, scale)
            for key, source in sources.items()
            if key not in changed and source != self._find_target(key)
        ]
        for factors in self._factors.bring(role.name, changed):
            records += [self._make_record(key, sources[key], factor, scale) for key, factor in factors.items()]
            self._launch(records)
            records = []
        if records:
            self._launch(records)

    def _find_target(self, key: Key) -> Array:
        held = self._held[key[0]]
        return held.merged[held.network.slots[key[1]].weight]

    def _make_record(self, key: Key, source: Array, factor: Factor | None, scale: np.float32) -> tuple[float, ...]:
        """A MERGE record. factor: None: the weight is copied."""
        network, target = self._held[key[0]].network, self._find_target(key)
        slot = network.slots[key[1]]
        rows, columns = (slot.outputs, slot.inputs) if slot.flipped else (slot.inputs, slot.outputs)
        places = [array.pointer + slot.at * np.dtype(array.dtype).itemsize for array in (source, target)]
        left, right, rank = factor or Factor(0, 0, 0)
        kind, first = MERGE_KINDS[source.dtype, network.types[slot.weight]], 0
        scales = (scale, 1.0) if slot.flipped else (1.0, scale)
        return (*places, left, right, slot.stride, rows, columns, rank, kind, first, *scales, 1 / slot.scale)

    def _launch(self, records: list[tuple[float, ...]]) -> None:
        table = np.array(records, MERGE)
        tasks = self._gpu.plan_merges(table=table.ctypes.data, count=len(table))
        place = self._arena["merge table"].part(0, table.nbytes)
        self._uploads.send(place, [table.view(np.uint8)])
        self._device.launch_kernel("merge_weights", self._stream, slots=place, count=len(table), tasks=tasks)
        self.count.add(table)

    def _upload(self, held: _Held, inputs: Iterable[str], to: Mapping[str, Array]) -> None:
        """Bring pristine inputs from the host to arrays of their type."""
        weights = self._networks.weights(held.network.name)
        for name in inputs:
            values, array = weights[name], to[name]
            if values.dtype != array.dtype or values.shape != array.shape:
                raise EngineError(
                    f"{held.network.name}: the base's own {name} is {values.dtype} {list(values.shape)}, expected "
                    f"{array.dtype} {list(array.shape)}; build the base again"
                )
            self._uploads.send(array, [np.ascontiguousarray(values).reshape(-1).view(np.uint8)])
            self.count.uploaded += array.nbytes

    def _forget(self, name: str) -> None:
        """Note that nobody holds the factors of this name any more."""
        for held in self._held.values():
            if held.role is not None and held.role.name == name:
                held.role = None


def check_subject(subject: Subject, networks: DeviceNetworks) -> None:
    """Raise FileFormatError for a subject with layers that the networks' slots do not take.

    Factors of networks that are not there are not checked.
    """
    for part, factors in subject.factors.items():
        names = [name for name in networks_of_factors(part) if name in networks]
        if names:
            check_fit(factors, [slot for name in names for slot in networks.slots(name)])
