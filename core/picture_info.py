"""What a picture says beside its pixels, and what of it still holds for a result: colour profile, EXIF, dpi."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import ExifTags, Image

from dreammix_trt.core.remarks import remark

_ORIENTATION = 0x0112

#: EXIF tags that stay true when a part is repainted: who, when, what, with which camera, at how many dots per inch.
_KEPT = (
    *("ImageDescription", "Make", "Model", "XResolution", "YResolution", "ResolutionUnit", "Software", "DateTime"),
    *("Artist", "HostComputer", "Copyright", "XPTitle", "XPComment", "XPAuthor", "XPKeywords", "XPSubject"),
)
_KEPT_TAGS = frozenset(int(ExifTags.Base[name]) for name in _KEPT)

#: Left out of the camera's own block: makers' notes (their offsets break, and they hold small pictures), comments of
#: other generators, and sizes in pixels.
_DROPPED = ("MakerNote", "UserComment", "ExifInteroperabilityOffset", "ExifImageWidth", "ExifImageHeight")
_DROPPED_TAGS = frozenset(int(ExifTags.Base[name]) for name in _DROPPED)

#: A JPEG has room for 65,533 bytes; a request wants some of them.
_MOST_EXIF = 40_000

_GREY, _COLOUR = b"GRAY", b"RGB "


def keep_profile(image: Image.Image, plain: Image.Image, label: str) -> bytes | None:
    """The colour profile of an image, where it holds for what the image became.

    image: as it was read.
    plain: the same as L, LA, RGB or RGBA.
    label: what a warning about a profile that is left out calls it.
    """
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not profile or image.mode in ("CMYK", "LAB"):  # those are converted
        return None
    space, expected = _space_of(profile), _GREY if plain.mode in ("L", "LA") else _COLOUR
    if space in (None, expected):
        return profile
    given, wanted = (each.decode("latin-1").strip() for each in (space, expected))
    remark(f"{label}: its colour profile is for {given!r} values, but it has {wanted!r}: the profile is left out")
    return None


def is_grey(image: Image.Image, converted: Image.Image) -> bool:
    """Whether a palette image is a grey one: its profile says so, and so do its colours."""
    if _space_of(image.info.get("icc_profile") or b"") != _GREY:
        return False
    red, green, blue = (np.asarray(converted.getchannel(band)) for band in "RGB")
    return bool((red == green).all() and (green == blue).all())


def through_profile(image: Image.Image, label: str) -> Image.Image:
    """A CMYK image as sRGB, through its colour profile where it has one that can be used (littlecms, relative
    colorimetric with black point compensation, as photo editors do)."""
    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    if not profile:
        remark(f"{label} is CMYK without a colour profile: its colours are a guess")
        return image.convert("RGB")
    try:
        converted = ImageCms.profileToProfile(
            image,
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            "RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        remark(f"{label}: its CMYK profile cannot be used ({error}): its colours are a guess")
        return image.convert("RGB")
    assert converted is not None
    return converted


def keep_exif(image: Image.Image, label: str) -> bytes | None:
    """The part of an image's EXIF block that a result keeps, None where there is none.

    Description, copyright, author, dates, camera, exposure, place and resolution are kept. The orientation is reset, as
    pixels are upright; small pictures of the old state, makers' notes and comments are left out.
    """
    try:
        given, kept = image.getexif(), Image.Exif()
        if not len(given) and len(image.info.get("exif", b"")) > len(b"Exif\0\0"):
            remark(f"{label}: its EXIF block is damaged and is left out")
        for tag in _KEPT_TAGS & given.keys():
            kept[tag] = given[tag]
        for part in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            values = {tag: value for tag, value in given.get_ifd(part).items() if tag not in _DROPPED_TAGS}
            if values:
                kept.get_ifd(part).update(values)
                kept[part] = values
        block = kept.tobytes() if len(kept) else None
        if block is not None and len(block) > _MOST_EXIF:
            remark(f"{label}: its EXIF block has {len(block)} bytes and is left out: too large for a JPEG")
            return None
        return block
    except Exception as error:  # whatever a camera or an editor wrote: it is not worth the picture
        remark(f"{label}: its EXIF block cannot be kept ({error})")
        return None


def keep_dpi(image: Image.Image) -> tuple[float, float] | None:
    """Dots per inch across and down, upright; None where nothing usable is said."""
    try:
        exif = image.getexif()
        if image.format == "JPEG" and not image.info.get("jfif_unit") and ExifTags.Base.XResolution not in exif:
            return None  # Pillow says 72 where nothing is said
        across, down = (float(value) for value in image.info.get("dpi", ()))
        turned = exif.get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception:  # IFD rationals of 0/0, single numbers, damaged blocks
        return None
    if not all(math.isfinite(value) and 1 < value < 1e6 for value in (across, down)):  # 1: nothing is said in a TIFF
        return None
    return (down, across) if turned else (across, down)


def _space_of(profile: bytes) -> bytes | None:
    """The colour space in a profile's header (ICC.1:2022, 7.2.8); None: not a profile that can be read."""
    return profile[16:20] if len(profile) >= 128 and profile[36:40] == b"acsp" else None
