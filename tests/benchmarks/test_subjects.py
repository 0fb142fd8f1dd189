"""The evidence of token subjects with a fake studio: its plan, what it reads as copied, goals, and going on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _common
import numpy as np
import pytest
import subjects
from _ablation_cases import Case, Place, draw_place, subject
from _ablation_work import Values, Work
from _common import Benchmark
from _subjects_cases import (
    BOTH,
    COUNTS,
    LORAS,
    NONE,
    PHOTOGRAPHS,
    RANDOM,
    REAL,
    REAL_POSED,
    TOKENS,
    UNDECOUPLED,
    WORDS,
    Reference,
    Rendering,
    SubjectPlan,
    list_ways,
    name_count,
    portraits,
    reference_of,
)
from _subjects_cost import compare, median_step, take_turns
from _subjects_leak import fit_portraits, read_leak
from _subjects_report import SHEET, Table, add_results, draw_subjects, take_whole
from _subjects_work import TokenTable, count_cells, render_case, show_photograph
from PIL import Image

from dreammix_trt.core.subject_tokens import TokenConfig
from dreammix_trt.core.token_adapter import TokenAdapter
from dreammix_trt.engine.enrolment import read_references
from dreammix_trt.trainer.micro.judge import crop_of_mask
from tests.benchmarks.fake_studio import FakeStudio, Killed

WAYS = list_ways("a", "b")
LORA, LONG = LORAS


class FakeSubjects(FakeStudio):
    """As FakeStudio; tokens keep all parts and LoRAs three of four, the others a quarter."""

    def judge(self, case: Case, picture: np.ndarray) -> Values:  # type: ignore[type-arg]
        kept = 0.75 if case.way.training else 1.0 if case.way.source else 0.25
        told = {"kept": kept, "all kept": None if case.edit.changed else float(kept == 1), "cosine": kept / 2}
        return {**super().judge(case, picture), **told, "nearest": 0.5, "pose": 0.0, "white": 0.0}


def make_plan(subjects: int = 2, loras: int = 1, scenes: int = 5) -> SubjectPlan:
    return SubjectPlan(WAYS, subjects, scenes, steps=2, loras=loras)


# -- what is painted --------------------------------------------------------------------------------------------------


def test_rows_are_told_apart_and_those_of_the_sheet_are_among_them() -> None:
    names = [way.name for way in WAYS]
    assert len(set(names)) == len(names) == 15
    assert set(SHEET) < set(names) and names[2:8] == [name_count(count) for count in COUNTS]
    assert UNDECOUPLED not in [way.name for way in list_ways("a")]


def test_the_first_subjects_are_whole_before_the_next_one_begins() -> None:
    numbers = [case.place.subject for case in make_plan().cases()]
    assert numbers == sorted(numbers)
    counts = [sum(case.place.subject == number for case in make_plan().cases()) for number in range(2)]
    assert counts == [15 * 5 * 2, 12 * 5 * 2]  # the second one has no LoRAs
    later = SubjectPlan(WAYS, 1, 5, 2, loras=1, first=1)
    assert [case.place.subject for case in later.cases()] == [1] * 15 * 5 * 2


def test_prompts_of_tokens_have_no_word_for_the_subject_and_every_row_asks_for_the_same_edit() -> None:
    asked: dict[tuple[Place, str], set[Any]] = {}
    for case in make_plan().cases():
        asked.setdefault((case.place, case.task), set()).add(case.edit.changed)
        assert ("sks" in case.edit.prompt.split()) == (case.way.training is not None)
        assert bool(case.substitute) <= (case.way.training is not None)
    assert all(len(changes) == 1 for changes in asked.values())
    what = subject(0).attributes
    first = {(case.row, case.task): case.edit for case in make_plan().cases() if case.place == Place(0, 0)}
    assert first[TOKENS, "identity"].prompt == f"a photo of a {what.shape}"
    assert first[LORA, "identity"].prompt == f"a photo of a sks {what.shape}"
    edit = first[WORDS, "editing"]
    assert edit.changed is not None and edit.changed[0] == "colour" and f" {edit.changed[1]} " in edit.prompt
    assert what.colour in first[WORDS, "identity"].prompt and f"{what.foot} foot" in edit.prompt


def test_every_photograph_is_the_reference_equally_often() -> None:
    turns = [reference_of(Place(0, scene)) for scene in range(10)]
    assert [turns.count(number) for number in range(PHOTOGRAPHS)] == [2] * PHOTOGRAPHS


def test_a_picture_depends_on_the_choice_of_cells_their_number_and_the_adapter(tmp_path: Path) -> None:
    work = Work(tmp_path, FakeSubjects())
    cases = [case for case in make_plan(1).cases() if case.place.scene == 0 and case.task == "identity"]
    assert len({work.picture_of(case) for case in cases}) == len(cases)
    tokens = next(case for case in cases if case.row == TOKENS)
    other = replace(tokens, way=replace(tokens.way, source=Reference("discriminative", "c")))
    assert work.picture_of(other) != work.picture_of(tokens)
    base, again = next(case for case in cases if case.row == NONE), list_ways("c")[0]
    assert work.picture_of(replace(base, way=again)) == work.picture_of(base)


# -- what is copied ---------------------------------------------------------------------------------------------------


def test_a_pose_that_was_taken_over_is_told_from_the_objects_own() -> None:
    """Of real renderings: two subjects in ten scenes."""
    figures: dict[bool, list[list[float]]] = {True: [], False: []}
    for place in (Place(number, scene) for number in range(2) for scene in range(5)):
        for posed, found in figures.items():
            case = Case(WAYS[-1], place, None, 0, 2)  # type: ignore[arg-type]
            leak = read_leak(render_case(case, Rendering(posed)), place)
            found.append([leak[name] or 0.0 for name in ("nearest", "pose", "white")])
    own, taken = (np.mean(figures[posed], 0) for posed in (False, True))
    assert taken[0] >= 0.6 and own[0] <= 0.4
    assert taken[1] > 0.1 and abs(own[1]) < 0.05
    assert abs(taken[2]) < 0.05 and abs(own[2]) < 0.05


def test_a_photograph_fits_itself_best_and_its_mirror_image_worse() -> None:
    scene = portraits(0)[2]  # a mug: its handle is on one side
    mask = np.zeros(scene.image.shape[:2], bool)
    x0, y0, x1, y1 = scene.box
    mask[y0 - 10 : y1 + 10, x0 - 10 : x1 + 10] = True
    white = np.where((scene.alpha > 0.5)[..., None], scene.image, np.uint8(255))
    crop = crop_of_mask(white, mask)
    fits = fit_portraits(crop, 0)
    assert int(np.argmax(fits)) == 2 and fits[2] > sorted(fits)[-2] + 0.1
    assert fit_portraits(np.ascontiguousarray(crop[:, ::-1]), 0)[2] < fits[2] - 0.2


def test_who_does_not_know_the_reference_is_nearest_to_it_once_in_a_round() -> None:
    """The same hole held against each photograph as the reference: gains cancel out, and one is the nearest."""
    picture = draw_place(Place(0, 0))[0].image
    fits = fit_portraits(crop_of_mask(picture, draw_place(Place(0, 0))[1]), 0)
    gains = [fit - (sum(fits) - fit) / (PHOTOGRAPHS - 1) for fit in fits]
    assert sum(gains) == pytest.approx(0)
    found = read_leak(picture, Place(0, 0))
    assert found["pose"] == pytest.approx(gains[0])
    assert found["nearest"] == float(int(np.argmax(fits)) == 0)


def test_white_around_the_object_is_seen() -> None:
    place = Place(0, 0)
    scene, mask = draw_place(place)
    copied = np.where((scene.alpha > 0.05)[..., None], scene.image, np.uint8(255))
    assert read_leak(np.where(mask[..., None], copied, scene.image), place)["white"] == pytest.approx(1, abs=0.05)
    assert read_leak(scene.background, place)["white"] == 0


# -- what it comes to -------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_and_tells_of_the_subjects_that_are_whole(tmp_path: Path) -> None:
    cases, left = list(make_plan().cases()), 15 * 5 * 2 + 2 + 7  # one subject, its two LoRAs, and some of the next
    with pytest.raises(Killed):
        Work(tmp_path, FakeSubjects(dies=left)).finish(cases)
    work = Work(tmp_path, FakeSubjects())
    whole = take_whole(cases, work.list_ready(cases))
    assert {case.place.subject for case, _ in whole} == {0} and len(whole) == 15 * 5 * 2
    assert work.finish(cases) == take_whole(cases, work.list_ready(cases))
    # LoRAs of more subjects are asked for: without them the others still count, but for rows of LoRAs
    more = list(make_plan(loras=2).cases())
    rest = take_whole(more, work.list_ready(more))
    assert {(case.place.subject, case.way.training is not None) for case, _ in rest} == {
        (0, False),
        (0, True),
        (1, False),
    }
    assert take_whole(more, []) == []


def test_goals_are_taken_of_the_subjects_that_have_both_rows(tmp_path: Path) -> None:
    """By hand: tokens keep 1, the class alone .25, LoRAs .75."""
    studio = FakeSubjects(right={NONE: 4, TOKENS: 3, UNDECOUPLED: 1})
    table = Table(Work(tmp_path, studio).finish(make_plan().cases()))
    bench = Benchmark("none")
    add_results(bench, table, 5)
    rows = {row["metric"]: row for row in bench.rows}
    assert rows[f"identity: parts kept, {TOKENS} / {NONE} (2 subjects)"]["value"] == 4
    assert rows[f"identity: parts kept, {TOKENS} / {LONG} (1 subjects)"]["value"] == pytest.approx(4 / 3, abs=1e-3)
    edits = rows[f"edits right, {TOKENS} / {NONE} (2 subjects)"]
    assert edits["value"] == 0.75 and edits["bound"] == ">= 0.8" and not edits["pass"]
    assert rows["subjects and scenes enough"]["pass"] is False
    assert rows[f"parts kept: real rendering / {NONE}, the most a ratio can be"]["value"] == 4
    assert rows[f"parts kept: {LORA}, of the way from {NONE} to a real rendering"]["value"] == pytest.approx(
        2 / 3, abs=1e-3
    )
    gap = rows[f"{TOKENS} less {UNDECOUPLED}, editing: edited part right"]["value"]
    assert gap == "0.400 [0.400, 0.400]"  # three of five scenes, and one
    assert f"{BOTH} less {LORA}, identity: parts kept" in rows


def test_rows_that_were_not_made_are_shown_as_such(tmp_path: Path) -> None:
    work = Work(tmp_path, FakeSubjects())
    readings = work.finish(make_plan(1, loras=0).cases())
    sheet = draw_subjects(work, readings)
    assert sheet.width > (2 + len(SHEET)) * 170
    assert (236, 235, 230) in {colour for _, colour in sheet.getcolors(1 << 20) or ()}


def test_a_cost_is_of_medians_over_turns() -> None:
    """By hand: 1 s without rows and 1.03 s with them, in two of three turns; neither first nor last steps count."""
    turns = [([9.0, 1.0, 1.0, 5.0], [8.0, 1.03, 1.03, 9.0])] * 2 + [([9.0, 2.0, 2.0, 5.0], [9.0, 7.0, 7.0, 5.0])]
    cost = compare(turns, median_step)
    assert cost.mean == pytest.approx(0.03) and cost.low == pytest.approx(0.03) and cost.high == pytest.approx(2.5)


def test_two_works_take_turns_and_the_first_round_does_not_count() -> None:
    told: list[str] = []
    works = [lambda name=name: [float(len(told)), told.append(name)][:1] for name in "ab"]
    assert take_turns(works, 2) == [([2.0], [3.0]), ([5.0], [4.0])]  # type: ignore[arg-type]
    assert told == list("baabba")


# -- what is asked of an engine ---------------------------------------------------------------------------------------


class FakeEngine:
    """Features that are their cells' numbers, and a projection that doubles them."""

    def __init__(self) -> None:
        self.config = TokenConfig(side=256, width=2, context_width=2)
        self.runtime = SimpleNamespace(adapter=SimpleNamespace(config=self.config, sha256="f" * 64))
        self.networks, self.facts = self, SimpleNamespace(scaling_factor=0.5)
        self.tokenizers = [SimpleNamespace(encode=lambda text: np.zeros(77, np.int64))] * 2
        self.added: dict[str, Any] = {}
        self.enrolled: list[tuple[str, str]] = []

    def run(self, network: str, **given: Any) -> dict[str, Any]:
        if network == "token_proj":
            assert given["tokens"].shape == (1, 48, 2)
            return {"token_rows": 2 * given["tokens"]}
        numbers = np.repeat(np.arange(self.config.cells, dtype=np.float32)[:, None], 2, 1)
        some = np.zeros((1, 77, 2), np.float32)
        return {"features": numbers[None], "mean": np.zeros((1, 4, 32, 32)), "hidden": some, "pooled": some[0]}

    def add_subject(self, made: Any) -> None:
        self.added[made.name] = made

    def enroll(self, image: Image.Image, mask: Image.Image, *, class_name: str, name: str) -> None:
        self.enrolled.append((name, class_name))


