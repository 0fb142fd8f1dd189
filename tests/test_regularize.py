"""Regular pictures: what is painted where, runs that go on, and masks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dreammix_trt import regularize
from dreammix_trt.cli import app
from dreammix_trt.core.attributes import AttributeDictionary
from dreammix_trt.core.errors import Cancelled, DreamMixError, InputError
from dreammix_trt.core.files import hold_alone
from dreammix_trt.engine import DreamMix, read_request
from dreammix_trt.regularize import Painted, Regular, paint_regular
from dreammix_trt.trainer.attributes import combine_prompts
from dreammix_trt.trainer.photographs import read_photographs
from dreammix_trt.trainer.regular_folder import RegularPicture, read_regular
from tests.trainer.test_segment import make_scene, write_network

MUG = AttributeDictionary.of("mug", {"colour": ["blue"], "part": ["white foot"]}, "hand", "here", {"colour": ["red"]})
FIELDS = (("num_inference_steps", 2),)


@pytest.fixture(scope="module")
def dm(mug_engine: Path) -> Iterator[DreamMix]:
    with DreamMix.load(mug_engine, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs, one of them larger than the base's side."""
    folder = tmp_path_factory.mktemp("photos")
    for n, scale in enumerate((1, 4)):
        image, subject = make_scene()
        for kind, array in (("image", image), ("mask", np.where(subject, 255, 0).astype(np.uint8))):
            (folder / kind).mkdir(exist_ok=True)
            Image.fromarray(array).resize((80 * scale, 60 * scale)).save(folder / kind / f"{n}.png")
    return folder


def order(**changes: Any) -> Regular:
    return Regular(**{"dictionary": MUG, "count": 3, "seed": 5, "fields": FIELDS, **changes})


def run(dm: DreamMix, out: Path, asked: Regular, **options: Any) -> Painted:
    return paint_regular(dm, asked, out, **options)


def stamps(out: Path) -> dict[str, tuple[int, bytes]]:
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in out.rglob("*-*.png")}


def test_pictures_are_painted_by_the_base_alone_and_say_how(dm: DreamMix, tmp_path: Path) -> None:
    done = run(dm, tmp_path / "out", order())
    assert (done.new, done.kept) == (3, 0)
    prompts = combine_prompts(MUG, 3, 5)
    found = {each.name.rpartition("/")[2]: each for each in read_regular(tmp_path / "out")}
    for number, prompt in enumerate(prompts):
        picture = found[str(5 + number)]
        request = read_request(picture.image)
        assert (request.prompt, request.seed, request.subject) == (prompt, 5 + number, "")
        assert picture.caption == prompt
        assert request.num_inference_steps == 2
        with Image.open(picture.image) as image, Image.open(picture.mask or "") as mask:
            assert image.size == mask.size == (128, 128)
            assert 0.05 < (np.asarray(mask) > 127).mean() < 0.9
    with Image.open(done.sheet) as sheet:
        assert sheet.width > 3 * 192


def test_the_subject_s_places_are_painted_anew(dm: DreamMix, photos: Path, tmp_path: Path) -> None:
    files = tuple(read_photographs(photos))
    run(dm, tmp_path / "out", order(photographs=files))
    found = sorted(read_regular(tmp_path / "out"), key=lambda each: int(each.name.rpartition("/")[2]))
    for number, picture in enumerate(found):
        photograph = files[number % 2].read()
        size = (80, 60) if number % 2 == 0 else (171, 128)  # the short side is at most the base's
        with Image.open(picture.image) as image, Image.open(picture.mask or "") as mask:
            assert image.size == mask.size == size
            painted, hole = np.asarray(image).astype(int), np.asarray(mask) > 127
        subject = np.asarray(Image.fromarray(photograph.subject).resize(size)) > 0
        assert hole[subject].all(), "nothing of the subject is left"
        if number == 0:
            far = ~_grow(hole, 8)
            assert (painted[far] == photograph.image[far]).all(), "what is around it stays"
            assert abs(painted - photograph.image)[hole].mean() > 5


def _grow(mask: np.ndarray, by: int) -> np.ndarray:
    padded = np.pad(mask, by)
    height, width = mask.shape
    shifts = [padded[y : y + height, x : x + width] for y in range(2 * by + 1) for x in range(2 * by + 1)]
    return np.any(shifts, 0)


