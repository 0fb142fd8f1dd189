"""The shipped judge reads renderings of things that it has never seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.trainer.attributes.judge import JudgeDescriber
from dreammix_trt.trainer.data import Photograph
from dreammix_trt.trainer.micro import world
from dreammix_trt.trainer.micro.judge import HEADS

MUG = world.Attributes("mug", "blue", foot="white", top="yellow", decal="heart", decal_colour="green")


def photograph(thing: world.Thing, count: int = 2) -> list[Photograph]:
    return [Photograph(image, mask > 127, f"{n}") for n, (image, mask) in enumerate(world.render_photos(thing, count))]


@pytest.fixture(scope="module")
def judge() -> JudgeDescriber:
    return JudgeDescriber(BaseFiles.open().folder)


def test_parts_and_colours_of_held_out_subjects_are_named(judge: JudgeDescriber) -> None:
    for thing in world.held_out_subjects(4, seed=1):
        what = thing.attributes
        found = judge.describe(photograph(thing), what.shape)
        top = {"mug": "rim", "teapot": "lid", "bottle": "cap", "bowl": "rim"}[what.shape]
        assert (found.class_name, found.source) == (what.shape, "judge")
        assert found.attributes["colour"] == (what.colour,)
        assert found.attributes["pattern"] == ("plain",)
        assert found.attributes["part"] == (f"{what.foot} foot", f"{what.top} {top}")
        assert found.attributes["decal"][0].split()[0] == what.decal_colour


@pytest.mark.parametrize(
    ("shares", "word"), [((0.1, 0.45, 0.45), "other"), ((0.6, 0.2, 0.2), "none"), ((0.1, 0.2, 0.7), "heart")]
)
def test_a_decal_of_no_clear_form_is_a_sticker(
    judge: JudgeDescriber, shares: tuple[float, float, float], word: str
) -> None:
    logits = np.full((1, len(HEADS["decal"])), -30, np.float32)
    logits[0, [HEADS["decal"].index(each) for each in ("none", "star", "heart")]] = np.log(shares)
    assert judge._choose("decal", logits) == word
    assert judge._choose("finish", np.zeros((2, 3), np.float32)) == "none", "no other head has such a word"


def test_what_is_not_there_is_not_named_and_glass_is_a_material(judge: JudgeDescriber) -> None:
    bare = world.Attributes("bottle", "orange", finish="glass")
    found = judge.describe(photograph(world.Thing(bare, world.Build())), "bottle")
    assert found.attributes == {"colour": ("orange",), "pattern": ("plain",), "material": ("glass",)}
    striped = replace(MUG, pattern="striped", foot=None, top=None, decal=None, decal_colour=None)
    found = judge.describe(photograph(world.Thing(striped, world.Build())), "mug")
    assert found.attributes["pattern"] == ("striped",) and "part" not in found.attributes
    assert set(found.contrasts["colour"]) == set(world.COLOURS)


def test_another_class_and_what_it_is_not_sure_of_are_said(caplog: pytest.LogCaptureFixture) -> None:
    sure = JudgeDescriber(BaseFiles.open().folder, threshold=1.0)
    pictures = photograph(world.Thing(MUG, world.Build()), 1)
    noise = np.random.default_rng(0).integers(0, 256, pictures[0].image.shape).astype(np.uint8)
    found = sure.describe([*pictures, Photograph(noise, np.ones(noise.shape[:2], bool), "noise")], "teapot")
    assert found.attributes == {}
    assert "the judge sees no clear shape, not a teapot" in caplog.text
    assert "foot is left out: the judge gives" in caplog.text and "below 1.00" in caplog.text
    caplog.clear()
    JudgeDescriber(BaseFiles.open().folder).describe(pictures, "teapot")
    assert "the judge sees a mug, not a teapot" in caplog.text
