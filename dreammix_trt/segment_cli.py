"""`train --segment`: masks for the photographs that have none, and a sheet to approve them by."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from dreammix_trt.core.errors import InputError
from dreammix_trt.terminal import say, show_progress

if TYPE_CHECKING:
    from dreammix_trt.report import Row
    from dreammix_trt.trainer.photographs import PhotographFile
    from dreammix_trt.trainer.segment import NewMasks

log = logging.getLogger(__name__)
_COLUMNS, _TILE = 5, 256


def make_masks(photos: Path, segmenter: Path | None, style: str | None, threads: int | None = None) -> NewMasks:
    """Make the missing masks, say so, and show all masks on a sheet where some are new.

    segmenter: its ONNX file; None: one that rembg has downloaded.
    style: how it wants pictures normalised; None: guessed.

    Raises InputError when no photograph has a mask even then.
    """
    from dreammix_trt.trainer.listing import SHEET
    from dreammix_trt.trainer.photographs import read_photographs
    from dreammix_trt.trainer.segment import open_segmenter, segment_photographs

    network = open_segmenter(segmenter, style, threads)
    with show_progress("segmenting") as update:
        new = segment_photographs(photos, network, update)
    for photograph in new.unseen:
        log.warning("%s: %s sees no subject in it; paint a mask", photograph, network.file.name)
    if not new.made:
        say(f"every photograph of {photos} that can have a mask has one; none was made")
        return new
    sheet = photos / SHEET
    write_mask_sheet(read_photographs(photos, large_masks=True), new.made, sheet)
    say(f"{len(new.made)} masks in {new.made[0].parent} ({network.file.name}, {network.style}); look at {sheet}")
    return new


def write_mask_sheet(files: Sequence[PhotographFile], made: Sequence[Path], sheet: Path) -> None:
    """Write a contact sheet of photographs with their subjects marked.

    files: at least one photograph.
    made: masks that are new, which the captions say.
    """
    from dreammix_trt.core.files import atomic_file
    from dreammix_trt.report import contact_sheet

    if not files:
        raise InputError("there is no mask to show")
    picture = contact_sheet(list(_lay_rows(files, made)), tile=_TILE, title="Is the subject marked, and nothing else?")
    with atomic_file(sheet) as temporary:
        picture.save(temporary, "PNG")


def _lay_rows(files: Sequence[PhotographFile], made: Sequence[Path]) -> Iterator[Row]:
    from dreammix_trt.report import Figure, Row, mark_region

    for start in range(0, len(files), _COLUMNS):
        tiles = []
        for file in files[start : start + _COLUMNS]:
            photograph = file.read()
            image, mask = Image.fromarray(photograph.image), Image.fromarray(photograph.subject)
            scale = min(1.0, 2 * _TILE / max(image.size))
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            marked = mark_region(image.resize(size), mask.convert("L").resize(size))
            origin = "new" if file.mask in made else "yours"
            tiles.append(Figure(marked, f"{file.name} ({origin}, {100 * photograph.subject.mean():.0f} %)"))
        last = min(start + _COLUMNS, len(files))
        yield Row(f"{start + 1} to {last} of {len(files)}", tiles)
