"""The ablation with a fake trainer, painter and judge: arithmetic, intervals, and going on after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import _common
import ablation
import numpy as np
import pytest
from _ablation_cases import ADM, DREAMBOOTH, REAL, SWEEPS, TABLE, Case, Place, Plan, draw_place, edits_of
from _ablation_report import (
    Curve,
    Summary,
    add_goals,
    add_sizes,
    draw_curves,
    spell,
    split_by_size,
    write_kinds,
    write_sizes,
    write_tables,
)
from _ablation_work import Work, score
from _common import Benchmark

from dreammix_trt.evaluation.statistics import Mean, bootstrap_interval
from tests.benchmarks.fake_studio import FakeStudio, Killed

ROWS = [way.name for way in TABLE]


def small_plan(part: str = "table") -> Plan:
    return Plan(SWEEPS[part], subjects=2, scenes=4, seeds=1, steps=2)


def test_small_things_are_told_apart() -> None:
    """The table's own places have sizes from 0.2 to 0.7 of the frame; the goal is for those below 0.3."""
    cases = [case for case in Plan(SWEEPS["table"], 3, 10, 1, 2).cases() if case.row in ("baseline", "+DIF")]
    readings = [
        (case, {"kept": 1.0, "all kept": 0.25 + 0.5 * (case.row == "+DIF"), "cosine": 0.5, "right": None, "both": None})
        for case in cases
    ]
    split = split_by_size(readings)
    assert list(split) == ["0.2 to 0.3", "0.3 to 0.45", "0.45 to 0.7"]
    found = [summary.mean("baseline", "identity", "kept") for summary in split.values()]
    assert sum(mean.pictures for mean in found if mean) == 30
    bench = Benchmark("ablation", threads=1)
    add_sizes(bench, readings)
    ratio = {row["metric"]: row for row in bench.rows}["size 0.2 to 0.3, all parts kept, +DIF / baseline"]
    assert ratio["value"] == 3 and ratio["bound"] == ">= 2" and ratio["pass"]
    assert "| 0.2 to 0.3 |" in write_sizes(readings)


def test_what_paints_is_part_of_a_picture_but_not_of_a_lora(tmp_path: Path) -> None:
    cases = list(small_plan("picture-steps").cases())[:4]
    plain, few = FakeStudio(), FakeStudio(painter="distilled")
    Work(tmp_path, plain).finish(cases)
    Work(tmp_path, few).finish(cases)
    assert plain.trained and not few.trained
    assert few.painted == plain.painted


def test_a_killed_run_goes_on_where_it_ended(tmp_path: Path) -> None:
    whole = FakeStudio()
    expected = Work(tmp_path / "whole", whole).finish(small_plan().cases())
    orders = len(whole.painted) + len(whole.trained)
    trained, painted = [], []
    for _ in range(orders):  # every run does three things and dies
        studio = FakeStudio(dies=3)
        try:
            found = Work(tmp_path / "pieces", studio).finish(small_plan().cases())
            break
        except Killed:
            continue
        finally:
            trained += studio.trained
            painted += studio.painted
    assert trained == whole.trained == [(n, t) for n in range(2) for t in (DREAMBOOTH, ADM)]
    assert painted == whole.painted
    assert found == expected


def test_a_picture_that_two_rows_share_is_painted_once(tmp_path: Path) -> None:
    """TAS changes nothing where the prompt contradicts nothing, such as an identity."""
    studio = FakeStudio()
    readings = Work(tmp_path, studio).finish(small_plan().cases())
    assert len(readings) == 2 * 4 * 2 * len(TABLE)
    shared = {(case.way.training, case.place, case.edit.prompt, str(case.fields)) for case, _ in readings}
    assert len(studio.painted) == len(shared) < len(readings)
    auto = [case for case, _ in readings if case.way.name == "++TAS"]
    assert all(case.substitute == () for case in auto if case.edit.kind == "identity")
    assert all(case.substitute for case in auto if case.edit.kind == "body colour")


