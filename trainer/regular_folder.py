"""Folders of regular pictures in the authors' layout: `regular_CLASS/PROMPT_WITH_UNDERSCORES/SEED-image.png`, and
`SEED-mask.png` beside it. The folder's name is the caption.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from dreammix_trt.core.errors import InputError
from dreammix_trt.trainer.listing import is_picture

log = logging.getLogger(__name__)

FOLDER_START = "regular_"
_IMAGE, _MASK = "-image", "-mask"
_NOT_IN_NAMES = re.compile(r'[_/\\:*?"<>|\x00-\x1f]')  # "_" stands for a space, the others are no file's anywhere
_LONGEST = 255  # bytes of a file's name


@dataclass(frozen=True)
class RegularPicture:
    """A picture of another member of the subject's class.

    mask: where the thing is, white; None: there is none.
    caption: what it shows, without the subject's token.
    name: for messages, "a photo of a red mug/7".
    """

    image: Path
    mask: Path | None
    caption: str
    name: str


def read_regular(folder: str | Path) -> list[RegularPicture]:
    """List the regular pictures of a folder, in order of captions and names. What is left out is logged.

    folder: that holds `regular_CLASS/`, or is it.

    Raises InputError for a folder that is missing, holds none, or those of several classes.
    """
    place = _find_place(Path(folder))
    pictures, others = [], []
    for prompt in sorted(each for each in place.iterdir() if each.is_dir() and not each.name.startswith(".")):
        found, left = _read_prompt(prompt)
        pictures += found
        others += left
    if not pictures:
        raise InputError(
            f"{place} holds no regular pictures; they lie in {FOLDER_START}CLASS/a_photo_of_a_red_mug/7-image.png, "
            "with 7-mask.png beside; `dreammix-trt regularize` makes such a folder"
        )
    if others:
        shown = ", ".join(str(file.relative_to(place)) for file in others[:3])
        log.warning("%s: left out (not named SEED-image or SEED-mask): %d, such as %s", place, len(others), shown)
    bare = [picture.name for picture in pictures if picture.mask is None]
    if bare:
        log.warning("%s: regular pictures without a mask: %d, such as %s", place, len(bare), ", ".join(bare[:3]))
    return pictures


def place_regular(folder: Path, class_name: str, caption: str, seed: int) -> tuple[Path, Path]:
    """Where a regular picture and its mask belong below `folder`.

    Raises InputError for a class or caption that is no folder's name.
    """
    place = folder / _as_name(class_name, FOLDER_START) / _as_name(caption)
    return place / f"{seed}{_IMAGE}.png", place / f"{seed}{_MASK}.png"


def _as_name(text: str, start: str = "") -> str:
    wrong = _NOT_IN_NAMES.search(text)
    name = start + text.replace(" ", "_")
    if wrong or name.startswith(".") or not text.strip():
        raise InputError(f"{text!r} cannot name a folder{f': it holds {wrong[0]!r}' if wrong else ''}; use plain words")
    if len(name.encode()) > _LONGEST:
        raise InputError(
            f"{text!r} is too long for a folder's name ({_LONGEST} bytes); use fewer or shorter attributes"
        )
    return name


def _find_place(folder: Path) -> Path:
    """The folder that holds the prompts' folders."""
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {state}; give the folder of regular pictures, such as {FOLDER_START}mug/")
    inner = sorted(each for each in folder.iterdir() if each.is_dir() and each.name.startswith(FOLDER_START))
    if len(inner) > 1:
        names = ", ".join(each.name for each in inner)
        raise InputError(f"{folder} holds the regular pictures of several classes ({names}); name one of these folders")
    return inner[0] if inner else folder


def _read_prompt(folder: Path) -> tuple[list[RegularPicture], list[Path]]:
    """The pictures of one caption, and files that are none."""
    there = sorted((file for file in folder.iterdir() if is_picture(file) and file.is_file()), key=_put_png_first)
    files: dict[str, Path] = {}
    for file in there:
        files.setdefault(file.stem, file)
    caption, pictures = folder.name.replace("_", " ").strip(), []
    for stem in sorted(files, key=_count_up):
        if stem.endswith(_IMAGE):
            seed = stem.removesuffix(_IMAGE)
            name = f"{caption}/{seed}"
            pictures.append(RegularPicture(files[stem], files.get(seed + _MASK), caption, name))
    used = {file for picture in pictures for file in (picture.image, picture.mask)}
    return pictures, [file for file in there if file not in used]


def _put_png_first(file: Path) -> tuple[bool, str]:
    return file.suffix.lower() != ".png", file.name


def _count_up(stem: str) -> tuple[int, str]:
    """Sorts 2-image before 10-image."""
    digits = re.match(r"\d+", stem)
    return (int(digits[0]) if digits else 0, stem)
