"""`train.html`: what a training did, on one page that stands alone."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dreammix_trt.core.files import atomic_file
from dreammix_trt.report import Figure, Row, contact_sheet, html_page, html_picture, html_table, mark_region

if TYPE_CHECKING:
    from dreammix_trt.train_validation import Painted
    from dreammix_trt.trainer.photographs import PhotographFile

FILE = "train.html"
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 960, 320, 64, 36
_COLOURS = {"all": "#3457d5", "subject": "#b3261e", "regular": "#2e7d32"}
_MOST_POINTS = 1200
_MOST_PHOTOGRAPHS = 12
_MEMORY = 0.98  # of the smoothed curve, a step


def write_report(
    folder: str | Path,
    record: Any,
    history: Sequence[float],
    validations: Sequence[Painted] = (),
    *,
    parts: Mapping[str, Sequence[float]] | None = None,
    photographs: Sequence[PhotographFile] = (),
    plan: Sequence[str] = (),
) -> Path:
    """Write `train.html`, whole or not at all; returns its path.

    folder: that the training writes.
    record: its settings and results, a mapping or a dataclass; what is nested is shown as JSON.
    history: the loss of every step.
    validations: the pictures that were painted meanwhile.
    parts: "subject" and "regular" -> the loss of every step of its samples alone, NaN where there were none.
    photographs: of the subject.
    plan: lines of the memory plan.
    """
    told = asdict(record) if is_dataclass(record) and not isinstance(record, type) else dict(record)
    title = f"Training of {told.get('token', '')} {told.get('class_name', '')}".rstrip()
    curves = {"all": history, **(parts or {})}
    body = ["<h2>Loss</h2>", plot_losses(curves), f"<p>{html.escape(_describe(history))}</p>"]
    if validations:
        body += ["<h2>What it could paint</h2>", html_picture(sheet_of(validations), "validation pictures by step")]
    if photographs:
        body += ["<h2>Photographs and masks</h2>", html_picture(_sheet_of_photographs(photographs), "photographs")]
    if plan:
        body += ["<h2>Memory</h2>", f"<pre>{html.escape(chr(10).join(plan))}</pre>"]
    body.append(html_table("Settings and results", [("what", "value"), *_list_rows(told)]))
    file = Path(folder) / FILE
    with atomic_file(file) as temporary:
        temporary.write_text(html_page(title, body), encoding="utf-8")
    return file


def _describe(history: Sequence[float]) -> str:
    """The curve in a sentence."""
    if not history:
        return "0 steps"
    tenth = max(1, len(history) // 10)
    first, last = (float(np.mean(values)) for values in (history[:tenth], history[-tenth:]))
    return (
        f"{len(history)} steps; mean loss of the first tenth {first:.4f}, of the last {last:.4f}. The loss depends "
        "more on the time that is drawn than on what is learnt, so it falls little; pictures say more."
    )


def _list_rows(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, value in told.items():
        text = f"{value:.6g}" if isinstance(value, float) else value
        if not isinstance(text, str | int):
            text = json.dumps(text, default=str, ensure_ascii=False)
        rows.append((name.replace("_", " "), str(text)))
    return rows


# -- pictures ---------------------------------------------------------------------------------------------------------


def sheet_of(validations: Sequence[Painted]) -> Image.Image:
    """A row for each step, a column for each place and prompt."""
    rows = []
    for step in sorted({each.step for each in validations}):
        tiles = [_read_figure(each) for each in validations if each.step == step]
        rows.append(Row(f"step {step}", tiles))
    return contact_sheet(rows, tile=200)


def _read_figure(painted: Painted) -> Figure:
    with Image.open(painted.file) as image:
        return Figure(image.convert("RGB"), f"{painted.prompt} ({painted.place})")


def _sheet_of_photographs(photographs: Sequence[PhotographFile]) -> Image.Image:
    figures = []
    for file in photographs[:_MOST_PHOTOGRAPHS]:
        read = file.read()
        mask = Image.fromarray(np.where(read.subject, np.uint8(255), np.uint8(0)))
        figures.append(Figure(mark_region(Image.fromarray(read.image), mask), file.name))
    left_out = len(photographs) - len(figures)
    note = f"and {left_out} more" if left_out else ""
    rows = [Row("", figures[start : start + 6]) for start in range(0, len(figures), 6)]
    return contact_sheet([*rows[:-1], Row("", rows[-1].tiles, note)], tile=170)


# -- the curve --------------------------------------------------------------------------------------------------------


def plot_losses(curves: Mapping[str, Sequence[float]]) -> str:
    """An SVG: the loss of every step thin for "all", and each curve smoothed; what is not finite is left out."""
    values = {name: np.asarray(curve, np.float64) for name, curve in curves.items()}
    drawn = {name: (_thin(curve), _thin(_smooth(curve))) for name, curve in values.items()}
    steps = max((len(curve) for curve in values.values()), default=0)
    known = np.concatenate([curve[np.isfinite(curve)] for curve in values.values()] or [np.zeros(0)])
    if not known.size:
        return "<p>No loss is known.</p>"
    top = _round_up(float(np.quantile(known, 0.99)))
    lines = _draw_axes(steps, top)
    raw, _ = drawn["all"] if "all" in drawn else (np.zeros((0, 2)), None)
    lines.append(_draw_line(raw, steps, top, _COLOURS["all"], 0.6, 0.35))
    for number, (name, (_, smooth)) in enumerate(drawn.items()):
        colour = _COLOURS.get(name, "#6d4c41")
        lines.append(_draw_line(smooth, steps, top, colour, 2, 1))
        at = _LEFT + 16 + 130 * number
        lines.append(f'<text x="{at}" y="18" fill="{colour}">{html.escape(name)}, smoothed</text>')
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    return f'<svg {size} font-size="12" role="img" aria-label="loss by step">{"".join(lines)}</svg>'


def _smooth(curve: NDArray[np.float64]) -> NDArray[np.float64]:
    """The running mean, without the pull of where it starts; a step without a value repeats it."""
    out, mean, weight = np.full_like(curve, np.nan), 0.0, 0.0
    for number, value in enumerate(curve):
        if math.isfinite(value):
            mean, weight = _MEMORY * mean + (1 - _MEMORY) * value, _MEMORY * weight + 1 - _MEMORY
        if weight:
            out[number] = mean / weight
    return out


def _thin(curve: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, 2): step and value, at most `_MOST_POINTS` of them, which are means of neighbours."""
    every = max(1, -(-len(curve) // _MOST_POINTS))
    points = []
    for start in range(0, len(curve), every):
        part = curve[start : start + every]
        if np.isfinite(part).any():
            points.append((start + (len(part) + 1) / 2, float(part[np.isfinite(part)].mean())))
    return np.asarray(points, np.float64).reshape(-1, 2)


def _round_up(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 5, 7.5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 3, 5, 7.5, 10) if step * power >= value * (1 - 1e-9))


def _draw_axes(steps: int, top: float) -> list[str]:
    right, floor = _WIDTH - 10, _HEIGHT - _BOTTOM
    lines = []
    for part in range(5):
        y = floor - (floor - 28) * part / 4
        lines.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e2dc"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{top * part / 4:.3g}</text>')
        x = _LEFT + (right - _LEFT) * part / 4
        anchor = "end" if part == 4 else "middle"
        lines.append(f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="{anchor}">{round(steps * part / 4)}</text>')
    lines.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 2}" text-anchor="middle">step</text>')
    return lines


def _draw_line(points: NDArray[np.float64], steps: int, top: float, colour: str, width: float, opacity: float) -> str:
    """A curve; what is above the plot runs along its edge."""
    right, floor = _WIDTH - 10, _HEIGHT - _BOTTOM
    x = _LEFT + (right - _LEFT) * points[:, 0] / max(steps, 1)
    y = floor - (floor - 28) * np.clip(points[:, 1] / top, 0, 1)
    pairs = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    style = f'fill="none" stroke="{colour}" stroke-width="{width}" stroke-opacity="{opacity}"'
    return f'<polyline points="{pairs}" {style}/>'