@pytest.mark.parametrize("change", [{"rank": 8}, {"beta": 0.5}, {"steps": 10}, {"captioned": False}])
def test_another_training_has_other_loras_and_readings(tmp_path: Path, change: dict[str, float]) -> None:
    work = Work(tmp_path, FakeStudio())
    case = next(small_plan().cases())
    other = replace(case, way=replace(case.way, training=replace(ADM, **change)))
    same = replace(case, way=replace(case.way, training=ADM))
    assert work.lora_of(0, other.way.training) != work.lora_of(0, ADM)
    assert work.picture_of(other) != work.picture_of(same)


def test_more_scenes_keep_those_that_are_there() -> None:
    few = set(Plan(SWEEPS["table"], 1, 4, 1, 2).cases())
    assert few < set(Plan(SWEEPS["table"], 2, 8, 2, 2).cases())


def test_the_figures_of_a_picture() -> None:
    told = {"edit_success": 1.0, "attributes_kept": 0.75, "subject_cosine": 0.5, "seam_gradient": 2.0}
    assert score(told) == {"right": 1, "kept": 0.75, "both": 0, "all kept": None, "cosine": 0.5, "seam": 2}
    assert score({**told, "attributes_kept": 1.0})["both"] == 1
    assert score({**told, "edit_success": None, "attributes_kept": 1.0})["all kept"] == 1


def test_means_count_subjects_and_not_pictures() -> None:
    """By hand: subject 0 has 1 of 2 edits right, subject 1 all 4; the mean is of .5 and 1, not 5 of 6."""
    summary = Summary([(_case(0, n), {"right": float(n < 1)}) for n in range(2)]
                      + [(_case(1, n), {"right": 1.0}) for n in range(4)])  # fmt: skip
    mean = summary.mean("baseline", "editing", "right")
    assert mean is not None and (mean.mean, mean.pictures) == (0.75, 6)
    assert (mean.low, mean.high) == (0.5, 1.0)  # of two subjects, a draw has one of them twice in half of the cases
    assert summary.mean("baseline", "identity", "right") is None
    assert summary.mean("+DIF", "editing", "right") is None
    assert spell(mean) == "0.75 [0.50, 1.00]" and spell(None) == "-"


def test_differences_are_taken_subject_by_subject() -> None:
    """Both subjects gain .25, whatever they start from: the interval is a point."""
    gains = [(0, "baseline", 0.0), (0, "+DIF", 0.25), (1, "baseline", 0.5), (1, "+DIF", 0.75)]
    readings = [(_case(subject, 0, row), {"right": value}) for subject, row, value in gains]
    summary = Summary(readings)
    gap = summary.difference("+DIF", "baseline", "editing", "right")
    assert gap is not None and (gap.mean, gap.low, gap.high) == (0.25, 0.25, 0.25)
    assert summary.ratio("+DIF", "baseline", "editing", "right") == 2.0
    assert bootstrap_interval([0.0, 0.5]) == (0.0, 0.5)


def test_goals_and_tables(tmp_path: Path) -> None:
    """By hand: right in 1 of 4 scenes at first and in 2 of 4 at the end; parts kept .5 and 1, mean .75."""
    studio = FakeStudio(right={"baseline": 1, "+DIF": 1, "++TAS": 1, "+++ADM": 2})
    summary = Summary(Work(tmp_path, studio).finish(small_plan().cases()))
    bench = Benchmark("none")
    add_goals(bench, summary)
    rows = {row["metric"]: row for row in bench.rows}
    assert rows["edits right, full / baseline"]["value"] == 2.0
    assert rows["edits right and all else kept, full / baseline"]["value"] == 2.0
    assert rows["identity: parts kept, full / baseline"]["value"] == 1.0
    assert rows["subjects and scenes enough"]["pass"] is False
    assert rows["+++ADM less ++TAS, editing: right"]["value"] == "0.250 [0.250, 0.250]"
    text = write_tables(summary, paper=True)
    assert "2 subjects, 4 scenes each." in text
    line = "| +++ADM | 0.50 [0.50, 0.50] | 0.75 [0.50, 1.00] | 0.25 [0.00, 0.50] | 0.25 [0.25, 0.25] "
    assert f"{line}| -1.00 [-1.00, -1.00] | 0.289 | 0.674 | 0.695 |" in text
    assert "| baseline | 1.00 [1.00, 1.00] | 0.00 [0.00, 0.00] |" in write_kinds(summary, ["body colour", "pattern"])


