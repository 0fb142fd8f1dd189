"""Does the memory of `dreammix-trt eval` stay the same over 1,000 pictures? No engine paints; every sum is kept."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from _common import Benchmark
from PIL import Image

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.request import Request
from dreammix_trt.engine.imprint import Imprint, Origin
from dreammix_trt.evaluation.example import write_example
from dreammix_trt.evaluation.metrics.choice import Weights, choose_metrics
from dreammix_trt.evaluation.metrics.fid import Fid
from dreammix_trt.evaluation.metrics.metric import Metric, Sample
from dreammix_trt.evaluation.painter import Painting
from dreammix_trt.evaluation.protocol import Scene, Subject
from dreammix_trt.evaluation.reading import read_protocol
from dreammix_trt.evaluation.running import evaluate

WARM = 200  # pictures after which everything has been allocated once


class NoisePainter:
    """Fills the mask with noise of the request's seed."""

    def request(self, fields: Mapping[str, Any]) -> Request:
        return Request.of(**fields)

    def identify(self, subject: Subject) -> str:
        return "noise"

    @contextmanager
    def open(self, subject: Subject) -> Iterator[None]:
        yield

    def check(self, scene: Scene, request: Request) -> tuple[str, ...]:
        return ()

    def paint(self, scene: Scene, request: Request) -> Painting:
        with Image.open(scene.image) as picture, Image.open(scene.mask) as mask:
            image = picture.convert("RGB")
            noise = np.random.default_rng(request.seed).integers(0, 256, (image.height, image.width, 3), np.uint8)
            image.paste(Image.fromarray(noise), mask=mask.convert("L"))
        return Painting(image, Imprint(request, Origin("")), 0.0)


class Watch(Metric):
    """Notes the process' resident memory at every picture."""

    name, unit, better, about = "resident", "MiB", "lower", "resident memory of the process"

    def __init__(self) -> None:
        self.seen: list[float] = []

    def add(self, sample: Sample) -> float | None:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        self.seen.append(
            float(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024
        )
        return self.seen[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    bench, watch = Benchmark("eval_memory"), Watch()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "protocol"
        write_example(place, size=given.side)
        record = json.loads((place / "protocol.json").read_text())
        record["seeds"] = list(range(given.pictures // 16))  # two subjects, two scenes, four prompts
        (place / "protocol.json").write_text(json.dumps(record))
        protocol = read_protocol(place)
        weights = np.random.default_rng(0).normal(size=(64, 2048))
        metrics = choose_metrics(protocol, Weights(judge=BaseFiles.open().folder))
        metrics = [metric for metric in metrics if metric.name != "fid"]
        scenes = [np.asarray(Image.open(scene.image).convert("RGB")) for scene in protocol.scenes]
        metrics += [Fid(lambda picture: picture[::16, ::16, 0].ravel()[:64] @ weights, scenes), watch]
        begun = time.process_time()
        evaluate(protocol, NoisePainter(), metrics, Path(folder) / "out")
        spent = time.process_time() - begun
    bench.add("pictures", len(watch.seen))
    bench.add("seconds of a processor a picture", spent / len(watch.seen))
    bench.add(f"resident after {WARM} pictures [MiB]", watch.seen[WARM])
    bench.add("resident at the end [MiB]", watch.seen[-1])
    bench.add("largest growth after them [MiB]", max(watch.seen[WARM:]) - watch.seen[WARM], bound="<= 8")
    return bench.finish(as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
