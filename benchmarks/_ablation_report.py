"""What the ablation's readings come to: means with intervals over subjects, tables in Markdown, figures, sheets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from _ablation_cases import SHARES, Case, share_of
from _common import Benchmark
from PIL import Image, ImageDraw, ImageFont

from dreammix_trt.evaluation.statistics import Mean, Tally, bootstrap_interval
from dreammix_trt.report import Figure, Row, contact_sheet

Readings = Sequence[tuple[Case, Mapping[str, float | None]]]
TASKS: Final = ("identity", "editing")
Columns = Mapping[str, Mapping[str, str]]
#: of a task, the figures of its table and what they are called there
COLUMNS: Final[Columns] = {
    "identity": {"kept": "parts kept", "all kept": "all kept", "cosine": "cosine", "seam": "seam [levels]"},
    "editing": {
        "right": "edited part right",
        "kept": "other parts kept",
        "both": "both",
        "cosine": "cosine",
        "seam": "seam [levels]",
    },
}
#: Table 3 of the paper (arXiv 2411.17223v1): row -> task -> CLIP-T, CLIP-I, DINO
PAPER: Final[dict[str, dict[str, tuple[float, float, float]]]] = {
    "baseline": {"identity": (0.253, 0.644, 0.628), "editing": (0.235, 0.601, 0.612)},
    "+DIF": {"identity": (0.291, 0.723, 0.717), "editing": (0.265, 0.696, 0.708)},
    "++TAS": {"identity": (0.290, 0.728, 0.715), "editing": (0.275, 0.685, 0.700)},
    "+++ADM": {"identity": (0.285, 0.728, 0.712), "editing": (0.289, 0.674, 0.695)},
}
#: of its Table 1: the judge's rendering stands where that has real images
PAPER_REAL: Final = (0.315, 0.883, 0.865)
_INK, _FAINT, _PAPER = (28, 28, 32), (228, 226, 220), (252, 251, 248)
_COLOURS: Final = ((52, 87, 213), (179, 38, 30), (46, 125, 50), (109, 76, 65), (136, 84, 208))
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 720, 380, 70, 58, 40


@dataclass(frozen=True)
class Curve:
    """One line of a figure. points: (x, mean), in order of x."""

    name: str
    points: Sequence[tuple[float, Mean]]


class Summary:
    """The means of rows. A mean counts every subject once; its interval is bootstrapped over subjects."""

    def __init__(self, readings: Readings) -> None:
        self._tally, self.rows = Tally(), list(dict.fromkeys(case.row for case, _ in readings))
        self.subjects = sorted({case.place.subject for case, _ in readings})
        self.scenes = len({case.place.scene for case, _ in readings})
        for case, values in readings:
            for task in dict.fromkeys((case.task, case.edit.kind)):  # an identity's kind is its task
                self._tally.add(str(case.place.subject), f"{case.row}/{task}", values)

    def mean(self, row: str, task: str, figure: str) -> Mean | None:
        """task: of TASKS, or the kind of an edit."""
        return self._tally.over_subjects(f"{row}/{task}", figure)

    def has(self, subject: int, row: str, task: str) -> bool:
        """Whether a row has pictures of a subject."""
        return self._tally.of_subject(str(subject), f"{row}/{task}", "kept") is not None

    def difference(self, row: str, other: str, task: str, figure: str) -> Mean | None:
        """`row` less `other`, subject by subject."""
        found, pictures = [], 0
        for each in self._tally.subjects:
            one, two = (self._tally.of_subject(each, f"{name}/{task}", figure) for name in (row, other))
            if one and two:
                found.append(one.mean - two.mean)
                pictures += one.pictures
        if not found:
            return None
        low, high = bootstrap_interval(found) or (None, None)
        return Mean(float(np.mean(found)), pictures, low, high)

    def ratio(self, row: str, other: str, task: str, figure: str) -> float | None:
        """Of the means; None where the other's is nought."""
        one, two = self.mean(row, task, figure), self.mean(other, task, figure)
        return one.mean / two.mean if one and two and two.mean else None


def spell(mean: Mean | None, digits: int = 2) -> str:
    """ "0.71 [0.64, 0.78]" """
    if mean is None:
        return "-"
    text = f"{mean.mean:.{digits}f}"
    return text if mean.low is None else f"{text} [{mean.low:.{digits}f}, {mean.high:.{digits}f}]"


def add_rows(bench: Benchmark, summary: Summary, tables: Columns = COLUMNS) -> None:
    """Every figure of every row."""
    bench.add("subjects", len(summary.subjects))
    bench.add("scenes a subject", summary.scenes)
    for row in summary.rows:
        for task, columns in tables.items():
            for figure in columns:
                mean = summary.mean(row, task, figure)
                if mean is not None:
                    bench.add(f"{row}, {task}: {figure} ({mean.pictures} pictures)", spell(mean, 3))


def add_goals(bench: Benchmark, summary: Summary) -> None:
    """What the table is held to: edits against identity, subject by subject."""
    full, start = "+++ADM", "baseline"
    bench.add("subjects and scenes enough", min(len(summary.subjects) / 12, summary.scenes / 20), bound=">= 1")
    for name, task, figure, bound in (
        ("edits right", "editing", "right", ">= 1.3"),
        ("edits right and all else kept", "editing", "both", ">= 1.3"),
        ("identity: parts kept", "identity", "kept", ">= 0.9"),
    ):
        ratio = summary.ratio(full, start, task, figure)
        if ratio is None:
            bench.add(f"{name}, full / baseline", "not defined: the baseline has none")
        else:
            bench.add(f"{name}, full / baseline", ratio, bound=bound)
    for row, other in zip(summary.rows[1:4], summary.rows[:3], strict=False):
        for task, figure in (("identity", "kept"), ("identity", "cosine"), ("editing", "right"), ("editing", "both")):
            gap = summary.difference(row, other, task, figure)
            bench.add(f"{row} less {other}, {task}: {figure}", spell(gap, 3))