def test_random_tokens_are_cells_of_the_object_and_the_same_again() -> None:
    engines = [FakeEngine() for _ in range(2)]
    found = [TokenTable(engine).find(0, 1, "random") for engine in engines]  # type: ignore[arg-type]
    first, second = (engine.added[name].tokens.rows for engine, name in zip(engines, found, strict=True))
    assert np.array_equal(first, second) and first.shape == (48, 2)
    cells = first[:, 0] / 2

    inside = read_references(*show_photograph(0, 1), None, engines[0].config)[0].inside
    assert len(set(cells)) == 48 and inside[cells.astype(int)].all() and list(cells) != sorted(cells)


def test_the_engines_own_tokens_are_enrolled_once() -> None:
    engine = FakeEngine()
    table = TokenTable(engine)  # type: ignore[arg-type]
    assert table.find(0, 1, "discriminative") == table.find(0, 1, "discriminative")
    table.find(0, 2, "discriminative")
    assert [what for _, what in engine.enrolled] == [subject(0).attributes.shape] * 2


def test_all_tokens_are_the_cells_of_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an engine counts them, which says that of fewer than 48 some are white."""
    config = FakeEngine().config
    monkeypatch.setattr(TokenAdapter, "open", lambda adapter: SimpleNamespace(config=config))
    seen = [read_references(*show_photograph(0, number), None, config)[0].inside.sum() for number in range(PHOTOGRAPHS)]
    assert count_cells(Path("a"), [0]) == pytest.approx(np.mean(seen)) and min(seen) > 48


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs it with a fake studio; returns the exit code."""
    for module in (subjects, _common):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(subjects, "identify", lambda adapter: str(adapter))
    monkeypatch.setattr(subjects, "count_cells", lambda adapter, numbers: 100.0)
    monkeypatch.setattr(subjects, "find_adapter", lambda: None)

    def run(*words: str, dies: int = 10**9, adapter: Sequence[str] = ("--adapter", "a")) -> int:
        monkeypatch.setattr(subjects, "SubjectStudio", lambda folder, adapters, threads: FakeSubjects(dies=dies))
        shared = [*adapter, "--work", str(tmp_path / "work"), "--scenes", "5", "--steps", "2"]
        monkeypatch.setattr("sys.argv", ["subjects", *shared, *words])
        return subjects.main()

    return run


