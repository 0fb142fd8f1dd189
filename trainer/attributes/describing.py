"""Who describes a subject, and the pictures that it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from dreammix_trt.core.attributes import AttributeDictionary
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.pictures import read_image
from dreammix_trt.core.remarks import keep_remarks
from dreammix_trt.trainer.data import Photograph, Picture
from dreammix_trt.trainer.listing import list_photographs
from dreammix_trt.trainer.photographs import choose_twin, has_cut_out, read_photographs

GREY = 127
_WHITE = 255
_T = TypeVar("_T")


class Describer(Protocol):
    """Says in words what a subject looks like."""

    def describe(self, pictures: Sequence[Photograph], class_name: str) -> AttributeDictionary:
        """The attributes that all pictures show. What is left out is logged with its reason.

        pictures: at least one. class_name: what the subject is.
        """
        ...


def read_pictures(
    folder: str | Path, most: int, *, need_masks: bool, invert_masks: bool = False, large_masks: bool = False
) -> list[Photograph]:
    """Read a subject's photographs as `train` does, but no more than `most`, spread over all of them.

    need_masks: False: where no photograph has a mask, whole photographs are taken, all of which is the subject.
    invert_masks, large_masks: as `photographs.read_photographs` takes them.

    Raises InputError as `read_photographs` does, and naming --segment where masks are needed and there are none.
    """
    masked = _has_masks(Path(folder))
    if need_masks and not masked:
        raise InputError(
            f"{folder}: no photograph has a mask, so nothing says what of it is the subject; `dreammix-trt train` with "
            "--segment --segmenter u2net.onnx makes masks and stops to show them"
        )
    if masked:
        files = read_photographs(folder, invert_masks=invert_masks, large_masks=large_masks)
        with keep_remarks(tell=False):  # told while all were looked at
            return [file.read() for file in _spread(files, most)]
    with keep_remarks():
        listing = list_photographs(Path(folder), choose_twin)
        listing.warn()
        shown = [
            (image.name, read_image(image, name="photograph").on(_WHITE))
            for image in _spread(list(listing.pairs), most)
        ]
    return [Photograph(picture, np.ones(picture.shape[:2], bool), name) for name, picture in shown]


def cut_out(photograph: Photograph, margin: float = 0.1) -> Picture:
    """The subject alone on a grey square, `margin` of its longer side around it; a whole photograph as it is.

    Returns uint8 (S, S, 3), or the photograph's own (H, W, 3) where all of it is the subject.
    """
    if photograph.subject.all():
        return photograph.image
    x0, y0, x1, y1 = photograph.box
    side = max(2, round(max(x1 - x0, y1 - y0) * (1 + 2 * margin)))
    square = np.full((side, side, 3), GREY, np.uint8)
    inside = photograph.subject[y0:y1, x0:x1]
    top, left = (side - (y1 - y0)) // 2, (side - (x1 - x0)) // 2
    square[top : top + y1 - y0, left : left + x1 - x0][inside] = photograph.image[y0:y1, x0:x1][inside]
    return square


def _has_masks(folder: Path) -> bool:
    with keep_remarks(tell=False):
        pairs = list_photographs(folder, choose_twin).pairs
        return any(
            mask is not None or has_cut_out(read_image(image, name="photograph")) for image, mask in pairs.items()
        )


def _spread(items: Sequence[_T], most: int) -> list[_T]:
    """At most `most` of the items, evenly over their order."""
    if len(items) <= most:
        return list(items)
    return [items[(2 * number + 1) * len(items) // (2 * most)] for number in range(most)]
