"""Where the weights of LoRA slots lie on a device: what each network's take, and the regions that hold them.

A network's slot weights have one *merged* region, to which it is bound and whose address never changes. The base's own,
*pristine* weights are beside it on the device, or in the host's file alone. Which of them, the memory plan decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from dreammix_trt.core.axes import FLOAT8
from dreammix_trt.core.errors import EngineError
from dreammix_trt.core.networks import KINDS, kind_of, list_groups
from dreammix_trt.core.seam import DeviceNetworks
from dreammix_trt.core.slots import Slot, names_of_weights
from dreammix_trt.core.subject import Subject
from dreammix_trt.engine.device.arena import Pieces
from dreammix_trt.engine.device.factors import Pair
from dreammix_trt.engine.device.records import MERGE

Pristine = Literal["device", "host"]

SHARED: Final = "slot weights"  # the merged region of networks that take turns
PIECES: Final = "pristine pieces"  # where weights of the host wait to be merged into a region of another type
_USUAL_RANK: Final = 8  # of a subject, by which `Options.subjects` counts
_PIECE: Final = 64 << 20


@dataclass(frozen=True)
class SlottedNetwork:
    """A network whose slot weights are inputs.

    slots: those that are inputs; an engine may lack a layer that has no effect.
    types: input -> its type.
    merged: the inputs as they lie on the device. FP8 numbers are bytes.
    pristine: the base's own weights as they lie in the host's file; those of FP8 inputs are float16.
    """

    name: str
    slots: tuple[Slot, ...]
    types: Mapping[str, str]
    merged: Pieces
    pristine: Pieces

    @classmethod
    def of(cls, networks: DeviceNetworks, name: str) -> SlottedNetwork | None:
        """A network's slots; None where it has none. Raises EngineError for inputs that slots only partly fill."""
        tensors = {tensor.name: tensor for tensor in networks.inputs(name)}
        slots = tuple(slot for slot in networks.slots(name) if slot.weight in tensors)
        if not slots:
            return None
        used = [tensors[weight] for weight in names_of_weights(slots)]
        shapes = {tensor.name: tuple(int(side) for side in tensor.shape) for tensor in used}
        found = cls(
            name,
            slots,
            {tensor.name: tensor.dtype for tensor in used},
            Pieces({t.name: (shapes[t.name], t.memory_dtype) for t in used}),
            Pieces({t.name: (shapes[t.name], "float16" if t.dtype == FLOAT8 else t.dtype) for t in used}),
        )
        found._check_whole()
        return found

    @property
    def in_place(self) -> bool:
        """Whether pristine weights have the inputs' type, so that they can be merged where they are."""
        return self.merged.arrays == self.pristine.arrays

    def _check_whole(self) -> None:
        filled: dict[str, int] = {}
        for slot in self.slots:
            filled[slot.weight] = filled.get(slot.weight, 0) + slot.inputs * slot.outputs
        for name, (shape, _) in self.merged.arrays.items():
            size = shape[0] * shape[1] if len(shape) == 2 else -1
            if filled[name] != size:
                raise EngineError(
                    f"{self.name}: slots fill {filled[name]} numbers of {name} {list(shape)}; build the base again"
                )


def list_slotted(networks: DeviceNetworks) -> dict[str, SlottedNetwork]:
    """The networks with slots, by name, in running order."""
    found = {kind.name: SlottedNetwork.of(networks, kind.name) for kind in KINDS if kind.name in networks}
    return {name: network for name, network in found.items() if network is not None}


def keeps_pristine(name: str, pristine: Pristine) -> bool:
    """Whether a network's pristine weights have a copy on the device. Few subjects touch the raw UNet: it has none."""
    return pristine == "device" and kind_of(name).group != "unet_raw"


def measure_factors(slotted: Mapping[str, SlottedNetwork], subjects: int) -> int:
    """Bytes for the factors of that many subjects of the usual rank, each for one UNet and the text encoders."""
    sides = [
        slot.inputs + slot.outputs
        for name, network in slotted.items()
        if kind_of(name).group != "unet_raw"
        for slot in network.slots
    ]
    return subjects * 4 * _USUAL_RANK * max(sum(sides), 1)


def measure_reading(slotted: Mapping[str, SlottedNetwork], reading: Subject | None) -> int:
    """Bytes for the factors that the token adapter adds; None: there is none."""
    found = 0
    for name, network in slotted.items() if reading is not None else ():
        factors = reading.factors_for(name) if reading is not None else {}
        found += sum(sum(Pair(slot, *factors[slot.module]).sizes) for slot in network.slots if slot.module in factors)
    return found


def list_tables(
    slotted: Mapping[str, SlottedNetwork], subjects: int, reading: Subject | None = None
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Memory for factors, and for the records of a merge.

    subjects: see `measure_factors`.
    reading: what the token adapter adds for subjects of tokens; its factors have a place beside the subjects'.
    """
    records = max(sum(len(each.slots) for each in slotted.values()), 1)
    factors = measure_factors(slotted, subjects) + measure_reading(slotted, reading)
    found = {"factors": factors, "merge table": records * MERGE.itemsize}
    return {name: ((size,), "uint8") for name, size in found.items()}


def measure_weights(slotted: Mapping[str, SlottedNetwork], *, turns: bool, pristine: Pristine) -> dict[str, int]:
    """Bytes of the regions of merged and pristine weights.

    turns: whether the networks of each phase take turns in one region.
    pristine: where the base's own weights are.
    """
    found: dict[str, int] = {}
    if turns and slotted:
        found[SHARED] = max(sum(sizes.values()) for sizes in measure_turns(slotted).values())
    elif not turns:
        for name, network in slotted.items():
            found[f"{name} slots"] = network.merged.nbytes
            if keeps_pristine(name, pristine):
                found[f"{name} pristine"] = network.pristine.nbytes
    staged = [each for each in slotted.values() if not each.in_place and f"{each.name} pristine" not in found]
    if staged:
        found[PIECES] = max(_PIECE, *map(_measure_largest, staged))
    return found


def _measure_largest(network: SlottedNetwork) -> int:
    """Bytes of the network's largest pristine input, as a piece."""
    return max(Pieces({name: array}).nbytes for name, array in network.pristine.arrays.items())


def measure_turns(slotted: Mapping[str, SlottedNetwork]) -> dict[str, dict[str, int]]:
    """Phase -> its networks' bytes of merged weights, in the order in which they lie in the shared region."""
    found: dict[str, dict[str, int]] = {group: {} for group in list_groups()}
    for name, network in slotted.items():
        found[kind_of(name).group][name] = network.merged.nbytes
    return {group: sizes for group, sizes in found.items() if sizes}
