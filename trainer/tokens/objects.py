"""The objects that an adapter learns on: a folder of them, or rendered ones."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.trainer.data import Photograph
from dreammix_trt.trainer.listing import is_picture, list_photographs
from dreammix_trt.trainer.photographs import PhotographFile, choose_twin
from dreammix_trt.trainer.regular_folder import FOLDER_START, read_regular
from dreammix_trt.trainer.tokens.recipes import name_class

if TYPE_CHECKING:
    from dreammix_trt.trainer.micro.objects import Attributes

log = logging.getLogger(__name__)
_SEED, _WORDS = 61, 64
_SIZES = (0.45, 0.8)  # of a rendered object's longer side, as shares of the picture's


@dataclass(frozen=True)
class Seen:
    """An object with its photographs, and a caption of each.

    words: texts that a request may have, each with one that says as well what the text leaves open of the object.
    """

    class_name: str
    photographs: Sequence[Photograph]
    captions: Sequence[str]
    words: Sequence[tuple[str, str]]


class ObjectPool(Protocol):
    """What objects are taken from, by their numbers.

    trained_on: what they are, in words.
    """

    @property
    def trained_on(self) -> str: ...

    def __len__(self) -> int: ...

    def open(self, number: int) -> Seen | None:
        """One object; None: nothing of it can be read, which is logged."""

    def describe(self) -> str:
        """What decides the objects, in a line that changes when they do."""


@dataclass(frozen=True)
class _Filed:
    class_name: str
    files: tuple[PhotographFile, ...]
    captions: tuple[str, ...]


class FolderObjects:
    """The objects of a folder, in two layouts, which may stand side by side:

    - `CLASS/OBJECT/` with an object's photographs and masks as `listing` finds them, or `CLASS/` where there is one
      object of a class; `NAME.txt` beside a photograph is its caption, else it is "a photo of a CLASS". "_" in CLASS
      stands for a space.
    - `regular_CLASS/CAPTION/SEED-image.png` and `SEED-mask.png`, as `regularize` writes them: an object each.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises InputError for a folder that is missing, or without objects that have masks."""
        self._folder = Path(folder)
        if not self._folder.is_dir():
            state = "is a file" if self._folder.exists() else "no such folder"
            raise InputError(f"{self._folder}: {state}; give a folder of objects, such as mug/my_cup/")
        self._objects = list(_list_objects(self._folder))
        if not self._objects:
            raise InputError(
                f"{self._folder} holds no objects with masks; photographs of an object lie in CLASS/OBJECT/image/ and "
                f"its masks in CLASS/OBJECT/mask/, or `dreammix-trt regularize` writes {FOLDER_START}CLASS/"
            )
        classes = sorted({each.class_name for each in self._objects})
        shown = ", ".join(classes[:8]) + (f" and {len(classes) - 8} more" if len(classes) > 8 else "")
        self.trained_on = f"{len(self._objects)} objects: {shown}"

    def __len__(self) -> int:
        return len(self._objects)

    def open(self, number: int) -> Seen | None:
        """As ObjectPool."""
        filed = self._objects[number]
        photographs, captions = [], []
        for file, caption in zip(filed.files, filed.captions, strict=True):
            try:
                photographs.append(file.read())
                captions.append(caption)
            except (InputError, FileFormatError) as error:
                log.warning("%s; it is left out", error)
        words = [(name_class(filed.class_name), caption) for caption in dict.fromkeys(captions)]
        return Seen(filed.class_name, photographs, captions, words) if photographs else None

    def describe(self) -> str:
        """Names, sizes and captions: there may be millions of files, too many to read twice."""
        digest = hashlib.sha256()
        for each in self._objects:
            for file, caption in zip(each.files, each.captions, strict=True):
                paths = (file.image, file.mask) if file.mask else (file.image,)
                told = (f"{path.relative_to(self._folder).as_posix()} {path.stat().st_size}" for path in paths)
                digest.update(f"{each.class_name} {caption} {' '.join(told)}\n".encode())
        return f"{self.trained_on}; {digest.hexdigest()[:16]}"


def _list_objects(folder: Path) -> Iterator[_Filed]:
    """In order of their names. What is left out is logged."""
    if folder.name.startswith(FOLDER_START):
        yield from _list_regular(folder)
        return
    for place in _list_folders(folder):
        if place.name.startswith(FOLDER_START):
            yield from _list_regular(place)
            continue
        inside = [place] if _holds_photographs(place) else _list_folders(place)
        for filed in (_read_object(place.name.replace("_", " ").strip(), each) for each in inside):
            if filed is not None:
                yield filed


def _list_folders(place: Path) -> list[Path]:
    return sorted(each for each in place.iterdir() if each.is_dir() and not each.name.startswith("."))


def _holds_photographs(place: Path) -> bool:
    return (place / "image").is_dir() or any(is_picture(file) for file in place.iterdir())


def _list_regular(place: Path) -> Iterator[_Filed]:
    class_name = place.name.removeprefix(FOLDER_START).replace("_", " ").strip()
    for picture in read_regular(place):  # which names those without a mask
        if picture.mask is not None:
            yield _Filed(class_name, (PhotographFile(picture.image, picture.mask),), (picture.caption,))


def _read_object(class_name: str, place: Path) -> _Filed | None:
    if not any(is_picture(file) for file in place.rglob("*")):
        log.warning("%s: no photographs; it is left out", place)
        return None
    pairs = list_photographs(place, choose_twin).pairs
    files = tuple(PhotographFile(image, mask) for image, mask in pairs.items() if mask is not None)
    bare = [image.name for image, mask in pairs.items() if mask is None]
    if bare:
        log.warning("%s: photographs without a mask are left out: %s", place, ", ".join(bare))
    return _Filed(class_name, files, tuple(_read_caption(file.image, class_name) for file in files)) if files else None


def _read_caption(image: Path, class_name: str) -> str:
    file = image.with_suffix(".txt")
    text = " ".join(file.read_text("utf-8", "replace").split()) if file.is_file() else ""
    return text or name_class(class_name)


class RenderedObjects:
    """Objects of the embedded model's world, drawn at random and rendered in a room for each photograph.

    Never one of a combination that is held out.
    """

    def __init__(self, base: BaseFiles, count: int, views: int, seed: int) -> None:
        """views: photographs of each. Raises InputError for another base than the embedded one."""
        if base.folder != BaseFiles.open().folder:
            raise InputError(
                f"{base.name} needs a folder of objects to learn from (DATA); objects are rendered for the embedded "
                "base alone"
            )
        self._side, self._count, self._views, self._seed = base.native_side, count, views, seed
        self.trained_on = f"{count} rendered objects, none of a combination that is held out"

    def __len__(self) -> int:
        return self._count

    def open(self, number: int) -> Seen | None:
        """As ObjectPool."""
        from dreammix_trt.trainer.micro import captions, world

        rng = np.random.default_rng([self._seed, _SEED, number])
        what, build = world.random_attributes(rng), world.random_build(rng)
        photographs, told = [], []
        for view in range(self._views):
            size = float(rng.uniform(*_SIZES)) * self._side
            scene = world.render_scene(rng, what, self._side, size, build=build)
            photographs.append(Photograph(scene.image, scene.alpha > 0.5, f"{number}/{view}"))
            told.append(captions.caption(rng, what, scene.surface) or captions.describe(what))
        return Seen(
            what.shape, photographs, told, _list_words(np.random.default_rng([self._seed, _WORDS, number]), what)
        )

    def describe(self) -> str:
        """How many, and their seed."""
        return f"{self._count} rendered objects, {self._views} photographs each, seed {self._seed}"


def _list_words(rng: np.random.Generator, what: Attributes) -> list[tuple[str, str]]:
    """The class alone, some of its parts, and two edits: each with all that is then to be seen of the thing."""
    from dreammix_trt.trainer.micro import captions

    whole = captions.describe(what)
    some = [part for part in captions.NAMEABLE if rng.random() < 0.5]
    found = [(name_class(what.shape), whole), (captions.phrase(rng, what, some), whole)]
    for _ in range(2):
        part, edited = captions.draw_edit(rng, what)
        found.append((captions.phrase(rng, edited, [part]), captions.describe(edited)))
    return found
