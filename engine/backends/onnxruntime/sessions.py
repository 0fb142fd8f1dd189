"""Sessions of ONNX Runtime on the CPU, and the graphs that it optimised, kept in the store.

What a graph is optimised to depends on its sides, on ONNX Runtime's version and on the processor. It holds the weights
of convolutions in the order in which this processor reads them, so that these are on the disk twice; all others are
read from the part. So only small networks are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dreammix_trt.core.onnx_runtime import KEEP_QUANTIZERS, import_onnxruntime
from dreammix_trt.core.store import Store
from dreammix_trt.engine.backends.kept import list_facts, take_or_make

if TYPE_CHECKING:
    import onnxruntime

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

    def take(kept: Path) -> onnxruntime.InferenceSession:
        return _make((kept / _FILE).read_bytes(), _choose_options({}, threads, weights=folder))

    def make(place: Path | None) -> onnxruntime.InferenceSession:
        return _make(graph, _choose_options(sides, threads, keep=place / _FILE if place else None))

    if shelf is None:
        return make(None)
    version = import_onnxruntime().__version__
    return take_or_make(shelf, list_facts(name, folder, entry, sides, onnxruntime=version), take, make)


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
