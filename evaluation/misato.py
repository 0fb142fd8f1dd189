"""MISATO's folders (Wang et al. 2025) as protocols: every picture is painted once, and is its own truth.

    image/0000.png ...      the pictures
    mask/0000.png ...       white is the hole; in the set of 1024 pixels with two zeros more: mask/000000.png

Pictures 0000 to 0499 are landscapes, then come indoor scenes, buildings and backgrounds, 500 each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from dreammix_trt.core.errors import InputError
from dreammix_trt.evaluation.protocol import FILE_NAME, SCHEMA
from dreammix_trt.trainer.listing import is_picture

PROMPT: Final = "background"  # the set's caption of every picture
_IMAGES, _MASKS = "image", "mask"
_KINDS: Final = ("landscape", "indoor", "building", "background")
_A_KIND: Final = 500  # pictures
_OTHER: Final = "pictures"
_PREFIX: Final = "00"  # of masks of 1024 pixels


def is_layout(folder: Path) -> bool:
    """Whether a folder is in MISATO's layout, and no protocol."""
    return not (folder / FILE_NAME).exists() and (folder / _IMAGES).is_dir() and (folder / _MASKS).is_dir()


def make_record(folder: Path) -> dict[str, Any]:
    """What the folder's protocol.json would say. Raises InputError for a folder without pictures."""
    kinds: dict[str, list[str]] = {}
    for image in _list_images(folder):
        kinds.setdefault(_find_kind(image.stem), []).append(image.stem)
    subjects = {kind: {"subject": "", "removal": [PROMPT], "scenes": names} for kind, names in kinds.items()}
    return {"schema": SCHEMA, "name": folder.resolve().name, "subjects": subjects}


def list_pairs(folder: Path) -> Iterator[tuple[Path, Path | None, Path]]:
    """Every picture, its mask (None: there is none), and where a mask of the set of 512 pixels belongs."""
    masks = {file.stem: file for file in sorted((folder / _MASKS).iterdir()) if is_picture(file)}
    for image in _list_images(folder):
        mask = masks.get(image.stem) or masks.get(f"{_PREFIX}{image.stem}")
        yield image, mask, folder / _MASKS / f"{image.stem}.png"


def _list_images(folder: Path) -> list[Path]:
    images = sorted(file for file in (folder / _IMAGES).iterdir() if is_picture(file))
    if not images:
        raise InputError(f"{folder / _IMAGES} holds no pictures; unpack the set there: 0000.png and those that follow")
    return images


def _find_kind(name: str) -> str:
    known = name.isdecimal() and int(name) < _A_KIND * len(_KINDS)
    return _KINDS[int(name) // _A_KIND] if known else _OTHER
