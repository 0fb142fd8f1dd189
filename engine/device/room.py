"""One frame size on the device: the networks bound to the arena at that size, and the graphs captured there.

A room is everything that depends on a shape. Its graphs hold whole phases. Pictures, schedules, texts and subjects are
data, so the graphs are replayed for any request of the shape.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from dreammix_trt.core.axes import FACTOR, Sides, Tensor
from dreammix_trt.core.config_fields import TOKENS
from dreammix_trt.core.networks import KINDS, Call, NetworkKind, kv_name, twin_name
from dreammix_trt.core.seam import Array, Bound, DeviceNetworks, Stream
from dreammix_trt.engine.canvas.geometry import Size, floor_to_cells
from dreammix_trt.engine.canvas.tiles import Tiling, needs_tiles, tiles_of
from dreammix_trt.engine.device.arena import Arena, Pieces, Regions
from dreammix_trt.engine.device.captures import Graphs, Tally
from dreammix_trt.engine.device.weights import DeviceWeights
from dreammix_trt.engine.drivers.device import Device, Memory

Ramps = list[tuple[Array, Array]]

# The regions that networks of a batch share: those called in a stage or a step.
BATCH_INPUTS = {
    "sample": "sample",
    "timestep": "timestep",
    "encoder_hidden_states": "text",
    "text_embeds": "pooled text",
    "time_ids": "time ids",
    "inpaint_feature": "feature",
}
KEYS_AND_VALUES = "keys and values"
HALVES = ("negative", "positive")  # the calls of a step whose rows have conditions of two lengths


@dataclass(frozen=True)
class RoomShape:
    """What decides a room.

    work: the frame's work size (height, width) in pixels.
    pictures: of a batch.
    rows_per_picture: of the UNet's batch.
    context: rows of the text condition.
    safe: whether networks are replaced by their float32 twins.
    against: rows of the negative condition where that has a length of its own; 0: it has `context` rows.
    """

    work: Size
    pictures: int
    rows_per_picture: int
    context: int = TOKENS
    safe: bool = False
    against: int = 0

    @property
    def size(self) -> Size:
        """(height, width) in pixels that the networks see."""
        return floor_to_cells(self.work)

    @property
    def latent(self) -> Size:
        return self.size[0] // FACTOR, self.size[1] // FACTOR

    @property
    def batch(self) -> Sides:
        """The sides of all rows of the batch."""
        return Sides(self.pictures * self.rows_per_picture, self.pictures, *self.latent, self.context)

    @property
    def calls(self) -> tuple[Sides, ...]:
        """The sides of each call of a UNet in a step, and of what attends for it in a stage: one for all rows.

        Where the negative rows have a condition of another length, one for them, and one for the positive rows.
        """
        lengths = (self.against, self.context) if self.against else ()
        return tuple(Sides(self.pictures, self.pictures, *self.latent, each) for each in lengths) or (self.batch,)

    @property
    def one(self) -> Sides:
        """The sides of one picture."""
        return Sides(1, 1, *self.latent)

    @property
    def tiling(self) -> Tiling | None:
        """How the VAE runs in tiles; None: whole."""
        return tiles_of(*self.latent) if needs_tiles(*self.size) else None

    @property
    def vae(self) -> Sides:
        """The sides of a VAE call."""
        tiling = self.tiling
        return Sides(1, 1, tiling.height, tiling.width) if tiling else self.one

    def sides_of(self, call: Call) -> tuple[Sides, ...]:
        """The sides of a network's calls by the way it is called (core/networks.py)."""
        one, calls = (self.one,), self.calls
        return {"prompt": one, "frame": one, "vae": (self.vae,), "stage": calls, "step": calls, "subject": one}[call]


def choose_twin(networks: DeviceNetworks, name: str, safe: bool) -> str:
    """A network's name, or with `safe` its float32 twin's where it exists."""
    twin = twin_name(name)
    return twin if safe and twin in networks else name


