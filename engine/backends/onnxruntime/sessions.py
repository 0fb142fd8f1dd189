"""Sessions of ONNX Runtime on the CPU, and the graphs that it optimised, kept in the store.

What a graph is optimised to depends on its sides, on ONNX Runtime's version and on the processor. It holds the weights
of convolutions in the order in which this processor reads them, so that these are on the disk twice; all others are
read from the part. So only small networks are kept. A store that fills up or cannot be written costs time alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dreammix_trt.core.files import sha256_of
from dreammix_trt.core.onnx_runtime import KEEP_QUANTIZERS, import_onnxruntime
from dreammix_trt.core.store import Store
from dreammix_trt.engine.hardware import name_processor, read_processor_features

if TYPE_CHECKING:
    import onnxruntime

log = logging.getLogger(__name__)
_FILE: Final = "optimised.onnx"


def open_session(
    name: str, folder: Path, entry: Mapping[str, Any], sides: Mapping[str, int], threads: int, shelf: Store | None
) -> onnxruntime.InferenceSession:
    """Make a session of a part.

    name: of the network.
    folder: the part.
    entry: its `network.json`.
    sides: of all named axes; {}: any.
    threads: of a call.
    shelf: where the optimised graph is taken from, or kept; None: nowhere.
    """
    graph = folder / entry["graph"]
    if shelf is None:
        return _make(graph, _choose_options(sides, threads))
    facts = _list_facts(name, folder, entry, sides)
    key = shelf.key(facts)
    kept = shelf.get_sound(key)
    if kept is not None:
        try:
            return _make((kept / _FILE).read_bytes(), _choose_options({}, threads, weights=folder))
        except Exception as error:  # ONNX Runtime raises its own unrelated classes
            log.warning("%s: cannot be used (%s); %s is optimised again", kept / _FILE, error, graph.name)
    session = None
    try:
        if kept is not None:
            shelf.remove(key)
        with shelf.put(key, facts) as place:
            if place is not None:  # else another process has just kept it
                session = _make(graph, _choose_options(sides, threads, keep=place / _FILE))
    except Exception as error:  # a full disk, which ONNX Runtime meets first and has its own classes for
        log.debug("%s: the optimised graph is not kept (%s)", graph, error)
    return session or _make(graph, _choose_options(sides, threads))


def _list_facts(name: str, folder: Path, entry: Mapping[str, Any], sides: Mapping[str, int]) -> dict[str, Any]:
    """What decides an optimised graph."""
    files = {file: sha256_of(folder / file) for file in (entry["graph"], entry.get("weights")) if file}
    return {
        "kind": "session",
        "part": name,
        "files": files,
        "sides": dict(sides),
        "onnxruntime": import_onnxruntime().__version__,
        "processor": [name_processor(), *read_processor_features()],
    }


def _choose_options(
    sides: Mapping[str, int], threads: int, *, keep: Path | None = None, weights: Path | None = None
) -> onnxruntime.SessionOptions:
    """keep: where to write the optimised graph. weights: it is such a graph, and its weights are in this folder."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # it only grows: one call at 1024x1024 held 11 GiB, without it 3
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(*KEEP_QUANTIZERS)
    for side, size in sides.items():
        options.add_free_dimension_override_by_name(side, size)
    if keep is not None:
        options.optimized_model_filepath = str(keep)
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _make(graph: Path | bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    model = graph if isinstance(graph, bytes) else str(graph)
    return import_onnxruntime().InferenceSession(model, options, providers=["CPUExecutionProvider"])
