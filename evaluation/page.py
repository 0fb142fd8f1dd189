"""The page of an evaluation: tables of means, then every picture as a thumbnail, linked to the whole one.

It is written row by row, so its length costs no memory. All links are relative: the folder can be moved and zipped.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import quote

from dreammix_trt.report import html_head

_ARROWS: Final = {"higher": "↑", "lower": "↓", "zero": "→ 0"}
_SHORT: Final = 3  # metrics under a picture


def write_page(
    file: Path, summary: Mapping[str, Any], rows: Iterable[Mapping[str, str]], photographs: Mapping[str, Sequence[str]]
) -> None:
    """Write the page.

    summary: of `Results.summarise`.
    rows: of the results, subject by subject, in each scene by scene.
    photographs: subject -> places of its thumbnails.
    """
    with file.open("w", encoding="utf-8") as page:
        page.write(html_head(f"Evaluation: {summary['run'].get('protocol', {}).get('name', '')}", _STYLE))
        _write_state(page, summary)
        _write_means(page, summary)
        _write_subjects(page, summary)
        _write_pictures(page, summary, rows, photographs)
        page.write("<h2>The run</h2><table>")
        for name, value in _flatten(summary["run"]):
            page.write(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>")
        page.write("</table></body></html>\n")


def _write_state(page: IO[str], summary: Mapping[str, Any]) -> None:
    counts = summary["pictures"]
    state = (
        f"{counts['measured']} pictures"
        if summary["finished"]
        else f"{counts['measured']} of {counts['of']} pictures so far"
    )
    page.write(f"<p>{state}, {len(summary['subjects'])} subjects. Tables: <a href='results.csv'>results.csv</a>, ")
    page.write("<a href='summary.csv'>summary.csv</a>, <a href='summary.json'>summary.json</a>.</p>\n")


def _write_means(page: IO[str], summary: Mapping[str, Any]) -> None:
    """Every metric by task, with its interval."""
    tasks = list(summary["tasks"])
    page.write("<h2>Means over subjects, 95 % bootstrap interval</h2><table><tr><th>metric</th>")
    page.write("".join(f"<th>{html.escape(task)}</th>" for task in tasks) + "<th></th></tr>\n")
    for metric, facts in summary["metrics"].items():
        about = facts["about"] if facts["measured"] else f"not measured: {facts['missing']}"
        cells = "".join(f"<td>{_spell(summary['tasks'][task].get(metric))}</td>" for task in tasks)
        page.write(f"<tr class='{'' if facts['measured'] else 'missing'}'><td>{_title(metric, facts)}</td>{cells}")
        page.write(f"<td class='about'>{html.escape(about)}</td></tr>\n")
    page.write("</table>\n")


def _write_subjects(page: IO[str], summary: Mapping[str, Any]) -> None:
    """Every subject by task."""
    metrics = {name: facts for name, facts in summary["metrics"].items() if facts["measured"]}
    page.write("<h2>By subject</h2><table class='wide'><tr><th>subject</th><th>task</th>")
    page.write("".join(f"<th>{_title(name, facts)}</th>" for name, facts in metrics.items()) + "</tr>\n")
    for subject, tasks in summary["subjects"].items():
        for task, values in tasks.items():
            cells = "".join(f"<td>{_spell(values.get(name))}</td>" for name in metrics)
            page.write(f"<tr><td><a href='#{quote(subject)}'>{html.escape(subject)}</a></td>")
            page.write(f"<td>{html.escape(task)}</td>{cells}</tr>\n")
    page.write("</table>\n")


def _write_pictures(
    page: IO[str],
    summary: Mapping[str, Any],
    rows: Iterable[Mapping[str, str]],
    photographs: Mapping[str, Sequence[str]],
) -> None:
    """A heading a subject with its photographs; a strip a scene: the scene, then its pictures."""
    shown = [name for name, facts in summary["metrics"].items() if facts["measured"]][:_SHORT]
    subject = scene = None
    for row in rows:
        if row["subject"] != subject:
            page.write(
                f"{'</div>' if subject else ''}\n<h2 id='{quote(row['subject'])}'>{html.escape(row['subject'])}</h2>"
            )
            page.write("<div class='strip'>")
            for place in photographs.get(row["subject"], ()):
                page.write(_figure(place, place, "photograph"))
            subject, scene = row["subject"], None
        if row["scene"] != scene:
            page.write("</div>\n<div class='strip'>" + _figure(row["scene_thumbnail"], "", row["scene"]))
            scene = row["scene"]
        values = ", ".join(f"{name} {float(row[name]):.3g}" for name in shown if row.get(name))
        gone = f" (without {row['substitute']})" if row["substitute"] else ""
        page.write(_figure(row["thumbnail"], row["picture"], f"“{row['prompt']}”{gone}, seed {row['seed']}", values))
    page.write("</div>\n" if subject else "")


def _figure(thumbnail: str, link: str, caption: str, values: str = "") -> str:
    image = f"<img loading='lazy' src='{quote(thumbnail)}' alt='{html.escape(caption, quote=True)}'>"
    image = f"<a href='{quote(link)}'>{image}</a>" if link else image
    return f"<figure>{image}<figcaption>{html.escape(caption)}<br><i>{html.escape(values)}</i></figcaption></figure>"


def _title(metric: str, facts: Mapping[str, Any]) -> str:
    unit = f" [{facts['unit']}]" if facts["unit"] else ""
    return html.escape(f"{metric.replace('_', ' ')}{unit} {_ARROWS[facts['better']]}")


def _spell(mean: Mapping[str, Any] | None) -> str:
    if mean is None:
        return "–"
    interval = f" <small>[{mean['low']:.4g}, {mean['high']:.4g}]</small>" if "low" in mean else ""
    return f"{mean['mean']:.4g}{interval}"


def _flatten(record: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{above}{name}: ")
        else:
            yield f"{above}{name}", str(value)


_STYLE = """\
body { max-width: 1240px }
table { display: block; overflow-x: auto }
th, td { overflow-wrap: normal }
.wide th, .wide td { font-size: 13px; padding-right: .7rem }
.about, .missing, small, figcaption { color: #6e6e76 }
.strip { display: flex; flex-wrap: wrap; gap: 10px; margin: 0 0 14px }
figure { margin: 0; width: 192px }
figcaption { font-size: 12px; line-height: 1.35; overflow-wrap: anywhere }
img { max-width: 192px }
"""
