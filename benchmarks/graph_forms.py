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
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from _common import Benchmark
from _sdxl_files import sdxl_configs, write_head, write_patch, write_single_file, write_tokenizers

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.export.networks import Network, networks_of
from dreammix_trt.export.onnx_export import export_network, write_graph

MIB, GIB = 1 << 20, 1 << 30
FORMS = ("packed", "stacked", "single")


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
        base = opened(folder, given.width)
        for fused, forms in ((True, FORMS), (False, FORMS[:1])):
            if not given.no_build:
                network = exported(base, folder, "float16", fused)
                for form in forms:
                    build(bench, folder, network, form, base, "single operators" if fused else "written out")
        if not given.no_run:
            for fused in (False, True):
                network = exported(base, folder, "float32", fused)
                run(bench, folder, network, FORMS if not fused else FORMS[:1])
    return bench.finish(as_json=given.json)


def opened(folder: Path, width: float) -> BaseFiles:
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


def exported(base: BaseFiles, folder: Path, precision: Any, fused: bool) -> Network:
    """The raw UNet's part in folder/<precision>-<fused>."""
    network = next(each for each in networks_of(base, 8, precision, fused) if each.name == "unet_raw")
    out = place(folder, network)
    if not (out / "network.json").exists():
        (out / "graph").mkdir(parents=True, exist_ok=True)
        write_graph(network, out / "graph")
        export_network(base, network, out / "graph", out, verify=False)
    return network


def place(folder: Path, network: Network) -> Path:
    return folder / f"forms-{network.precision}-{'fused' if network.fused else 'plain'}"


def formed(folder: Path, network: Network, form: str) -> tuple[Path, list[dict[str, Any]]]:
    """The graph in a form, beside its weights, and its inputs."""
    out = place(folder, network)
    inputs = [{"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)} for spec in network.inputs]
    if form == "packed":
        return out / "unet.onnx", inputs
    model = onnx.load(out / "unet.onnx", load_external_data=False)
    factors = _cut_out_factors(model.graph, network)
    made = _single(model.graph, factors) if form == "single" else _stacked(model.graph, factors)
    _drop_idle(model.graph)
    onnx.save(model, out / f"unet-{form}.onnx")
    kept = [entry for entry in inputs if entry["name"] != "lora"]
    return out / f"unet-{form}.onnx", kept + [{"name": n, "dtype": network.precision, "shape": s} for n, s in made]


def _cut_out_factors(graph: onnx.GraphProto, network: Network) -> list[tuple[str, int, int]]:
    """Remove the packed input and what unpacks it; (value, height, width) of every factor, now without source."""
    split = max((node for node in graph.node if node.op_type == "Split"), key=lambda node: len(node.output))
    reshapes = {node.input[0]: node for node in graph.node if node.op_type == "Reshape"}
    shapes = [side for slot in network.slots for side in ((slot.inputs, slot.rank), (slot.rank, slot.outputs))]
    nodes = [reshapes[output] for output in split.output]
    for node in (*nodes, split):
        graph.node.remove(node)
    return [(node.output[0], *shape) for node, shape in zip(nodes, shapes, strict=True)]


def _single(graph: onnx.GraphProto, factors: list[tuple[str, int, int]]) -> Iterator[tuple[str, list[Any]]]:
    """One input a factor."""
    dtype = graph.input[0].type.tensor_type.elem_type
    made = []
    for name, height, width in factors:
        graph.input.append(onnx.helper.make_tensor_value_info(name, dtype, ["rows", height, width]))
        made.append((name, ["rows", height, width]))
    return iter(made)


def _stacked(graph: onnx.GraphProto, factors: list[tuple[str, int, int]]) -> Iterator[tuple[str, list[Any]]]:
    """One input a shape: (factors, rows, height, width), split and squeezed."""
    dtype = graph.input[0].type.tensor_type.elem_type
    groups: dict[tuple[int, int], list[str]] = {}
    for name, height, width in factors:
        groups.setdefault((height, width), []).append(name)
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([0], np.int64), "first_axis"))
    made, nodes = [], []
    for (height, width), names in groups.items():
        stack, shape = f"factors_{height}x{width}", [len(names), "rows", height, width]
        graph.input.append(onnx.helper.make_tensor_value_info(stack, dtype, shape))
        made.append((stack, shape))
        parts = [f"{name}_of_stack" for name in names]
        nodes.append(onnx.helper.make_node("Split", [stack], parts, axis=0, num_outputs=len(parts)))
        nodes += [
            onnx.helper.make_node("Squeeze", [part, "first_axis"], [name])
            for part, name in zip(parts, names, strict=True)
        ]
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    return iter(made)


