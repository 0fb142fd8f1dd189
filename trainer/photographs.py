"""A subject's photographs: checked once, kept as files, read when a view is drawn from them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.masks import looks_drawn, marked_share, mask_from_alpha, read_mask
from dreammix_trt.core.pictures import U8, PictureIn, read_image
from dreammix_trt.core.remarks import keep_remarks
from dreammix_trt.trainer.data import Photograph
from dreammix_trt.trainer.listing import SEGMENT_HINT, Choice, Listing, list_photographs

log = logging.getLogger(__name__)

#: bytes of decoded photographs that are kept while views are drawn; the others are read again
KEPT_BYTES = 256 << 20
#: a subject fills more than this share of a photograph only where one means it
LARGE_SHARE = 0.6
_WHITE = 255


@dataclass(frozen=True)
class PhotographFile:
    """A photograph and its mask, as files.

    mask: None: the photograph is a cut-out, and what is opaque is the subject.
    inverted: black in the mask is the subject.
    """

    image: Path
    mask: Path | None
    inverted: bool = False

    @property
    def name(self) -> str:
        return self.image.name

    def read(self) -> Photograph:
        """Read both files. Transparency becomes white.

        Raises InputError when one cannot be read, the mask is empty or of another size, or the two are exchanged.
        """
        picture = read_image(self.image, name="photograph")
        if self.mask is not None:
            self._check_exchange(picture, self.mask)
        subject = self._read_mask(picture) > 127
        if not subject.any():
            raise InputError(f"{self.mask}: everything in it is white, so nothing is left when it is inverted")
        return Photograph(picture.on(_WHITE), subject, self.name)

    def _read_mask(self, picture: PictureIn) -> U8:
        if self.mask is None:
            return mask_from_alpha(picture, f"photograph {str(self.image)!r}", of_subject=True)
        mask = read_mask(self.mask, picture, name="mask", of_subject=True)
        return 255 - mask if self.inverted else mask

    def _check_exchange(self, picture: PictureIn, mask_file: Path) -> None:
        if not looks_drawn(picture):
            return
        mask = read_image(mask_file, name="mask")
        if not has_cut_out(mask) and not looks_drawn(mask):
            raise InputError(
                f"{self.image} looks like a mask and {mask_file} like a photograph: exchange them (photographs belong "
                "into image/, masks into mask/)"
            )


class Album:
    """Photographs that are read when they are asked for; as many stay in memory as fit.

    Views take the photographs in turn, so the first ones stay: to drop the oldest would mean to read all of them again
    in every round.
    """

    def __init__(self, files: Sequence[PhotographFile], kept_bytes: int = KEPT_BYTES) -> None:
        self._files, self._room = files, kept_bytes
        self._kept: dict[int, Photograph] = {}

    def open(self, number: int) -> Photograph:
        """The photograph of a number, counted round and round. Raises InputError as `PhotographFile.read` does."""
        number %= len(self._files)
        if number in self._kept:
            return self._kept[number]
        with keep_remarks(tell=False):  # `read_photographs` has told them
            photograph = self._files[number].read()
        size = photograph.image.nbytes + photograph.subject.nbytes
        if size <= self._room:
            self._room -= size
            self._kept[number] = photograph
        return photograph


def read_photographs(
    folder: str | Path, *, invert_masks: bool = False, large_masks: bool = False
) -> list[PhotographFile]:
    """The photographs of a subject that have a mask, in order of their names, each looked at once.

    folder: photographs and masks as `listing` finds them. A photograph without a mask is one itself where its
        background is transparent. What is left out is logged by name and reason.
    invert_masks: the subject is black in the masks.
    large_masks: masks may mark more than `LARGE_SHARE` of every photograph.

    Raises InputError when a folder is missing or empty, no photograph has a mask, a file cannot be decoded, a mask is
    empty or of another size than its photograph, or the masks look inverted.
    """
    with keep_remarks():  # a file is read several times
        listing = list_photographs(Path(folder), choose_twin)
        files = []
        for image, mask in listing.pairs.items():
            if mask is None and not has_cut_out(read_image(image, name="photograph")):
                listing.leave_out("it has no mask", image)
            else:
                files.append(PhotographFile(image, mask, invert_masks and mask is not None))
        listing.warn()
        if not files:
            raise InputError(_explain_no_masks(listing))
        shares = {file.name: marked_share(np.where(file.read().subject, 255, 0)) for file in files}
    if not large_masks:
        _check_shares(Path(folder), shares, invert_masks)
    return files


def has_cut_out(picture: PictureIn) -> bool:
    """Whether a picture's transparency can be a mask."""
    return picture.alpha is not None and bool(picture.alpha.min() <= 127 < picture.alpha.max())


def choose_twin(files: Sequence[Path], mask: Path | None) -> Choice:
    """Choose among pictures that differ in their suffix alone: one of them may be the mask of the other.

    Raises InputError for different photographs of one name, as a mask could belong to either.
    """
    pictures = {file: read_image(file, name="photograph") for file in files}
    if mask is None and len(files) == 2:
        for mask_file, photograph in (files, tuple(reversed(files))):
            drawn = looks_drawn(pictures[mask_file]) and not looks_drawn(pictures[photograph])
            if drawn or (has_cut_out(pictures[mask_file]) and not has_cut_out(pictures[photograph])):
                return photograph, mask_file, {}
    wanted = None if mask is None else read_image(mask, name="mask").size
    best = max(files, key=lambda file: (pictures[file].size == wanted, pictures[file].rgb.size))
    for file in files:
        if not _look_equal(pictures[file], pictures[best]):
            raise InputError(
                f"{best.parent}: two photographs are named {best.stem} ({best.name} and {file.name}), and they differ; "
                "a mask could belong to either: rename one"
            )
    return best, mask, {f"the same picture as {best.name}": [file for file in files if file != best]}


def _look_equal(one: PictureIn, other: PictureIn) -> bool:
    small = [
        np.asarray(Image.fromarray(each.on(_WHITE)).resize((32, 32), Image.Resampling.BOX), np.int16)
        for each in (one, other)
    ]
    return bool(np.abs(small[0] - small[1]).mean() < 8)


def _explain_no_masks(listing: Listing) -> str:
    images = list(listing.pairs)
    names = ", ".join(f"{image.stem}.png" for image in images[:3])
    return (
        f"{listing.mask_folder}: no photograph has a mask; put masks there, white where the subject is, named like the "
        f"photographs ({names}, ...), or as {images[0].stem}_mask.png beside them, {SEGMENT_HINT}"
    )


def _check_shares(folder: Path, shares: dict[str, float], inverted: bool) -> None:
    large = [name for name, share in shares.items() if share > LARGE_SHARE]
    if len(large) == len(shares):
        low, high = (f"{100 * share:.0f}" for share in (min(shares.values()), max(shares.values())))
        span = high if low == high else f"{low} to {high}"
        remedy = "omit --invert-masks" if inverted else "give --invert-masks, if the subject is black in them"
        raise InputError(
            f"{folder}: the masks mark {span} % of every photograph, so black and white are probably "
            f"exchanged: {remedy}; or --large-masks, if the subject does fill them"
        )
    if large:
        log.warning("%s: masks that mark more than %.0f %%: %s", folder, 100 * LARGE_SHARE, ", ".join(large))
