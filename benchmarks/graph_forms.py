"""Which form of the UNet's graph is best: weights of slots as inputs or constants, attention fused or written out?

TensorRT-RTX (ahead of time, for SM89): build time, memory, plan size of every form. ONNX Runtime on the CPU: one call
as `EngineSet` makes it, and what merging another subject takes.
The forms are the product's own graphs; `--folder` takes a full-size checkpoint that full_size.py left.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _common import Benchmark
from _sdxl_files import sdxl_configs, write_head, write_patch, write_single_file, write_tokenizers

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.files import read_json
from dreammix_trt.core.merging import list_changes, merge_weights
from dreammix_trt.core.networks import Network, describe_networks
from dreammix_trt.engine import kernels
from dreammix_trt.engine.backends.onnxruntime.engine_set import EngineSet
from dreammix_trt.export.onnx_export import export_facts, export_network, write_graph

MIB, GIB = 1 << 20, 1 << 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=float, default=0.2)
    parser.add_argument("--folder", type=Path, help="with a checkpoint that full_size.py wrote; graphs go there, too")
    parser.add_argument("--no-build", action="store_true", help="without TensorRT-RTX")
    parser.add_argument("--no-run", action="store_true", help="without ONNX Runtime")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    bench = Benchmark("graph_forms" if given.width != 1 else "graph_forms_full_size", threads=None)
    forms = [(fused, slots) for fused in (True, False) for slots in (True, False)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        base = open_checkpoint(folder, given.width)
        if not given.no_build:
            for form in forms:
                build(bench, folder, export_unet(base, folder, "float16", *form), base)
        if not given.no_run:
            run(bench, base, folder, [export_unet(base, folder, "float32", *form) for form in forms])
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


def export_unet(base: BaseFiles, folder: Path, precision: Any, fused: bool, slots: bool) -> Network:
    """The raw UNet's part in its form's folder."""
    network = next(each for each in describe_networks(base, slots, precision, fused) if each.name == "unet_raw")
    out = place(folder, network) / network.name
    if not (out / "network.json").exists():
        (out / "graph").mkdir(parents=True, exist_ok=True)
        write_graph(network, out / "graph")
        export_network(base, network, out / "graph", out, verify=False)
    return network


def place(folder: Path, network: Network) -> Path:
    form = "fused" if network.fused else "plain"
    return folder / f"forms-{network.precision}-{form}-{'inputs' if network.slots else 'constants'}"


def describe(network: Network) -> str:
    weights = "weights as inputs" if network.slots else "weights as constants"
    return f"{weights}, attention {'as single operators' if network.fused else 'written out'}"


def build(bench: Benchmark, folder: Path, network: Network, base: BaseFiles) -> None:
    """Build one form for SM89."""
    from dreammix_trt.engine.backends.tensorrt.builder import build_engine, profiles_for

    part = place(folder, network) / network.name
    entry, side = read_json(part / "network.json"), base.native_side // 8
    profiles = profiles_for(entry["inputs"], pictures=1, shapes="static", latent_side=side, step=4)
    plan = folder / "form.engine"
    report = build_engine(part / entry["graph"], plan, backend="tensorrt-rtx", profiles=profiles, targets=["sm_89"])
    plan.unlink()
    name = f"TensorRT-RTX, {describe(network)}"
    bench.add(f"{name}: build [s]", report.seconds)
    bench.add(f"{name}: anonymous memory [GiB]", (report.peak_anonymous or 0) / GIB)
    bench.add(
        f"{name}: plan beyond weights [MiB]", (report.engine_bytes - (part / entry["weights"]).stat().st_size) / MIB
    )
    bench.add(f"{name}: layers of the parsed network", float(report.layers))
    bench.add(f"{name}: attentions without a fused kernel", float(report.decomposed))


def run(bench: Benchmark, base: BaseFiles, folder: Path, networks: list[Network]) -> None:
    """Calls at a small latent, where what a form costs by itself shows; the forms take turns."""
    works: dict[str, Callable[[], Any]] = {}
    for network in networks:
        parts = place(folder, network)
        if not (parts / "base").is_dir():
            (parts / "base").mkdir()
            export_facts(base, bool(network.slots), parts / "base")
        opened = EngineSet.load(parts, threads=1)
        inputs = network.without_slots().draw_example({"pictures": 1, "rows": 2, "h": 8, "w": 8})
        works[f"ONNX Runtime, {describe(network)}: call at 8x8 [ms]"] = partial(opened.run, network.name, **inputs)
        if network.slots and not network.fused:
            merge = prepare_merge(network, opened.weights(network.name))
            works["merging a subject of rank 8 into all slots [ms]"] = merge
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(12):
        for name, work in works.items():
            seconds[name].append(_measure(work))
    for name in works:
        bench.add(name, 1000 * statistics.median(seconds[name][2:]))


def prepare_merge(network: Network, pristine: Any) -> Callable[[], Any]:
    """What merges a subject of rank 8 into every slot."""
    rng = np.random.default_rng(0)
    factors = {}
    for slot in network.slots:
        a, b = ((slot.inputs, 8), (8, slot.outputs))
        factors[slot.module] = rng.standard_normal(a).astype(np.float32), rng.standard_normal(b).astype(np.float32)
    changes = list(list_changes(factors, network.slots, 1e-3))
    return partial(merge_weights, pristine, changes, kernels.merge_weight)


def _measure(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
