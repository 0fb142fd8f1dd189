"""What `gpu_suite.py` reports: rows with goals, statistics, one JSON file merged part by part, a table."""

from __future__ import annotations

import json
import math
import os
import re
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
PARTS = (
    "machine", "build", "kernels", "memcheck", "loop", "graphs", "networks", "subjects", "full",
    "compiled-step", "compiled-vae", "compiled-guided", "compiled-quick",
    "peers-eager", "peers-float32", "peers-guided", "peers-quick", "memory", "soak", "rtx", "ratios",
)  # fmt: skip
GROUPS = {
    "compiled": tuple(name for name in PARTS if name.startswith("compiled-")),
    "peers": tuple(name for name in PARTS if name.startswith("peers-") or name == "ratios"),
}
PEER_GOALS = {"eager": ">= 2", "compiled": ">= 1.2"}  # of diffusers' time over our best
UNFINISHED = "not finished"  # the error of a part whose process may still be running

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


def merge_bytes(factors: Iterable[tuple[Any, Any]], itemsize: int) -> int:
    """Fewest bytes moved by merging a subject into weights: pristine read, merged written, factors read in float32.

    factors: A (inputs, rank) and B (rank, outputs) of every layer it touches; itemsize: of the weights.
    """
    return sum(2 * itemsize * a.shape[0] * b.shape[1] + 4 * (a.size + b.size) for a, b in factors)


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
    skipped: str | None = None  # why there is nothing to measure here
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

    def skip(self, why: str) -> None:
        """Why the part cannot be measured here, and what would help; it is not called passed."""
        self.skipped = why
        self.keep(self)

    def to_json(self) -> dict[str, Any]:
        told = {"seconds": round(self.seconds, 1), "notes": self.notes, "error": self.error}
        skipped = {} if self.skipped is None else {"skipped": self.skipped}
        return {**self.facts, "rows": self.rows, **told, **skipped}


def has_failed(record: Mapping[str, Any]) -> bool:
    """Whether a part ended early or missed a goal."""
    return record.get("error") is not None or any(row["pass"] is False for row in record["rows"])


def is_complete(record: Mapping[str, Any] | None) -> bool:
    """Whether a part ran to its end, whatever its goals."""
    return record is not None and record.get("error") is None and not record.get("skipped")


def keep_rows(record: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """A part's record with the rows that only an earlier, stopped run of it had: same GPU, same settings.

    Those rows come behind, and a note counts them. A part that is complete keeps its own rows alone.
    """
    if before is None or is_complete(record) or _circumstances(before) != _circumstances(record):
        return dict(record)
    own = {row["metric"] for row in record["rows"]}
    kept = [row for row in before["rows"] if row["metric"] not in own]
    notes = [f"{len(kept)} rows are an earlier run's"] if kept else []
    return {**record, "rows": [*record["rows"], *kept], "notes": [*record.get("notes", ()), *notes]}


def _circumstances(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two runs of a part must share for their rows to stand side by side."""
    machine = record.get("machine", {})
    return machine.get("gpu"), machine.get("driver"), machine.get("processor"), record.get("settings")


# ------------------------------------------------------------------------------------------------ choosing, keeping


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """The parts to run in their order, each once; none named: all; a group's name stands for its parts.

    Raises ValueError naming what is no part.
    """
    unknown = [name for name in names if name not in (*PARTS, *GROUPS)]
    if unknown:
        raise ValueError(f"no part {', '.join(unknown)}; there are {', '.join((*PARTS, *GROUPS))}")
    wanted = {part for name in names for part in GROUPS.get(name, (name,))}
    return tuple(name for name in PARTS if name in wanted or not names)


def read_parts(path: Path, *, simulated: bool = False) -> dict[str, Any]:
    """The records of a file by part; {} for one that is absent, damaged, no result of this suite, or of the other kind
    (simulated or real)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    same = isinstance(found, dict) and found.get("name") == NAME and found.get("simulated", False) == simulated
    parts = found.get("parts") if same else None
    return parts if isinstance(parts, dict) else {}


def merge_parts(path: Path, parts: Mapping[str, Mapping[str, Any]], *, simulated: bool = False) -> dict[str, Any]:
    """The file's content with these parts in place of its own; every part carries the machine it ran on.

    A file that is absent, damaged or no result of this suite counts as empty; so do simulated results for real ones.
    """
    every = {**read_parts(path, simulated=simulated), **parts}
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


def add_ratios(part: Part, parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Diffusers' times over our best, by job, of the parts `peers-*` that were measured under the same circumstances.

    parts: the file's. Their last record says which circumstances. Skips the part where there is no pair of times.
    """
    peers = [record for name, record in parts.items() if name.startswith("peers-") and record["rows"]]
    alike = [record for record in peers if _circumstances(record) == _circumstances(peers[-1])]
    times = {row["metric"]: row["value"] for record in alike for row in record["rows"]}
    kinds = "|".join(PEER_GOALS)
    ours: dict[str, list[float]] = {}
    for metric, seconds in times.items():
        if found := re.fullmatch(rf"(.*): ours, torch ({kinds}) in the device runtime \[s\]", metric):
            ours.setdefault(found[1], []).append(seconds)
    for metric, seconds in times.items():
        found = re.fullmatch(rf"(.*): diffusers, ({kinds}) \[s\]", metric)
        if found and found[1] in ours:
            goal = PEER_GOALS[found[2]]
            part.add(f"{found[1]}: diffusers, {found[2]} / ours, best", seconds / min(ours[found[1]]), goal=goal)
    if not part.rows:
        part.skip("there are no times to compare: run the parts `peers` into the same file first")


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
        lines += [f"  SKIPPED: {record['skipped']}"] if record.get("skipped") else []
        lines += [f"  FAILED: {record['error']}"] if record.get("error") else []
    return "\n".join(lines) + "\n"


def _format_value(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