def test_a_run_that_was_killed_goes_on(dm: DreamMix, tmp_path: Path) -> None:
    whole = run(dm, tmp_path / "whole", order())
    wanted = {
        Path(name).relative_to(tmp_path / "whole"): data for name, (_, data) in stamps(tmp_path / "whole").items()
    }

    def stop(_name: str, fraction: float, _message: str) -> None:
        if fraction > 0.5:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        run(dm, tmp_path / "out", order(), progress=stop)
    before = stamps(tmp_path / "out")
    assert len(before) == 4 and not (tmp_path / "out" / "sheet.png").exists()
    lone = next(file for file in (tmp_path / "out").rglob("*-image.png"))
    lone.unlink()  # a picture comes after its mask, so it is what a kill leaves out
    again = run(dm, tmp_path / "out", order())
    assert (again.new, again.kept, whole.new) == (2, 1, 3)
    after = stamps(tmp_path / "out")
    kept = [name for name, stamp in before.items() if after[name] == stamp]
    assert len(kept) == 2
    assert {Path(name).relative_to(tmp_path / "out"): data for name, (_, data) in after.items()} == wanted
    assert run(dm, tmp_path / "out", order()).new == 0


def test_a_batch_paints_the_same_pictures(dm: DreamMix, tmp_path: Path) -> None:
    for name, batch in (("one", 1), ("two", 2)):
        assert run(dm, tmp_path / name, order(), batch=batch).new == 3
    pictures = [[data for _, (_, data) in sorted(stamps(tmp_path / name).items())] for name in ("one", "two")]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 6


CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"seed": 6},
    "count": {"count": 4},
    "contrast": {"contrast": 0.25},
    "attributes": {"dictionary": AttributeDictionary.of("mug", {"colour": ["green"]}, "hand", "here")},
    "base": {"base": "another"},
    "num_inference_steps": {"fields": (("num_inference_steps", 3),)},
    "guidance_scale": {"fields": (*FIELDS, ("guidance_scale", 3.0))},
}


