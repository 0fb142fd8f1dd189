"""What every benchmark shares: the timer, the machine's description, the sample picture, and how results are said.

A script makes a `Benchmark`, adds rows and ends with `finish`. With `as_json` stdout holds exactly one object
{"name", "machine", "rows": [{"metric", "value", "bound", "pass"}]}, else a table; `save` keeps the object under
benchmarks/results/.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from dreammix_trt.engine.dreammix import DreamMix

RESULTS = Path(__file__).parent / "results"


class Benchmark:
    """The rows one script measured, each perhaps with a bound to keep."""

    def __init__(self, name: str, threads: int | None = None) -> None:
        self.name, self.threads = name, threads
        self.rows: list[dict[str, Any]] = []

    def add(self, metric: str, value: float | str | bool, *, bound: str | None = None) -> None:
        """One row. `bound` reads ">= 10", "<= 0.15" or "== 1"; without one the row only reports."""
        if isinstance(value, float | np.floating):
            value = float(f"{float(value):.4g}")
        passed = None if bound is None else _keeps(float(value), bound)
        self.rows.append({"metric": metric, "value": value, "bound": bound, "pass": passed})

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "machine": machine(self.threads), "rows": self.rows}

    def finish(self, as_json: bool, keep: bool = True) -> int:
        """Save (keep) and say the rows; returns the exit code: 0, or 1 where a bound was missed."""
        if keep:
            save(self)
        sys.stdout.write(json.dumps(self.to_json()) + "\n" if as_json else _table(self))
        return int(any(row["pass"] is False for row in self.rows))


def save(benchmark: Benchmark) -> Path:
    """Keep the rows as benchmarks/results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{benchmark.name}.json"
    path.write_text(json.dumps(benchmark.to_json(), indent=2) + "\n", encoding="utf-8")
    return path


def machine(threads: int | None = None) -> dict[str, Any]:
    """Processor, cores, system and Python: what a figure means nothing without."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "threads": threads or cores,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def median_seconds(works: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """Median wall time of each work over `repeats` (at least 5) rounds after one warm-up.

    The works run in turns, so that whatever else the machine does falls on all of them alike and ratios hold.
    """
    for work in works.values():
        work()
    rounds = [[_seconds(work) for work in works.values()] for _ in range(max(repeats, 5))]
    return {name: statistics.median(times) for name, times in zip(works, zip(*rounds, strict=True), strict=True)}


def sample_place(side: int) -> tuple[Image.Image, Image.Image]:
    """A room of side x side pixels and a mask (L, 0/255) with place for one object of about half the side."""
    from dreammix_trt.trainer.micro.world import held_out_scenes, show_mask

    [(scene, mask)] = held_out_scenes(1, seed=90_500, size=side, object_share=(0.5, 0.55))
    return Image.fromarray(scene.background), show_mask(mask)


@contextmanager
def embedded_engine(threads: int, backend: str = "", precision: str = "") -> Iterator[DreamMix]:
    """The runtime on the embedded model without a subject, built for the occasion (the base comes from the store).

    backend, precision: of `EngineOptions`.
    """
    from dreammix_trt.building import EngineOptions, build
    from dreammix_trt.engine import DreamMix

    with tempfile.TemporaryDirectory() as folder:
        look = 0 if precision == "bfloat16" else None
        build(out=Path(folder) / "engine", engine=EngineOptions(backend=backend, precision=precision, look=look))
        with DreamMix.load(Path(folder) / "engine", threads=threads) as dm:
            yield dm


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _keeps(value: float, bound: str) -> bool:
    sign, limit = bound.split()
    return {">=": value >= float(limit), "<=": value <= float(limit), "==": value == float(limit)}[sign]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _table(benchmark: Benchmark) -> str:
    marks = {True: "pass", False: "MISSED", None: ""}
    cells = [(row["metric"], str(row["value"]), row["bound"] or "", marks[row["pass"]]) for row in benchmark.rows]
    widths = [max((len(row[i]) for row in cells), default=0) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    about = ", ".join(f"{key} {value}" for key, value in machine(benchmark.threads).items())
    return "\n".join([f"{benchmark.name} ({about})", *lines]) + "\n"
