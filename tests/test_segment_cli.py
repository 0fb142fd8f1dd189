"""`train` on folders that need a word from the user: missing, inverted and new masks."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dreammix_trt.cli import app
from dreammix_trt.core.errors import DreamMixError
from tests.trainer.test_segment import make_scene, write_network, write_photographs


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the trainer was asked for; nothing is trained."""
    from dreammix_trt.trainer import lora
    from dreammix_trt.trainer.photographs import read_photographs

    asked: list[dict[str, Any]] = []

    def train(photos: Path, class_name: str, out: Path, **options: Any) -> Any:
        chosen = {name: options[name] for name in ("invert_masks", "large_masks")}
        asked.append({"photographs": len(read_photographs(photos, **chosen)), **chosen})
        return SimpleNamespace(steps=1, seconds=0.0, kohya_file="sks_mug.safetensors")

    monkeypatch.setattr(lora, "train_lora", train)
    return asked


def run(photos: Path, *more: str | Path) -> Any:
    out = photos.parent / "lora"
    return CliRunner().invoke(
        app, ["train", str(photos), "--class-name", "mug", "--out", str(out), *(str(each) for each in more)]
    )


def error_of(result: Any) -> str:
    assert isinstance(result.exception, DreamMixError), result.exception
    return str(result.exception)


def test_segment_shows_new_masks_before_it_trains(
    tmp_path: Path, trained: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    photos, file = write_photographs(tmp_path / "photos"), write_network(tmp_path / "u2net.onnx", side=64)
    assert "no photograph has a mask" in error_of(run(photos)) and "--segment" in error_of(run(photos))
    stopped = run(photos, "--segment", "--segmenter", file)
    assert stopped.exit_code == 1 and not trained
    sheet = photos / "masks-to-look-at.png"
    assert "Nothing was trained yet" in stopped.output and sheet.name in stopped.output
    with Image.open(sheet) as image:
        assert (np.asarray(image.convert("RGB")) == (255, 0, 120)).all(2).any()  # the outline of a subject
    assert sorted(path.name for path in (photos / "mask").iterdir()) == ["0.png", "1.png"]
    again = run(photos, "--segment", "--segmenter", file)  # the user has looked
    assert again.exit_code == 0, again.output
    assert [each["photographs"] for each in trained] == [2]


def test_a_stop_for_new_masks_is_told_to_scripts(tmp_path: Path, trained: list[dict[str, Any]]) -> None:
    photos, file = write_photographs(tmp_path / "photos"), write_network(tmp_path / "u2net.onnx", side=64)
    stopped = run(photos, "--segment", "--segmenter", file, "--json")
    assert stopped.exit_code == 1 and not trained
    assert json.loads(stopped.stdout) == {
        "lora": None,
        "sheet": str(photos / "masks-to-look-at.png"),
        "masks": [str(photos / "mask" / name) for name in ("0.png", "1.png")],
        "unseen": [],
    }


def test_the_file_for_other_programs_is_said(tmp_path: Path, trained: list[dict[str, Any]]) -> None:
    photos, file = write_photographs(tmp_path / "photos"), write_network(tmp_path / "u2net.onnx", side=64)
    done = run(photos, "--segment", "--segmenter", file, "--yes")
    assert f"for ComfyUI, A1111 and Fooocus: {tmp_path / 'lora' / 'sks_mug.safetensors'}" in done.stderr


def test_yes_does_not_stop(tmp_path: Path, trained: list[dict[str, Any]]) -> None:
    photos = write_photographs(tmp_path / "photos")
    file = write_network(tmp_path / "mine.onnx", side=64, shift=0.5)
    done = run(photos, "--segment", "--segmenter", file, "--segmenter-style", "isnet", "--yes")
    assert done.exit_code == 0, done.output
    assert len(trained) == 1 and (photos / "masks-to-look-at.png").is_file()
    assert "isnet" in done.output


def test_flat_folders_are_not_confused_by_the_sheet(tmp_path: Path, trained: list[dict[str, Any]]) -> None:
    photos = tmp_path / "flat"
    photos.mkdir()
    Image.fromarray(make_scene()[0]).save(photos / "0.jpg", quality=95)
    file = write_network(tmp_path / "u2net.onnx", side=64)
    assert run(photos, "--segment", "--segmenter", file).exit_code == 1
    assert run(photos).exit_code == 0
    assert trained[0]["photographs"] == 1


def test_photographs_without_a_subject_are_named(
    tmp_path: Path, trained: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    photos = write_photographs(tmp_path / "photos", 1)
    file = write_network(tmp_path / "u2net.onnx", side=64, constant=True)
    with caplog.at_level(logging.WARNING):
        assert "no photograph has a mask" in error_of(run(photos, "--segment", "--segmenter", file))
    assert "0.png: u2net.onnx sees no subject in it" in caplog.text and not trained


def test_inverted_masks_and_their_options(tmp_path: Path, trained: list[dict[str, Any]]) -> None:
    photos = write_photographs(tmp_path / "photos")
    (photos / "mask").mkdir()
    for index in range(2):
        Image.fromarray(~make_scene()[1]).save(photos / "mask" / f"{index}.png")
    assert "--invert-masks" in error_of(run(photos)) and "--large-masks" in error_of(run(photos))
    assert run(photos, "--invert-masks").exit_code == 0
    assert run(photos, "--large-masks").exit_code == 0
    assert [(each["invert_masks"], each["large_masks"]) for each in trained] == [(True, False), (False, True)]


def test_options_that_need_each_other(tmp_path: Path) -> None:
    photos = write_photographs(tmp_path / "photos")
    assert "need --segment" in error_of(run(photos, "--segmenter", "u2net.onnx"))
    assert "need --segment" in error_of(run(photos, "--yes"))
    assert "--invert-masks excludes --segment" in error_of(run(photos, "--segment", "--invert-masks"))
    assert "there is no such file" in error_of(run(photos, "--segment", "--segmenter", "absent.onnx"))
