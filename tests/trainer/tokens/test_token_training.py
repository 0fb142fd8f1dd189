"""A training of a token adapter, whole: what it writes, that it goes on to the bit, what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.subject_tokens import TokenConfig
from dreammix_trt.core.token_adapter import FILE_NAME, TokenAdapter
from dreammix_trt.core.token_factors import read_factors
from dreammix_trt.trainer.hardware import Hardware
from dreammix_trt.trainer.tokens import encoding
from dreammix_trt.trainer.tokens.lesson import TokenLesson
from dreammix_trt.trainer.tokens.recipes import FULL, SMALL, TokenRecipe, recipe_for
from tests.support.token_training import tiny_recipe, train


def stop_at(step: int) -> Any:
    """Progress that stops the program when a step is done, before its checkpoint."""

    def update(_name: str, _fraction: float, message: str) -> None:
        if message.startswith(f"step {step} "):
            raise KeyboardInterrupt

    return update


def test_an_adapter_is_written_that_fits_its_base(base: BaseFiles, objects: Path, tmp_path: Path) -> None:
    done = train(tmp_path / "adapter", base, objects)
    assert done.steps == 3 and np.isfinite(done.loss) and done.parameters > 5000
    adapter = TokenAdapter.open(tmp_path / "adapter")
    adapter.check_fit(base.configs)
    assert not adapter.find_doubts(base.hash_contents)
    card = adapter.card
    assert card.config == TokenConfig.of_base(base.configs)
    assert (card.rank, card.trained_on) == (2, "3 objects: mug")
    assert card.settings["trained"] == {
        "steps": 3, "loss": done.loss, "first_loss": done.first_loss, "parameters": done.parameters
    }  # fmt: skip
    assert card.settings["decoupling"] == 0.5 and card.settings["seed"] == 0
    factors = read_factors(adapter)
    assert any(np.abs(b).max() > 0 for _, b in factors["unet"].values()), "it has learnt"
    assert [file.name for file in (tmp_path / "adapter").iterdir()] == [FILE_NAME]
    left = [file.name for file in (tmp_path / "adapter.work").iterdir()]
    assert len(left) == 1 and left[0].startswith("objects-"), "nothing is left to go on from"


def test_a_training_may_begin_with_an_adapter_and_says_so(base: BaseFiles, objects: Path, tmp_path: Path) -> None:
    """With a rate of next to nothing what comes out is what went in."""
    for name, fields in (
        ("first", {}),
        ("second", {"start": tmp_path / "first"}),
        ("third", {"start": tmp_path / "second"}),
    ):
        recipe = tiny_recipe(learning_rate=2e-3 if name == "first" else 1e-12, decay=0.0, steps=1 if fields else 3)
        train(tmp_path / name, base, objects, recipe=recipe, **fields)
    first, third = (TokenAdapter.open(tmp_path / name) for name in ("first", "third"))
    for name, values in third.projection().items():
        np.testing.assert_allclose(values, first.projection()[name], atol=1e-6)
    for module, pair in read_factors(third)["unet"].items():
        np.testing.assert_array_equal(pair[1], read_factors(first)["unet"][module][1])
    earlier = third.card.settings["earlier"]
    assert [each["steps"] for each in earlier] == [3, 1] and first.card.settings["earlier"] == []
    assert not any("earlier" in each for each in earlier)
    with pytest.raises(InputError, match=r"rank is 3, but .*first.* has 2: give --rank 2"):
        train(tmp_path / "more", base, objects, recipe=tiny_recipe(rank=3), start=tmp_path / "first")
    assert not (tmp_path / "more").exists()


def test_a_stopped_training_goes_on_to_the_bit(base: BaseFiles, objects: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(accumulate=2)
    done = train(tmp_path / "whole", base, objects, recipe=recipe)
    out = tmp_path / "adapter"
    with pytest.raises(KeyboardInterrupt):
        train(out, base, objects, recipe=recipe, progress=stop_at(3))
    assert not out.exists()
    checkpoint = tmp_path / "adapter.work" / "checkpoint"
    assert json.loads((checkpoint / "checkpoint.json").read_text())["step"] == 2
    for other, message in (
        ({"recipe": replace(recipe, batch=3)}, "batch is 3, and was 2"),
        ({"recipe": replace(recipe, decoupling=0.1)}, "decoupling is 0.1, and was 0.5"),
        ({"seed": 9}, "seed is 9, and was 0"),
    ):
        with pytest.raises(InputError, match=message):
            train(out, base, objects, **{"recipe": recipe, **other}, resume=True)
    resumed = train(out, base, objects, recipe=recipe, resume=True)
    assert (resumed.loss, resumed.first_loss) == (done.loss, done.first_loss)
    assert (out / FILE_NAME).read_bytes() == (tmp_path / "whole" / FILE_NAME).read_bytes()
    assert not checkpoint.exists()


def test_objects_are_encoded_once_for_several_trainings(
    base: BaseFiles, objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    train(tmp_path / "one", base, objects, work=work)
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "ObjectEncoder", None)
        train(tmp_path / "two", base, objects, work=work, recipe=tiny_recipe(decoupling=0.0, rank=1))
        with pytest.raises(TypeError):
            train(tmp_path / "three", base, objects, work=work, recipe=tiny_recipe(views=3))
    assert len(list(work.iterdir())) == 2, "another number of views is another folder"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objects": None}, "needs a folder of objects to learn from"),
        ({"seed": -1}, "seed is -1"),
        ({"hardware": Hardware("tpu")}, "device is 'tpu'"),
        ({"resume": True}, "there is no checkpoint to go on from"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    fields: dict[str, Any], message: str, base: BaseFiles, objects: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train(tmp_path / "adapter", base, **{"objects": objects, **fields})
    assert not (tmp_path / "adapter").exists()


def test_a_folder_of_other_files_is_not_replaced(base: BaseFiles, objects: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        train(tmp_path, base, objects, work=tmp_path.parent / "elsewhere")


def test_a_loss_that_is_not_finite_stops_it_and_keeps_the_checkpoint(
    base: BaseFiles, objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = TokenLesson.loss
    monkeypatch.setattr(
        TokenLesson, "loss", lambda self, rows, step: honest(self, rows, step) * (float("nan") if step == 2 else 1)
    )
    with pytest.raises(InputError, match=r"loss is nan at step 3.*smaller learning rate.*of step 2 is kept"):
        train(tmp_path / "adapter", base, objects)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be 1 to"),
        ({"rank": 300}, "rank is 300"),
        ({"views": 0}, "views is 0"),
        ({"decoupling": 1.5}, "decoupling is 1.5; it must be 0 to 1"),
        ({"heaviest": 0.5}, "heaviest is 0.5"),
        ({"learning_rate": float("nan")}, "learning rate is nan"),
    ],
)
def test_recipes_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_recipe(**fields)


def test_a_small_base_has_its_own_recipe() -> None:
    assert (recipe_for(256), recipe_for(1024)) == (SMALL, FULL)
    recipe = TokenRecipe(steps=110, learning_rate=1.0, batch=1, rank=1, objects=1, views=1, warmup=10)
    assert [recipe.rate_at(step) for step in (0, 9, 10, 60)] == pytest.approx([0.1, 1.0, 1.0, 0.5])
