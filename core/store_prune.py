"""Removing the parts of a store that nobody needs. It is planned first, so that the plan can be shown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dreammix_trt.core.files import folder_bytes
from dreammix_trt.core.store import Entry, Store

_SMALL = ("graph", "range")


@dataclass(frozen=True)
class Pruning:
    """What pruning would do.

    goes: the parts to remove.
    stays: the other parts, each with the reason.
    leftovers: directories of killed builds, which are removed as well.
    lost: engine directories that are not where they were. Their parts stay, because the directories may be on a disk
        that is not mounted now.
    forgotten: such directories when the user said that they are gone.
    """

    goes: tuple[Entry, ...]
    stays: tuple[tuple[Entry, str], ...]
    leftovers: tuple[Path, ...]
    lost: tuple[Path, ...]
    forgotten: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """How many bytes it would free."""
        return sum(entry.bytes for entry in self.goes) + sum(folder_bytes(path) for path in self.leftovers)

    @property
    def exported_again(self) -> tuple[str, ...]:
        """Networks whose ONNX goes while an engine made from it stays: a build for another GPU exports them again."""
        sources = _sources(entry for entry, _ in self.stays)
        return tuple(sorted({entry.name for entry in self.goes if entry.key in sources}))


def plan_pruning(
    store: Store, *, everything: bool = False, keep_onnx: bool = False, forget_missing: bool = False
) -> Pruning:
    """Plan which parts of a store go and which stay. A part that an engine directory needs always stays.

    everything: also remove small parts that save work in later builds, if nobody needs them: traced graphs, the ranges
        of VAEs.
    keep_onnx: keep the ONNX that the engines here were made from, for builds for other GPUs.
    forget_missing: treat engine directories that are not where they were as gone.
    """
    missing = {user.engine: user.keys for user in store.list_users() if not user.present}
    awaited = {} if forget_missing else missing
    entries = store.entries()
    reasons = {entry.key: _why_needed(entry, awaited) for entry in entries}
    engines = [entry for entry in entries if entry.kind == "engine" and reasons[entry.key]]
    sources = _sources(engines) if keep_onnx else {}
    for entry in entries:
        if reasons[entry.key] or not entry.complete:
            continue
        if entry.kind in _SMALL and not everything:
            reasons[entry.key] = "small, and saves work when the network is built again; --all removes it"
        elif entry.kind == "onnx" and entry.key in sources:
            reasons[entry.key] = f"--keep-onnx: the {sources[entry.key]} engine was made from it"
    return Pruning(
        goes=tuple(entry for entry in entries if not reasons[entry.key]),
        stays=tuple((entry, reasons[entry.key]) for entry in entries if reasons[entry.key]),
        leftovers=tuple(store.leftovers()),
        lost=tuple(awaited),
        forgotten=tuple(missing) if forget_missing else (),
    )


def prune(store: Store, plan: Pruning) -> tuple[int, list[Entry]]:
    """Carry out a plan.

    Returns the bytes freed, and the planned parts that stay because they are needed or being built by now.
    """
    for user in store.list_users():
        if user.engine in plan.forgotten and not user.present:
            store.forget(user.engine)
    freed, left = 0, []
    for entry in plan.goes:
        size = store.remove(entry.key)
        if size is None:
            left.append(entry)
        else:
            freed += size
    return freed + store.tidy(), left


def _why_needed(entry: Entry, awaited: Mapping[Path, Collection[str]]) -> str:
    """Say which engine directories need a part; "" when none does."""
    if entry.users:
        return f"needed by {', '.join(str(engine) for engine in entry.users)}"
    absent = ", ".join(str(engine) for engine, keys in awaited.items() if entry.key in keys)
    return f"needed by {absent}, which is not there now; --forget-missing if it is gone" if absent else ""


def _sources(entries: Iterable[Entry]) -> dict[str, str]:
    """Keys of the ONNX that these engines were made from -> the network's name."""
    return {str(entry.parts["onnx"]): entry.name for entry in entries if "onnx" in entry.parts}
