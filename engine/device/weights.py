"""The weights of LoRA slots on a device: merged with a subject's factors when it is chosen, always from pristine ones.

Networks are bound to the merged weights, so captured graphs serve every subject. Only what the last or the present
subject touches is written, with one launch of `merge_weights`. Where a network's pristine weights are on the device, a
swap moves nothing over the bus but a table of records. Where they are not, the inputs touched come from the host's file
again and are merged where they are. Either way a subject that comes back gives the same bits.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.axes import FLOAT8
from dreammix_trt.core.errors import EngineError
from dreammix_trt.core.networks import kind_of
from dreammix_trt.core.remarks import remark
from dreammix_trt.core.seam import Array, DeviceNetworks, Stream
from dreammix_trt.core.subject import Role, Subject
from dreammix_trt.engine.device.arena import Arena, Pieces
from dreammix_trt.engine.device.choices import PRISTINE, Choices, Chosen
from dreammix_trt.engine.device.factors import Factors
from dreammix_trt.engine.device.records import MERGE_KINDS
from dreammix_trt.engine.device.saturation import Saturation, describe_cut
from dreammix_trt.engine.device.slot_layout import (
    PIECES,
    SHARED,
    Pristine,
    SlottedNetwork,
    keeps_pristine,
    measure_turns,
)
from dreammix_trt.engine.device.slot_records import Addresses, SlotRecords
from dreammix_trt.engine.device.transfers import Uploads
from dreammix_trt.engine.drivers.device import Device

Slots = npt.NDArray[np.bool_]  # a word on each slot of a network

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


class _Held:
    """What a network's merged weights hold.

    merged: its inputs.
    pristine: the copies beside them; None: the host has the only ones.
    records: of its slots.
    label: of whose they are; None: nobody knows, or other weights are there.
    touched: for each slot, whether it may differ from pristine.
    """

    def __init__(self, network: SlottedNetwork, merged: dict[str, Array], pristine: dict[str, Array] | None) -> None:
        self.network, self.merged, self.pristine = network, merged, pristine
        self.records = SlotRecords(network, merged)
        self.sources = self.records.locate(pristine or merged)  # not of those that come in pieces
        self.label: tuple[int, float] | None = None
        self.touched = np.ones(len(network.slots), np.bool_)

    @property
    def name(self) -> str:
        return self.network.name

    def lose(self) -> None:
        """Note that all of it is to be written again."""
        self.label = None
        self.touched[:] = True

    def list_inputs(self) -> set[str]:
        """The inputs of touched slots."""
        return {self.network.slots[number].weight for number in np.flatnonzero(self.touched)}


class _Source(NamedTuple):
    """Pristine weights that are on the device.

    there: for each slot, whether it is to be written from them.
    addresses: of each slot.
    """

    held: _Held
    there: Slots
    addresses: Addresses


class DeviceWeights:
    """See the module.

    networks: where the pristine weights come from.
    slotted: those with slots.
    turns: whether the networks of each phase take turns in one region; then `enter` brings them.
    pristine: where the base's own weights are.
    reading: what the token adapter adds for subjects of tokens; None: there is no adapter.
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
        reading: Subject | None = None,
    ) -> None:
        self._device, self._stream, self._networks = device, stream, networks
        self._arena, self._uploads = arena, uploads
        self._slotted, self._turns, self.count = slotted, turns, MergeCount()
        self._gpu = importlib.import_module("dreammix_trt._cpp").gpu
        self._factors = Factors(arena["factors"], uploads)
        self._choices = Choices(networks, slotted, self._factors, reading)
        self._saturation = Saturation(networks, slotted)
        self._held = {name: self._make_held(network, pristine) for name, network in slotted.items()}
        if not turns:
            for held in self._held.values():
                if held.pristine is not None:
                    self._upload(held, held.network.pristine.arrays, held.pristine)
            self.enter(PRISTINE, self._held)

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
        self._choices.add(name, subject)

    def remove(self, name: str) -> None:
        """Forget a subject. What is merged stays until another role is entered."""
        self._choices.remove(name)

    def check_adapter(self) -> None:
        """Raise FileFormatError where the slots do not take the adapter's factors, as in an engine without any."""
        self._choices.check_adapter()

    def choose(self, role: Role) -> Chosen:
        """What a role means now. Raises EngineError for a subject that was removed."""
        return self._choices.choose(role)

    def check_range(self, role: Role) -> None:
        """Remark on a role with which weights are cut off, as FP8 cannot hold them."""
        chosen = self.choose(role)
        cut = self._saturation.find(chosen.factors, chosen.scale) if chosen.factors else {}
        if cut:
            remark(describe_cut(role, cut))

    def enter(self, chosen: Chosen, names: Iterable[str]) -> None:
        """Let networks hold what was chosen; those without slots and those that hold it already are passed over.

        With pristine weights and factors on the device it only enqueues. After an error what the networks hold is
        written anew by the next call.
        """
        todo = [self._held[name] for name in names if name in self._held and self._held[name].label != chosen.label]
        if not todo:
            return
        changed = {held.name: self._list_changed(chosen, held) for held in todo}
        for held in todo:
            self._begin(held, changed[held.name])
        for sources in self._bring_sources(todo):
            self._merge(chosen, sources, changed)
        for held in todo:
            held.label, held.touched = chosen.label, changed[held.name]

    # -- parts of them ------------------------------------------------------------------------------------------------

    def _make_held(self, network: SlottedNetwork, pristine: Pristine) -> _Held:
        name = network.name
        if self._turns:
            sizes = measure_turns(self._slotted)[kind_of(name).group]
            before = sum(sizes[other] for other in takewhile(lambda other: other != name, sizes))
            return _Held(network, network.merged.cut(self._arena[SHARED], before), None)
        copy = network.pristine.cut(self._arena[f"{name} pristine"]) if keeps_pristine(name, pristine) else None
        return _Held(network, network.merged.cut(self._arena[f"{name} slots"]), copy)

    @staticmethod
    def _list_changed(chosen: Chosen, held: _Held) -> Slots:
        """For each slot, whether the factors change it."""
        count = len(held.network.slots)
        return chosen.factors.touches(held.name, count) if chosen.factors else np.zeros(count, np.bool_)

    def _begin(self, held: _Held, changed: Slots) -> None:
        """Note what will be written, before anything is."""
        held.label = None
        held.touched = held.touched | changed
        if self._turns:
            for other in self._held.values():
                if kind_of(other.name).group != kind_of(held.name).group:
                    other.lose()

    def _bring_sources(self, todo: Iterable[_Held]) -> Iterator[list[_Source]]:
        """Bring the pristine inputs of touched slots to the device, where they are not.

        What reads those that are yielded must be enqueued before the next are asked for.
        """
        found, staged = [], []
        for held in todo:
            if held.pristine is None and not held.network.in_place:
                staged.append(held)
                continue
            if held.pristine is None:
                self._upload(held, held.list_inputs(), held.merged)
            found.append(_Source(held, held.touched, held.sources))
        if found:
            yield found
        for held in staged:
            for there in self._list_pieces(held.network, held.list_inputs()):
                self._upload(held, there, there)
                written = np.array([slot.weight in there for slot in held.network.slots])
                yield [_Source(held, written, held.records.locate(there))]

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

    def _merge(self, chosen: Chosen, sources: Sequence[_Source], changed: Mapping[str, Slots]) -> None:
        """Enqueue the merging of slots whose sources are there; those not `changed` are copied."""
        tables = [
            each.held.records.restore(np.flatnonzero(each.there & ~changed[each.held.name]), each.addresses)
            for each in sources
        ]
        wanted = {each.held.name: each.there & changed[each.held.name] for each in sources}
        if chosen.factors and any(mask.any() for mask in wanted.values()):
            for factors, start in self._factors.bring(chosen.factors, wanted):
                for held, _, addresses in sources:
                    if held.name in factors.placed:
                        placed = factors.placed[held.name].among(wanted[held.name])
                        tables.append(held.records.merge(placed, addresses, start, chosen.scale))
                self._launch(tables)
                tables = []
        self._launch(tables)

    def _launch(self, tables: Sequence[npt.NDArray[np.void]]) -> None:
        if not any(map(len, tables)):
            return
        table = np.concatenate(tables)
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
