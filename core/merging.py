"""A subject's factors merged into the weights of a network's slots: W + A B, summed in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.lora import describe_other_base
from dreammix_trt.core.lora_names import join_first
from dreammix_trt.core.networks import networks_of_factors
from dreammix_trt.core.slots import Floats, Slot
from dreammix_trt.core.subject import Pairs, Subject

Merge = Callable[[NDArray[Any], NDArray[Any], Slot, Floats, Floats], None]  # as `merge_slot`


class SlottedNetworks(Protocol):
    """Networks, as far as their slots go."""

    def __contains__(self, name: str) -> bool: ...

    def slots(self, name: str) -> Sequence[Slot]:
        """A network's slots."""
        ...


class Change(NamedTuple):
    """What a subject adds to one slot.

    a: float32 (inputs, rank).
    b: float32 (rank, outputs), with the subject's strength.
    """

    slot: Slot
    a: Floats
    b: Floats


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


def find_misfits(factors: Pairs, slots: Sequence[Slot]) -> Misfits:
    """Find the layers that slots do not take.

    factors: module -> (A, B).
    slots: of all networks that these factors are for.
    """
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


def check_fit(factors: Pairs, slots: Sequence[Slot]) -> None:
    """Raise `FileFormatError` that lists the layers which slots do not take, with the remedy.

    factors, slots: as for `find_misfits`.
    """
    if factors and not slots:
        raise FileFormatError(
            "this engine was built with --no-slots, so nothing can be added to it: build it without that option, or "
            "merge the LoRA: `dreammix-trt build --lora FILE --merge --out DIR` (a subject file cannot be merged)"
        )
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


def check_subject(subject: Subject, networks: SlottedNetworks) -> None:
    """Raise `FileFormatError` for a subject with layers that the networks' slots do not take (`check_fit`).

    Factors of networks that are not there are not checked.
    """
    for part, factors in subject.factors.items():
        names = [name for name in networks_of_factors(part) if name in networks]
        if names:
            check_fit(factors, [slot for name in names for slot in networks.slots(name)])


def list_changes(factors: Pairs, slots: Sequence[Slot], scale: float = 1.0) -> Iterator[Change]:
    """What factors add to the slots of one network, in the order of the slots; factors of other layers are not its.

    factors: module -> (A, B), checked with `check_fit`.
    scale: multiplies B.
    """
    for slot in slots:
        if slot.module in factors:
            a, b = factors[slot.module]
            yield Change(slot, a, b * np.float32(scale))


def merge_weights(
    pristine: Mapping[str, NDArray[Any]], changes: Iterable[Change], merge: Merge | None = None
) -> dict[str, NDArray[Any]]:
    """Merge changes into copies of the weights that they touch.

    pristine: input name -> the base's weight, float32 or float16. Changes of other inputs have no effect, and are left.
    merge: carries one change out; None: `merge_slot`.

    Returns input name -> merged weight of the same shape and dtype, of touched inputs alone.
    """
    merged: dict[str, NDArray[Any]] = {}
    for slot, a, b in changes:
        if slot.weight not in pristine:
            continue
        source = pristine[slot.weight]
        if slot.weight not in merged:
            alone = source.size == slot.inputs * slot.outputs
            merged[slot.weight] = np.empty_like(source) if alone else source.copy()
        (merge or merge_slot)(source, merged[slot.weight], slot, a, b)
    return merged


def merge_slot(pristine: NDArray[Any], out: NDArray[Any], slot: Slot, a: Floats, b: Floats) -> None:
    """Write W + A B into the slot's part of `out`. cpp_ext/merge.hpp has the same arithmetic, to the bit.

    pristine, out: the whole input, float32 or float16 both.
    a: float32 (inputs, rank).
    b: float32 (rank, outputs).
    """
    with np.errstate(over="ignore"):  # beyond float16 it becomes infinite, which the networks' results show
        slot.view(out)[...] = slot.view(pristine).astype(np.float32) + sum_products(a, b)


def sum_products(a: Floats, b: Floats) -> Floats:
    """A B in float32, summed in the order of the ranks.

    a: float32 (rows, rank).
    b: float32 (rank, columns).
    """
    total: Floats = np.zeros((len(a), b.shape[1]), np.float32)
    for rank in range(len(b)):
        total += a[:, rank, None] * b[rank]
    return total


def _kind(module: str) -> tuple[str, ...]:
    """The kind of a layer: the last two words of its name without numbers ("attn1", "to_out")."""
    return tuple([word for word in module.split(".") if not word.isdigit()][-2:])
