"""The networks of one base on ONNX Runtime: name in, named arrays in, named arrays out.

A base's parts are folders, one per network and one named `base` (docs/architecture.md). They are below one folder, or
each in its own place in the store.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, Self

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import EngineError, FileFormatError, InputError
from dreammix_trt.core.seam import BaseFacts
from dreammix_trt.core.slots import Slot, names_of_weights, slots_of
from dreammix_trt.core.store import Store
from dreammix_trt.core.tensors import map_tensors
from dreammix_trt.engine.backends.onnxruntime.binding import Binding, Unbound
from dreammix_trt.engine.backends.onnxruntime.sessions import open_session
from dreammix_trt.engine.hardware import count_cores

SCHEMA = 3
Array = npt.NDArray[Any]
REBUILD = "build it again with `dreammix-trt build`"
#: a network with more bytes of weights has one session for all sides, as each session holds them once more
LARGE: Final = 256 << 20
#: what a network with more bytes of weights was optimised to is not kept: it may be as large, for each of its sides
MOST_KEPT: Final = 64 << 20
_MOST_SIDES: Final = 4  # for which a network keeps sessions: two frames, with guidance and without
Sides = tuple[tuple[str, int], ...]  # of the named axes of a call, in the order of their names


class Call(Protocol):
    """A session as one thread uses it."""

    def run(self, given: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """The outputs for inputs by name, in order."""
        ...


@dataclass(frozen=True)
class Opened:
    """A session.

    make: gives a call of it.
    free: the calls that no thread uses now.
    """

    make: Callable[[], Call]
    free: list[Call] = field(default_factory=list)


class EngineSet:
    """A base's networks on ONNX Runtime.

    A session is made when a network is first called with inputs of certain sides, and lives until `close`, or until
    the network was called with several other ones. A session whose sides are fixed is made ten times faster, and what
    it was optimised to can be kept (`sessions`).

    parts: name -> folder.
    facts: about the base.
    entries: each network's `network.json`.
    threads: of each network call.
    shelf: where optimised graphs are kept; None: nowhere.
    """

    def __init__(
        self,
        parts: Mapping[str, Path],
        facts: BaseFacts,
        entries: Mapping[str, Mapping[str, Any]],
        threads: int,
        shelf: Store | None = None,
    ) -> None:
        self.parts, self.facts, self.entries, self.threads, self.shelf = parts, facts, entries, threads, shelf
        self._opened: dict[tuple[str, Sides], Opened] = {}  # the one used last is the last one
        self._weights: dict[str, dict[str, Array]] = {}
        self._bytes: dict[str, int] = {}
        self._lock = threading.Lock()
        self._opening: dict[tuple[str, Sides], threading.Lock] = {}

    @classmethod
    def load(
        cls, parts: str | Path | Mapping[str, Path], threads: int | None = None, shelf: Store | None = None
    ) -> Self:
        """Open the parts of a base. No network is read before it is called.

        parts: name -> folder, or the folder that holds them all.
        threads: per network call; None: every core that this process may use.
        shelf: where optimised graphs are kept; None: nowhere.

        Raises EngineError for parts that are not valid or lack a file, InputError for threads < 1.
        """
        places = parts if isinstance(parts, Mapping) else list_parts(Path(parts))
        if threads is not None and threads < 1:
            raise InputError(f"threads is {threads}; it must be at least 1")
        entries = {name: read_network(folder) for name, folder in places.items() if name != "base"}
        for name, entry in entries.items():
            for file in filter(None, map(entry.get, ("graph", "weights", "slot_weights"))):
                if not (places[name] / file).is_file():
                    raise EngineError(f"{places[name] / file}: missing, so {name} cannot run; {REBUILD}")
        return cls(places, read_facts(places["base"]), entries, threads or count_cores(), shelf)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def close(self) -> None:
        """Free every session."""
        with self._lock:
            self._opened.clear()

    def slots(self, name: str) -> tuple[Slot, ...]:
        """The LoRA slots of a network."""
        return slots_of(self.entries[name]) if name in self.entries else ()

    def weights(self, name: str) -> Mapping[str, Array]:
        """The base's own weights of the slots, mapped from their file at first use; see `core.seam.Networks`."""
        if name not in self._weights:
            self._weights[name] = map_weights(self.parts[name], self._entry(name))
        return self._weights[name]

    def run(self, name: str, **arrays: Array) -> dict[str, Array]:
        """Run a network.

        arrays: its inputs, contiguous; floats are float32, weights of slots may be of the input's own dtype. Those that
            are not given are the base's own. An array that is given again and again costs nothing. Inputs that the
            network does not have (the weights of one without slots) are ignored.

        Returns its outputs by name; floats are float32.
        """
        entry = self._entry(name)
        wanted = {**self.weights(name), **arrays}
        given = {
            spec["name"]: wanted[spec["name"]].astype(spec["dtype"], copy=False)
            for spec in entry["inputs"]
            if spec["name"] in wanted
        }
        names = [spec["name"] for spec in entry["outputs"]]
        with self._borrow(name, find_sides(entry, given) if self._fixes_sides(name) else ()) as call:
            found = call.run(given, names)
        outputs = [output.astype(np.float32) if output.dtype == np.float16 else output for output in found]
        return dict(zip(names, outputs, strict=True))

    def is_large(self, name: str) -> bool:
        """Whether a network's weights are too many to be held twice."""
        return self._count_bytes(name) > LARGE

    def is_kept(self, name: str) -> bool:
        """Whether what a network is optimised to is kept in the store, where there is one."""
        return self._count_bytes(name) <= MOST_KEPT

    def _count_bytes(self, name: str) -> int:
        """The bytes of a network's own weights, those of slots too."""
        if name not in self._bytes:
            files = filter(None, map(self._entry(name).get, ("weights", "slot_weights")))
            self._bytes[name] = sum((self.parts[name] / file).stat().st_size for file in files)
        return self._bytes[name]

    def _fixes_sides(self, name: str) -> bool:
        """Whether sessions of this network are each for certain sides."""
        return not self.is_large(name)

    @contextmanager
    def _borrow(self, name: str, sides: Sides) -> Iterator[Call]:
        """A call of a network with inputs of these sides, which no other thread uses meanwhile."""
        opened = self._find(name, sides)
        with self._lock:
            call = opened.free.pop() if opened.free else None
        call = call or opened.make()
        yield call
        with self._lock:
            opened.free.append(call)

    def _find(self, name: str, sides: Sides) -> Opened:
        """The session for inputs of these sides. Of threads that want the same new one, one makes it."""
        key = name, sides
        with self._lock:
            opening = self._opening.setdefault(key, threading.Lock())
        with opening:
            with self._lock:
                opened = self._opened.pop(key, None)
                if opened is not None:
                    self._opened[key] = opened
                    return opened
            made = Opened(self._open(name, sides))
            with self._lock:
                self._opened[key] = made
                for old in [known for known in self._opened if known[0] == name][:-_MOST_SIDES]:
                    del self._opened[old]
            return made

    def _open(self, name: str, sides: Sides) -> Callable[[], Call]:
        """A session for inputs of these sides; (): of any."""
        entry = self._entry(name)
        folder, shelf = self.parts[name], self.shelf if self.is_kept(name) else None
        try:
            session = open_session(name, folder, entry, dict(sides), self.threads, shelf)
        except Exception as error:  # ONNX Runtime raises its own unrelated classes
            raise EngineError(f"{folder / entry['graph']}: {name} cannot be loaded ({error}); {REBUILD}") from error
        kind = Binding if entry.get("slots") else Unbound
        return lambda: kind(session)

    def _entry(self, name: str) -> Mapping[str, Any]:
        if name not in self.entries:
            raise EngineError(f"this base has no network {name!r}; it has {', '.join(self.entries)}")
        return self.entries[name]


