"""What do TensorRT-RTX's plans of SDXL's networks launch? Counted ahead of time for an RTX 4090, without a GPU.

Every network is traced with weights of the true shapes and random values, built for SM89 at 1024 x 1024, and counted
(docs/reading-a-plan.md). `--depth 1` has every kind of block once, at a sixth of the time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from _common import RESULTS, Benchmark
from _sdxl_files import sdxl_configs

from dreammix_trt.core.networks import Network, describe_networks
from dreammix_trt.core.tensors import write_tensors
from dreammix_trt.engine.backends.tensorrt.builder import BuildReport, build_engine
from dreammix_trt.engine.backends.tensorrt.profiles import profiles_for
from dreammix_trt.export.onnx_graph import trace_graph

MIB = 1 << 20
LATENT = 128
GOALS = {"unet": "<= 1360", "unet without slots": "<= 1300"}  # of the whole depth


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=float, default=0.2, help="of UNet, VAE and text encoders; 1: SDXL itself")
    parser.add_argument("--depth", type=int, help="most transformer layers in a block (default: as SDXL has them)")
    parser.add_argument("--network", action="append", help="one of the list, or `unet without slots` (default: all)")
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--every-profile", action="store_true", help="not only the one with the most rows")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    depth = f"_depth_{given.depth}" if given.depth else ""
    bench = Benchmark(f"plan_counts_{given.width:g}{depth}" if given.width != 0.2 or depth else "plan_counts")
    keep_earlier(bench)
    for name, network in list_networks(given.width, given.depth).items():
        if name in (given.network or (name,)):
            with tempfile.TemporaryDirectory() as folder:
                report = plan(network, Path(folder), given.pictures, every=given.every_profile)
            add_rows(bench, name, report, bounded=not given.depth)
    return bench.finish(as_json=given.json)


def keep_earlier(bench: Benchmark) -> None:
    """Start from the rows of the last run, so that networks can be counted one by one."""
    path = RESULTS / f"{bench.name}.json"
    if path.is_file():
        bench.rows = json.loads(path.read_text(encoding="utf-8"))["rows"]


def list_networks(width: float, depth: int | None) -> dict[str, Network]:
    """The networks of a base of that size in the form for TensorRT; the UNet also without slots. No twins."""
    configs = sdxl_configs(width, depth=depth)
    base: Any = SimpleNamespace(
        configs=configs,
        latent_channels=4,
        feature_channels=configs["unet"]["block_out_channels"][0],
        has_head=True,
        head_padding="replicate",
        patch=None,
    )
    found = {each.name: each for each in describe_networks(base, precision="float16", fused=True)}
    plain = {each.name: each for each in describe_networks(base, False, "float16", True)}
    found["unet without slots"] = plain["unet"]
    return {name: each for name, each in found.items() if not name.endswith("_float32")}


def plan(network: Network, folder: Path, pictures: int, *, every: bool) -> BuildReport:
    """Trace a network, draw its weights, build its plan."""
    graph = trace_graph(network)
    (folder / "n.onnx").write_bytes(graph.proto.SerializeToString())
    rng = np.random.default_rng(0)

    def draw(name: str) -> np.ndarray[Any, Any]:
        return (0.03 * rng.standard_normal(graph.weights[name].shape, np.float32)).astype(np.float32)

    shapes = {name: (weight.dtype, weight.shape) for name, weight in graph.weights.items()}
    write_tensors(folder / f"{network.graph}.safetensors", shapes, draw)
    taken = {item.name for item in graph.proto.graph.input}
    inputs = [spec for spec in network.describe()["inputs"] if spec["name"] in taken]
    profiles = profiles_for(inputs, pictures=pictures, shapes="static", latent_side=LATENT, call=network.kind.call)
    chosen = profiles if every else profiles[-1:]
    return build_engine(
        folder / "n.onnx", folder / "n.plan", backend="tensorrt-rtx", profiles=chosen, targets=["sm_89"]
    )


def add_rows(bench: Benchmark, name: str, report: BuildReport, *, bounded: bool) -> None:
    """The rows of one network, in place of those of an earlier run."""
    bench.rows = [row for row in bench.rows if not row["metric"].startswith(f"{name}: ")]
    for number, counts in enumerate(report.kernels):
        what = name if len(report.kernels) == 1 else f"{name}: profile {number}"
        bench.add(f"{what}: kernels", counts.total, bound=GOALS.get(name) if bounded else None)
        for kind, count in counts.kinds.items():
            bench.add(f"{what}: of kind {kind}", count)
        bench.add(f"{what}: products", counts.products)
        bench.add(f"{what}: products of a LoRA's rank", counts.narrow_products, bound="== 0")
        bench.add(f"{what}: products of float32", counts.wide_products)
        bench.add(f"{what}: attentions in one kernel", counts.attentions)
        bench.add(f"{what}: attentions with their scores in memory", counts.scores)
        bench.add(f"{what}: residuals added where the product is made", counts.residuals)
        bench.add(f"{what}: copies", counts.copies)
        bench.add(f"{what}: kernels that join streams", counts.waits, bound="== 0")
        bench.add(f"{what}: constants [MiB]", counts.constant_bytes / MIB)
        bench.add(f"{what}: largest value between kernels [MiB]", counts.largest_bytes / MIB)
    bench.add(f"{name}: plan [MiB]", report.engine_bytes / MIB)
    bench.add(f"{name}: build [s]", report.seconds)


if __name__ == "__main__":
    sys.exit(main())
