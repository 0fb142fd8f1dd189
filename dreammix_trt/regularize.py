"""The regular pictures of the Attribute Decoupling Mechanism (paper, section 3.3), painted by our own runtime.

Other members of the subject's class, with its attributes and contrasting ones: the base paints them, without a subject,
into the subject's own photographs or into drawn rooms. A run that was stopped goes on where it ended.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image

from dreammix_trt.core.attributes import AttributeDictionary
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.files import atomic_file, check_place, hold_alone, read_json, sha256_of, write_json
from dreammix_trt.report import Figure, Row, contact_sheet
from dreammix_trt.trainer.attributes import CONTRAST, combine_prompts
from dreammix_trt.trainer.regular_folder import FOLDER_START, RegularPicture, place_regular, read_regular

if TYPE_CHECKING:
    from dreammix_trt.engine.dreammix import DreamMix
    from dreammix_trt.engine.result import Result
    from dreammix_trt.trainer.photographs import PhotographFile
    from dreammix_trt.trainer.segment import Segmenter

log = logging.getLogger(__name__)

RECORD: Final = "regular.json"
SHEET: Final = "sheet.png"
_SCHEMA: Final = 1
_SHARE: Final = (0.5, 0.66)  # of a drawn room's side that the thing takes
_COLUMNS, _TILE, _MOST_SHOWN = 6, 192, 240
_LEAST: Final = 0.02  # of the painted region that a segmenter must find
Update = Callable[[str, float, str], None]
Room = tuple[Image.Image, Image.Image]  # a picture, and the region to paint in it


@dataclass(frozen=True)
class Regular:
    """What `paint_regular` is asked for.

    dictionary: the subject's attributes.
    count: pictures.
    seed: of prompts, places and pictures; picture k is painted with seed + k, which is its file's name.
    contrast: as `combine_prompts` takes it.
    photographs: the subject's, whose places are painted anew; none: drawn rooms.
    base: names the base's weights, so that a run goes on with the same.
    fields: of the requests (num_inference_steps, guidance_scale).
    """

    dictionary: AttributeDictionary
    count: int = 24
    seed: int = 0
    contrast: float = CONTRAST
    photographs: Sequence[PhotographFile] = ()
    base: str = ""
    fields: tuple[tuple[str, Any], ...] = ()

    def prompts(self) -> list[str]:
        """One prompt a picture; where the words give fewer, they take turns."""
        found = combine_prompts(self.dictionary, self.count, self.seed, contrast=self.contrast)
        if len(found) < self.count:
            log.warning(
                "the attributes give %d different prompts, which take turns in %d pictures", len(found), self.count
            )
        return [found[number % len(found)] for number in range(self.count)]

    def to_dict(self, segmenter: Segmenter | None) -> dict[str, Any]:
        """All that decides the pictures, as plain JSON values."""
        photographs = {
            file.name: [sha256_of(each)[:16] for each in (file.image, file.mask) if each is not None]
            + ["inverted"] * file.inverted
            for file in self.photographs
        }
        return {
            "schema": _SCHEMA,
            **{name: value for name, value in self.dictionary.to_dict().items() if name not in ("schema", "source")},
            "count": self.count,
            "seed": self.seed,
            "contrast": self.contrast,
            "photographs": photographs,
            "base": self.base,
            "segmenter": None if segmenter is None else [sha256_of(segmenter.file)[:16], segmenter.style],
            **dict(self.fields),
        }


@dataclass(frozen=True)
class Painted:
    """What `paint_regular` did: how many pictures it painted and found finished, and the sheet that shows all."""

    new: int
    kept: int
    sheet: Path


def paint_regular(
    dm: DreamMix,
    order: Regular,
    out: Path,
    *,
    segmenter: Segmenter | None = None,
    batch: int = 1,
    force: bool = False,
    progress: Update | None = None,
) -> Painted:
    """Paint regular pictures into the folder `out`, in the authors' layout; what is finished there stays.

    dm: paints with its base alone.
    segmenter: finds the thing in what was painted; None: its mask is the whole painted region.
    batch: pictures painted at a time.
    force: paint all of them anew.

    Raises InputError for a folder with other files, of a run with other settings, which it names, or where another run
    paints just now.
    """
    with hold_alone(out, "another run paints"):
        return _paint_missing(dm, order, out, segmenter, batch, force, progress or (lambda *_: None))


def _paint_missing(
    dm: DreamMix, order: Regular, out: Path, segmenter: Segmenter | None, batch: int, force: bool, update: Update
) -> Painted:
    prompts = order.prompts()
    places = [
        place_regular(out, order.dictionary.class_name, prompt, order.seed + n) for n, prompt in enumerate(prompts)
    ]
    _begin(out, order.to_dict(segmenter), force=force)
    _warn_of_words(dm, prompts)
    wanted = [number for number, files in enumerate(places) if not all(file.is_file() for file in files)]
    for start in range(0, len(wanted), batch):
        numbers = wanted[start : start + batch]
        update("pictures", start / len(wanted), prompts[numbers[0]])
        rooms = [_find_room(order, dm.facts.native_side, number) for number in numbers]
        results = _paint(dm, order, [prompts[number] for number in numbers], numbers, rooms)
        for number, (_, hole), result in zip(numbers, rooms, results, strict=True):
            image_file, mask_file = places[number]
            with atomic_file(mask_file) as temporary:
                _find_mask(result.images[0], hole, segmenter, prompts[number]).save(temporary, "PNG")
            result.save(image_file)  # last: with it the pair is finished
    write_sheet(read_regular(out), out / SHEET)
    return Painted(len(wanted), len(places) - len(wanted), out / SHEET)


def _paint(
    dm: DreamMix, order: Regular, prompts: Sequence[str], numbers: Sequence[int], rooms: Sequence[Room]
) -> list[Result]:
    """One batch, without a subject."""
    from dreammix_trt.engine.jobs import Job

    jobs = []
    for prompt, number, (image, mask) in zip(prompts, numbers, rooms, strict=True):
        request = dm.request(prompt, subject="", seed=order.seed + number, **dict(order.fields))
        jobs.append(Job(image, mask, request))
    return dm.inpaint_batch(jobs)


def write_sheet(pictures: Sequence[RegularPicture], sheet: Path) -> None:
    """Write a contact sheet of regular pictures with their captions; of very many, some from all over the list."""
    step = -(-len(pictures) // _MOST_SHOWN)
    shown = pictures[::step]
    rows = [shown[start : start + _COLUMNS] for start in range(0, len(shown), _COLUMNS)]
    laid = [
        Row(f"{n * _COLUMNS + 1} to {n * _COLUMNS + len(row)}", list(map(_show, row))) for n, row in enumerate(rows)
    ]
    title = "Does each picture show what its caption says? Delete those that do not"
    title += "" if step == 1 else f" ({len(shown)} of {len(pictures)} are here)"
    with atomic_file(sheet) as temporary:
        contact_sheet(laid, tile=_TILE, title=title).save(temporary, "PNG")


def _show(picture: RegularPicture) -> Figure:
    with Image.open(picture.image) as opened:
        image = opened.convert("RGB")
    image.thumbnail((2 * _TILE, 2 * _TILE))
    return Figure(image, f"{picture.caption} ({picture.name.rpartition('/')[2]})")


def _begin(out: Path, settings: dict[str, Any], *, force: bool) -> None:
    """Note the settings in `out`, or check that they are those of the run that goes on there."""
    check_place(out, RECORD)
    record = out / RECORD
    if record.exists() and force:
        for folder in out.glob(f"{FOLDER_START}*"):
            shutil.rmtree(folder, ignore_errors=True)
    elif record.exists():
        known = read_json(record)
        for name in settings:
            if known.get(name) != settings[name]:
                raise InputError(
                    f"{out} was made with {name} {_shorten(known.get(name))}, and now it is "
                    f"{_shorten(settings[name])}: name another folder, or --force to paint all of them anew"
                )
        return
    write_json(record, settings)


def _warn_of_words(dm: DreamMix, prompts: Sequence[str]) -> None:
    """Say which words the base's text encoder takes apart: what it cannot read it cannot paint."""
    words = dict.fromkeys(word for prompt in prompts for word in prompt.replace(",", "").split())
    strange = [word for word in words if dm.tokenizers[0].spells_out(word)]
    if strange:
        log.warning(
            "the base's text encoder hardly knows %s; other words, or contrasts of your own, serve it better",
            ", ".join(strange),
        )


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _find_room(order: Regular, side: int, number: int) -> Room:
    """A picture and the region to paint in it (white), of picture `number`."""
    from dreammix_trt.demo import find_places
    from dreammix_trt.trainer.data import random_hole
    from dreammix_trt.trainer.micro.objects import SHAPES

    if not order.photographs:
        shape = order.dictionary.class_name
        spot = find_places(
            1, 1000 + order.seed + number, (side, side), _SHARE, shape if shape in SHAPES else SHAPES[0]
        )[0]
        return spot.image, spot.mask
    photograph = order.photographs[number % len(order.photographs)].read()
    image, subject = (
        Image.fromarray(photograph.image),
        Image.fromarray(np.where(photograph.subject, 255, 0).astype(np.uint8)),
    )
    scale = min(1.0, side / min(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    shown = np.asarray(subject.resize(size, Image.Resampling.BOX)) > 0
    hole = random_hole(np.random.default_rng([order.seed, 34, number]), shown)
    return image.resize(size, Image.Resampling.LANCZOS), Image.fromarray(hole).convert("L")


def _find_mask(picture: Image.Image, hole: Image.Image, segmenter: Segmenter | None, prompt: str) -> Image.Image:
    """Where the painted thing is: what the segmenter finds in the painted region, else that region."""
    if segmenter is None:
        return hole
    found = segmenter.find_subject(np.asarray(picture.convert("RGB")))
    region = np.asarray(hole) > 127
    inside = region & (found > 127) if found is not None else np.zeros_like(region)
    if inside.sum() < _LEAST * region.sum():
        log.warning(
            "%r: %s sees nothing in what was painted; its mask is the painted region", prompt, segmenter.file.name
        )
        return hole
    return Image.fromarray(inside).convert("L")