def find_sides(entry: Mapping[str, Any], given: Mapping[str, Array]) -> Sides:
    """The sides of the named axes in inputs.

    entry: the network's `network.json`.
    given: inputs by name.
    """
    shapes = [(spec["shape"], given[spec["name"]].shape) for spec in entry["inputs"] if spec["name"] in given]
    found = {
        side: size for shape, sizes in shapes for side, size in zip(shape, sizes, strict=False) if type(side) is str
    }
    return tuple(sorted(found.items()))


def list_parts(folder: Path) -> dict[str, Path]:
    """The parts below one folder: name -> folder, in the order of their names."""
    found = {place.name: place for place in sorted(folder.iterdir()) if place.is_dir()} if folder.is_dir() else {}
    if "base" not in found:
        raise EngineError(f"{folder}: holds no base's parts (no folder `base`); {REBUILD}")
    return found


def read_network(folder: Path) -> dict[str, Any]:
    """A part's `network.json`: graph or engine, weights, inputs, outputs, slots, parity."""
    record = _read_json(folder / "network.json")
    if record.get("schema") != SCHEMA or not isinstance(record.get("inputs"), list):
        raise EngineError(
            f"{folder / 'network.json'}: schema {record.get('schema')!r}, this version reads {SCHEMA}; {REBUILD}"
        )
    return record


def map_weights(folder: Path, entry: Mapping[str, Any]) -> dict[str, Array]:
    """The base's own weights of a network's slots: input name -> array in the mapped file, not to be written.

    folder: the network's part.
    entry: its `network.json`.

    Raises EngineError for a file that is damaged or lacks a weight.
    """
    if not entry.get("slot_weights"):
        return {}
    file, names = folder / entry["slot_weights"], set(names_of_weights(slots_of(entry)))
    try:
        held = map_tensors(file)
    except FileFormatError as error:
        raise EngineError(f"{error}; {REBUILD}") from error
    for spec in entry["inputs"]:
        name, array = spec["name"], held.get(spec["name"])
        if name in names and (array is None or array.shape != tuple(spec["shape"])):
            found = "missing" if array is None else f"{array.shape}"
            raise EngineError(f"{file}: {name} is {found}, expected {tuple(spec['shape'])}; {REBUILD}")
    return held


def read_facts(folder: Path) -> BaseFacts:
    """The facts about a base in `base.json`."""
    record = _read_json(folder / "base.json")
    try:
        return BaseFacts(
            native_side=record["native_side"],
            divisor=record["divisor"],
            scaling_factor=record["scaling_factor"],
            feature_channels=record["feature_channels"],
            defaults=record.get("defaults", {}),
            unet=record.get("unet"),
            prior_side=record.get("prior_side"),
        )
    except KeyError as error:
        raise EngineError(f"{folder / 'base.json'}: {error} is missing; {REBUILD}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: missing or damaged ({error}); {REBUILD}") from error
    if not isinstance(value, dict):
        raise EngineError(f"{path}: not a part's file; {REBUILD}")
    return value
