"""Reads masks as users have them: painted, cut out, erased, or drawn by another program.

The rule: where the colours carry a mask, white is marked and transparency takes away from it. Where the colours are
constant, transparency is the mask, and what is opaque is marked. The picture itself with a region erased is no mask by
this rule, so it is recognised first.
"""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.pictures import MAX_PIXELS, PictureIn, name_source, read_image, spell_size
from dreammix_trt.core.sources import Source

log = logging.getLogger(__name__)
U8 = npt.NDArray[np.uint8]

#: Colours within so many levels are one colour: lossy formats and premultiplied edges.
_SAME = 16
#: Brightness within this share of its range from the darkest or the brightest is one of a mask's two tones.
_TONE = 0.16
#: Colours scatter by at most so many levels around the line between two colours.
_LINE = 6.0
#: A drawn mask has at least this share of pixels in its two tones, a photograph less.
_DRAWN = 0.9


def read_mask(
    source: Source | None,
    picture: PictureIn,
    *,
    name: str = "mask_image",
    max_pixels: int = MAX_PIXELS,
    of_subject: bool = False,
) -> U8:
    """Read a mask as uint8 (H, W): what is above 127 is marked.

    source: as for `read_image`. None: the picture's own transparency (`mask_from_alpha`).
    picture: the upright picture, whose size the mask must have.
    name: what errors call it, where there is no file name.
    max_pixels: the largest mask.
    of_subject: the mask shows where a subject is, as in training, so of a cut-out the opaque part is marked. Otherwise
        a cut-out of the picture is what stays, and the transparent part is marked.

    Of several channels the brightest of R, G, B counts, so that a mask painted in any colour works.

    Raises InputError, with both sizes where they differ, for a mask that marks nothing, and for a picture that is no
    mask.
    """
    if source is None:
        return mask_from_alpha(picture, of_subject=of_subject)
    label = name_source(source, name)
    mask = read_image(source, name=name, max_pixels=max_pixels)
    if mask.size != picture.size:
        raise InputError(_explain_size(label, mask.size, picture.size))
    marked = _read_layers(mask, picture, label, of_subject)
    if not (marked > 127).any():
        raise InputError(
            f"{label} {'is empty' if of_subject else 'repaints nothing'}: its brightest value is {int(marked.max())}, "
            f"and only values above 127 count; paint the {'subject' if of_subject else 'region'} white (255)"
        )
    return marked


def mask_from_alpha(picture: PictureIn, name: str = "image", *, of_subject: bool = False) -> U8:
    """The mask that a picture's own transparency is, uint8 (H, W): what is transparent is marked.

    name: what errors call the picture.
    of_subject: what is opaque is marked: the picture is a cut-out of the subject.

    Raises InputError for a picture without transparency, or without anything visible.
    """
    alpha = picture.alpha
    if alpha is None or alpha.min() > 127 or alpha.max() <= 127:
        state = "has no transparency" if alpha is None else "is nowhere more than half transparent"
        state = "is transparent everywhere" if alpha is not None and alpha.max() <= 127 else state
        raise InputError(f"{name} {state}, so it holds no mask: erase the region to repaint, or give a mask")
    return np.ascontiguousarray(alpha if of_subject else 255 - alpha)


def marked_share(mask: U8) -> float:
    """The share of a mask's pixels that are marked, 0..1."""
    return float((mask > 127).mean())


def looks_drawn(picture: PictureIn) -> bool:
    """Whether what is visible has hardly more than two tones, as masks have and photographs have not."""
    bright = _brightness(picture)
    if picture.alpha is not None and (picture.alpha > 127).any():
        bright = bright[picture.alpha > 127]
    low, high = int(bright.min()), int(bright.max())
    reach = max(_TONE * (high - low), _SAME / 2)
    return bool(((bright <= low + reach) | (bright >= high - reach)).mean() >= _DRAWN)


def _read_layers(mask: PictureIn, picture: PictureIn, label: str, of_subject: bool) -> U8:
    """What colours and alpha of a mask mark together."""
    alpha = mask.alpha
    bright = _brightness(mask)
    if alpha is None or alpha.min() == alpha.max():
        _check_colours(mask, picture, bright, label)
        return bright
    solid = alpha > 127 if (alpha > 127).any() else alpha > 0
    if _shows(mask, picture, solid):
        part = "opaque" if of_subject else "transparent"
        log.info("%s is the picture with a part erased: what is %s is marked", label, part)
        return np.ascontiguousarray(alpha if of_subject else 255 - alpha)
    if int(bright[solid].max()) - int(bright[solid].min()) <= _SAME:
        return np.ascontiguousarray(alpha)
    if not looks_drawn(mask) and not _looks_painted(mask, solid):
        if of_subject:
            return np.ascontiguousarray(alpha)
        raise InputError(
            f"{label} is a photograph with a transparent part, but not this picture: give a mask, white on black; or "
            "give it as the picture and take the mask from its transparency (--mask-from-alpha, mask_image=None)"
        )
    return np.asarray((bright.astype(np.uint16) * alpha + 127) // 255, np.uint8)


def _check_colours(mask: PictureIn, picture: PictureIn, bright: U8, label: str) -> None:
    """Refuse an opaque picture whose colours are no mask."""
    if not looks_drawn(mask) and _shows(mask, picture, np.ones(mask.size, bool)):
        raise InputError(f"{label} is the picture itself, without a transparent part: paint a mask, white on black")
    if int(bright.max()) - int(bright.min()) <= _SAME < int(np.ptp(mask.rgb.reshape(-1, 3), axis=0).max()):
        raise InputError(
            f"{label} has colours that are all equally bright ({int(bright.max())}), so nothing says which are marked: "
            "paint the region white on black"
        )


def _brightness(mask: PictureIn) -> U8:
    return np.ascontiguousarray(mask.rgb.max(2))


def _looks_painted(mask: PictureIn, where: npt.NDArray[np.bool_]) -> bool:
    """Whether colours lie on a line, as in a mask with soft edges that was painted in one colour on another."""
    colours = mask.rgb[where].astype(np.float32)
    spread = np.linalg.eigvalsh(np.cov(colours, rowvar=False))  # variances along the three main axes, rising
    return bool(spread[1] <= _LINE**2)


def _shows(mask: PictureIn, picture: PictureIn, where: npt.NDArray[np.bool_]) -> bool:
    """Whether a mask's colours are the picture's there: they differ by far less than they vary."""
    colours = mask.rgb[where].astype(np.int16)
    variation = np.abs(colours - np.rint(colours.mean(0)).astype(np.int16)).mean()
    return bool(variation > 2 and np.abs(colours - picture.rgb[where]).mean() < 0.25 * variation)


def _explain_size(label: str, size: tuple[int, int], wanted: tuple[int, int]) -> str:
    text = f"{label} is {spell_size(size)} but the image is {spell_size(wanted)} (width x height, upright): "
    if size == wanted[::-1] and size[0] != size[1]:
        return text + "it seems to be drawn on the picture as it lies in the file; turn it as the picture is turned"
    return text + "give a mask of the image's size"
