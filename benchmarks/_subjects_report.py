"""What the readings of token subjects come to: tables, the goals and the paper's claims, a figure, and a sheet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from _ablation_cases import Case, Place, draw_place
from _ablation_report import Columns, Curve, Readings, Summary, add_rows, draw_curves, draw_sheet, spell
from _ablation_work import Work
from _common import Benchmark
from _subjects_cases import (
    BOTH,
    COUNTS,
    LORAS,
    NONE,
    RANDOM,
    REAL,
    REAL_POSED,
    TOKENS,
    UNDECOUPLED,
    WORDS,
    name_count,
    portraits,
    reference_of,
)
from PIL import Image

from dreammix_trt.report import enlarge_region, mark_region
from dreammix_trt.trainer.micro.world import show_mask

_LEAKS: Final = {"nearest": "pose: nearest to the reference", "pose": "pose: fit gained", "white": "white around it"}
TABLES: Final[Columns] = {
    "identity": {"kept": "parts kept", "all kept": "all kept", "cosine": "cosine", **_LEAKS},
    "editing": {
        "right": "edited part right",
        "kept": "other parts kept",
        "both": "both",
        "cosine": "cosine",
        **_LEAKS,
    },
}
SHORT, LONG = LORAS
#: rows of the sheet, and what a stranger is told of them
SHEET: Final = {
    NONE: "the class alone",
    name_count(1): "1 token",
    name_count(4): "4 tokens",
    TOKENS: "24 tokens (default)",
    name_count(48): "48 tokens",
    RANDOM: "24 tokens by chance",
    SHORT: "LoRA, 200 steps",
    LONG: "LoRA, 800 steps",
    BOTH: "24 tokens + LoRA 200",
}
SHOWN: Final = 6  # subjects of the sheet
_AROUND: Final = 0.4  # of a hole's side, what the sheet shows on each side of it
Goal = tuple[str, str, str, str, str, str]  # what it says; row, other row; task, figure; bound
GOALS: Final[tuple[Goal, ...]] = (
    ("identity: parts kept", TOKENS, NONE, "identity", "kept", ">= 2"),
    ("identity: cosine", TOKENS, NONE, "identity", "cosine", ">= 2"),
    ("identity: parts kept", TOKENS, LONG, "identity", "kept", ">= 0.8"),
    ("identity: cosine", TOKENS, LONG, "identity", "cosine", ">= 0.8"),
    ("edits right", TOKENS, NONE, "editing", "right", ">= 0.8"),
)
#: of the paper: fewer, discriminative tokens copy less at equal identity; decoupling restores edits by text
CLAIMS: Final = (
    (TOKENS, "48 tokens", (("identity", "nearest"), ("identity", "pose"), ("identity", "kept"), ("editing", "right"))),
    (TOKENS, RANDOM, (("identity", "nearest"), ("identity", "pose"), ("identity", "kept"), ("identity", "cosine"))),
    (TOKENS, UNDECOUPLED, (("editing", "right"), ("editing", "both"), ("identity", "kept"), ("identity", "nearest"))),
    (TOKENS, NONE, (("identity", "kept"), ("identity", "cosine"), ("identity", "nearest"), ("identity", "white"))),
    (BOTH, SHORT, (("identity", "kept"), ("identity", "cosine"), ("editing", "right"), ("editing", "both"))),
    (TOKENS, LONG, (("identity", "kept"), ("identity", "cosine"), ("editing", "right"), ("editing", "both"))),
)  # fmt: skip


class Table:
    """The readings of whole sets: subjects for which every way was painted, and those that have LoRAs, too."""

    def __init__(self, readings: Readings) -> None:
        self.all = Summary(readings)
        trained = {case.place.subject for case, _ in readings if case.way.training}
        self._few = Summary([(case, values) for case, values in readings if case.place.subject in trained])
        self._slow = {case.row for case, _ in readings if case.way.training}

    def between(self, *rows: str) -> Summary:
        """The summary in which rows can be compared: of the subjects that have all of them."""
        return self._few if self._slow & set(rows) else self.all


def take_whole(cases: Sequence[Case], ready: Readings) -> Readings:
    """The readings of subjects all of whose pictures are there; those with LoRAs may lack while the others count."""

    def part_of(case: Case) -> tuple[int, bool]:
        return case.place.subject, case.way.training is not None

    wanted, found = Counter(map(part_of, cases)), Counter(part_of(case) for case, _ in ready)
    lacking = {part for part, count in wanted.items() if found[part] < count}
    quick = {number for number, slow in lacking if not slow}
    return [each for each in ready if part_of(each[0]) not in lacking and each[0].place.subject not in quick]


def add_results(bench: Benchmark, table: Table, scenes: int) -> None:
    """Every figure, the goals, and what the paper claims."""
    add_rows(bench, table.all, TABLES)
    bench.add("subjects and scenes enough", min(len(table.all.subjects) / 24, scenes / 10), bound=">= 1")
    for name, row, other, task, figure, bound in GOALS:
        summary = table.between(row, other)
        ratio = summary.ratio(row, other, task, figure)
        if ratio is not None:
            bench.add(f"{name}, {row} / {other} ({len(_who(summary, row, other, task))} subjects)", ratio, bound=bound)
    for figure in ("kept", "cosine"):
        add_chance(bench, table, figure)
    for row, other, figures in CLAIMS:
        for task, figure in figures:
            gap = table.between(row, other).difference(row, other, task, figure)
            if gap is not None:
                bench.add(f"{row} less {other}, {task}: {TABLES[task][figure]}", spell(gap, 3))


def add_chance(bench: Benchmark, table: Table, figure: str) -> None:
    """Identity between what the class alone has by chance (0) and real renderings (1)."""
    least, most = (table.all.mean(row, "identity", figure) for row in (NONE, REAL))
    if not least or not most:
        return
    called = TABLES["identity"][figure]
    if least.mean > 0:
        bench.add(f"{called}: real rendering / {NONE}, the most a ratio can be", most.mean / least.mean)
    for row in table.all.rows:
        mean = table.between(row).mean(row, "identity", figure)
        if mean and row not in (NONE, REAL, REAL_POSED) and most.mean != least.mean:
            share = (mean.mean - least.mean) / (most.mean - least.mean)
            bench.add(f"{called}: {row}, of the way from {NONE} to a real rendering", share)


def _who(summary: Summary, row: str, other: str, task: str) -> list[int]:
    return [
        number for number in summary.subjects if summary.has(number, row, task) and summary.has(number, other, task)
    ]


def draw_counts(summary: Summary) -> Image.Image:
    """Identity, edits and leak against the number of tokens; 0: no reference."""
    rows = {0: NONE, **{count: name_count(count) for count in COUNTS}}
    drawn = {
        "as itself: parts kept": ("identity", "kept"),
        "as itself: cosine": ("identity", "cosine"),
        "edited: right": ("editing", "right"),
        "edited: right, all else kept": ("editing", "both"),
        "pose nearest to the reference (chance 0.2)": ("identity", "nearest"),
    }
    curves = [
        Curve(name, [(float(count), mean) for count, row in rows.items() if (mean := summary.mean(row, *figure))])
        for name, figure in drawn.items()
    ]
    return draw_curves(curves, across="tokens of the reference", up="share, or cosine")


def draw_subjects(work: Work, readings: Readings) -> Image.Image:
    """A scene of each of the first subjects, as itself and edited: reference, place, and what each way painted."""
    found = {(case.place, case.task, case.row): (case, values) for case, values in readings}
    rows = []
    scenes = sorted({case.place.scene for case, _ in readings})
    for number in sorted({case.place.subject for case, _ in readings})[:SHOWN]:
        place = Place(number, scenes[number % len(scenes)])
        for task, what in (("identity", "as itself"), ("editing", "edited")):
            tiles = _draw_row(work, place, {row: found.get((place, task, row)) for row in SHEET})
            prompt = next((case.edit.prompt for (at, kind, row), (case, _) in found.items()
                           if (at, kind) == (place, task) and not case.way.training and row != WORDS), "")  # fmt: skip
            rows.append((f"subject {number + 1}, {what}: “{prompt}”; LoRAs are told “sks” before the class", tiles))
    title = "A subject from one picture: left the reference, then the place, then what each way paints there"
    return draw_sheet(rows, title)


def _draw_row(
    work: Work, place: Place, painted: Mapping[str, tuple[Case, Mapping[str, float | None]] | None]
) -> list[tuple[Image.Image, str]]:
    scene, mask = draw_place(place)
    hole = show_mask(mask)
    where = enlarge_region(mark_region(Image.fromarray(scene.background), hole), hole, _AROUND)
    tiles = [(_show_reference(place), "the reference"), (where, "the place")]
    for row, told in SHEET.items():
        entry = painted[row]
        if entry is None:
            tiles.append((Image.new("RGB", where.size, (236, 235, 230)), f"{told}: not made"))
            continue
        case, values = entry
        with Image.open(work.picture_of(case)) as opened:
            picture = enlarge_region(opened, hole, _AROUND)
        right = {None: "", 0.0: ", edit wrong", 1.0: ", edit right"}[values["right"]]
        tiles.append((picture, f"{told}: {values['kept'] or 0:.0%} of the parts kept{right}"))
    return tiles


def _show_reference(place: Place) -> Image.Image:
    """The object of the scene's reference on white."""
    scene = portraits(place.subject)[reference_of(place)]
    white = Image.fromarray(np.where((scene.alpha > 0.5)[..., None], scene.image, np.uint8(255)))
    return enlarge_region(white, show_mask(scene.alpha > 0.5), 0.1)