#: of the frame's side: where small things end, and where large ones begin
SIZES: Final = (SHARES[0], 0.3, 0.45, SHARES[1])


def split_by_size(readings: Readings) -> dict[str, Summary]:
    """A summary of the pictures whose thing is so large: "0.2 to 0.3" and so on."""
    found = {}
    for low, high in pairwise(SIZES):
        within = [(case, values) for case, values in readings if low <= share_of(case.place) < high]
        if within:
            found[f"{low:g} to {high:g}"] = Summary(within)
    return found


def add_sizes(bench: Benchmark, readings: Readings) -> None:
    """What two stages bring to things of each size, and the goal for small ones."""
    for size, summary in split_by_size(readings).items():
        for figure in ("kept", "all kept", "cosine"):
            for row in ("baseline", "+DIF"):
                bench.add(f"size {size}, {row}: {figure}", spell(summary.mean(row, "identity", figure), 3))
            gap = summary.difference("+DIF", "baseline", "identity", figure)
            bench.add(f"size {size}, +DIF less baseline: {figure}", spell(gap, 3))
        ratio = summary.ratio("+DIF", "baseline", "identity", "all kept")
        if ratio is not None:
            small = {"bound": ">= 2"} if size.startswith(f"{SIZES[0]:g} ") else {}
            bench.add(f"size {size}, all parts kept, +DIF / baseline", ratio, **small)


def write_sizes(readings: Readings) -> str:
    """Markdown: identity by the thing's size, in one stage and in two."""
    columns = [(row, figure) for figure in ("kept", "all kept", "cosine") for row in ("baseline", "+DIF")]
    head = [
        "side of the thing / frame",
        "pictures",
        *(f"{row}: {COLUMNS['identity'][figure]}" for row, figure in columns),
    ]
    lines = [head, ["---"] * len(head)]
    for size, summary in split_by_size(readings).items():
        means = [summary.mean(row, "identity", figure) for row, figure in columns]
        lines.append([size, str(means[0].pictures if means[0] else 0), *map(spell, means)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def write_tables(summary: Summary, tables: Columns = COLUMNS, *, paper: bool = False) -> str:
    """Markdown: a table for each task; paper: beside the figures of its Table 3, which are other measures."""
    parts = [f"{len(summary.subjects)} subjects, {summary.scenes} scenes each."]
    for task, columns in tables.items():
        if all(summary.mean(row, task, "kept") is None for row in summary.rows):
            continue
        head = [task, *columns.values(), *(("paper: CLIP-T", "CLIP-I", "DINO") if paper else ())]
        lines = [head, ["---"] * len(head)]
        for row in summary.rows:
            theirs = PAPER.get(row, {}).get(task, ("-",) * 3) if paper else ()
            lines.append([row, *(spell(summary.mean(row, task, figure)) for figure in columns), *map(str, theirs)])
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    return "\n\n".join(parts) + "\n"


def write_kinds(summary: Summary, kinds: Iterable[str]) -> str:
    """Markdown: the share of edits that are right, by kind."""
    head = ["edited part right", *kinds]
    lines = [head, ["---"] * len(head)]
    lines += [[row, *(spell(summary.mean(row, kind, "right")) for kind in head[1:])] for row in summary.rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def draw_curves(curves: Sequence[Curve], *, across: str, up: str) -> Image.Image:
    """Lines with their intervals on axes of even steps; up: what is drawn, 0 to 1."""
    places = sorted({x for curve in curves for x, _ in curve.points})
    top = max(_TOP, 17 * len(curves) + 12)  # below the names
    height = _HEIGHT + top - _TOP
    picture = Image.new("RGB", (_WIDTH, height), _PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    floor, right = height - _BOTTOM, _WIDTH - 30
    for part in range(6):
        y = floor - (floor - top) * part / 5
        draw.line((_LEFT, y, right, y), fill=_FAINT)
        draw.text((_LEFT - 8, y), f"{part / 5:.1f}", fill=_INK, font=font, anchor="rm")
    step = (right - _LEFT) / max(len(places), 1)
    for number, x in enumerate(places):
        draw.text((_LEFT + step * (number + 0.5), floor + 8), f"{x:.3g}", fill=_INK, font=font, anchor="ma")
    draw.text(((_LEFT + right) / 2, height - 26), f"{across} (bars: 95 % over subjects)", _INK, font, anchor="ma")
    draw.text((10, 8), up, fill=_INK, font=font)
    for number, curve in enumerate(curves):
        colour, moved = _COLOURS[number % len(_COLOURS)], 5 * (number - (len(curves) - 1) / 2)
        draw.text((_WIDTH - 30, 8 + 17 * number), curve.name, fill=colour, font=font, anchor="ra")
        at = [(_LEFT + step * (places.index(x) + 0.5) + moved, mean) for x, mean in curve.points]
        ends = [(x, floor - (floor - top) * mean.mean) for x, mean in at]
        draw.line(ends, fill=colour, width=2)
        for (x, y), (_, mean) in zip(ends, at, strict=True):
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
            if mean.low is not None and mean.high is not None:
                draw.line([(x, floor - (floor - top) * end) for end in (mean.low, mean.high)], fill=colour)
    return picture


def draw_sheet(rows: Sequence[tuple[str, Sequence[tuple[Image.Image, str]]]], title: str) -> Image.Image:
    """A contact sheet; rows: heading, then pictures with what stands below them."""
    laid = [Row(name, [Figure(image, text) for image, text in tiles]) for name, tiles in rows]
    return contact_sheet(laid, tile=170, title=title)
