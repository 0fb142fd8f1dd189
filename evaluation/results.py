"""What an evaluation writes: a row a picture, means by subject and task with intervals, facts of the run.

Rows go to a temporary file as they come. `publish` puts tables and page into place, each whole or not at all.
"""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from dreammix_trt.core.files import atomic_file, write_json
from dreammix_trt.evaluation.metrics.metric import Metric
from dreammix_trt.evaluation.protocol import TASKS
from dreammix_trt.evaluation.statistics import Mean, Tally

SCHEMA: Final = 1
ROWS: Final = "results.csv"
SUMMARY: Final = "summary.json"
TABLE: Final = "summary.csv"
PAGE: Final = "index.html"
ALL: Final = "all"  # stands for every subject
FACTS: Final = (
    *("picture", "subject", "scene", "task", "prompt_name", "prompt", "substitute", "seed", "painted_seconds"),
    *("thumbnail", "scene_thumbnail", "warnings"),
)


@dataclass
class Results:
    """The results of one evaluation as they come.

    facts: of the run.
    total: how many pictures there will be.
    """

    out: Path
    metrics: Sequence[Metric]
    facts: Mapping[str, Any]
    total: int
    tally: Tally = field(default_factory=Tally)
    measured: int = 0
    by_task: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TASKS, 0))
    painted: int = 0
    photographs: dict[str, list[str]] = field(default_factory=dict)
    _rows: IO[str] = field(init=False)
    _writer: Any = field(init=False)

    def __post_init__(self) -> None:
        self._rows = tempfile.TemporaryFile("w+", newline="", encoding="utf-8")  # noqa: SIM115 (close does it)
        self._writer = csv.DictWriter(self._rows, [*FACTS, *(each.name for each in self.metrics if not each.missing)])
        self._writer.writeheader()

    def close(self) -> None:
        self._rows.close()

    def add(self, facts: Mapping[str, Any], values: Mapping[str, float | None], *, painted: bool) -> None:
        """Add a picture.

        facts: of FACTS.
        values: of the metrics; None: it has none.
        painted: whether it was painted now, or was there.
        """
        self.tally.add(facts["subject"], facts["task"], values)
        spelt = {name: "" if value is None else f"{value:.6g}" for name, value in values.items()}
        self._writer.writerow({**facts, **spelt})
        self.measured += 1
        self.by_task[facts["task"]] += 1
        self.painted += painted

    def rows(self) -> Iterator[dict[str, str]]:
        """Every row so far, read back one at a time."""
        self._rows.flush()
        self._rows.seek(0)
        yield from csv.DictReader(self._rows)
        self._rows.seek(0, 2)

    def publish(self, *, final: bool) -> dict[str, Any]:
        """Write all tables and the page; returns the summary.

        final: all pictures are measured; then measures of all pictures together are made, too.
        """
        from dreammix_trt.evaluation.page import write_page

        self._rows.flush()
        self._rows.seek(0)
        with atomic_file(self.out / ROWS) as temporary, temporary.open("w", encoding="utf-8", newline="") as copy:
            shutil.copyfileobj(self._rows, copy)
        self._rows.seek(0, 2)
        summary = self.summarise(final=final)
        write_json(self.out / SUMMARY, summary)
        with atomic_file(self.out / TABLE) as temporary, temporary.open("w", encoding="utf-8", newline="") as table:
            writer = csv.writer(table)
            writer.writerow(["task", "subject", "metric", "unit", "mean", "low", "high", "pictures"])
            writer.writerows(_spell_table(summary))
        with atomic_file(self.out / PAGE) as temporary:
            write_page(temporary, summary, self.rows(), self.photographs)
        return summary

    def summarise(self, *, final: bool) -> dict[str, Any]:
        """The means as plain JSON values: by task over all subjects, and by subject and task."""
        together = {task: {each.name: each.result(task) if final else None for each in self.metrics} for task in TASKS}
        tasks: dict[str, dict[str, Any]] = {}
        subjects: dict[str, dict[str, Any]] = {}
        for task in TASKS:
            for metric in self.metrics:
                whole = together[task][metric.name]
                mean = self.tally.over_subjects(task, metric.name) if whole is None else Mean(whole, self.by_task[task])
                if mean:
                    tasks.setdefault(task, {})[metric.name] = _spell_mean(mean)
            for subject in self.tally.subjects:
                for metric in self.metrics:
                    if mean := self.tally.of_subject(subject, task, metric.name):
                        subjects.setdefault(subject, {}).setdefault(task, {})[metric.name] = _spell_mean(mean)
        return {
            "schema": SCHEMA,
            "finished": final,
            "pictures": {"measured": self.measured, "of": self.total, "painted_now": self.painted},
            "metrics": {each.name: _describe(each) for each in self.metrics},
            "tasks": tasks,
            "subjects": subjects,
            "run": dict(self.facts),
        }


def _describe(metric: Metric) -> dict[str, Any]:
    facts = {"unit": metric.unit, "better": metric.better, "about": metric.about, "measured": not metric.missing}
    return facts | ({"missing": metric.missing} if metric.missing else {})


def _spell_mean(mean: Mean) -> dict[str, Any]:
    interval = {} if mean.low is None else {"low": mean.low, "high": mean.high}
    return {"mean": mean.mean, **interval, "pictures": mean.pictures}


def _spell_table(summary: Mapping[str, Any]) -> Iterator[list[str]]:
    """Rows of the table of means; what is not measured says so."""
    groups = {(task, ALL): values for task, values in summary["tasks"].items()}
    groups |= {(task, name): values for name, tasks in summary["subjects"].items() for task, values in tasks.items()}
    for (task, subject), values in groups.items():
        for metric, facts in summary["metrics"].items():
            if metric in values:
                numbers = (values[metric].get(name) for name in ("mean", "low", "high"))
                spelt = ["" if number is None else f"{number:.6g}" for number in numbers]
                yield [task, subject, metric, facts["unit"], *spelt, str(values[metric]["pictures"])]
            elif subject == ALL and not facts["measured"]:
                yield [task, subject, metric, facts["unit"], "not measured", "", "", "0"]
