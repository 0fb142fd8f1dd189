"""Which form of the UNet's graph is best: how LoRA factors enter it, and how attention and group norm are written?

TensorRT-RTX (ahead of time, for SM89): build time, memory, plan size of every form. ONNX Runtime on the CPU: one call
with every input bound beforehand, and what putting another subject's factors into the bound buffers takes.
The forms are made of the product's own graphs by surgery; `--parts` takes full-size ones that full_size.py left.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from _common import Benchmark
from _sdxl_files import sdxl_configs, write_head, write_patch, write_single_file, write_tokenizers

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.networks import Network, describe_networks
from dreammix_trt.core.onnx_runtime import import_onnxruntime
from dreammix_trt.export.onnx_export import export_network, write_graph

MIB, GIB = 1 << 20, 1 << 30
FORMS = ("single", "stacked", "packed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=float, default=0.2)
    parser.add_argument("--folder", type=Path, help="with a checkpoint that full_size.py wrote; graphs go there, too")
    parser.add_argument("--no-build", action="store_true", help="without TensorRT-RTX")
    parser.add_argument("--no-run", action="store_true", help="without ONNX Runtime")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    bench = Benchmark("graph_forms" if given.width != 1 else "graph_forms_full_size", threads=None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        base = open_checkpoint(folder, given.width)
        if not given.no_build:
            for form in FORMS:
                build(bench, folder, export_unet(base, folder, "float16", True), form, base)
            build(bench, folder, export_unet(base, folder, "float16", False), "single", base)
        if not given.no_run:
            run(bench, folder, [export_unet(base, folder, "float32", fused) for fused in (False, True)])
    return bench.finish(as_json=given.json)


def open_checkpoint(folder: Path, width: float) -> BaseFiles:
    """The benchmark's checkpoint, written where it is not there."""
    file, patch, head = (folder / name for name in ("sdxl.safetensors", "v26.fooocus.patch", "inpaint_head.pth"))
    configs = sdxl_configs(width)
    if not file.exists():
        write_single_file(file, configs)
    if not patch.exists():
        write_patch(patch, configs)
        write_head(head, configs)
    if width != 1 and not (folder / "tokenizers").exists():
        write_tokenizers(folder / "tokenizers", configs)
    return BaseFiles.open(file, patch, head, tokenizer=folder / "tokenizers" if width != 1 else None)


def export_unet(base: BaseFiles, folder: Path, precision: Any, fused: bool) -> Network:
    """The raw UNet's part in folder/<precision>-<fused>."""
    network = next(each for each in describe_networks(base, 8, precision, fused) if each.name == "unet_raw")
    out = place(folder, network)
    if not (out / "network.json").exists():
        (out / "graph").mkdir(parents=True, exist_ok=True)
        write_graph(network, out / "graph")
        export_network(base, network, out / "graph", out, verify=False)
    return network


def place(folder: Path, network: Network) -> Path:
    return folder / f"forms-{network.precision}-{'fused' if network.fused else 'plain'}"


