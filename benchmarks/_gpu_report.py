"""What `gpu_suite.py` reports: rows with goals, statistics, one JSON file merged part by part, a table."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _common import Benchmark

NAME = "gpu_suite"
MIB, GIB = 1 << 20, 1 << 30
PARTS = ("machine", "kernels", "loop", "full", "compiled", "peers", "graphs", "subjects", "memory", "soak", "rtx")

# TFLOP of full-size SDXL, 2 a multiply-add, attention included: the UNet's step of two rows by latent size, and at
# 1024x1024 pixels the VAE's halves and both text encoders. Counted with torch's FlopCounterMode on diffusers' modules.
STEP_TFLOP: Mapping[tuple[int, int], float] = {
    (64, 64): 3.18,
    (96, 96): 7.28,
    (128, 128): 13.522,
    (128, 192): 21.36,
}
DECODE_TFLOP, ENCODE_TFLOP, TEXT_TFLOP = 10.470, 4.879, 0.22
ENCODES, DECODES = 5, 2  # of one picture in two stages


# ------------------------------------------------------------------------------------------------ numbers


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value that at least `percent` (above 0, to 100) of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    if not ordered or not 0 < percent <= 100:
        raise ValueError(f"percentile {percent} of {len(ordered)} values")
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]


@dataclass(frozen=True)
class Spread:
    """How a time varies: median, 50th and 99th percentile, in the unit of the values."""

    median: float
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), percentile(values, 50), percentile(values, 99))


def step_tflop(height: int, width: int, rows: int, scale: float = 1.0) -> float | None:
    """TFLOP of one UNet call: latent height and width, rows; scale: the model's width. None where nobody counted."""
    known = STEP_TFLOP.get((height, width)) if scale == 1 else None
    return None if known is None else known * rows / 2


def job_tflop(steps: int, rows: int, side: int = 1024, scale: float = 1.0) -> float | None:
    """TFLOP of a whole picture in two stages of `side` pixels with `steps` steps in all; None where nobody counted."""
    step = step_tflop(side // 8, side // 8, rows, scale)
    if step is None:
        return None
    area = (side / 1024) ** 2  # of the VAE; its attention, 5 % at 1024, grows faster
    return steps * step + area * (ENCODES * ENCODE_TFLOP + DECODES * DECODE_TFLOP) + TEXT_TFLOP


def largest_difference(found: Any, truth: Any) -> float:
    """Largest difference over the truth's largest value; infinite where anything found is not a number."""
    import numpy as np

    found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    if found.shape != truth.shape:
        raise ValueError(f"{found.shape} against {truth.shape}")
    if not np.isfinite(found).all():
        return math.inf
    return float(np.abs(found - truth).max(initial=0) / max(np.abs(truth).max(initial=0), 1e-30))


# ------------------------------------------------------------------------------------------------ a part


@dataclass
class Part:
    """What one part measured. Every row is kept as soon as it is added, so that a part that is stopped leaves its rows.

    goals: whether rows are held against their goals. keep: called after each change.
    """

    name: str
    goals: bool = True
    keep: Callable[[Part], None] = lambda part: None
    facts: dict[str, Any] = field(default_factory=dict)  # the machine, the settings
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._bench = Benchmark(self.name)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """{"metric", "value", "bound", "pass"}."""
        return self._bench.rows

    def add(self, metric: str, value: float | str | bool, *, goal: str | None = None) -> None:
        """One row; goal reads "<= 2" (`_common.Benchmark.add`)."""
        self._bench.add(metric, value, bound=goal if self.goals else None)
        print(f"{self.name}: {metric}: {self.rows[-1]['value']}", file=sys.stderr, flush=True)
        self.keep(self)

    def add_share(self, metric: str, value: float, of: float | None, *, goal: str | None = None) -> None:
        """A row value / of, where `of` is known."""
        if of:
            self.add(metric, value / of, goal=goal)

    def note(self, text: str) -> None:
        """Something a reader of the rows must know."""
        self.notes.append(text)
        self.keep(self)

    def fail(self, text: str) -> None:
        """Why the part ended early; the rows stay."""
        self.error = text
        self.keep(self)

    def to_json(self) -> dict[str, Any]:
        told = {"seconds": round(self.seconds, 1), "notes": self.notes, "error": self.error}
        return {**self.facts, "rows": self.rows, **told}


def has_failed(record: Mapping[str, Any]) -> bool:
    """Whether a part ended early or missed a goal."""
    return record.get("error") is not None or any(row["pass"] is False for row in record["rows"])


# ------------------------------------------------------------------------------------------------ choosing, keeping


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """The parts to run in their order, each once; none named: all. Raises ValueError naming what is no part."""
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise ValueError(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return tuple(name for name in PARTS if name in names or not names)


def merge_parts(path: Path, parts: Mapping[str, Mapping[str, Any]], *, simulated: bool = False) -> dict[str, Any]:
    """The file's content with these parts in place of its own; every part carries the machine it ran on.

    A file that is absent, damaged or no result of this suite counts as empty; so do simulated results for real ones.
    """
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    same = isinstance(before, dict) and before.get("name") == NAME and before.get("simulated", False) == simulated
    kept = before.get("parts") if same else None
    every = {**(kept if isinstance(kept, dict) else {}), **parts}
    told = {"simulated": True} if simulated else {}
    return {"name": NAME, **told, "parts": {name: every[name] for name in PARTS if name in every}}


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")
        os.chmod(scratch, 0o644)  # mkstemp's are its owner's alone
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ table


def table(parts: Mapping[str, Mapping[str, Any]], *, goals: bool = True) -> str:
    """The parts' rows for people; goals: with the columns that say what was to be reached."""
    marks = {True: "pass", False: "MISSED", None: ""}
    lines = []
    for name, record in parts.items():
        cells = [
            (row["metric"], _format_value(row["value"]), *((row["bound"] or "", marks[row["pass"]]) if goals else ()))
            for row in record["rows"]
        ]
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))] if cells else []
        lines.append(f"{name} ({record.get('seconds', 0):g} s)")
        padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
        lines += ["  " + "  ".join(row).rstrip() for row in padded]
        lines += [f"  note: {note}" for note in record.get("notes", ())]
        lines += [f"  FAILED: {record['error']}"] if record.get("error") else []
    return "\n".join(lines) + "\n"


def _format_value(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
