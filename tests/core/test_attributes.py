"""The attribute dictionary: what files hold, what is refused by field, and the captions made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dreammix_trt.core.attributes import AttributeDictionary, compose_phrase
from dreammix_trt.core.errors import InputError

MUG = {"part": ["a Cream  foot", "white rim"], "colour": ["Blue", "blue"], "decal": ["orange star"], "texture": []}


def test_values_are_tidied_and_kinds_have_the_order_of_a_caption() -> None:
    found = AttributeDictionary.of(" mug ", MUG, "hand", "here")
    assert found.class_name == "mug"
    assert found.pairs == (
        ("colour", "blue"),
        ("part", "cream foot"),
        ("part", "white rim"),
        ("decal", "orange star"),
    )


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = AttributeDictionary.of("mug", MUG, "judge", "here")
    found.write(tmp_path / "attributes.json")
    assert AttributeDictionary.read(tmp_path / "attributes.json") == found


def test_contrasts_are_kept_where_there_are_some(tmp_path: Path) -> None:
    found = AttributeDictionary.of("mug", MUG, "judge", "here", {"colour": ["Red", "the green"]})
    assert found.contrasts == {"colour": ("red", "green")}
    found.write(tmp_path / "attributes.json")
    assert AttributeDictionary.read(tmp_path / "attributes.json") == found
    assert "contrasts" not in AttributeDictionary("mug", {}).to_dict()


def test_a_file_written_by_hand_needs_class_and_attributes_alone(tmp_path: Path) -> None:
    file = tmp_path / "attributes.json"
    file.write_text(json.dumps({"class_name": "teapot", "attributes": {"material": "clay"}}), encoding="utf-8")
    assert AttributeDictionary.read(file) == AttributeDictionary("teapot", {"material": ("clay",)}, "hand")


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"attributes": {}}, "class_name is ''"),
        ({"class_name": "mug", "attributes": ["blue"]}, "attributes is"),
        ({"class_name": "mug", "attributes": {"smell": ["sweet"]}}, "attributes.smell: no such kind"),
        ({"class_name": "mug", "attributes": {"colour": [3]}}, "attributes.colour holds 3"),
        ({"class_name": "mug", "attributes": {"colour": ["blue, red"]}}, "attributes.colour holds 'blue, red'"),
        ({"class_name": "mug", "attributes": {"part": ["a " + "very " * 9 + "long foot"]}}, "one to 8 plain words"),
        ({"class_name": "mug", "attributes": {"part": [f"foot {n}" for n in range(17)]}}, "17 values"),
        ({"class_name": "mug", "schema": 9}, "schema 9"),
        ({"class_name": "mug", "source": 1}, "source is 1"),
        ({"class_name": "mug", "contrasts": 3}, "contrasts is 3"),
        ({"class_name": "mug", "contrasts": {"colour": [""]}}, "contrasts.colour holds ''"),
    ],
)
def test_faults_are_named_with_file_and_field(tmp_path: Path, record: dict[str, Any], told: str) -> None:
    file = tmp_path / "attributes.json"
    file.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(InputError, match=r"attributes\.json") as caught:
        AttributeDictionary.read(file)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("pairs", "token", "phrase"),
    [
        ([], "sks", "sks mug"),
        ([("colour", "blue")], "", "blue mug"),
        (
            [("part", "orange rim"), ("colour", "blue"), ("finish", "shiny")],
            "sks",
            "sks shiny blue mug with an orange rim",
        ),
        ([("decal", "star"), ("part", "foot"), ("part", "lid")], "", "mug with a foot, a lid and a star"),
    ],
)
def test_a_phrase_has_attributes_before_and_behind_the_class(
    pairs: list[tuple[str, str]], token: str, phrase: str
) -> None:
    assert compose_phrase("mug", pairs, token) == phrase