def test_other_settings_are_refused_by_name(dm: DreamMix, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(dm, out, order(count=3))
    before = stamps(out)
    for name, change in {**CHANGES, "photographs": {"photographs": tuple(read_photographs(photos))}}.items():
        with pytest.raises(InputError, match=rf"was made with {name} .*--force"):
            run(dm, out, order(**change))
    assert stamps(out) == before
    bottle = AttributeDictionary.of("bottle", {"colour": ["green"]}, "hand", "here")
    done = run(dm, out, order(dictionary=bottle, count=1), force=True)
    assert (done.new, [each.caption for each in read_regular(out)]) == (1, ["a photo of a bottle"])


def test_a_mask_that_was_changed_is_another_setting(dm: DreamMix, photos: Path, tmp_path: Path) -> None:
    files = tuple(read_photographs(photos))
    settings = order(photographs=files).to_dict(None)
    copied = tmp_path / "mask.png"
    mask = Image.open(files[0].mask or "")
    mask.paste(255, (0, 0, 9, 9))
    mask.save(copied)
    changed = order(photographs=(replace(files[0], mask=copied), files[1])).to_dict(None)
    assert [name for name in settings if settings[name] != changed[name]] == ["photographs"]


def test_a_sheet_of_very_many_shows_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreammix_trt import regularize

    monkeypatch.setattr(regularize, "_MOST_SHOWN", 4)
    pictures = []
    for n in range(10):
        Image.new("RGB", (8, 8), (25 * n, 0, 200)).save(tmp_path / f"{n}-image.png")
        pictures.append(RegularPicture(tmp_path / f"{n}-image.png", None, "a mug", f"a mug/{n}"))
    regularize.write_sheet(pictures, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        seen = {colour for _, colour in sheet.getcolors(1 << 20) or ()}
    assert {n for n in range(10) if (25 * n, 0, 200) in seen} == {0, 3, 6, 9}


def test_a_folder_with_other_files_is_left_alone(dm: DreamMix, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear all")
    for force in (False, True):
        with pytest.raises(InputError, match="holds other files"):
            run(dm, tmp_path, order(), force=force)
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def test_few_words_take_turns_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    few = AttributeDictionary.of("mug", {"part": ["foot"]}, "hand", "here", {"colour": ["red"]})
    prompts = order(dictionary=few, count=9).prompts()
    assert len(set(prompts)) == 4 and prompts[4:8] == prompts[:4]
    assert "give 4 different prompts, which take turns in 9 pictures" in caplog.text


def test_words_that_the_base_cannot_read_are_named(
    dm: DreamMix, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = {"material": ["bamboo"], "colour": ["blue"]}
    odd = AttributeDictionary.of("mug", plain, "hand", "here", {"material": ["clay"], "colour": ["red"]})
    run(dm, tmp_path / "odd", order(dictionary=odd, count=9, fields=(("num_inference_steps", 1),)))
    assert "the base's text encoder hardly knows bamboo; other words" in caplog.text
    caplog.clear()
    run(dm, tmp_path / "known", order(count=1))
    assert caplog.text == ""


class Seer:
    """A segmenter that marks the upper half of the picture, or nothing, or what is not asked for."""

    style = "u2net"

    def __init__(self, sees: str, file: Path) -> None:
        self.file, self._sees = file, sees

    def find_subject(self, rgb: np.ndarray) -> np.ndarray | None:
        if self._sees == "nothing":
            return None
        mask = np.zeros(rgb.shape[:2], np.uint8)
        mask[: len(mask) // 2 if self._sees == "half" else 1] = 255
        return mask


def test_masks_are_what_the_segmenter_finds_in_the_painted_region(
    dm: DreamMix, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = run(dm, tmp_path / "plain", order(count=1))
    (picture,) = read_regular(tmp_path / "plain")
    region = np.asarray(Image.open(picture.mask or "")) > 127
    (tmp_path / "u2net.onnx").write_bytes(b"a network")
    for sees in ("half", "nothing", "elsewhere"):
        caplog.clear()
        run(dm, tmp_path / sees, order(count=1), segmenter=Seer(sees, tmp_path / "u2net.onnx"))
        (found,) = read_regular(tmp_path / sees)
        mask = np.asarray(Image.open(found.mask or "")) > 127
        wanted = region.copy()
        if sees == "half":
            wanted[64:] = False
        assert (mask == wanted).all()
        assert ("sees nothing in what was painted" in caplog.text) == (sees != "half")
        with pytest.raises(InputError, match="was made with segmenter"):
            run(dm, tmp_path / sees, order(count=1))
    assert plain.new == 1


def test_a_run_goes_on_with_the_same_segmenter_whatever_its_file_is_called(tmp_path: Path) -> None:
    out, file = tmp_path / "regular", tmp_path / "u2net.onnx"
    out.mkdir()
    file.write_bytes(b"a network")

    def begin(segmenter: Any) -> None:
        regularize._begin(out, order().to_dict(segmenter), force=False)

    begin(Seer("half", file))
    begin(Seer("half", Path(shutil.copy(file, tmp_path / "copy.onnx"))))
    other = Seer("half", file)
    other.style = "isnet"
    with pytest.raises(InputError, match=r"was made with segmenter .*u2net.*isnet"):
        begin(other)
    file.write_bytes(b"another network")
    with pytest.raises(InputError, match="was made with segmenter"):
        begin(Seer("half", file))


# -- the command ------------------------------------------------------------------------------------------------------


def call(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["regularize", *(str(word) for word in words)])


@pytest.fixture
def attributes(tmp_path: Path) -> Path:
    MUG.write(tmp_path / "attributes.json")
    return tmp_path / "attributes.json"


def test_the_command_paints_and_goes_on(mug_engine: Path, photos: Path, attributes: Path, tmp_path: Path) -> None:
    network = write_network(tmp_path / "u2net.onnx", side=64)
    words = [mug_engine, attributes, "-o", tmp_path / "out", "--photos", photos, "-n", "2", "--steps", "1"]
    segment = ["--segment", "--segmenter", network, "--threads", "1"]
    first = call(*words, *segment, "--json")
    assert first.exit_code == 0, first.output
    record = json.loads(first.stdout)
    assert record == {
        "regular": str(tmp_path / "out"),
        "sheet": str(tmp_path / "out/sheet.png"),
        "painted": 2,
        "kept": 0,
    }
    assert "2 pictures painted, 0 were there; masks by u2net.onnx" in first.stderr
    again = call(*words, *segment)
    assert "0 pictures painted, 2 were there" in again.stderr
    other = call(*words, "--seed", "3", *segment)
    assert "was made with seed 0, and now it is 3" in str(other.exception)


WRONG = {
    "a segmenter alone": (["--segmenter", "u2net.onnx"], "need --segment"),
    "masks of nothing": (["--invert-masks"], "need --photos"),
    "a batch on the CPU": (["--batch", "2"], "needs --device cuda"),
    "no photographs": (["--photos", "{place}/nowhere"], "nowhere: no such folder"),
    "no segmenter": (["--segment", "--segmenter", "absent.onnx"], "absent.onnx: there is no such file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_named_and_leaves_nothing(name: str, mug_engine: Path, attributes: Path, tmp_path: Path) -> None:
    options, told = WRONG[name]
    done = call(mug_engine, attributes, "-o", tmp_path / "out", *(each.format(place=tmp_path) for each in options))
    assert isinstance(done.exception, DreamMixError) and told in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_a_gpu_is_given_room_for_the_batch(
    attributes: Path, mug_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def load(_engine: Path, **options: Any) -> Any:
        asked.append(options)
        raise InputError("no GPU here")

    monkeypatch.setattr(DreamMix, "load", load)
    call(mug_engine, attributes, "-o", tmp_path / "out", "--device", "cuda", "--batch", "4")
    assert asked[0]["device"] == "cuda" and asked[0]["pictures"] == 4


def test_a_second_run_is_kept_out(dm: DreamMix, tmp_path: Path) -> None:
    with hold_alone(tmp_path / "regular", "a test is at work"), pytest.raises(InputError, match="another run paints"):
        run(dm, tmp_path / "regular", order(count=1))
    assert not [*tmp_path.iterdir()]
