"""Pictures that are learnt from as they are, without captions: a folder of any sizes, or rooms that are rendered.

Each gives random square crops, and silhouettes of things for holes in their shape.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.core.pictures import read_image
from dreammix_trt.core.tensors import map_tensors, write_tensors
from dreammix_trt.trainer.data import Mask, Picture
from dreammix_trt.trainer.listing import is_picture

log = logging.getLogger(__name__)

_TRIES = 20  # pictures that cannot be read, one after the other, before the folder is given up
_SHARPEST, _SEED = Image.Resampling.LANCZOS, 31


class PicturePool(Protocol):
    """What pictures are drawn from; several threads may draw at a time.

    objects: silhouettes of things, bool (h, w); (): there are none.
    """

    @property
    def objects(self) -> Sequence[Mask]: ...

    def prepare(self, tell: Callable[[float], None]) -> None:
        """Make what is drawn from, unless it is there; before the first draw. tell: is told the share that is made."""

    def draw(self, rng: np.random.Generator, side: int, crop: tuple[float, float]) -> Picture:
        """A random square of a random picture, mirrored half of the time: uint8 (side, side, 3).

        crop: the least and the most that it shows, as a share of the largest square in the picture by area.
        """

    def describe(self) -> str:
        """What decides the pictures, in a line that changes when they do; also before they are made."""


class FolderPool:
    """The pictures of a folder and of the folders in it.

    One that cannot be read is named once, and the next is drawn in its place.
    """

    def __init__(self, folder: str | Path, objects: str | Path | None = None) -> None:
        """objects: folder of silhouettes, white on black. Raises InputError for a folder without pictures."""
        self._folder = Path(folder)
        self._files = list_pictures(self._folder, "pictures to learn from, such as 0001.jpg, or folders of them")
        self.objects: Sequence[Mask] = _read_silhouettes(Path(objects)) if objects else ()
        self._damaged: set[Path] = set()

    def prepare(self, tell: Callable[[float], None]) -> None:
        """They are there."""

    def draw(self, rng: np.random.Generator, side: int, crop: tuple[float, float]) -> Picture:
        """As PicturePool. Raises InputError where one picture after the other cannot be read."""
        for _ in range(_TRIES):
            file = self._files[int(rng.integers(len(self._files)))]
            try:
                return crop_picture(rng, read_image(file).on(255), side, crop)
            except InputError as error:
                if file not in self._damaged:
                    log.warning("%s; it is left out", error)
                self._damaged.add(file)
        raise InputError(f"{self._folder}: {_TRIES} pictures one after the other cannot be read; see the warnings")

    def describe(self) -> str:
        """Their names and sizes: there may be millions, too many to read twice."""
        digest, size = hashlib.sha256(), 0
        for file in self._files:
            bytes_ = file.stat().st_size
            digest.update(f"{file.relative_to(self._folder).as_posix()} {bytes_}\n".encode())
            size += bytes_
        for mask in self.objects:
            digest.update(np.packbits(mask).tobytes())
        return f"{len(self._files)} pictures, {size} bytes, {digest.hexdigest()[:16]}"


def list_pictures(folder: Path, wanted: str) -> list[Path]:
    """All pictures below a folder by their names, in order. Raises InputError where there are none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: {'is a file' if folder.exists() else 'no such folder'}; give a folder of {wanted}")
    found = sorted(file for file in folder.rglob("*") if is_picture(file) and file.is_file())
    if not found:
        raise InputError(f"{folder} holds no pictures; it should hold {wanted}")
    return found


def _read_silhouettes(folder: Path) -> list[Mask]:
    """Raises InputError for one that marks nothing."""
    found = []
    for file in list_pictures(folder, "silhouettes of things, white on black"):
        mask = np.asarray(read_image(file).on(0).max(2) > 127)
        if not mask.any():
            raise InputError(f"{file} marks nothing: no value is above 127; paint the thing white, or remove the file")
        found.append(mask)
    return found


def crop_picture(rng: np.random.Generator, image: Picture, side: int, crop: tuple[float, float]) -> Picture:
    """As `PicturePool.draw`, of one picture, uint8 (H, W, 3). Nothing is scaled where the square has the right side."""
    height, width = image.shape[:2]
    short = min(height, width)
    piece = max(1, round(short * math.sqrt(rng.uniform(*crop))))
    top, left = (int(rng.integers(length - piece + 1)) for length in (height, width))
    square = image[top : top + piece, left : left + piece]
    if piece != side:
        square = np.asarray(Image.fromarray(square).resize((side, side), _SHARPEST))
    return np.ascontiguousarray(square[:, ::-1] if rng.random() < 0.5 else square)


class ScenePool:
    """Rooms of the embedded model's world, rendered once: half of them with a thing in it, half empty.

    That a room may be empty has to be seen in training. Where each one holds a thing, an auto-encoder that sees none
    expects it in the hole.

    images: uint8 (N, S, S, 3), prepared. objects: silhouettes, of things that stand in the rooms or could, prepared.
    """

    def __init__(self, base: BaseFiles, folder: Path, count: int, seed: int) -> None:
        """folder: where rooms are kept. Raises InputError for another base than the embedded one."""
        if base.folder != BaseFiles.open().folder:
            raise InputError(
                f"{base.name} needs a folder of pictures to learn from; rooms are rendered for the embedded base alone"
            )
        self._side, self._count, self._seed = base.native_side, count, seed
        self._file = folder / f"rooms-{self._side}-{count}-{seed}.safetensors"
        self.images: Picture = np.empty((0, self._side, self._side, 3), np.uint8)
        self.objects: Sequence[Mask] = ()

    def prepare(self, tell: Callable[[float], None]) -> None:
        """Take the rooms that are kept, else render and keep them."""
        if len(self.images):
            return
        images, objects = self._read() or self._make(tell)
        self.images, self.objects = images, [np.asarray(mask, bool) for mask in objects if mask.any()]

    def _read(self) -> tuple[Picture, Picture] | None:
        if not self._file.exists():
            return None
        try:
            held = map_tensors(self._file)
            return held["images"], held["objects"]
        except (FileFormatError, KeyError) as error:
            log.warning("%s is damaged (%s); the rooms are rendered again", self._file, error)
            return None

    def _make(self, tell: Callable[[float], None]) -> tuple[Picture, Mask]:
        images, objects = _render(self._side, self._count, self._seed, tell)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"images": images, "objects": objects.astype(np.uint8)}
        write_tensors(self._file, {name: ("uint8", each.shape) for name, each in arrays.items()}, arrays.__getitem__)
        return images, objects

    def draw(self, rng: np.random.Generator, side: int, crop: tuple[float, float]) -> Picture:
        """As PicturePool."""
        return crop_picture(rng, self.images[int(rng.integers(len(self.images)))], side, crop)

    def describe(self) -> str:
        """How many, and their seed."""
        return f"{self._count} rendered rooms, seed {self._seed}"


def _render(side: int, count: int, seed: int, tell: Callable[[float], None]) -> tuple[Picture, Mask]:
    from dreammix_trt.trainer.micro import world

    images, objects = np.empty((count, side, side, 3), np.uint8), np.empty((count, side, side), bool)
    for number in range(count):
        scene = world.render_scene(np.random.default_rng([seed, _SEED, number]), size=side)
        images[number] = scene.background if number % 2 else scene.image
        objects[number] = scene.alpha > 0.5
        tell((number + 1) / count)
    return images, objects
