from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dreammix_trt.core.lora_words import LoraWords, find_words, read_caption_words, read_words

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
