"""`dreammix-trt attributes`: sources, files, and what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from dreammix_trt.cli import app
from dreammix_trt.core.attributes import KINDS, AttributeDictionary
from dreammix_trt.core.errors import DreamMixError
from dreammix_trt.demo import demo_subject
from dreammix_trt.trainer.micro.world import write_photos
from tests.support.chat_server import Reply, say, serve

ANSWER = json.dumps({**{kind: [] for kind in KINDS}, "colour": ["blue"], "part": ["white foot"]})


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, demo_subject(), 2)
    return folder


def run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["attributes", *(str(word) for word in words)])


def error_of(result: Any) -> str:
    assert isinstance(result.exception, DreamMixError), result.exception or result.output
    return str(result.exception)


def test_the_judge_names_the_demo_s_mug(photos: Path, tmp_path: Path) -> None:
    """The demo's subject is blue, with a white foot, a white rim and a green heart."""
    out = tmp_path / "attributes.json"
    done = run(photos, "--class-name", "mug", "-o", out, "--judge")
    assert done.exit_code == 0, done.output
    found = AttributeDictionary.read(out)
    assert found.attributes["colour"] == ("blue",)
    assert found.attributes["part"] == ("white foot", "white rim")
    assert found.attributes["decal"] == ("green heart",)
    assert "part" in done.stdout and "white foot, white rim" in done.stdout and "a photo of a sks mug" in done.stdout


def test_an_endpoint_names_them_and_tells_what_it_cost(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-hidden-123")
    with serve(say(ANSWER, 1234, 56)) as script:
        words = ["--endpoint", script.url, "--model", "vlm", "--key-variable", "MY_KEY", "--photographs", "1", "--json"]
        done = run(photos, "--class-name", "mug", "-o", tmp_path / "a.json", *words)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["tokens"] == {"read": 1234, "written": 56} and record["source"] == "vlm"
    assert record["attributes"] == {"colour": ["blue"], "part": ["white foot"]}
    assert record["captions"]["subject"][0] == "a photo of a sks mug"
    assert "1,234 tokens read and 56 written" in done.stderr and "whole photographs" not in done.stderr
    assert len(script.asked[0]["messages"][0]["content"]) == 2, "a text and one photograph"
    assert script.keys == ["Bearer sk-hidden-123"] and "sk-hidden" not in done.output


def test_whole_photographs_go_to_an_endpoint_and_nowhere_else(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "one.jpg")
    common = [tmp_path, "--class-name", "mug", "-o", tmp_path / "a.json"]
    with serve(say(ANSWER)) as script:
        done = run(*common, "--endpoint", script.url, "--model", "vlm")
    assert done.exit_code == 0 and "the whole photographs are shown" in done.stderr
    assert "--segment" in error_of(run(*common, "--judge", "--force"))


def test_a_failure_writes_nothing_but_tells_what_it_cost(photos: Path, tmp_path: Path) -> None:
    with serve(say("no idea", 11, 2), say("really", 7, 1)) as script:
        done = run(photos, "--class-name", "mug", "-o", tmp_path / "a.json", "--endpoint", script.url, "--model", "vlm")
    assert "answered twice" in error_of(done) and "18 tokens read and 3 written" in done.stderr
    with serve(Reply(status=503)) as script:
        words = ["--endpoint", script.url, "--model", "vlm", "--deadline", "0.2"]
        assert "--deadline gives it more time" in error_of(
            run(photos, "--class-name", "mug", "-o", tmp_path / "a.json", *words)
        )
    assert not (tmp_path / "a.json").exists()


def test_a_file_by_hand_is_checked_and_shown(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"class_name": "teapot", "attributes": {"material": "clay", "part": ["cream lid"]}}))
    done = run("--check", file)
    assert done.exit_code == 0 and "clay" in done.stdout and "a photo of a sks teapot" in done.stdout
    file.write_text(json.dumps({"class_name": "teapot", "attributes": {"smell": "sweet"}}))
    assert "attributes.smell: no such kind" in error_of(run("--check", file))
    for more in (["--judge"], ["--class-name", "mug"], ["-o", tmp_path / "a.json"]):
        assert "give it alone" in error_of(run("--check", file, *more))


def test_a_file_that_is_there_stays(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "attributes.json"
    out.write_text("by hand")
    assert "--force replaces it" in error_of(run(photos, "--class-name", "mug", "-o", out, "--judge"))
    assert out.read_text() == "by hand"
    assert run(photos, "--class-name", "mug", "-o", out, "--judge", "--force").exit_code == 0


WRONG = {
    "no source": ([], "say who describes the subject: --endpoint URL --model NAME"),
    "two sources": (["--judge", "--clip", "x"], "--clip and --judge exclude each other"),
    "no model": (["--endpoint", "http://h/v1"], "--model is missing"),
    "a model alone": (["--judge", "--model", "x", "--side", "99"], "--model, --side: only with --endpoint"),
    "no address": (["--endpoint", "h", "--model", "x"], "is no address"),
    "a threshold for a model": (
        ["--endpoint", "http://h/v1", "--model", "x", "--threshold", "0.5"],
        "no probabilities",
    ),
    "no CLIP": (["--clip", "{place}/nowhere"], "config.json is missing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_named(name: str, photos: Path, tmp_path: Path) -> None:
    options, told = WRONG[name]
    words = [option.format(place=tmp_path) for option in options]
    assert told in error_of(run(photos, "--class-name", "mug", "-o", tmp_path / "a.json", *words))
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named() -> None:
    assert "PHOTOS is missing" in error_of(run("--judge"))
    assert "--class-name is missing" in error_of(run("photos", "--judge"))
    assert "--out is missing" in error_of(run("photos", "--class-name", "mug", "--judge"))


def test_a_place_that_cannot_be_written_is_refused_before_a_model_is_asked(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with serve(say(ANSWER)) as script:
        for out in (tmp_path / "file" / "a.json", tmp_path):
            words = ["-o", out, "--force", "--endpoint", script.url, "--model", "vlm"]
            assert str(out.name) in error_of(run(photos, "--class-name", "mug", *words))
    assert script.asked == []
