"""Reads masks as users have them: painted, cut out, erased, or drawn by another program.

The rule: where the colours carry a mask, white is marked and transparency takes away from it. Where the colours are
constant, transparency is the mask, and what is opaque is marked. The picture itself with a region erased is no mask by
this rule, so it is recognised first.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.pictures import MAX_PIXELS, PictureIn, name_source, read_image, spell_size
from dreammix_trt.core.remarks import remark
from dreammix_trt.core.sources import Source

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
    few = _sample(picture.size)
    bright = _brightness(picture.rgb[few])
    if picture.alpha is not None and (picture.alpha[few] > 127).any():
        bright = bright[picture.alpha[few] > 127]
    low, high = int(bright.min()), int(bright.max())
    reach = max(_TONE * (high - low), _SAME / 2)
    return bool(((bright <= low + reach) | (bright >= high - reach)).mean() >= _DRAWN)


def _read_layers(mask: PictureIn, picture: PictureIn, label: str, of_subject: bool) -> U8:
    """What colours and alpha of a mask mark together."""
    alpha, bright = mask.alpha, _brightness(mask.rgb)
    if alpha is None or alpha.min() == alpha.max():
        _check_colours(mask, picture, bright, label)
        return bright
    alpha, few = _stretch(alpha), _sample(mask.size)
    solid = alpha > 127
    if _shows(mask.rgb[few], picture.rgb[few], solid[few]):
        if of_subject:
            return alpha
        remark(f"{label} is the picture with a part erased: what is transparent is repainted")
        return 255 - alpha
    if int(bright[solid].max()) - int(bright[solid].min()) <= _SAME:
        return alpha
    if not looks_drawn(mask) and not _lies_on_a_line(mask.rgb[few][solid[few]]):
        if of_subject:
            return alpha
        raise InputError(
            f"{label} is a photograph with a transparent part, but not this picture: give a mask, white on black; or "
            "give it as the picture and take the mask from its transparency (--mask-from-alpha, mask_image=None)"
        )
    return np.asarray((bright.astype(np.uint16) * alpha + 127) // 255, np.uint8)


def _check_colours(mask: PictureIn, picture: PictureIn, bright: U8, label: str) -> None:
    """Refuse an opaque picture whose colours are no mask."""
    few = _sample(mask.size)
    colours, shown = mask.rgb[few], picture.rgb[few]
    if _is_painted_over(colours, shown):
        raise InputError(
            f"{label} is the picture with a part painted over, and not a mask: save it with that part transparent, or "
            "paint a mask, white on black"
        )
    drawn = looks_drawn(mask)
    if not drawn and looks_drawn(picture) and not _lies_on_a_line(colours.reshape(-1, 3)):
        raise InputError(f"{label} looks like a photograph and its picture like a mask: exchange them")
    if not drawn and _shows(colours, shown, np.ones(colours.shape[:2], bool)):
        raise InputError(f"{label} is the picture itself, without a transparent part: paint a mask, white on black")
    if int(bright.max()) - int(bright.min()) <= _SAME < int(np.ptp(mask.rgb.reshape(-1, 3), axis=0).max()):
        raise InputError(
            f"{label} has colours that are all equally bright ({int(bright.max())}), so nothing says which are marked: "
            "paint the region white on black"
        )


def _stretch(alpha: U8) -> U8:
    """Alpha up to 255: a half opaque brush or layer marks as much as an opaque one."""
    high = int(alpha.max())
    return np.asarray((alpha.astype(np.uint16) * 255 + high // 2) // high, np.uint8)


def _brightness(rgb: U8) -> U8:
    return np.maximum(np.maximum(rgb[..., 0], rgb[..., 1]), rgb[..., 2])


# What a mask is told by. Colours are uint8 (h, w, 3), of a sample of the pixels.


def _sample(size: tuple[int, int]) -> tuple[slice, slice]:
    """Every so many rows and columns of a picture, a hundred thousand pixels or more: enough to tell what it is."""
    step = max(1, math.isqrt(size[0] * size[1] // 100_000))
    return slice(None, None, step), slice(None, None, step)


def _is_painted_over(colours: U8, shown: U8) -> bool:
    """Whether a mask shows the picture wherever it does not have one other colour."""
    differs = np.abs(colours.astype(np.int16) - shown).max(2) > _SAME
    if differs.mean() < 0.001:
        return False
    paint = np.median(colours[differs], axis=0).astype(np.int16)
    rest = np.abs(colours - paint).max(2) > _SAME
    return bool(rest.mean() > 0.001) and _shows(colours, shown, rest)


def _lies_on_a_line(colours: U8) -> bool:
    """Whether colours (N, 3) lie on a line, as in a mask with soft edges, painted in one colour on another."""
    if len(colours) < 2:
        return True
    spread = np.linalg.eigvalsh(np.cov(colours.astype(np.float32), rowvar=False))  # variances along the main axes
    return bool(spread[1] <= _LINE**2)


def _shows(colours: U8, shown: U8, where: npt.NDArray[np.bool_]) -> bool:
    """Whether a mask's colours are the picture's there: they differ by far less than they vary."""
    if not where.any():
        return False
    there, wanted = colours[where].astype(np.int16), shown[where]
    variation = np.abs(there - np.rint(there.mean(0)).astype(np.int16)).mean()
    return bool(variation > 2 and np.abs(there - wanted).mean() < 0.25 * variation)


def _explain_size(label: str, size: tuple[int, int], wanted: tuple[int, int]) -> str:
    text = f"{label} is {spell_size(size)} but the image is {spell_size(wanted)} (width x height, upright): "
    if size == wanted[::-1] and size[0] != size[1]:
        return text + "it seems to be drawn on the picture as it lies in the file; turn it as the picture is turned"
    return text + "give a mask of the image's size"