def _drop_idle(graph: onnx.GraphProto) -> None:
    """Drop nodes and the input `lora` whose results nobody uses."""
    wanted = {item.name for item in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    inputs = [item for item in graph.input if item.name != "lora"]
    del graph.input[:]
    graph.input.extend(inputs)


def build(bench: Benchmark, folder: Path, network: Network, form: str, base: BaseFiles, said: str) -> None:
    """Build one form for SM89."""
    from dreammix_trt.engine.tensorrt import build_engine, profiles_for

    graph, inputs = formed(folder, network, form)
    profiles = profiles_for(inputs, pictures=1, shapes="static", latent_side=base.native_side // 8, step=4)
    plan = folder / "form.engine"
    report = build_engine(graph, plan, backend="tensorrt-rtx", profiles=profiles, targets=["sm_89"])
    plan.unlink()
    weights = (place(folder, network) / "unet.safetensors").stat().st_size
    name = f"TensorRT-RTX, {form} factors, attention in {said}"
    bench.add(f"{name}: build [s]", report.seconds)
    bench.add(f"{name}: anonymous memory [GiB]", (report.peak_anonymous or 0) / GIB)
    bench.add(f"{name}: plan beyond weights [MiB]", (report.engine_bytes - weights) / MIB)
    bench.add(f"{name}: layers of the parsed network", float(report.layers))
    bench.add(f"{name}: attentions without a fused kernel", float(report.decomposed))


def run(bench: Benchmark, folder: Path, network: Network, forms: tuple[str, ...]) -> None:
    """Calls at a small latent, where what a form costs by itself shows; the forms take turns."""
    import onnxruntime as ort

    works: dict[str, Any] = {}
    said = "single operators" if network.fused else "written out"
    for form in forms:
        graph, inputs = formed(folder, network, form)
        session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        sizes = {"pictures": 1, "rows": 2, "h": 8, "w": 8}
        arrays = replace(network, inputs=()).example(sizes)
        rng = np.random.default_rng(0)
        for entry in inputs:
            shape = [sizes.get(side, side) for side in entry["shape"]]
            arrays[entry["name"]] = (0.05 * rng.standard_normal(shape)).astype(entry["dtype"])
        binding = session.io_binding()
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("eps", "cpu")
        factors = [(values[name], arrays[name]) for name in arrays if name not in KEPT]
        works[form] = (session, binding, factors)
    calls: dict[str, list[float]] = {form: [] for form in works}
    swaps: dict[str, list[float]] = {form: [] for form in works}
    for _ in range(12):
        for form, (session, binding, factors) in works.items():
            calls[form].append(_timed(lambda s=session, b=binding: s.run_with_iobinding(b)))
            swaps[form].append(_timed(lambda f=factors: [value.update_inplace(array) for value, array in f]))
    for form in works:
        name = f"ONNX Runtime, {form} factors, attention {said}"
        bench.add(f"{name}: call at 8x8 [ms]", 1000 * statistics.median(calls[form][2:]))
        bench.add(f"{name}: swap of the factors [ms]", 1000 * statistics.median(swaps[form][2:]))


KEPT = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids", "inpaint_feature")


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
