"""What does FP8 do to pictures? The embedded model with its UNets in E4M3, emulated on the CPU, against float32.

Held-out scenes are painted twice with the same seeds: PSNR over the whole picture and under the mask, and what the
judge reads in both. `--through onnxruntime` runs the engine that `build --precision fp8` makes (its quantised graph);
`--through torch` rounds the same values in the torch networks, which is several times as fast.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from _common import Benchmark
from micro_quality import LARGE, judged, paint

from dreammix_trt.building import EngineOptions, build
from dreammix_trt.core.calibration import FILE_NAME, Calibration
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.engine import DreamMix
from dreammix_trt.trainer.micro.judge import Judge
from dreammix_trt.trainer.micro.world import held_out_scenes

Pictures = list[np.ndarray[Any, Any]]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--through", choices=("onnxruntime", "torch"), default="onnxruntime")
    parser.add_argument("--calibration", type=Path, help="default: that of the embedded model")
    parser.add_argument("--scenes", type=int, default=48)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    base = BaseFiles.open()
    calibration = given.calibration or base.folder / FILE_NAME
    found = Calibration.read(calibration)
    bench = Benchmark("fp8", threads=given.threads)
    bench.add("emulated by", given.through)
    bench.add("calibration: requests", len(found.runs))
    for name in found.layers:
        bench.add(f"{name}: layers in E4M3", len(found.scales(name)))
        bench.add(f"{name}: layers kept in float16", len(found.kept(name)))
        bench.add(f"{name}: of these for their error", ", ".join(found.hurt(name)) or "none")
    opened = through_torch if given.through == "torch" else through_onnxruntime
    scenes = held_out_scenes(given.scenes, size=base.native_side, object_share=LARGE)
    with opened(calibration, given.threads) as engines:
        pictures = {name: list(paint(dm, scenes, given.steps)) for name, dm in engines.items()}
    compare(bench, pictures["float32"], pictures["fp8"], scenes)
    judge = Judge.load(base.folder)
    shares = {name: judged(judge, made, scenes) for name, made in pictures.items()}
    for what in shares["float32"]:
        if what != "scenes":
            exact, rounded = shares["float32"][what], shares["fp8"][what]
            bench.add(f"judge: {what}, float32", exact)
            bench.add(f"judge: {what}, fp8", rounded)
            bench.add(f"judge: {what}, difference in points", 100 * abs(rounded - exact), bound="<= 2")
    return bench.finish(as_json=given.json)


def compare(bench: Benchmark, exact: Pictures, rounded: Pictures, scenes: list[Any]) -> None:
    """The rows of PSNR."""
    rows: dict[str, list[float]] = {"whole picture": [], "under the mask": []}
    for one, other, (_, mask) in zip(exact, rounded, scenes, strict=True):
        square = (one.astype(np.float64) - other) ** 2
        for what, part in (("whole picture", square), ("under the mask", square[mask])):
            rows[what].append(10 * np.log10(255**2 / max(float(part.mean()), 1e-4)))
    bench.add("scenes", len(scenes))
    for what, values in rows.items():
        bench.add(f"PSNR against float32, {what}: mean [dB]", float(np.mean(values)), bound=">= 35")
        bench.add(f"PSNR against float32, {what}: least [dB]", float(np.min(values)))


@contextmanager
def through_onnxruntime(calibration: Path, threads: int) -> Iterator[dict[str, DreamMix]]:
    """Both engines as `build` makes them."""
    options = {"float32": EngineOptions(), "fp8": EngineOptions(precision="fp8", calibration=calibration)}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        engines = {}
        for name, engine in options.items():
            build(out=Path(folder) / name, engine=engine)
            engines[name] = opened.enter_context(DreamMix.load(Path(folder) / name, threads=threads))
        yield engines


@contextmanager
def through_torch(calibration: Path, threads: int) -> Iterator[dict[str, DreamMix]]:
    """The torch networks twice, once with the UNets' layers rounded."""
    import torch

    from dreammix_trt.calibration import open_torch
    from dreammix_trt.export.calibrating import emulate_float8
    from dreammix_trt.export.torch_backend.engine_set import TorchEngineSet

    torch.set_num_threads(threads)
    base, found = BaseFiles.open(), Calibration.read(calibration)
    with ExitStack() as opened:
        engines = {}
        for name in ("float32", "fp8"):
            networks = TorchEngineSet(base, slots=False)
            for unet in found.layers if name == "fp8" else ():
                opened.enter_context(emulate_float8(networks.module(unet).network, found.scales(unet)))
            engines[name] = opened.enter_context(open_torch(base, networks))
        yield engines


if __name__ == "__main__":
    sys.exit(main())
