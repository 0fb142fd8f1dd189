"""`enroll` on the command line, and what it writes in `inpaint`, `build` and `inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("torch")

from dreammix_trt.building import build
from dreammix_trt.cli import app
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import DreamMixError
from dreammix_trt.core.passport import Passport
from dreammix_trt.core.subject import read_subject
from dreammix_trt.engine.result import read_request
from tests.engine.conftest import make_scene
from tests.engine.test_tokens import draw_object
from tests.support.tokens import write_small_adapter
from tests.trainer.test_segment import write_network


@pytest.fixture(scope="module")
def place(test_home: Path, small_base: Path, mug_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an engine of a LoRA and an adapter, a photograph and its mask, a picture and its hole."""
    folder = tmp_path_factory.mktemp("enroll")
    adapter = write_small_adapter(folder / "adapter.safetensors", BaseFiles.open(small_base))
    build(mug_lora, out=folder / "engine", base=small_base, tokens=adapter.file, name="lora")
    for names, pictures in ((("photo", "mask"), draw_object(0)), (("table", "hole"), make_scene())):
        for name, pixels in zip(names, pictures, strict=True):
            Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def enroll(place: Path, *more: str | Path, mask: str | None = "mask.png", out: str = "mug.safetensors") -> Any:
    given: list[str | Path] = ["-m", place / mask] if mask else []
    usual = ["enroll", place / "engine", "-i", place / "photo.png", "--class-name", "mug", "-o", place / out]
    return run(*usual, *given, *more)


def inpaint(place: Path, *more: str | Path) -> Any:
    usual = ["inpaint", place / "engine", "-i", place / "table.png", "-m", place / "hole.png", "--steps", "2"]
    return run(*usual, "-o", place / "out.png", "-f", "--json", *more)


def error_of(result: Any) -> str:
    assert isinstance(result.exception, DreamMixError), (result.exception, result.output)
    return str(result.exception)


def test_a_photograph_becomes_a_file_that_inpaint_and_build_take(place: Path) -> None:
    done = enroll(place, "--json", "--force")
    assert done.exit_code == 0, done.output
    record, file = json.loads(done.stdout), place / "mug.safetensors"
    assert record.pop("seconds") > 0
    told = {"file": str(file), "name": "mug", "class_name": "mug", "kind": "tokens", "tokens": 48, "warnings": []}
    assert record == told | {"bytes": file.stat().st_size}
    painted = inpaint(place, "--subject-file", file, "-p", "a red mug", "--token-count", "8", "--token-weight", "0.5")
    assert painted.exit_code == 0, painted.output
    told = json.loads(painted.stdout)
    assert (told["subject"], told["token_subject"], told["warnings"]) == ("mug", "mug", [])
    request = read_request(place / "out.png")
    assert (request.subject, request.token_count, request.token_weight) == ("mug", 8, 0.5)
    both = inpaint(
        place, "--subject-file", f"cup={file}", "--subject", "lora", "--token-subject", "cup", "-p", "a sks mug"
    )
    told = json.loads(both.stdout)
    assert (told["subject"], told["token_subject"]) == ("lora", "cup")
    lora = inpaint(place, "-p", "a sks mug")
    assert (json.loads(lora.stdout)["subject"], json.loads(lora.stdout)["token_subject"]) == ("lora", "")


def test_an_engine_is_built_with_it_and_says_its_kind(place: Path, small_base: Path, mug_lora: Path) -> None:
    assert enroll(place, "--force", "--name", "cup", out="cup.safetensors").exit_code == 0
    out, adapter = place / "three", place / "adapter.safetensors"
    given = ["--base", small_base, "--tokens", adapter, "--subject", f"lora={mug_lora}"]
    done = run("build", "-o", out, *given, "--subject", f"cup={place / 'cup.safetensors'}")
    assert done.exit_code == 0, done.output
    lora, cup = Passport.read(out).subjects
    assert (lora.kind, cup.kind, cup.target, cup.token) == ("lora", "tokens", "", "")
    shown = run("inspect", out).output
    assert '"a mug"' in shown and "tokens, " in shown and "token adapter" in shown
    kinds = [each["kind"] for each in json.loads(run("inspect", out, "--json").stdout)["subjects"]]
    assert kinds == ["lora", "tokens"]
    plain = run("build", "-o", place / "none", "--base", small_base, "--subject", f"cup={place / 'cup.safetensors'}")
    assert "subject cup: its tokens were made with the token adapter" in error_of(plain)
    assert not (place / "none").exists()


def test_a_segmenter_finds_the_object(place: Path) -> None:
    network = write_network(place / "u2net.onnx", side=64)
    rng = np.random.default_rng(0)
    photo = np.full((96, 96, 3), 20, np.uint8)
    photo[20:70, 30:80] = rng.integers(180, 256, (50, 50, 3))
    Image.fromarray(photo).save(place / "bright.png")
    usual = ["enroll", place / "engine", "-i", place / "bright.png", "--class-name", "mug"]
    done = run(*usual, "--segment", network, "-o", place / "seen.safetensors")
    assert done.exit_code == 0, done.output
    assert read_subject(place / "seen.safetensors").kind == "tokens"
    assert "has no mask" in error_of(run(*usual, "-o", place / "unseen.safetensors"))
    assert not (place / "unseen.safetensors").exists()


def test_what_to_expect_is_said(place: Path) -> None:
    for name, pixels in zip(("photo", "mask"), draw_object(0, 24), strict=True):
        Image.fromarray(pixels).save(place / f"small-{name}.png")
    usual = ["enroll", place / "engine", "-i", place / "small-photo.png", "-m", place / "small-mask.png"]
    done = run(*usual, "--class-name", "mug", "-o", place / "small.safetensors", "--json")
    (warning,) = json.loads(done.stdout)["warnings"]
    assert "less than 4 cells of 16" in warning and "small-photo.png" in warning


def test_several_photographs(place: Path) -> None:
    more = ["-i", place / "photo.png", "-m", place / "mask.png"]
    done = enroll(place, *more, out="two.safetensors")
    assert done.exit_code == 0, done.output
    assert "2 photographs and 1 masks" in error_of(enroll(place, *more[:2], out="three.safetensors"))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--segment", "x.onnx"], "--mask and --segment exclude each other"),
        (["--name", "lora"], "name is 'lora': a subject of a LoRA is loaded under it"),
        (["-o", "x.png"], "--out x.png: a subject's file ends with .safetensors"),
        (["-o", "nowhere/x.safetensors"], "does not exist; make it first"),
    ],
    ids=str,
)
def test_what_cannot_be_enrolled(more: list[str], told: str, place: Path) -> None:
    assert told in error_of(enroll(place, *more, out="bad.safetensors"))
    assert not (place / "bad.safetensors").exists()


def test_a_file_that_is_there_stays_without_force(place: Path) -> None:
    (place / "kept.safetensors").write_bytes(b"mine")
    assert "is there already; --force replaces it" in error_of(enroll(place, out="kept.safetensors"))
    assert (place / "kept.safetensors").read_bytes() == b"mine"


def test_a_subject_file_needs_a_name_or_a_file(place: Path) -> None:
    assert "give FILE or NAME=FILE" in error_of(inpaint(place, "--subject-file", "=x", "-p", "a mug"))
    assert "nothing.safetensors" in error_of(inpaint(place, "--subject-file", "nothing.safetensors", "-p", "a mug"))