def test_places_are_the_same_in_every_row_and_the_edit_shows_in_the_real_rendering() -> None:
    place = Place(0, 1)
    scene, mask = draw_place(place)
    edit = next(each for each in edits_of(0, 1) if each.kind == "body colour")
    edited, same = draw_place(place, edit)
    assert np.array_equal(scene.background, edited.background) and np.array_equal(mask, same)
    assert edit.changed is not None and edited.attributes.colour == edit.changed[1] != scene.attributes.colour
    small = [draw_place(Place(0, 1, share))[1].mean() for share in (0.15, 0.3, 0.6)]
    assert all(one < two for one, two in pairwise(small))


def test_a_figure_shows_means_where_they_are() -> None:
    """The only point, .5 of 1, stands half way up the axis."""
    picture = np.asarray(draw_curves([Curve("a", [(1.0, Mean(0.5, 3, 0.4, 0.6))])], across="x", up="y"))
    marked = np.argwhere((picture == (52, 87, 213)).all(-1))
    dot = marked[(marked[:, 1] > 80) & (marked[:, 1] < 600)]
    assert abs(dot[:, 0].mean() - (40 + (380 - 58)) / 2) < 2
    assert np.ptp(dot[:, 0]) == pytest.approx(0.2 * (380 - 58 - 40), abs=2)


@pytest.mark.parametrize("part", ["table", "size", "size-base"])
def test_the_command_writes_results_when_all_pictures_are_there(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, studio = tmp_path / "results", FakeStudio(right={way: 2 for way in (*ROWS, REAL)})
    for module in (ablation, _common):
        monkeypatch.setattr(module, "RESULTS", results)
    monkeypatch.setattr(ablation, "MicroStudio", lambda folder, threads, few_step, asuka: studio)
    words = ["ablation", "--part", part, "--subjects", "2", "--scenes", "2", "--work", str(tmp_path / "work")]
    monkeypatch.setattr("sys.argv", words)
    studio._left = 9
    with pytest.raises(Killed):
        ablation.main()
    assert not results.exists()
    studio._left = 10**9
    assert ablation.main() == 1  # two subjects are too few, and nothing is better than anything here
    told = capsys.readouterr()
    rows = {row["metric"]: row["value"] for row in json.loads(next(results.glob("*.json")).read_text())["rows"]}
    assert (rows["subjects"], rows["scenes a subject"]) == (2, 2)
    assert "2 subjects, 2 scenes each." in told.out and "min left" in told.err
    assert (tmp_path / "work" / f"{next(results.glob('*.json')).stem}-sheet.png").exists()
    assert len(list(results.glob("*.png"))) == (part != "table")
    assert len(studio.trained) == {"table": 4, "size": 2, "size-base": 0}[part]
    if part != "table":  # of two subjects, in two scenes, one keeps all
        assert rows["both at 0.2, identity: kept (4 pictures)"] == "0.750 [0.500, 1.000]"
        assert rows["all parts kept at 0.2, both / whole frame"] == 1.0
    real = f"{REAL}, editing: right (4 pictures)"
    assert (rows.get(real) == "1.000 [1.000, 1.000]") == (part == "table")


def test_no_row_is_called_as_real_renderings_are() -> None:
    assert REAL not in ROWS and len(set(ROWS)) == len(ROWS)


def _case(subject: int, scene: int, row: str = "baseline") -> Case:
    way = next(way for way in TABLE if way.name == row)
    edit = next(each for each in edits_of(0, 0) if each.kind == "body colour")
    return Case(way, Place(subject, scene), edit, 0, 2)
