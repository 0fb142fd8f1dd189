"""The networks of one base on ONNX Runtime: name in, named arrays in, named arrays out.

A base's parts are folders, one per network and one named `base` (docs/architecture.md). They are below one folder, or
each in its own place in the store.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import EngineError, FileFormatError, InputError
from dreammix_trt.core.networks import is_twin
from dreammix_trt.core.onnx_runtime import KEEP_QUANTIZERS, import_onnxruntime
from dreammix_trt.core.seam import BaseFacts
from dreammix_trt.core.slots import Slot, names_of_weights, slots_of
from dreammix_trt.core.tensors import map_tensors
from dreammix_trt.engine.backends.onnxruntime.binding import Binding
from dreammix_trt.engine.hardware import count_cores

if TYPE_CHECKING:
    import onnxruntime

SCHEMA = 3
Array = npt.NDArray[Any]
REBUILD = "build it again with `dreammix-trt build`"


class EngineSet:
    """A base's networks. A session is made at its first use (or by `prepare`) and lives until `close`.

    parts: name -> folder.
    facts: about the base.
    entries: each network's `network.json`.
    threads: of each network call.
    """

    def __init__(
        self, parts: Mapping[str, Path], facts: BaseFacts, entries: Mapping[str, Mapping[str, Any]], threads: int
    ) -> None:
        self.parts, self.facts, self.entries, self.threads = parts, facts, entries, threads
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._bindings: dict[str, list[Binding]] = {}  # those that no call uses now
        self._weights: dict[str, dict[str, Array]] = {}
        self._lock = threading.Lock()

    @classmethod
    def load(cls, parts: str | Path | Mapping[str, Path], threads: int | None = None) -> EngineSet:
        """Open the parts of a base.

        parts: name -> folder, or the folder that holds them all.
        threads: per network call; None: every core that this process may use.

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
        return cls(places, read_facts(places["base"]), entries, threads or count_cores())

    def __enter__(self) -> EngineSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def close(self) -> None:
        """Free every session."""
        with self._lock:
            self._bindings.clear()
            self._sessions.clear()

    def slots(self, name: str) -> tuple[Slot, ...]:
        """The LoRA slots of a network."""
        return slots_of(self.entries[name]) if name in self.entries else ()

    def weights(self, name: str) -> Mapping[str, Array]:
        """The base's own weights of the slots, mapped from their file at first use; see `core.seam.Networks`."""
        if name not in self._weights:
            self._weights[name] = map_weights(self.parts[name], self._entry(name))
        return self._weights[name]

    def prepare(self, names: Iterable[str] | None = None) -> None:
        """Make sessions now, side by side.

        names: their networks; None: all but float32 twins, which may never be needed.
        """
        usual = [name for name in self.entries if not is_twin(name)]
        with ThreadPoolExecutor(max_workers=min(4, count_cores())) as pool:
            list(pool.map(self._find_session, names if names is not None else usual))

    def run(self, name: str, **arrays: Array) -> dict[str, Array]:
        """Run a network.

        arrays: its inputs, contiguous; floats are float32, weights of slots may be of the input's own dtype. Those that
            are not given are the base's own. An array that is given again and again costs nothing. Inputs that the
            network does not have (the weights of one without slots) are ignored.

        Returns its outputs by name; floats are float32.
        """
        session, entry = self._find_session(name), self._entry(name)
        wanted = {**self.weights(name), **arrays}
        given = {
            spec["name"]: wanted[spec["name"]].astype(spec["dtype"], copy=False)
            for spec in entry["inputs"]
            if spec["name"] in wanted
        }
        names = [spec["name"] for spec in entry["outputs"]]
        found = self._run_bound(name, session, given, names) if entry.get("slots") else session.run(names, given)
        outputs = [output.astype(np.float32) if output.dtype == np.float16 else output for output in found]
        return dict(zip(names, outputs, strict=True))

    def _run_bound(
        self, name: str, session: onnxruntime.InferenceSession, given: Mapping[str, Array], names: Sequence[str]
    ) -> list[Array]:
        """Run with inputs that stay bound from call to call: hundreds of weights."""
        with self._lock:
            free = self._bindings.setdefault(name, [])
            binding = free.pop() if free else Binding(session)
        found = binding.run(given, names)
        with self._lock:
            free.append(binding)
        return found

    def _find_session(self, name: str) -> onnxruntime.InferenceSession:
        self._entry(name)
        session = self._sessions.get(name)
        if session is None:
            opened = self._open_session(name)
            with self._lock:
                session = self._sessions.setdefault(name, opened)
        return session

    def _entry(self, name: str) -> Mapping[str, Any]:
        if name not in self.entries:
            raise EngineError(f"this base has no network {name!r}; it has {', '.join(self.entries)}")
        return self.entries[name]

    def _open_session(self, name: str) -> onnxruntime.InferenceSession:
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = False  # it only grows: one call at 1024x1024 held 11 GiB, without it 3
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry(*KEEP_QUANTIZERS)
        graph = self.parts[name] / self.entries[name]["graph"]
        try:
            session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises its own unrelated classes
            raise EngineError(f"{graph}: {name} cannot be loaded ({error}); {REBUILD}") from error
        logging.getLogger(__name__).debug("%s: session ready", name)
        return session


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