def form_graph(folder: Path, network: Network, form: str) -> tuple[Path, list[dict[str, Any]]]:
    """The graph in a form, beside its weights, and its inputs; a fused graph has single factors, another one packed."""
    out = place(folder, network)
    inputs = [{"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)} for spec in network.inputs]
    if form == ("single" if network.fused else "packed"):
        return out / "unet.onnx", inputs
    model = onnx.load(out / "unet.onnx", load_external_data=False)
    graph, side = model.graph, "pictures" if network.fused else "rows"
    factors = _without_inputs(graph, network) if network.fused else _cut_out(graph, network)
    made = {"single": _single, "stacked": _stack_factors, "packed": _pack_factors}[form](graph, factors, side)
    _drop_idle(graph)
    onnx.save(model, out / f"unet-{form}.onnx")
    kept = [entry for entry in inputs if entry["name"] in KEPT]
    return out / f"unet-{form}.onnx", kept + [{"name": n, "dtype": network.precision, "shape": s} for n, s in made]


Factors = list[tuple[str, int, int]]
Made = list[tuple[str, list[Any]]]


def _without_inputs(graph: onnx.GraphProto, network: Network) -> Factors:
    """Remove the inputs of the factors; (value, height, width) of each, now without source."""
    shapes = {spec.name: spec.shape[1:] for spec in network.inputs if spec.name not in KEPT}
    inputs = [item for item in graph.input if item.name in KEPT]
    found = [(item.name, *map(int, shapes[item.name])) for item in graph.input if item.name not in KEPT]
    del graph.input[:]
    graph.input.extend(inputs)
    return found  # type: ignore[return-value]


def _cut_out(graph: onnx.GraphProto, network: Network) -> Factors:
    """The same for a packed input and what unpacks it."""
    split = max((node for node in graph.node if node.op_type == "Split"), key=lambda node: len(node.output))
    reshapes = {node.input[0]: node for node in graph.node if node.op_type == "Reshape"}
    shapes = [side for slot in network.slots for side in ((slot.inputs, slot.rank), (slot.rank, slot.outputs))]
    nodes = [reshapes[output] for output in split.output]
    for node in (*nodes, split):
        graph.node.remove(node)
    return [(node.output[0], *shape) for node, shape in zip(nodes, shapes, strict=True)]


def _single(graph: onnx.GraphProto, factors: Factors, side: str) -> Made:
    """One input a factor."""
    made = [(name, [side, height, width]) for name, height, width in factors]
    _add_inputs(graph, made)
    return made


def _stack_factors(graph: onnx.GraphProto, factors: Factors, side: str) -> Made:
    """One input a shape: (factors, side, height, width), split and squeezed."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name, height, width in factors:
        groups.setdefault((height, width), []).append(name)
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([0], np.int64), "first_axis"))
    made, nodes = [], []
    for (height, width), names in groups.items():
        stack, parts = f"factors_{height}x{width}", [f"{name}_of_stack" for name in names]
        made.append((stack, [len(names), side, height, width]))
        nodes.append(onnx.helper.make_node("Split", [stack], parts, axis=0, num_outputs=len(parts)))
        for part, name in zip(parts, names, strict=True):
            nodes.append(onnx.helper.make_node("Squeeze", [part, "first_axis"], [name]))
    _add_inputs(graph, made)
    _put_first(graph, nodes)
    return made


def _pack_factors(graph: onnx.GraphProto, factors: Factors, side: str) -> Made:
    """One input: every factor flattened, one after the other."""
    sizes = [height * width for _, height, width in factors]
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(sizes, np.int64), "factor_sizes"))
    parts = [f"{name}_pack_factors" for name, _, _ in factors]
    nodes = [onnx.helper.make_node("Split", ["lora", "factor_sizes"], parts, axis=1)]
    for part, (name, height, width) in zip(parts, factors, strict=True):
        shape = onnx.numpy_helper.from_array(np.array([0, height, width], np.int64), f"{name}_shape")
        graph.initializer.append(shape)
        nodes.append(onnx.helper.make_node("Reshape", [part, shape.name], [name]))
    made: Made = [("lora", [side, sum(sizes)])]
    _add_inputs(graph, made)
    _put_first(graph, nodes)
    return made


def _add_inputs(graph: onnx.GraphProto, made: Made) -> None:
    dtype = graph.input[0].type.tensor_type.elem_type
    graph.input.extend(onnx.helper.make_tensor_value_info(name, dtype, shape) for name, shape in made)


def _put_first(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])


def _drop_idle(graph: onnx.GraphProto) -> None:
    """Drop nodes and inputs whose results nobody uses."""
    wanted = {item.name for item in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    inputs = [item for item in graph.input if item.name in wanted]
    del graph.input[:]
    graph.input.extend(inputs)


def build(bench: Benchmark, folder: Path, network: Network, form: str, base: BaseFiles) -> None:
    """Build one form for SM89."""
    from dreammix_trt.engine.backends.tensorrt.builder import build_engine, profiles_for

    graph, inputs = form_graph(folder, network, form)
    profiles = profiles_for(inputs, pictures=1, shapes="static", latent_side=base.native_side // 8, step=4)
    plan = folder / "form.engine"
    report = build_engine(graph, plan, backend="tensorrt-rtx", profiles=profiles, targets=["sm_89"])
    plan.unlink()
    weights = (place(folder, network) / "unet.safetensors").stat().st_size
    name = f"TensorRT-RTX, {form} factors, {describe(network)}"
    bench.add(f"{name}: build [s]", report.seconds)
    bench.add(f"{name}: anonymous memory [GiB]", (report.peak_anonymous or 0) / GIB)
    bench.add(f"{name}: plan beyond weights [MiB]", (report.engine_bytes - weights) / MIB)
    bench.add(f"{name}: layers of the parsed network", float(report.layers))
    bench.add(f"{name}: attentions without a fused kernel", float(report.decomposed))


def run(bench: Benchmark, folder: Path, networks: list[Network]) -> None:
    """Calls at a small latent, where what a form costs by itself shows; the forms take turns."""
    works = {}
    for network in networks:
        for form in FORMS if not network.fused else ("packed",):
            works[f"ONNX Runtime, {form} factors, {describe(network)}"] = bound(folder, network, form)
    calls: dict[str, list[float]] = {name: [] for name in works}
    swaps: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(12):
        for name, (session, binding, factors) in works.items():
            calls[name].append(_measure(partial(session.run_with_iobinding, binding)))
            swaps[name].append(_measure(partial(_swap, factors)))
    for name in works:
        bench.add(f"{name}: call at 8x8 [ms]", 1000 * statistics.median(calls[name][2:]))
        bench.add(f"{name}: swap of the factors [ms]", 1000 * statistics.median(swaps[name][2:]))


def bound(folder: Path, network: Network, form: str) -> tuple[Any, Any, list[tuple[Any, Any]]]:
    """A session with every input bound, and the bound factors with what to copy into them."""
    ort = import_onnxruntime()
    graph, inputs = form_graph(folder, network, form)
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    sizes, rng = {"pictures": 1, "rows": 2, "h": 8, "w": 8}, np.random.default_rng(0)
    arrays = {}
    for entry in inputs:
        shape = [sizes.get(side, side) for side in entry["shape"]]
        arrays[entry["name"]] = (0.05 * rng.standard_normal(shape)).astype(entry["dtype"])
    binding = session.io_binding()
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("eps", "cpu")
    return session, binding, [(values[name], arrays[name]) for name in arrays if name not in KEPT]


def describe(network: Network) -> str:
    return f"attention {'as single operators' if network.fused else 'written out'}"


def _swap(factors: list[tuple[Any, Any]]) -> None:
    for value, array in factors:
        value.update_inplace(array)


KEPT = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids", "inpaint_feature")


def _measure(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
