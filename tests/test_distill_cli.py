"""`distill` on the command line, and what comes of its LoRA: an engine that takes few steps, and subjects on top."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

for _name in ("torch", "diffusers", "transformers", "peft"):
    pytest.importorskip(_name, reason="the trainer needs its extra")

from dreammix_trt.building import build  # noqa: E402
from dreammix_trt.cli import app  # noqa: E402
from dreammix_trt.core.errors import InputError  # noqa: E402
from dreammix_trt.engine import DreamMix  # noqa: E402
from dreammix_trt.trainer import distill, events  # noqa: E402
from dreammix_trt.trainer.hardware import Hardware  # noqa: E402
from tests.support.training import write_regular  # noqa: E402


def run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["distill", *(str(word) for word in words)])


def test_a_distilled_lora_acts_and_so_does_a_subject_on_top_of_it(
    small_base: Path, mug_engine: Path, mug_lora: Path, tmp_path: Path
) -> None:
    """Four pictures: with and without each of the two; they differ all, where the LoRA changes the base's weights."""
    pictures = write_regular(tmp_path / "regular_mug")
    how = "--steps 1 --batch 1 --views 2 --rank 2 --learning-rate 0.02 --threads 1 --json"
    done = run("-o", tmp_path / "lcm", "--base", small_base, "--pictures", pictures, *how.split())
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    file = tmp_path / "lcm/lcm_lora.safetensors"
    assert told["lora"] == str(file) and told["bytes"] == file.stat().st_size
    passport = build(mug_lora, base=small_base, out=tmp_path / "fast", name="mug", base_loras=[file], verify=False)
    assert passport.base["defaults"] == {"sampler": "lcm", "num_inference_steps": 8, "guidance_scale": 1.0}
    image, mask = Image.new("RGB", (128, 128), (90, 120, 150)), Image.new("L", (128, 128))
    mask.paste(255, (30, 30, 100, 100))
    painted = []
    for engine in (mug_engine, tmp_path / "fast"):
        with DreamMix.load(engine, threads=1) as dm:
            for scale in (0.0, 1.0):
                fields = {"sampler": "lcm", "num_inference_steps": 4, "guidance_scale": 1.0, "subject_scale": scale}
                result = dm.inpaint(image, mask, "a sks mug", seed=1, **fields)  # type: ignore[arg-type]
                painted.append(np.asarray(result.images[0], np.int32))
    for index, one in enumerate(painted):
        for other in painted[index + 1 :]:
            assert np.abs(one - other)[40:90, 40:90].mean() > 0.5


def test_options_become_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def note(_out: Path, **options: Any) -> Any:
        asked.append(options)
        return SimpleNamespace(steps=1, seconds=0.0, loss=0.1, first_loss=0.2, bytes=1)

    monkeypatch.setattr(distill, "distill_lora", note)
    monkeypatch.setattr(events, "list_missing", lambda _: [])
    assert run("-o", tmp_path / "lcm").exit_code == 0
    assert asked[0]["recipe"] == distill.SMALL and asked[0]["pictures"] is None and not asked[0]["resume"]
    how = "--steps 5 --guidance 3,6 --skip 2 --rank 9 --batch 3 --accumulate 2 --views 7 --checkpoint-every 4"
    where = "--device cuda --precision bf16 --optimizer adamw8bit --resume --seed 8"
    assert run("-o", tmp_path / "lcm", *how.split(), *where.split(), "--learning-rate", 0.5).exit_code == 0
    recipe = distill.DistillRecipe(
        5, 0.5, 3, 7, 9, accumulate=2, guidance=(3.0, 6.0), skip=2, checkpoint_every=4, constant=distill.SMALL.constant
    )
    assert asked[1]["recipe"] == recipe and asked[1]["hardware"] == Hardware("cuda", "bfloat16", "adamw8bit")
    assert (asked[1]["resume"], asked[1]["seed"]) == (True, 8)
    assert run("-o", tmp_path / "lcm", "--tensorboard", tmp_path / "board").exit_code == 0
    assert asked[1]["events"] is None and asked[2]["events"].folder == tmp_path / "board"
    wrong = run("-o", tmp_path / "lcm", "--guidance", "much")
    assert isinstance(wrong.exception, InputError) and "--guidance is 'much'; give a number" in str(wrong.exception)
    (tmp_path / "lcm").mkdir()
    (tmp_path / "lcm/distill.json").write_text("{}")
    kept = run("-o", tmp_path / "lcm")
    assert isinstance(kept.exception, InputError) and "--force replaces it" in str(kept.exception)
