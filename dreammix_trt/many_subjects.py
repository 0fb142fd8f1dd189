"""The subjects in a folder: a folder of photographs each, or a LoRA each; and what is no subject, by name.

What a subject of photographs is called stands in its folder, in files that other commands write: `subject.json`, the
card of `train`; `attributes.json` of `attributes`; or the name of a folder of kohya's scripts, `10_ohwx teapot`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dreammix_trt.core.attributes import AttributeDictionary
from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.core.files import read_json
from dreammix_trt.core.lora_words import CARD, read_folder_name
from dreammix_trt.trainer.listing import is_picture

ATTRIBUTES = "attributes.json"
_OF_ONE = ("image", "images", "img", "mask", "masks")  # folders that one subject's photographs and masks have
_LORAS = (".safetensors", ".bin")
LOG, WORK = ".log", ".work"  # what lies beside the output of a job
Tell = Callable[[str], None]


def find_photographed(folder: Path, tell: Tell) -> dict[str, Path]:
    """The folders in a folder that hold photographs, by name, in order.

    tell: called with what is left out.

    Raises InputError where there is none, or the folder is that of one subject.
    """
    own = [each.name for each in _list(folder) if is_picture(each) or (each.is_dir() and each.name.lower() in _OF_ONE)]
    if own:
        raise InputError(
            f"{folder} is the folder of one subject ({own[0]}), which `train` takes; give the folder that holds one "
            "such folder for each subject"
        )
    found = {each.name: each for each in _list(folder) if each.is_dir() and _has_pictures(each)}
    _tell_rest(folder, set(found), "holds no photographs", tell)
    return _need(found, folder, "folder with photographs")


def find_learnt(folder: Path, tell: Tell) -> dict[str, Path]:
    """The LoRAs and subject files in a folder, by name, in order: folders as `train` writes them, and files.

    tell: called with what is left out.

    Raises InputError where there is none, or two have one name.
    """
    found: dict[str, Path] = {}
    for each in _list(folder):
        name = each.name if each.is_dir() else each.stem
        if not _is_learnt(each):
            continue
        if name in found:
            raise InputError(f"{found[name]} and {each} would both become {name}; rename one")
        found[name] = each
    _tell_rest(folder, {each.name for each in found.values()}, "holds no LoRA", tell)
    return _need(found, folder, "LoRA or subject file")


def read_names(folder: Path) -> dict[str, Any]:
    """What a subject's folder says: `token`, `class_name`, `prompt`, `attributes` (the file), as far as it does.

    Raises FileFormatError for a card that cannot be read, InputError for attributes that cannot.
    """
    found: dict[str, Any] = {}
    for each in (folder, *sorted(each for each in folder.iterdir() if each.is_dir())):
        named = read_folder_name(each.name)
        if named.class_name:
            found = {"token": named.token, "class_name": named.class_name}
    if (folder / ATTRIBUTES).is_file():
        found["class_name"] = AttributeDictionary.read(folder / ATTRIBUTES).class_name
        found["attributes"] = folder / ATTRIBUTES
    if (folder / CARD).is_file():
        card = read_json(folder / CARD)
        for name in ("token", "class_name", "prompt"):
            if not isinstance(card.get(name, ""), str):
                raise FileFormatError(f"{folder / CARD}: {name} is {card[name]!r}; it must be a text")
            found |= {name: card[name]} if card.get(name) else {}
    return found


def explain_no_class(folder: Path) -> str:
    """What to do where nothing says what a subject is."""
    return (
        f"{folder}: nothing says what the subject is; give --class-name for all, or write it into "
        f'{folder / CARD}: {{"class_name": "mug", "token": "sks"}}'
    )


def _list(folder: Path) -> list[Path]:
    """What is in a folder but hidden files. Raises InputError where it is none."""
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {state}; give the folder that holds the subjects")
    return sorted(each for each in folder.iterdir() if not each.name.startswith("."))


def _has_pictures(folder: Path) -> bool:
    inside = [folder, *(each for each in folder.iterdir() if each.is_dir())]
    return any(is_picture(file) for each in inside for file in each.iterdir())


def _is_learnt(path: Path) -> bool:
    if path.is_dir():
        inside = [path, *(each for each in path.iterdir() if each.is_dir())]
        return path.suffix != WORK and any(file.suffix in _LORAS for each in inside for file in each.iterdir())
    return path.suffix in _LORAS


def _tell_rest(folder: Path, taken: set[str], why: str, tell: Tell) -> None:
    """Say what in a folder is no subject, but for what our own jobs lay beside those that are."""
    rest = [each for each in _list(folder) if each.name not in taken]
    for each in rest:
        if each.is_dir() and each.suffix == WORK:
            stopped = each.name.removesuffix(WORK)
            if stopped not in taken:
                tell(f"{each}: the training of {stopped} has not ended; left out")
        elif each.is_dir():
            tell(f"{each}: {why}; left out")
        elif each.suffix != LOG:
            tell(f"{each}: a file, no subject; left out")


def _need(found: dict[str, Path], folder: Path, what: str) -> dict[str, Path]:
    if not found:
        raise InputError(f"{folder} holds no {what}; give the folder that holds one for each subject")
    return found