def test_the_command_writes_results_and_can_tell_of_a_part(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--subjects", "2", "--lora-subjects", "1")
    assert command(*words, "--ready") == 1 and "no subject is whole" in capsys.readouterr().err
    with pytest.raises(Killed):
        command(*words, dies=14 * 5 * 2 + 2 + 3)
    assert not (tmp_path / "results").exists()
    assert command(*words, "--ready") == 1  # one subject is too few
    told = json.loads((tmp_path / "results" / "subjects.json").read_text())["rows"]
    assert {row["metric"]: row["value"] for row in told}["subjects"] == 1
    capsys.readouterr()
    assert command(*words, "--json") == 1
    rows = {row["metric"]: row["value"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert (rows["subjects"], rows["scenes a subject"]) == (2, 5)
    assert (
        rows[f"{TOKENS}, identity: parts kept".replace("parts kept", "kept") + " (10 pictures)"]
        == "1.000 [1.000, 1.000]"
    )
    assert {each.name for each in (tmp_path / "results").iterdir()} == {"subjects.json", "subjects.png"}
    assert {"subjects.md", "subjects.png", "subjects-sheet.png"} <= {
        each.name for each in (tmp_path / "work").iterdir()
    }


def test_rows_can_be_painted_alone(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--subjects", "1", "--ways", RANDOM, "--ways", REAL) == 0
    out = capsys.readouterr().out
    assert f"| {RANDOM} |" in out and f"| {REAL} |" in out and f"| {REAL_POSED} |" not in out
    assert not (tmp_path / "results").exists()
    with pytest.raises(SystemExit, match="no row is called 'LoRA'"):
        command("--ways", "LoRA")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--scenes", "12"), "multiple"),
        (("--subjects", "0"), "at least 1"),
    ],
)
def test_bad_numbers_are_named(command: Any, capsys: pytest.CaptureFixture[str], words: Any, said: str) -> None:
    with pytest.raises(SystemExit):
        command(*words)
    assert said in capsys.readouterr().err


def test_without_an_adapter_it_says_what_makes_one(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(adapter=())
    assert "train-tokens" in capsys.readouterr().err
