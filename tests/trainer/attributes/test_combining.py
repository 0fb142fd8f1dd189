"""Prompts combined of attributes: different ones, the same for a seed, and as many contrasts as are asked for."""

from __future__ import annotations

import re

import pytest

from dreammix_trt.core.attributes import AttributeDictionary
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.vocabulary import USUAL
from dreammix_trt.trainer.attributes import combine_prompts

MUG = AttributeDictionary.of(
    "mug",
    {"colour": ["blue"], "finish": ["shiny"], "part": ["cream foot", "big handle"], "decal": ["orange star"]},
    "hand",
    "here",
)
OWN = {"blue", "shiny", "cream foot", "big handle", "orange star"}


def is_own(prompt: str) -> bool:
    """Whether a prompt says nothing of the mug that it is not: taken apart by hand."""
    before, _, behind = prompt.removeprefix("a photo of ").partition(" with ")
    words = [word for word in before.split() if word not in ("a", "an", "mug", "sks")]
    parts = [re.sub(r"^an? ", "", part) for part in re.split(", | and ", behind) if part]
    return {*words, *parts} <= OWN


def test_prompts_differ_and_follow_the_seed() -> None:
    prompts = combine_prompts(MUG, 40, 3)
    assert len(set(prompts)) == len(prompts) == 40
    assert prompts[0] == "a photo of a mug"
    assert prompts == combine_prompts(MUG, 40, 3) != combine_prompts(MUG, 40, 4)
    assert combine_prompts(MUG, 12, 3) == prompts[:12], "a longer run begins like a shorter one"


@pytest.mark.parametrize(("contrast", "wanted"), [(0.0, 0), (0.5, 10), (0.25, 5), (1.0, 20)])
def test_as_many_contrast_as_are_asked_for(contrast: float, wanted: int) -> None:
    prompts = combine_prompts(MUG, 21, 0, contrast=contrast)
    assert len(prompts) == 21 or contrast == 0.0
    assert sum(not is_own(prompt) for prompt in prompts) == wanted


def test_contrasts_keep_the_kind_of_the_word() -> None:
    """A part keeps its noun and changes its colour; what says nothing else of its kind has no contrast."""
    text = " ".join(combine_prompts(MUG, 300, 1, contrast=1.0))
    colours = set(USUAL["colour"])
    assert {word for word in re.findall(r"(\w+) foot", text)} == colours
    assert {word for word in re.findall(r"(\w+) star", text)} == colours
    assert {word for word in re.findall(r"(\w+) handle", text)} == {"big", "small"}, "not large, which means the same"
    assert set(USUAL["finish"]) <= set(text.split())
    assert not {"fluffy", "clay"} & set(text.split()), "kinds that the subject has no word for stay away"


def test_what_means_the_same_is_no_contrast() -> None:
    """ "gray" is "grey"; of "dark blue" the colour is exchanged; what nobody knows contrasts with all of its kind."""
    words = {"colour": ["gray"], "finish": ["glossy"], "part": ["dark blue lid", "wooden knob"]}
    own = AttributeDictionary.of("mug", words, "hand", "here", {"material": ["steel", "unobtainium"]})
    prompts = combine_prompts(own, 400, 1, contrast=1.0)
    text = " ".join(prompts)
    before = {word for prompt in prompts for word in prompt.partition(" with ")[0].split()}
    assert {"gray", "red", "glossy", "matte"} <= before and not {"grey", "shiny"} & before
    assert set(re.findall(r"(\w+) (\w+) lid", text)) == {("dark", colour) for colour in USUAL["colour"]}
    assert set(re.findall(r"(\w+) knob", text)) == {"wooden", "steel", "unobtainium"}


def test_a_dictionary_brings_its_own_contrasts() -> None:
    found = AttributeDictionary("mug", MUG.attributes, "judge", {"colour": ("red",), "pattern": ("striped",)})
    text = " ".join(combine_prompts(found, 200, 1, contrast=1.0))
    assert {word for word in re.findall(r"(\w+) star", text)} == {"red", "orange"}
    assert "striped" in text and "turquoise" not in text


def test_a_subject_s_captions_say_only_what_it_is() -> None:
    prompts = combine_prompts(MUG, 20, 0, "sks")
    assert prompts[0] == "a photo of a sks mug"
    assert all("sks" in prompt.split() and is_own(prompt) for prompt in prompts)
    counts = [len(re.findall("blue|shiny|foot|handle|star", prompt)) for prompt in prompts]
    assert max(counts) == 3 and set(counts) == {0, 1, 2, 3}
    assert max(len(re.findall("blue|shiny|foot|handle|star", each)) for each in combine_prompts(MUG, 20, 0, most=5)) > 3


def test_words_that_give_no_more_end_the_list() -> None:
    only = AttributeDictionary("mug", {"part": ("foot",)}, "hand", {"colour": ("red",)})
    every = {"a photo of a mug", "a photo of a mug with a foot"}
    assert set(combine_prompts(only, 9, 0, contrast=0.0)) == every
    reds = {"a photo of a red mug", "a photo of a red mug with a foot"}
    assert set(combine_prompts(only, 9, 0)) == every | reds
    nothing = AttributeDictionary("mug", {})
    assert combine_prompts(nothing, 9, 0, "sks") == ("a photo of a sks mug",)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"contrast": 1.1}, {"most": 0}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="must be at least 1, contrast"):
        combine_prompts(MUG, **{"count": 2, "seed": 0, **wrong})  # type: ignore[arg-type]
