"""`train-asuka` on the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

for _name in ("torch", "diffusers", "transformers"):
    pytest.importorskip(_name, reason="the trainer needs its extra")

from dreammix_trt.cli import app  # noqa: E402
from dreammix_trt.core.errors import InputError  # noqa: E402
from dreammix_trt.trainer import events  # noqa: E402
from dreammix_trt.trainer.asuka import training  # noqa: E402
from dreammix_trt.trainer.asuka.recipes import SMALL  # noqa: E402
from dreammix_trt.trainer.hardware import Hardware  # noqa: E402
from tests.support.asuka_training import write_pictures  # noqa: E402


def run(*words: str | Path | float) -> Any:
    return CliRunner().invoke(app, ["train-asuka", *(str(word) for word in words)])


def test_the_prior_is_trained_aligned_and_not_lost(small_base: Path, tmp_path: Path) -> None:
    images, out = write_pictures(tmp_path / "pictures"), tmp_path / "asuka"
    how = ("--steps", "1", "--batch", "1", "--side", "64", "--threads", "1")
    done = run("prior", images, "-o", out, "--base", small_base, *how, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["asuka"], told["part"], told["steps"]) == (str(out), "prior", 1)
    assert f"next: dreammix-trt train-asuka align -o {out}" in done.stderr
    again = run("prior", images, "-o", out, "--base", small_base, *how)
    assert isinstance(again.exception, InputError)
    assert "holds this part (prior) already; --force trains it again and removes" in str(again.exception)
    done = run("align", images, "-o", out, "--base", small_base, *how, "--revealed", "0,0")
    assert done.exit_code == 0, done.output
    assert json.loads((out / "train.json").read_text())["align"]["settings"]["revealed"] == [0.0, 0.0]
    assert run("align", images, "-o", out, "--base", small_base, *how).exit_code != 0
    assert run("prior", images, "-o", out, "--base", small_base, *how, "--force").exit_code == 0


def test_options_become_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def note(part: str, _out: Path, **options: Any) -> Any:
        asked.append((part, options))
        return training.AsukaTrained("align", 1, 0.0, 0.1, 0.2, 5)

    monkeypatch.setattr(training, "train_asuka", note)
    monkeypatch.setattr(events, "list_missing", lambda _: [])
    assert run("align", "-o", tmp_path / "a").exit_code == 0
    part, options = asked[0]
    assert (part, options["images"], options["recipe"]) == ("align", None, SMALL["align"]) and not options["resume"]
    how = "--steps 5 --batch 3 --accumulate 2 --side 128 --revealed 0.5,0 --reveal-steps 7 --checkpoint-every 4"
    board = ("--tensorboard", tmp_path / "board")
    where = "--device cuda --precision bf16 --optimizer adamw8bit --resume --seed 8 --learning-rate 0.5"
    done = run("align", "pictures", "-o", tmp_path / "a", "--objects", "masks", *how.split(), *where.split(), *board)
    assert done.exit_code == 0, done.output
    recipe = replace(SMALL["align"], steps=5, learning_rate=0.5, batch=3, accumulate=2, side=128, checkpoint_every=4)
    options = asked[1][1]
    assert options["events"].folder == tmp_path / "board" / "align", "a run for each part"
    assert options["recipe"] == replace(recipe, revealed=(0.5, 0.0), reveal_steps=7)
    assert options["hardware"] == Hardware("cuda", "bfloat16", "adamw8bit")
    assert (options["images"], options["objects"], options["seed"]) == (Path("pictures"), Path("masks"), 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("align", "--revealed", "often"), "--revealed is 'often'; give two shares with a comma"),
        (("prior", "--revealed", "1,0"), "--revealed and --reveal-steps are of the alignment"),
        (("decoder", "--reveal-steps", "3"), "--revealed and --reveal-steps are of the alignment"),
    ],
)
def test_options_of_other_parts_are_refused(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = run(*words, "-o", tmp_path / "a")
    assert isinstance(done.exception, InputError) and message in str(done.exception)
