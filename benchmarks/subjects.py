"""A subject from one picture against a LoRA of five: DreamInpainter's claims on the embedded model.

Each of the held-out subjects stands in scenes that ask for it as it is and for one edit. Rows: no reference (the base
told the class alone), the same told everything in words, 1 to 48 discriminative tokens, 24 tokens of cells drawn by
chance, 24 with an adapter that was trained without the decoupling regularisation, LoRAs after 200 and 800 steps, tokens
beside the LoRA, and real renderings. The paper's row of all N tokens is read as 48, the most that an engine takes; the
results say how many cells an object has.

The shipped judge reads parts and likeness; how much of the reference's pose and background is copied is read as
`_subjects_leak.py` says. Part `cost` times enrolling, a step and a change of subject.

Every LoRA and reading is kept in the work folder: a run that was killed goes on. Subjects are painted one after the
other, so `--ready` can report those that are whole at any time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _ablation_cases import Way
from _ablation_report import Readings, write_kinds, write_tables
from _ablation_work import Work
from _common import RESULTS, Benchmark
from _subjects_cases import KINDS, SCENES_OF_A_ROUND, SubjectPlan, list_ways
from _subjects_cost import measure_cost
from _subjects_report import TABLES, Table, add_results, draw_counts, draw_subjects, take_whole
from _subjects_work import SubjectStudio, count_cells, find_adapter, identify


def main() -> int:
    given = parse()
    if given.part == "cost":
        bench = Benchmark("subjects_cost", threads=given.threads)
        measure_cost(bench, given.adapter, given.work, given.threads, given.rounds, given.swaps)
        return bench.finish(as_json=given.json)
    adapters = [each for each in (given.adapter, given.undecoupled) if each]
    plan = SubjectPlan(choose_ways(given), given.subjects, given.scenes, given.steps, given.lora_subjects, given.first)
    work = Work(given.work, SubjectStudio(given.work, adapters, given.threads), say)
    cases = list(plan.cases())
    readings = take_whole(cases, work.list_ready(cases) if given.ready else work.finish(cases))
    if not readings:
        say("no subject is whole yet: run without --ready")
        return 1
    return report(given, work, readings)


def report(given: argparse.Namespace, work: Work, readings: Readings) -> int:
    """Tables, sheet and figure in the work folder; results where no row was left out."""
    table = Table(readings)
    text = write_tables(table.all, TABLES) + "\n" + write_kinds(table.all, KINDS)
    (given.work / "subjects.md").write_text(text, encoding="utf-8")
    draw_subjects(work, readings).save(given.work / "subjects-sheet.png")
    figure = draw_counts(table.all)
    figure.save(given.work / "subjects.png")
    if not given.json:
        sys.stdout.write(text + "\n")
    if given.ways or given.first:
        say("rows or subjects were left out: no results are written")
        return 0
    bench = Benchmark("subjects", threads=given.threads)
    bench.add("steps of a picture", given.steps)
    bench.add("cells of an object, mean of the references: all tokens", count_cells(given.adapter, table.all.subjects))
    add_results(bench, table, given.scenes)
    RESULTS.mkdir(exist_ok=True)
    figure.save(RESULTS / "subjects.png")
    return bench.finish(as_json=given.json)


def choose_ways(given: argparse.Namespace) -> tuple[Way, ...]:
    """The rows that are asked for."""
    ways = list_ways(identify(given.adapter), identify(given.undecoupled) if given.undecoupled else "")
    if given.ways is None:
        return tuple(way for way in ways if given.lora_subjects or way.training is None)
    unknown = set(given.ways) - {way.name for way in ways}
    if unknown:
        names = ", ".join(repr(way.name) for way in ways)
        raise SystemExit(f"--ways: no row is called {', '.join(map(repr, sorted(unknown)))}; there are {names}")
    return tuple(way for way in ways if way.name in given.ways)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("table", "cost"), default="table")
    parser.add_argument("--adapter", type=Path, help="token adapter, file or folder; default: the embedded base's")
    parser.add_argument("--undecoupled", type=Path, metavar="ADAPTER", help="one trained with --decoupling 0")
    parser.add_argument("--subjects", type=int, default=24)
    parser.add_argument("--lora-subjects", type=int, default=12, metavar="N", help="subjects that LoRAs are trained of")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="first subject, where processes share a work")
    parser.add_argument("--scenes", type=int, default=10, help="of each subject; a multiple of 5")
    parser.add_argument("--steps", type=int, default=12, help="of a picture")
    parser.add_argument("--ways", action="append", metavar="ROW", help="paint this row alone; may be given repeatedly")
    parser.add_argument("--ready", action="store_true", help="paint nothing: report the subjects that are whole")
    parser.add_argument("--rounds", type=int, default=30, help="cost: turns of each measurement")
    parser.add_argument("--swaps", type=int, default=100, help="cost: changes of subject of each kind")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("subjects-work"), help="where LoRAs and readings are kept")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    given.adapter = given.adapter or find_adapter()
    if given.adapter is None:
        parser.error("the embedded base has no token adapter: give --adapter, as `dreammix-trt train-tokens` makes it")
    least = {
        "subjects": 1,
        "lora_subjects": 0,
        "first": 0,
        "scenes": 5,
        "steps": 1,
        "rounds": 2,
        "swaps": 2,
        "threads": 1,
    }
    for name, bound in least.items():
        if getattr(given, name) < bound:
            option = name.replace("_", "-")
            parser.error(f"--{option} is {getattr(given, name)}; it must be at least {bound}")
    if given.scenes % SCENES_OF_A_ROUND:
        parser.error(
            f"--scenes is {given.scenes}; the {SCENES_OF_A_ROUND} references take turns: give a multiple of them"
        )
    return given


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
