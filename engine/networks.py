"""The networks of one base on ONNX Runtime: name in, named arrays in, named arrays out.

The folder's layout is that of docs/architecture.md. Graphs hold no weights: they are mapped from safetensors and handed
to the session, so that `unet` and `unet_raw` share one graph file and float32 weights are never copied.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import EngineError, InputError
from dreammix_trt.core.subject import Slot, slots_of

if TYPE_CHECKING:
    import onnxruntime

SCHEMA = 1
Array = npt.NDArray[Any]
REBUILD = "build it again with `dreammix-trt build`"
_DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}


@dataclass(frozen=True)
class BaseFacts:
    """What the runtime must know of a base (base.json).

    native_side: pixels it was trained at; divisor: what picture sides must be multiples of; scaling_factor: of the
    VAE's latents; feature_channels: of the inpaint head.
    """

    native_side: int
    divisor: int
    scaling_factor: float
    feature_channels: int


class EngineSet:
    """A base's networks. Sessions are made when first asked for (or by `prepare`) and live until `close`.

    facts: of the base. entries: the table of networks.json. threads: of each network call.
    """

    def __init__(self, folder: Path, facts: BaseFacts, entries: Mapping[str, Mapping[str, Any]], threads: int) -> None:
        self.folder, self.facts, self.entries, self.threads = folder, facts, entries, threads
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._kept: dict[str, Any] = {}
        self._lock = threading.Lock()

    @classmethod
    def load(cls, folder: str | Path, threads: int | None = None) -> EngineSet:
        """Open the set in `folder`. threads: per network call; None: every core this process may use.

        Raises EngineError for a folder that is no engine set or lacks a file, InputError for threads < 1.
        """
        folder = Path(folder)
        if threads is not None and threads < 1:
            raise InputError(f"threads is {threads}; it must be at least 1")
        entries = read_networks(folder)
        for name, entry in entries.items():
            for file in (entry["graph"], entry["weights"]):
                if not (folder / file).is_file():
                    raise EngineError(f"{folder / file}: missing, so {name} cannot run; {REBUILD}")
        return cls(folder, read_facts(folder), entries, threads or available_cores())

    def __enter__(self) -> EngineSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def close(self) -> None:
        """Free every session."""
        with self._lock:
            self._sessions.clear()
            self._kept.clear()

    def slots(self, name: str) -> tuple[Slot, ...]:
        """The LoRA slots of a network, in packed order."""
        return slots_of(self.entries[name]) if name in self.entries else ()

    def prepare(self, names: Iterable[str] | None = None) -> None:
        """Make the sessions of these networks (default: all) now, side by side."""
        with ThreadPoolExecutor(max_workers=min(4, available_cores())) as pool:
            list(pool.map(self._session, names if names is not None else list(self.entries)))

    def run(self, name: str, **arrays: Array) -> dict[str, Array]:
        """Run a network: its inputs as contiguous arrays of the recorded dtypes, its outputs by name."""
        outputs = self._session(name).run(None, arrays)
        return dict(zip((spec["name"] for spec in self.entries[name]["outputs"]), outputs, strict=True))

    def _session(self, name: str) -> onnxruntime.InferenceSession:
        if name not in self.entries:
            raise EngineError(f"{self.folder}: this base has no network {name!r}; it has {', '.join(self.entries)}")
        session = self._sessions.get(name)
        if session is None:
            session, kept = self._opened(name)
            with self._lock:
                self._kept.setdefault(name, kept)
                session = self._sessions.setdefault(name, session)
        return session

    def _opened(self, name: str) -> tuple[onnxruntime.InferenceSession, Any]:
        import onnxruntime as ort

        entry = self.entries[name]
        weights = read_weights(self.folder / entry["weights"])
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_external_initializers(list(weights), values)
        try:
            graph = str(self.folder / entry["graph"])
            session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises its own unrelated classes
            file = self.folder / entry["graph"]
            raise EngineError(f"{file}: {name} cannot be loaded ({error}); {REBUILD}") from error
        logging.getLogger(__name__).debug("%s: session ready", name)
        return session, (weights, values)


def read_networks(folder: Path) -> dict[str, dict[str, Any]]:
    """The table of `networks.json`: network -> graph, weights, inputs, outputs, slots, parity."""
    record = _json(folder / "networks.json")
    if record.get("schema") != SCHEMA or not isinstance(record.get("networks"), dict):
        raise EngineError(
            f"{folder / 'networks.json'}: schema {record.get('schema')!r}, this version reads {SCHEMA}; {REBUILD}"
        )
    return dict(record["networks"])


def read_facts(folder: Path) -> BaseFacts:
    """What `base.json` says of the base."""
    record = _json(folder / "base.json")
    try:
        return BaseFacts(**{field.name: record[field.name] for field in fields(BaseFacts)})
    except KeyError as error:
        raise EngineError(f"{folder / 'base.json'}: {error} is missing; {REBUILD}") from error


def read_weights(path: Path) -> dict[str, Array]:
    """The tensors of a safetensors file: mapped, not read; float16 widened to float32. EngineError if damaged."""
    try:
        data = np.memmap(path, np.uint8, "r")
        length = int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        return {name: _tensor(data[8 + length :], entry) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{path}: truncated, or not a weight file ({error}); {REBUILD}") from error


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tensor(data: Array, entry: Mapping[str, Any]) -> Array:
    first, last = entry["data_offsets"]
    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
    if not 0 <= first <= last <= len(data) or last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor lies outside the file")
    raw = data[first:last]
    values = np.frombuffer(raw, dtype) if raw.ctypes.data % dtype.itemsize == 0 else np.frombuffer(raw.tobytes(), dtype)
    return (values.astype(np.float32) if dtype == np.float16 else values).reshape(shape)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: missing or damaged ({error}); {REBUILD}") from error
    if not isinstance(value, dict):
        raise EngineError(f"{path}: not an engine set's file; {REBUILD}")
    return value
