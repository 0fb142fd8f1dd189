"""Which part of DreamMix brings what, on the embedded model? The paper's Table 3 and Fig. 5 with held-out subjects.

Rows: the baseline (DreamBooth: regular pictures of the class alone, captions without attributes; painted in the whole
frame), +DIF (two stages), +TAS (`substitute="auto"`), +ADM (captions with attributes, regular pictures of combined
ones). Each scene asks for the subject as it is and for one edit, and the shipped judge reads what was painted. Parts:
the table, object size, the share of local steps, the steps of a picture, and the trainer's beta, rank and steps.

Every LoRA and reading is kept in the work folder: a run that was killed goes on. Only a run that has all of its
pictures writes results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _ablation_cases import REAL, SWEEPS, Case, Plan, Sweep, Way, draw_place
from _ablation_report import (
    COLUMNS,
    Curve,
    Readings,
    Summary,
    add_goals,
    add_rows,
    add_sizes,
    draw_curves,
    draw_sheet,
    spell,
    write_kinds,
    write_sizes,
    write_tables,
)
from _ablation_work import MicroStudio, Work
from _common import RESULTS, Benchmark
from PIL import Image

from dreammix_trt.report import mark_region
from dreammix_trt.trainer.micro.world import show_mask

SHOWN = 4  # scenes of a sheet


def main() -> int:
    given = parse()
    studio = MicroStudio(given.work, given.threads, given.few_step, asuka=given.part == "asuka")
    sweep, work = SWEEPS[given.part], Work(given.work, studio, say)
    plan = Plan(sweep, given.subjects, given.scenes, given.seeds, given.steps)
    readings: Readings = work.finish(plan.cases())
    if not sweep.axis:
        readings = [*readings, *real_readings(work, readings)]
    name = "ablation" if given.part == "table" else f"ablation_{given.part.replace('-', '_')}"
    name += "_few_step" if given.few_step else ""
    bench, summary = Benchmark(name, threads=given.threads), Summary(readings)
    bench.add("steps of a picture", given.steps)
    add_rows(bench, summary)
    if given.part == "table":
        add_goals(bench, summary)
        add_sizes(bench, readings)
    if sweep.shares:
        add_size_goal(bench, summary)
    text = write_tables(summary, paper=given.part == "table")
    if given.part == "table":
        text += "\n" + write_sizes(readings)
    if sweep.edits:
        text += "\n" + write_kinds(summary, plan.kinds)
    (given.work / f"{name}.md").write_text(text, encoding="utf-8")
    sheet(work, readings).save(given.work / f"{name}-sheet.png")
    if sweep.axis:
        RESULTS.mkdir(exist_ok=True)
        figure(summary, sweep).save(RESULTS / f"{name}.png")
    if not given.json:
        sys.stdout.write(text + "\n")
    return bench.finish(as_json=given.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=SWEEPS, default="table")
    parser.add_argument("--subjects", type=int, default=12)
    parser.add_argument("--scenes", type=int, default=20, help="of each subject")
    parser.add_argument("--seeds", type=int, default=1, help="pictures of each prompt in a scene")
    parser.add_argument("--steps", type=int, default=12, help="of a picture")
    parser.add_argument("--few-step", type=Path, metavar="LORA", help="few-step LoRA, merged into the base that paints")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("ablation-work"), help="where LoRAs and readings are kept")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    for name in ("subjects", "scenes", "seeds", "steps", "threads"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} is {getattr(given, name)}; it must be at least 1")
    return given


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


def real_readings(work: Work, readings: Readings) -> Readings:
    """What the judge makes of real renderings of what the first row asks for: no row can be better but by chance."""
    first = [case for case, _ in readings if case.row == readings[0][0].row]
    return [(Case(Way(REAL, case.way.training), case.place, case.edit, case.seed, case.steps), work.judge_real(case))
            for case in first]  # fmt: skip


def add_size_goal(bench: Benchmark, summary: Summary) -> None:
    """Small objects: all parts kept, two stages against the whole frame."""
    for share in (0.15, 0.2):
        whole = f"whole frame at {share:g}"
        for row in ("local", "both"):
            name = f"all parts kept at {share:g}, {row} / whole frame"
            ratio = summary.ratio(f"{row} at {share:g}", whole, "identity", "all kept")
            if ratio is None:
                bench.add(name, "not defined: no picture of the whole frame keeps all")
            else:
                bench.add(name, ratio, bound=">= 2")
            gap = summary.difference(f"{row} at {share:g}", whole, "identity", "kept")
            bench.add(f"parts kept at {share:g}, {row} less whole frame", spell(gap, 3))


def figure(summary: Summary, sweep: Sweep) -> Image.Image:
    """The curves of a sweep: one a way at sizes, else one a figure of the judge."""
    if sweep.shares:
        curves = [
            Curve(way.name, [(share, mean) for share in sweep.shares
                             if (mean := summary.mean(f"{way.name} at {share:g}", "identity", "kept"))])
            for way in sweep.ways
        ]  # fmt: skip
        return draw_curves(curves, across=sweep.axis, up="share of the parts kept")
    drawn = {"identity: parts kept": ("identity", "kept"), "identity: cosine": ("identity", "cosine"),
             "edit: right": ("editing", "right"), "edit: both": ("editing", "both")}  # fmt: skip
    curves = [
        Curve(name, [(float(row), mean) for row in summary.rows if (mean := summary.mean(row, task, column))])
        for name, (task, column) in drawn.items()
    ]
    return draw_curves(curves, across=sweep.axis, up="share, or cosine")


def sheet(work: Work, readings: Readings) -> Image.Image:
    """The first scenes of every subject: where it is to stand, then each row's picture."""
    shown = [(case, values) for case, values in readings if case.way.name != REAL and not case.seed]
    groups: dict[tuple[int, int, str, float], list[tuple[Image.Image, str]]] = {}
    for case, values in shown:
        place = case.place
        if place.scene >= SHOWN:
            continue
        key = (place.subject, place.scene, case.edit.prompt, place.share)
        if key not in groups:
            scene, mask = draw_place(place)
            groups[key] = [(mark_region(Image.fromarray(scene.background), show_mask(mask)), "where")]
        with Image.open(work.picture_of(case)) as opened:
            picture = opened.convert("RGB")
        told = [f"{name} {values[name]:.2g}" for name in COLUMNS[case.task] if values.get(name) is not None]
        gone = f" (without {', '.join(case.substitute)})" if case.substitute else ""
        groups[key].append((picture, f"{case.row}{gone}: {', '.join(told)}"))
    rows = [(f"subject {number}: {prompt}", tiles) for (number, _, prompt, _), tiles in groups.items()]
    return draw_sheet(rows, "Ablation on the embedded model")


if __name__ == "__main__":
    sys.exit(main())