def list_regions(networks: DeviceNetworks, largest: RoomShape) -> Regions:
    """Memory to which the networks are bound.

    largest: the largest room.

    The UNets share theirs, and so do the networks that attend for them. Every other network has its own, large enough
    for float32, which twins use. Slots' weights are elsewhere (`DeviceWeights`). With ASUKA's prior there is memory for
    steps of two calls as well.
    """
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    shapes = {"": largest.batch}
    apart = replace(largest, against=largest.context)
    if "asuka_prior" in networks:
        shapes |= {f"{half} ": sides for half, sides in zip(HALVES, apart.calls, strict=True)}
    for name, tensors in (
        (kv_name("unet"), networks.inputs(kv_name("unet"))),
        ("unet", (*networks.inputs("unet"), *networks.outputs("unet"))),
    ):
        for tensor in tensors:
            region = {**BATCH_INPUTS, "eps": "eps"}.get(tensor.name)
            for half, sides in shapes.items():
                if region is not None and (not half or _has_rows(tensor)):
                    found[f"{half}{region}"] = (sides.shape(tensor), _choose_dtype(networks, name, tensor))
    found["no feature"] = found["feature"]
    sizes = [sum(each.nbytes for each in _lay_keys(networks, shape)) for shape in (largest, apart)]
    found[KEYS_AND_VALUES] = ((max(sizes if "asuka_prior" in networks else sizes[:1]),), "uint8")
    for kind in _list_kinds(networks):
        if kind.call not in ("stage", "step"):
            (sides,) = largest.sides_of(kind.call)
            for tensor in (*networks.inputs(kind.name), *networks.outputs(kind.name)):
                found[f"{kind.name} {tensor.name}"] = (sides.shape(tensor), "float32")
    return found


def _lay_keys(networks: DeviceNetworks, shape: RoomShape) -> list[Pieces]:
    """Room for the keys and values of each call, in the larger type where a float32 twin shares it."""
    outputs = networks.outputs(kv_name("unet"))
    types = {tensor.name: _choose_dtype(networks, "unet", tensor) for tensor in outputs}
    return [Pieces({each.name: (sides.shape(each), types[each.name]) for each in outputs}) for sides in shape.calls]


def _has_rows(tensor: Tensor) -> bool:
    """Whether it has an entry for each row of a batch, and not for each picture."""
    return tensor.shape[0] == "rows"


def _list_kinds(networks: DeviceNetworks) -> Iterator[NetworkKind]:
    """The networks that rooms bind: all but those of prompts and subjects, whose sizes do not depend on the frame."""
    return (kind for kind in KINDS if kind.call not in ("prompt", "subject") and kind.name in networks)


def _choose_dtype(networks: DeviceNetworks, name: str, tensor: Tensor) -> str:
    """The larger type where a float32 twin shares the memory."""
    return "float32" if twin_name(name) in networks and tensor.dtype == "float16" else tensor.dtype


