from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dreammix_trt.core.lora_words import (
    CARD,
    LoraWords,
    add_card,
    find_words,
    read_attributes,
    read_caption_words,
    read_words,
)
from dreammix_trt.core.remarks import keep_remarks

CAPTIONS = {"10_ohwx teapot": {"ohwx teapot": 12, "on a table": 5}}


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"token": "sks", "class_name": "coffee mug"}, ("sks", "coffee mug", "token")),
        ({"modelspec.trigger_phrase": "ohwx teapot"}, ("ohwx", "teapot", "modelspec.trigger_phrase")),
        ({"modelspec.trigger_phrase": "ohwx, red, shiny"}, ("ohwx", "", "modelspec.trigger_phrase")),
        ({"trainedWords": ["ohwx", "teapot"]}, ("ohwx", "", "trainedWords")),
        ({"instance_prompt": "a photo of an ohwx teapot"}, ("ohwx", "teapot", "instance_prompt")),
        ({"ss_tag_frequency": CAPTIONS}, ("ohwx", "teapot", "ss_tag_frequency")),
        ({"ss_dataset_dirs": {"20_ohwx teapot": {"n_repeats": 20}}}, ("ohwx", "teapot", "ss_dataset_dirs")),
        ({"ss_tag_frequency": {"img": {"zwx": 9, "table": 2}}}, ("zwx", "", "ss_tag_frequency")),
        ({"ss_tag_frequency": {"10_img": {"a photo of zwx dog": 9}}}, ("zwx", "dog", "ss_tag_frequency")),
        ({"ss_tag_frequency": {"1_x y": {"one long sentence that tells a story of a pot": 9}}}, ("", "", "")),
        ({"ss_tag_frequency": "{", "ss_dataset_dirs": "[1]"}, ("", "", "")),
        ({"ss_tag_frequency": {"10_a": {"the": "x"}}}, ("", "", "")),
        ({}, ("", "", "")),
    ],
)
def test_the_words_are_found_wherever_trainers_write_them(
    metadata: dict[str, Any], words: tuple[str, str, str]
) -> None:
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    assert read_words(texts) == LoraWords(*words)


@pytest.mark.parametrize(
    ("name", "told", "words"),
    [
        ("pot.civitai.info", {"trainedWords": ["ohwx teapot", "x"]}, ("ohwx", "teapot", "pot.civitai.info")),
        ("pot.json", {"activation text": "zwx, red", "preferred weight": 0.8}, ("zwx", "", "pot.json")),
        ("pot.json", {"activation text": ""}, ("", "", "")),
        ("pot.json", [1], ("", "", "")),
        ("other.json", {"activation text": "zwx"}, ("", "", "")),
    ],
)
def test_a_file_beside_says_it_where_the_lora_does_not(
    tmp_path: Path, name: str, told: Any, words: tuple[str, str, str]
) -> None:
    (tmp_path / name).write_text(json.dumps(told))
    assert find_words(tmp_path / "pot.safetensors", {}) == LoraWords(*words)
    assert find_words(tmp_path / "pot.safetensors", {"token": "sks"}).token == "sks", "the LoRA itself counts more"


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"captions": '["a photo of a Blue sks mug", "a shiny, hand-made sks mug"]'}, "blue hand-made mug shiny sks"),
        ({"ss_tag_frequency": '{"10_ohwx pot": {"ohwx pot, red": 3, "on a table": 1}}'}, "ohwx pot red table"),
        ({"captions": "[]", "ss_tag_frequency": '{"x": 3}'}, ""),
        ({"ss_tag_frequency": "{"}, ""),
        ({}, ""),
    ],
)
def test_the_words_of_captions(metadata: dict[str, str], words: str) -> None:
    assert read_caption_words(metadata) == tuple(words.split())


@pytest.mark.parametrize(
    ("text", "found", "why"),
    [
        ('{"colour": ["Blue", "blue"], "part": "a cream foot"}', {"colour": ("blue",), "part": ("cream foot",)}, ""),
        ("{}", {}, ""),
        ("{", {}, "Expecting property name"),
        ("[1]", {}, "attributes is [1]; it must be an object"),
        ("null", {}, "attributes is None; it must be an object"),
        ('{"smell": ["good"]}', {}, "attributes.smell: no such kind"),
        ('{"colour": [{"a": 1}]}', {}, "attributes.colour holds {'a': 1}"),
        ("[" * 100_000, {}, ""),
        (None, {}, ""),
    ],
    ids=range(9),
)
def test_attributes_that_are_not_ours_break_nothing(
    text: str | None, found: dict[str, tuple[str, ...]], why: str
) -> None:
    metadata = {"token": "sks"} | ({} if text is None else {"attributes": text})
    with keep_remarks(tell=False) as remarks:
        assert read_attributes(Path("x.safetensors"), metadata) == found
    assert bool(remarks) == (not found and text not in (None, "{}"))
    assert all(each.startswith("x.safetensors: the attributes in its metadata are ignored") for each in remarks)
    assert why in "".join(remarks)


def test_a_card_beside_a_lora_says_what_it_leaves_out(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    assert add_card(file, {"format": "pt"}) == {"format": "pt"}
    card = {
        "class_name": "mug",
        "token": "sks",
        "captions": ["a blue sks mug"],
        "attributes": {"colour": ["blue"]},
        "rank": 4,
    }
    (tmp_path / CARD).write_text(json.dumps(card))
    found = add_card(file, {"format": "pt"})
    assert read_words(found) == LoraWords("sks", "mug", "token")
    assert read_attributes(file, found) == {"colour": ("blue",)}
    assert read_caption_words(found) == ("blue", "mug", "sks")
    own = add_card(file, {"token": "sks", "attributes": '{"colour": ["red"]}'})
    assert read_attributes(file, own) == {"colour": ("red",)}, "the LoRA itself counts more"
    stranger = {"modelspec.trigger_phrase": "zwx dog"}
    assert add_card(file, stranger) == stranger, "the card of another LoRA in this folder"
    for spoilt in ("[]", "{", '{"token": 3, "attributes": ""}'):
        (tmp_path / CARD).write_text(spoilt)
        assert add_card(file, stranger) == stranger
        assert add_card(file, {}) == {}
