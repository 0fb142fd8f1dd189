"""Which subjects a folder holds, what they are called, and what is no subject."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dreammix_trt.core.attributes import AttributeDictionary
from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.many_subjects import find_learnt, find_photographed, read_names
from dreammix_trt.trainer.listing import list_photographs
from dreammix_trt.trainer.photographs import choose_twin


def picture(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(file)
    return file


def test_folders_of_photographs_are_found_and_all_else_is_named(tmp_path: Path) -> None:
    for name in ("mug/image/0.png", "teapot/0.jpg", "kohya/10_ohwx dog/0.png", ".hidden/0.png"):
        picture(tmp_path / name)
    (tmp_path / "empty" / "image").mkdir(parents=True)
    (tmp_path / "notes.txt").touch()
    told: list[str] = []
    assert list(find_photographed(tmp_path, told.append)) == ["kohya", "mug", "teapot"]
    assert told == [
        f"{tmp_path / 'empty'}: holds no photographs; left out",
        f"{tmp_path / 'notes.txt'}: a file, no subject; left out",
    ]
    with pytest.raises(InputError, match=r"mug is the folder of one subject \(image\), which `train` takes"):
        find_photographed(tmp_path / "mug", told.append)
    with pytest.raises(InputError, match=r"empty.* holds no folder with photographs"):
        find_photographed(tmp_path / "empty" / "image", told.append)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        find_photographed(tmp_path / "nowhere", told.append)


def test_loras_are_found_and_all_else_is_named(tmp_path: Path) -> None:
    for name in ("mug/pytorch_lora_weights.safetensors", "cup.safetensors", "mug.work/checkpoint/x.safetensors",
                 "dog.work/checkpoint/x.safetensors", "mug.log", "empty/x.txt", "notes.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    told: list[str] = []
    assert list(find_learnt(tmp_path, told.append)) == ["cup", "mug"]
    assert told == [
        f"{tmp_path / 'dog.work'}: the training of dog has not ended; left out",
        f"{tmp_path / 'empty'}: holds no LoRA; left out",
        f"{tmp_path / 'notes.txt'}: a file, no subject; left out",
    ]
    (tmp_path / "mug.safetensors").touch()
    with pytest.raises(InputError, match="would both become mug; rename one"):
        find_learnt(tmp_path, told.append)


def test_a_subject_is_called_as_its_folder_says(tmp_path: Path) -> None:
    def names(folder: Path) -> dict[str, Any]:
        return read_names(folder)

    photo = picture(tmp_path / "one" / "10_ohwx tea pot" / "0.png")
    assert names(tmp_path / "one") == names(photo.parent) == {"token": "ohwx", "class_name": "tea pot"}
    AttributeDictionary.of("teapot", {"colour": ["red"]}, "hand", "x").write(tmp_path / "one" / "attributes.json")
    seen = {"class_name": "teapot", "attributes": tmp_path / "one" / "attributes.json"}
    assert names(tmp_path / "one") == {"token": "ohwx", **seen}
    card = tmp_path / "one" / "subject.json"
    card.write_text(json.dumps({"token": "zwx", "prompt": "a zwx pot", "class_name": ""}))
    assert names(tmp_path / "one") == {"token": "zwx", "prompt": "a zwx pot", **seen}
    card.write_text(json.dumps({"token": 3}))
    with pytest.raises(FileFormatError, match=r"subject\.json: token is 3; it must be a text"):
        names(tmp_path / "one")
    picture(tmp_path / "two" / "0.png")
    for name in ("subject.json", "attributes.json"):
        (tmp_path / "two" / name).write_text("{}")
    assert list_photographs(tmp_path / "two", choose_twin).explain() == [], "words are no photographs left out"
    card.write_text("{")
    with pytest.raises(FileFormatError, match=r"subject\.json"):
        names(tmp_path / "one")