class Room:
    """The bound networks of a shape.

    arrays: by network and tensor name. Where a step has two calls, a UNet's are those of all its rows, from which the
        calls' own are filled.
    calls: by network, the arrays of each call by tensor name.
    """

    def __init__(
        self,
        shape: RoomShape,
        device: Device,
        networks: DeviceNetworks,
        arena: Arena,
        weights: DeviceWeights,
        workspace: Array,
        upload: Callable[[Array, np.ndarray], None],
        tally: Tally,
    ) -> None:
        """Bind the networks of a shape.

        workspace: scratch that the networks share.
        upload: copies values to the device, and waits.
        tally: counts how the phases run.
        """
        self.shape = shape
        self.arrays: dict[str, dict[str, Array]] = {}
        self.calls: dict[str, list[dict[str, Array]]] = {}
        self._device, self._networks, self._workspace, self._upload = device, networks, workspace, upload
        self._bound: dict[str, list[Bound]] = {}
        self._graphs = Graphs(device, tally)
        self._used: set[str] = set()  # networks of the present phase
        self._arena = arena
        self._memory: list[Memory] = []
        self._ramps: dict[int, Ramps] = {}
        outputs = networks.outputs(choose_twin(networks, kv_name("unet"), shape.safe))
        pieces = [Pieces({each.name: (sides.shape(each), each.dtype) for each in outputs}) for sides in shape.calls]
        starts = [0, *accumulate(each.nbytes for each in pieces)]
        region = arena[KEYS_AND_VALUES]
        self._keys = [each.cut(region, at) for each, at in zip(pieces, starts, strict=False)]
        self.attended = region.reshape((starts[-1] // np.dtype(outputs[0].dtype).itemsize,), outputs[0].dtype)
        try:
            if shape.tiling:
                self._ramps = {factor: self._upload_ramps(shape.tiling, factor) for factor in (1, FACTOR)}
            actual = {kind.name: choose_twin(networks, kind.name, shape.safe) for kind in _list_kinds(networks)}
            self._fit_workspace(actual)
            for kind in _list_kinds(networks):
                self._bind(kind, actual[kind.name], weights)
        except BaseException:
            self.close()
            raise

    @property
    def texts(self) -> list[Array]:
        """The token rows of the batch's condition for each call, (rows, context, D)."""
        return [call["encoder_hidden_states"] for call in self.calls[kv_name("unet")]]

    def enqueue(self, name: str, stream: Stream, call: int = 0) -> None:
        """Run a network of the room.

        call: which one, where it has two.
        """
        self._used.add(name)
        self._bound[name][call].enqueue(stream)

    def play(self, phase: Hashable, record: Callable[[Any], None], stream: Stream, *, capture: bool) -> None:
        """Do what `record(phase)` enqueues: replay its graph, or run it plainly and capture it for the next time.

        phase: a value that decides everything that is recorded.
        capture: whether it may be captured.
        """
        self._used.clear()
        self._graphs.play(phase, lambda: record(phase), stream, capture=capture, find_obstacle=self._find_obstacle)

    def close(self) -> None:
        """Free graphs and bindings. The device must be idle."""
        self._graphs.close()
        for bound in self._bound.values():
            for each in bound:
                each.close()
        for memory in self._memory:
            memory.free()
        self._bound, self._memory = {}, []

    def ramps(self, factor: int) -> Ramps:
        """Each tile's weights along rows and columns, float32.

        factor: 1: in latent cells; `FACTOR`: in pixels.
        """
        return self._ramps[factor]

    def _upload_ramps(self, tiling: Tiling, factor: int) -> Ramps:
        tiles = tiling.tiles(factor)
        values = np.concatenate([ramp for tile in tiles for ramp in (tile.ramp_rows, tile.ramp_cols)])
        memory = self._device.allocate(values.nbytes)
        self._memory.append(memory)
        whole = Array(memory.pointer, values.shape, "float32")
        self._upload(whole, values)
        height, width = factor * tiling.height, factor * tiling.width
        starts = [index * (height + width) for index in range(len(tiles))]
        return [(whole.part(at, height), whole.part(at + height, width)) for at in starts]

    def _find_obstacle(self) -> str | None:
        """Why what just ran cannot be captured; None: it can. Networks that did not run may never have run."""
        return find_obstacle((name, bound) for name in sorted(self._used) for bound in self._bound[name])

    def _fit_workspace(self, actual: Mapping[str, str]) -> None:
        """Take scratch memory of the room's own where a network needs more than what all rooms share.

        Twins are not counted in that. A smaller frame may use kernels that need more than the largest frame's.

        actual: network -> itself or its twin.
        """
        need = max(
            self._networks.workspace_bytes(actual[kind.name], sides)
            for kind in _list_kinds(self._networks)
            for sides in self.shape.sides_of(kind.call)
        )
        if need > self._workspace.nbytes:
            self._memory.append(self._device.allocate(need))
            self._workspace = Array(self._memory[-1].pointer, (need,), "uint8")

    def _bind(self, kind: NetworkKind, actual: str, weights: DeviceWeights) -> None:
        """actual: the network itself, or its twin."""
        name, calls = kind.name, self.shape.sides_of(kind.call)
        tensors = {t.name: t for t in (*self._networks.inputs(actual), *self._networks.outputs(actual))}
        self.calls[name], self._bound[name] = [], []
        for number, sides in enumerate(calls):
            given = dict(weights.arrays(name)) | (self._keys[number] if kind.call in ("stage", "step") else {})
            arrays = {each: array for each, array in given.items() if each in tensors}
            half = HALVES[number] if len(calls) > 1 else ""
            for tensor in tensors.values():
                if tensor.name not in arrays:
                    arrays[tensor.name] = self._view(kind, tensor, sides, half)
            self.calls[name].append(arrays)
            self._bound[name].append(self._networks.bind(actual, sides, arrays, self._workspace))
        self.arrays[name] = self.calls[name][0]
        if len(calls) > 1:
            rows = [tensor for tensor in tensors.values() if tensor.name in (*BATCH_INPUTS, "eps")]
            self.arrays[name] = {tensor.name: self._view(kind, tensor, self.shape.batch) for tensor in rows}

    def _view(self, kind: NetworkKind, tensor: Tensor, sides: Sides, half: str = "") -> Array:
        """A tensor's region, or that of half the rows, in its shape and type."""
        region = _find_region(kind, tensor)
        region = f"{half} {region}" if half and _has_rows(tensor) else region
        return self._arena[region].reshape(sides.shape(tensor), tensor.dtype)


def find_obstacle(bound: Iterable[tuple[str, Bound]]) -> str | None:
    """The first of these networks that the back end does not let be captured, in words; None: all can be."""
    for name, each in bound:
        if not each.capturable:
            return f"{name} has run, and its back end says that it cannot be captured now"
    return None


def _find_region(kind: NetworkKind, tensor: Tensor) -> str:
    """The region of a tensor of a network."""
    if kind.call not in ("stage", "step"):
        return f"{kind.name} {tensor.name}"
    raw = {"inpaint_feature": "no feature"} if kind.name == "unet_raw" else {}
    return {**BATCH_INPUTS, **raw, "eps": "eps"}[tensor.name]


class Rooms:
    """The rooms of a runtime. At most `most` of them are kept.

    A shape gets a room that stays when there is space for one, or when the shape comes a second time while another room
    was not used for longer. Else it gets a guest's room, whose phases run uncaptured and which is closed after the
    request. A room that the same request has entered is never closed. A room of float32 twins is always a guest's: what
    twins take beside their weights goes with the request that overflowed.
    """

    def __init__(self, make: Callable[[RoomShape], Room], most: int = 4) -> None:
        self._make, self._most = make, most
        self._kept: OrderedDict[RoomShape, Room] = OrderedDict()
        self._seen: OrderedDict[RoomShape, None] = OrderedDict()
        self._guests: list[Room] = []
        self._entered: set[RoomShape] = set()

    def __len__(self) -> int:
        return len(self._kept)

    def enter(self, shape: RoomShape) -> tuple[Room, bool]:
        """The room of a shape, and whether its phases may be captured. The device must be idle."""
        self._entered.add(shape)
        if shape.safe:
            return self._receive(shape), False
        if shape in self._kept:
            self._kept.move_to_end(shape)
            return self._kept[shape], True
        full = len(self._kept) >= self._most
        oldest = next((each for each in self._kept if each not in self._entered), None)
        if full and (oldest is None or shape not in self._seen):
            self._seen[shape] = None
            if len(self._seen) > 4 * self._most:
                self._seen.popitem(last=False)
            logging.getLogger(__name__).debug("%s runs uncaptured: %d shapes are kept", shape, self._most)
            return self._receive(shape), False
        if full and oldest is not None:
            self._kept.pop(oldest).close()
        self._seen.pop(shape, None)
        room = self._kept[shape] = self._make(shape)
        return room, True

    def _receive(self, shape: RoomShape) -> Room:
        """A room of a guest."""
        self._guests.append(self._make(shape))
        return self._guests[-1]

    def leave(self) -> None:
        """End a request: close the guests' rooms. The device must be idle."""
        for room in self._guests:
            room.close()
        self._guests.clear()
        self._entered.clear()

    def close(self) -> None:
        """Close every room. The device must be idle."""
        self.leave()
        for room in self._kept.values():
            room.close()
        self._kept.clear()
