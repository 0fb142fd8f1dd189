"""`train-tokens` on the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

for _name in ("torch", "diffusers", "transformers", "peft"):
    pytest.importorskip(_name, reason="the trainer needs its extra")

from dreammix_trt.cli import app  # noqa: E402
from dreammix_trt.core.errors import InputError  # noqa: E402
from dreammix_trt.core.token_adapter import FILE_NAME, TokenAdapter  # noqa: E402
from dreammix_trt.trainer import events  # noqa: E402
from dreammix_trt.trainer.hardware import Hardware  # noqa: E402
from dreammix_trt.trainer.tokens import training  # noqa: E402
from dreammix_trt.trainer.tokens.recipes import SMALL  # noqa: E402
from tests.support.token_training import write_objects  # noqa: E402


def run(*words: str | Path | float) -> Any:
    return CliRunner().invoke(app, ["train-tokens", *(str(word) for word in words)])


def test_an_adapter_is_trained_and_not_lost(small_base: Path, tmp_path: Path) -> None:
    objects, out = write_objects(tmp_path / "objects"), tmp_path / "adapter"
    how = ("-o", out, "--base", small_base, "--steps", "1", "--batch", "1", "--rank", "1", "--threads", "1")
    done = run(objects, *how, "--views", "1", "--accumulate", "1", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["adapter"], told["steps"]) == (str(out / FILE_NAME), 1)
    assert f"next: dreammix-trt build --tokens {out / FILE_NAME} -o ENGINE" in done.stderr
    assert TokenAdapter.open(out).card.settings["rank"] == 1
    again = run(objects, *how)
    assert isinstance(again.exception, InputError) and "--force replaces it" in str(again.exception)


def test_options_become_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def note(_out: Path, data: Path | None, **options: Any) -> Any:
        asked.append((data, options))
        return training.TokensTrained(1, 0.0, 0.1, 0.2, 5)

    monkeypatch.setattr(training, "train_tokens", note)
    monkeypatch.setattr(events, "list_missing", lambda _: [])
    assert run("-o", tmp_path / "a").exit_code == 0
    data, options = asked[0]
    assert (data, options["recipe"], options["resume"], options["events"]) == (None, SMALL, False, None)
    how = "--steps 5 --batch 3 --accumulate 2 --rank 7 --objects 9 --views 3 --decoupling 0.25 --checkpoint-every 4"
    where = "--device cuda --precision bf16 --optimizer adamw8bit --resume --seed 8 --learning-rate 0.5"
    done = run("-o", tmp_path / "a", *how.split(), *where.split(), "--tensorboard", tmp_path / "board")
    assert done.exit_code == 0, done.output
    recipe = replace(SMALL, steps=5, batch=3, accumulate=2, rank=7, objects=9, views=3, decoupling=0.25)
    options = asked[1][1]
    assert options["recipe"] == replace(recipe, checkpoint_every=4, learning_rate=0.5)
    assert options["hardware"] == Hardware("cuda", "bfloat16", "adamw8bit")
    assert (options["seed"], options["resume"], options["events"].folder) == (8, True, tmp_path / "board")


def test_a_number_of_rendered_objects_beside_a_folder_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "-o", tmp_path / "a", "--objects", "3")
    assert isinstance(done.exception, InputError) and "--objects is how many are rendered" in str(done.exception)
