"""MISATO's folders, finished pictures and the set that is drawn by rule: read, named, resumed, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.evaluation import pairs
from dreammix_trt.evaluation.metrics.choice import Weights, choose_metrics
from dreammix_trt.evaluation.metrics.pixels import Psnr
from dreammix_trt.evaluation.metrics.truth import PsnrAsuka
from dreammix_trt.evaluation.painter import FinishedPainter
from dreammix_trt.evaluation.pairs import write_pairs
from dreammix_trt.evaluation.reading import read_protocol
from dreammix_trt.evaluation.running import evaluate
from tests.evaluation.test_running import read_rows
from tests.support.protocols import SIDE, FakePainter, draw_mask, save, write_protocol

NUMBERS = (0, 499, 500, 1499, 1500, 1999)


def write_misato(folder: Path, prefix: str = "") -> Path:
    rng = np.random.default_rng(0)
    for kind in ("image", "mask"):
        (folder / kind).mkdir(parents=True)
    for number in NUMBERS:
        save(folder / f"image/{number:04d}.png", rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
        save(folder / f"mask/{prefix}{number:04d}.png", draw_mask())
    return folder


@pytest.mark.parametrize("prefix", ["", "00"])
def test_a_misato_folder_is_a_protocol_of_its_kinds(tmp_path: Path, prefix: str) -> None:
    folder = write_misato(tmp_path / "1024", prefix)
    protocol = read_protocol(folder)
    kinds = {each.name: [scene.name for scene in each.scenes] for each in protocol.subjects}
    assert kinds == {
        "landscape": ["0000", "0499"], "indoor": ["0500"], "building": ["1499"], "background": ["1500", "1999"],
    }  # fmt: skip
    assert protocol.scenes[0].mask == folder / f"mask/{prefix}1500.png" and protocol.name == "1024"
    asked = {(each.engine_name, prompt.task, prompt.text) for each in protocol.subjects for prompt in each.prompts}
    assert asked == {("", "removal", "background")} and len(protocol) == 6
    other = read_protocol(folder, {"num_inference_steps": 3}, "an empty table")
    assert {prompt.text for each in other.subjects for prompt in each.prompts} == {"an empty table"}
    assert other.fields == {"num_inference_steps": 3} and other.digest() != protocol.digest()
    assert read_protocol(folder).digest() == protocol.digest()


def test_its_faults_are_told_with_their_files(tmp_path: Path) -> None:
    folder = write_misato(tmp_path / "512")
    (folder / "mask/0500.png").unlink()
    save(folder / "mask/1499.png", np.zeros((9, 9), np.uint8))
    save(folder / "image/2000.png", np.zeros((SIDE, SIDE, 3), np.uint8))
    with pytest.raises(InputError) as told:
        read_protocol(folder)
    assert "0500.png: has no mask; put it there as" in str(told.value) and "mask/0500.png, white" in str(told.value)
    assert "1499.png" in str(told.value) and "2000.png: has no mask" in str(told.value)
    for file in (folder / "image").iterdir():
        file.unlink()
    with pytest.raises(InputError, match="image holds no pictures; unpack the set"):
        read_protocol(folder)
    shutil.rmtree(folder / "mask")
    with pytest.raises(FileFormatError, match=r"protocol\.json is missing"):
        read_protocol(folder)


def test_a_removal_is_measured_on_the_scene_with_the_painted_hole(tmp_path: Path) -> None:
    """A painter that spoils the surroundings has the same figures: y = painted m + truth (1 - m)."""
    protocol = read_protocol(write_misato(tmp_path / "512"))

    class Careless(FakePainter):
        def paint(self, scene: Any, request: Any) -> Any:
            painting = super().paint(scene, request)
            pixels = np.asarray(painting.image).copy()
            pixels[:5] = 0
            painting.image.paste(Image.fromarray(pixels))
            return painting

    metrics = lambda: [Psnr(), PsnrAsuka()]  # noqa: E731
    clean = evaluate(protocol, FakePainter(), metrics(), tmp_path / "clean")
    careless = evaluate(protocol, Careless(), metrics(), tmp_path / "careless")
    assert clean["tasks"] == careless["tasks"] and set(clean["tasks"]) == {"removal"}
    assert 5 < clean["tasks"]["removal"]["psnr_asuka"]["mean"] < 40
    assert clean["tasks"]["removal"]["psnr"]["mean"] == pytest.approx(
        clean["tasks"]["removal"]["psnr_asuka"]["mean"], rel=1e-3
    )
    assert set(clean["subjects"]) == {"landscape", "indoor", "building", "background"}


def test_finished_pictures_are_measured_without_an_engine(tmp_path: Path) -> None:
    folder = write_misato(tmp_path / "512")
    protocol, finished = read_protocol(folder), tmp_path / "finished"
    shutil.copytree(folder / "image", finished)
    summary = evaluate(
        protocol, FinishedPainter(finished, protocol), choose_metrics(protocol, Weights()), tmp_path / "out"
    )
    assert summary["tasks"]["removal"]["psnr_asuka"]["mean"] == pytest.approx(70)
    assert summary["tasks"]["removal"]["grad"]["mean"] == 0 and summary["pictures"]["painted_now"] == 6
    assert "landscape" in (tmp_path / "out/index.html").read_text(encoding="utf-8")
    again = evaluate(protocol, FinishedPainter(finished, protocol), [Psnr()], tmp_path / "out")
    assert again["pictures"]["painted_now"] == 0
    save(finished / "0000.png", np.zeros((SIDE, SIDE, 3), np.uint8))
    with pytest.raises(InputError, match=r"holds 2 pictures(?s:.*)--force"):
        evaluate(protocol, FinishedPainter(finished, protocol), [Psnr()], tmp_path / "out")


def test_finished_pictures_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = write_misato(tmp_path / "512")
    protocol, finished, out = read_protocol(folder), tmp_path / "finished", tmp_path / "out"
    with pytest.raises(InputError, match="no such folder; give one with a finished picture"):
        FinishedPainter(finished, protocol)
    shutil.copytree(folder / "image", finished)
    (finished / "0499.png").unlink()
    with pytest.raises(InputError, match=r"has no 0499\.png"):
        evaluate(protocol, FinishedPainter(finished, protocol), [Psnr()], out)
    save(finished / "0499.png", np.zeros((8, 9, 3), np.uint8))
    with pytest.raises(InputError, match=rf"0499\.png: is 9x8, but its scene {SIDE}x{SIDE}"):
        evaluate(protocol, FinishedPainter(finished, protocol), [Psnr()], out)
    assert not out.exists()
    several = read_protocol(write_protocol(tmp_path / "protocol"))
    with pytest.raises(InputError, match="asks for 8 pictures of 2 scenes; finished pictures need one prompt"):
        FinishedPainter(finished, several)


def test_rooms_are_drawn_by_rule_and_drawing_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write_pairs(whole, 6, size=48)
    drawn: list[int] = []
    draw = pairs._write_room

    def stop(folder: Path, number: int, seed: int, size: int) -> str:
        drawn.append(number)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return draw(folder, number, seed, size)

    monkeypatch.setattr(pairs, "_write_room", stop)
    with pytest.raises(KeyboardInterrupt):
        write_pairs(broken, 6, size=48)
    with pytest.raises(FileFormatError):
        read_protocol(broken)
    write_pairs(broken, 6, size=48)
    assert drawn == [0, 1, 2, 3, 3, 4, 5]
    files = sorted(file.relative_to(whole) for file in whole.rglob("*") if file.is_file())
    assert len(files) == 14 and all((whole / each).read_bytes() == (broken / each).read_bytes() for each in files)
    protocol = read_protocol(whole)
    assert len(protocol) == 6 and protocol.name.startswith("micro-sdxl")
    assert all(scene.name.endswith(each.name) for each in protocol.subjects for scene in each.scenes)
    for name in ("mine", "mine_mask"):
        (whole / "scenes" / f"{name}.png").write_bytes(b"")  # of somebody else
    write_pairs(whole, 7, size=48)
    for file in (whole / "scenes").glob("mine*.png"):
        file.unlink()  # left, but no picture that a protocol could have
    assert len(read_protocol(whole)) == 7
    with pytest.raises(InputError, match="have seed 0 and 48 pixels a side, not 1 and 48"):
        write_pairs(whole, 6, seed=1, size=48)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="other files"):
        write_pairs(tmp_path / "mine", 1)


def test_a_removal_needs_no_photographs_and_takes_another_prompt(tmp_path: Path) -> None:
    folder = write_protocol(tmp_path / "p", subjects=1)
    record = json.loads((folder / "protocol.json").read_text())
    record["subjects"]["rooms"] = {"subject": "", "removal": [""]}
    (folder / "protocol.json").write_text(json.dumps(record))
    protocol = read_protocol(folder, prompt="a floor")
    rooms = next(each for each in protocol.subjects if each.name == "rooms")
    assert rooms.photographs == () and [prompt.text for prompt in rooms.prompts] == ["a floor"]
    mug = next(each for each in protocol.subjects if each.name == "mug-0")
    assert [prompt.task for prompt in mug.prompts] == ["identity", "editing"]
    out = tmp_path / "out"
    summary = evaluate(protocol, FakePainter(), [Psnr()], out)
    assert summary["tasks"]["identity"]["psnr"]["mean"] == 100 > summary["tasks"]["removal"]["psnr"]["mean"]
    assert {row["task"] for row in read_rows(out)} == {"identity", "editing", "removal"}
