"""`train` takes the bases that `build` takes, and tells the trainer what was chosen."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

for _name in ("torch", "diffusers", "transformers", "peft"):
    pytest.importorskip(_name, reason="the trainer needs its extra")

from dreammix_trt.cli import app  # noqa: E402
from dreammix_trt.core.errors import DreamMixError, MissingExtraError  # noqa: E402
from dreammix_trt.trainer import events, lora  # noqa: E402
from dreammix_trt.trainer.lora import FULL, SMALL, Hardware  # noqa: E402
from tests.support.mini_sdxl import Checkpoint, small_configs, write_single  # noqa: E402


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A single-file checkpoint with patch, head and tokenizers."""
    return write_single(tmp_path_factory.mktemp("single"), small_configs())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the trainer was asked for; nothing is trained."""
    noted: list[dict[str, Any]] = []

    def train(_photos: Path, _class_name: str, _out: Path, **options: Any) -> Any:
        noted.append(options)
        return SimpleNamespace(steps=1, seconds=0.0, kohya_file="sks_mug.safetensors", recipe={"steps": 1000})

    monkeypatch.setattr(lora, "train_lora", train)
    monkeypatch.setattr(events, "list_missing", lambda _: [])
    return noted


def run(tmp_path: Path, *more: str | Path) -> Any:
    words = ["train", tmp_path / "photos", "--class-name", "coffee mug", "--out", tmp_path / "lora", *more]
    return CliRunner().invoke(app, [str(word) for word in words])


def test_every_base_of_build_is_one_of_train(single: Checkpoint, tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    parts = ["--base", single.base, "--patch", single.patch, "--head", single.head, "--tokenizer", single.tokenizer]
    more = ["--base-lora", "style.safetensors:0.5", "--patch-biases"]
    done = run(tmp_path, *parts, *more)
    assert done.exit_code == 0, done.output
    base = asked[0]["base"]
    assert (base.folder, base.patch, base.head_file) == (single.base, single.patch, single.head)
    assert base.tokenizer == single.tokenizer and base.patch_biases
    assert asked[0]["base_loras"] == ["style.safetensors:0.5"]
    assert asked[0]["recipe"] == FULL and asked[0]["hardware"] == Hardware(), "native side 1024"
    lonely = run(tmp_path, "--base", single.base, "--patch", single.patch, "--tokenizer", single.tokenizer)
    assert isinstance(lonely.exception, DreamMixError) and "without its head" in str(lonely.exception)


def test_options_become_recipe_and_hardware(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    assert run(tmp_path).exit_code == 0
    assert asked[0]["recipe"] == SMALL and asked[0]["rank"] is None, "nothing was chosen"
    how = "--beta 0.4 --beta-as loss --crop-share 0 --batch 2 --accumulate 3 --gradient-checkpointing on"
    where = "--device cuda:1 --precision bf16 --optimizer adamw8bit --checkpoint-every 9"
    what = "--validate-every 5 --validate-prompt x --captions plain --attributes words.json"
    what += " --validation-image room.png --validation-mask hole.png"
    board = ("--tensorboard", tmp_path / "board")
    assert run(tmp_path, *how.split(), *where.split(), *what.split(), "--resume", *board).exit_code == 0
    recipe, chosen = asked[1]["recipe"], asked[1]
    assert (recipe.beta, recipe.beta_as, recipe.crop_share) == (0.4, "loss", 0.0)
    assert (recipe.batch, recipe.accumulate, recipe.checkpoint_every) == (2, 3, 9)
    assert recipe.gradient_checkpointing and recipe.steps == SMALL.steps
    assert chosen["hardware"] == Hardware("cuda:1", "bfloat16", "adamw8bit")
    watch = chosen["watch"]
    assert (watch.every, watch.prompts) == (5, ("x",))
    assert watch.events is chosen["events"] and chosen["events"].folder == tmp_path / "board"
    assert (watch.image, watch.mask) == (Path("room.png"), Path("hole.png"))
    assert chosen["resume"] and not chosen["attribute_captions"] and chosen["attributes"] == Path("words.json")
    lonely = run(tmp_path, "--captions", "attributes")
    assert isinstance(lonely.exception, DreamMixError) and "needs --attributes" in str(lonely.exception)


def test_without_tensorboard_nothing_is_begun(
    tmp_path: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "list_missing", list)
    refused = run(tmp_path, "--base", tmp_path / "nowhere", "--tensorboard", tmp_path / "board")
    assert isinstance(refused.exception, MissingExtraError) and "pip install" in str(refused.exception)
    assert not asked
