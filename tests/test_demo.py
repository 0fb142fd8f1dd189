"""The demo from photographs to report, with a training of a few steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.passport import Passport
from dreammix_trt.demo import _EDITS, check_folder, demo_subject, find_thing, run_demo
from dreammix_trt.engine.retrieval import retrieve
from dreammix_trt.report import Figure, Row, contact_sheet, enlarge_border, enlarge_region, mark_region
from dreammix_trt.trainer.micro.captions import dictionary_of


@pytest.mark.slow
def test_the_demo_makes_its_pages(mug_engine: Path, tmp_path: Path) -> None:
    told: list[str] = []
    pages = run_demo(tmp_path / "demo", training_steps=3, picture_steps=3, progress=lambda name, *_: told.append(name))
    with Image.open(pages.sheet) as sheet:
        assert sheet.width > 1000
        assert sheet.height > 1000
    report = pages.report.read_text(encoding="utf-8")
    for text in ("data:image/png;base64,", "network:unet", "num_inference_steps", "micro-sdxl"):
        assert text in report
    assert {"train", "build", "inpaint"} <= {name.split()[0] for name in told}
    (subject,) = Passport.read(tmp_path / "demo" / "engine").subjects
    assert subject.attributes == {"colour": ["blue"], "part": ["white foot", "white rim"], "decal": ["green heart"]}


class _StopHereError(Exception):
    """Before the first step."""


def test_it_learns_by_these_captions_and_brings_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dictionary travels with the LoRA and changes nothing of what is trained."""
    for name in ("torch", "diffusers", "transformers", "peft"):
        pytest.importorskip(name, reason="the demo trains")
    from dreammix_trt.trainer import lora, preparing
    from dreammix_trt.trainer.task import Task

    asked: list[Task] = []

    def take(task: Task, *_: object) -> None:
        asked.append(task)
        raise _StopHereError

    monkeypatch.setattr(lora, "_Job", take)
    with pytest.raises(_StopHereError):
        run_demo(tmp_path)
    (task,) = asked
    assert task.names.prompts == (
        "a photo of a sks mug",
        "a photo of a blue sks mug",
        "a photo of a plain sks mug",
        "a photo of a sks mug with a white foot",
        "a photo of a sks mug with a white rim",
        "a photo of a sks mug with a green heart",
        "a photo of a blue plain sks mug with a white foot, a white rim and a green heart",
    )
    assert task.attributes == dictionary_of(demo_subject().attributes)
    regular = preparing._list_captions(task)
    plain = preparing._list_captions(replace(task, attributes=None))
    assert regular != plain, "in combinations of the subject's words"
    assert preparing._list_captions(replace(task, regular_attributes=False)) == plain
    assert "regular_attributes" in task.preparing_settings()


def test_its_edits_take_out_what_a_person_would() -> None:
    attributes = dictionary_of(demo_subject().attributes).attributes
    found = {prompt: retrieve(prompt, attributes, "mug", "sks").words for prompt in _EDITS}
    assert found == {
        "a red sks mug": ("blue",),
        "a yellow sks mug": ("blue",),
        "a sks mug with a yellow star": ("green", "heart"),
        "a striped sks mug": (),
    }


def test_a_sheet_holds_every_tile() -> None:
    tiles = [Figure(Image.new("RGB", (64, 32), colour), colour) for colour in ("red", "lime", "blue")]
    sheet = contact_sheet([Row("three", tiles), Row("two", tiles[:2])], tile=100, title="colours")
    seen = {sheet.getpixel((x, y)) for x in range(0, sheet.width, 4) for y in range(0, sheet.height, 4)}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255)} <= seen


def test_a_marked_region_is_veiled_and_the_rest_is_not() -> None:
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 8, 16, 16))
    picture = mark_region(Image.new("RGB", (32, 32), (100, 100, 100)), mask)
    assert picture.getpixel((0, 0)) == (100, 100, 100)
    assert picture.getpixel((12, 12)) != (100, 100, 100)


def test_a_row_s_note_is_written_below_it() -> None:
    tiles = [Figure(Image.new("RGB", (64, 64), "red"))]
    plain, noted = (contact_sheet([Row("one", tiles, note)], tile=200) for note in ("", "what to look for"))
    assert noted.height > plain.height


def test_a_region_is_enlarged_with_a_margin_around_it() -> None:
    picture, mask = Image.new("RGB", (100, 100), "red"), Image.new("L", (100, 100), 0)
    picture.paste((0, 0, 255), (40, 50, 60, 70))
    mask.paste(255, (40, 50, 60, 70))
    region = enlarge_region(picture, mask)
    assert region.size == (34, 34)  # 20 pixels, 0.35 of them more on each side
    assert region.getpixel((17, 17)) == (0, 0, 255)
    assert region.getpixel((2, 2)) == (255, 0, 0)
    corner = Image.new("L", (100, 100), 0)
    corner.paste(255, (0, 0, 20, 20))
    assert enlarge_region(picture, corner).getcolors() == [(34 * 34, (255, 0, 0))]  # nothing from outside the picture


def test_a_border_is_enlarged_where_the_region_s_upper_half_ends() -> None:
    picture, mask = Image.new("RGB", (100, 80), "red"), Image.new("L", (100, 80), 0)
    mask.paste(255, (20, 20, 60, 40))
    mask.paste(255, (20, 40, 90, 60))  # a shadow, wider than the thing
    picture.paste((0, 0, 255), mask=mask)
    part = enlarge_border(picture, mask)
    assert part.size == (20, 20)
    assert sorted(part.getcolors() or ()) == [(200, (0, 0, 255)), (200, (255, 0, 0))]


def test_the_thing_that_is_taken_out_is_marked_with_its_shadow() -> None:
    place = find_thing(128)
    marked = np.asarray(place.mask) > 127
    assert place.image.size == (128, 128) and 0.15 < marked.mean() < 0.35


def test_a_demo_replaces_what_a_demo_wrote_and_nothing_else(tmp_path: Path) -> None:
    check_folder(tmp_path / "new")
    for name in (
        "photos/image/00.png",
        "photos/mask/04.png",
        "lora/subject.json",
        "engine/passport.json",
        "report.html",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    check_folder(tmp_path)
    for name in ("letter.txt", "photos/holiday.jpg", "photos/image/IMG_1.jpg"):
        (tmp_path / name).touch()
        with pytest.raises(InputError, match=f"{name}.*--force"):
            check_folder(tmp_path)
        (tmp_path / name).unlink()
