"""Reads pictures as users have them into plain arrays, and returns results in the kind of the input.

Every fault of a picture or a mask is reported here, before any network runs.
"""

from __future__ import annotations

import functools
import io
import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.sources import Source as Source
from dreammix_trt.core.sources import as_bytes, as_picture_array

U8 = npt.NDArray[np.uint8]

#: Pictures of more pixels are refused before they are decoded.
MAX_PIXELS = 89_000_000

_ORIENTATION = 0x0112  # the EXIF tag

#: What Pillow's decoders raise on damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, TypeError, RuntimeError, struct.error)

#: Raster formats whose decoders start no other program and load nothing else.
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "TGA")


@dataclass(frozen=True)
class PictureIn:
    """A picture as the canvas works on it, and what is needed to return a result of the same kind.

    rgb: uint8 (H, W, 3), upright.
    alpha: uint8 (H, W) or None, passed through unchanged.
    grey: the user gave one channel.
    icc_profile: the colour profile, which still holds for the result.
    """

    rgb: U8
    alpha: U8 | None = None
    grey: bool = False
    icc_profile: bytes | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        height, width = self.rgb.shape[:2]
        return height, width

    def with_pixels(self, rgb: U8) -> Image.Image:
        """Pixels as an image of the input's kind: RGB, RGBA, L or LA.

        rgb: uint8, of the picture's size.

        Grey pixels keep their value exactly: luminance weights sum to one.
        """
        image = Image.fromarray(np.ascontiguousarray(rgb))
        if self.grey:
            image = image.convert("L")
        if self.alpha is not None:
            image.putalpha(Image.fromarray(self.alpha))
        if self.icc_profile is not None:
            image.info["icc_profile"] = self.icc_profile
        return image


def read_image(source: Source, *, name: str = "image", max_pixels: int = MAX_PIXELS) -> PictureIn:
    """Read a picture.

    source: a path, a PIL image, the bytes of a file, an open binary file, or an array or tensor
        (`core.sources.as_picture_array`).
    name: what errors call it, where there is no file name.
    max_pixels: the largest picture.

    EXIF orientation is applied. RGB, RGBA, L and LA stay what they are, 1 becomes L, palette RGB or RGBA, 16-bit grey
    its upper 8 bits, CMYK and the other colour spaces RGB. Of an animation the first frame counts. Images of
    32-bit values are refused: nothing says whether 1.0 or 255 is white.

    Raises InputError, with `name` or the file, for a source that is missing, truncated, not a picture, or above
    `max_pixels`.
    """
    pixels, mode, profile = _read_pixels(source, _name_source(source, name), max_pixels)
    grey, alpha = mode in ("L", "LA"), None
    if mode in ("LA", "RGBA"):
        alpha = np.ascontiguousarray(pixels[..., -1])
    rgb = np.empty((*pixels.shape[:2], 3), np.uint8)
    rgb[...] = pixels[..., :1] if grey else pixels[..., :3]
    return PictureIn(rgb, alpha, grey, profile)


def read_mask(source: Source, size: tuple[int, int], *, name: str = "mask_image", max_pixels: int = MAX_PIXELS) -> U8:
    """Read a mask as uint8 (H, W): white (above 127) is repainted.

    source: as for `read_image`.
    size: (height, width) of the upright image, which the mask must have.
    name: what errors call it, where there is no file name.
    max_pixels: the largest mask.

    Of several channels the brightest of R, G, B counts, so that a mask painted in any colour works. An alpha channel
    that varies counts alone (opaque is repainted).

    Raises InputError, with both sizes where they differ, and for a mask that repaints nothing.
    """
    label = _name_source(source, name)
    pixels, mode, _ = _read_pixels(source, label, max_pixels)
    found = pixels.shape[0], pixels.shape[1]
    if found != tuple(size):
        raise InputError(
            f"{label} is {_spell_size(found)} but the image is {_spell_size(size)} (width x height, upright): "
            "give a mask of the image's size"
        )
    alpha = pixels[..., -1] if mode in ("LA", "RGBA") else None
    if alpha is not None and alpha.min() != alpha.max():
        mask: U8 = np.ascontiguousarray(alpha)
    else:
        colours = [pixels[..., channel] for channel in range(1 if mode in ("L", "LA") else 3)]
        mask = np.ascontiguousarray(functools.reduce(np.maximum, colours))
    if not (mask > 127).any():
        raise InputError(
            f"{label} repaints nothing: its brightest value is {int(mask.max())}, and only values above 127 are "
            "repainted; paint the region white (255)"
        )
    return mask


def _read_pixels(source: Source, label: str, max_pixels: int) -> tuple[U8, str, bytes | None]:
    """The upright pixels uint8 (H, W, 1..4), their mode (L, LA, RGB or RGBA) and colour profile."""
    image = _open_image(source, label, max_pixels)
    profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA", "L", "LA", "P", "PA") else None
    image = _convert_mode(image, label)
    return np.asarray(image).reshape(image.height, image.width, -1), image.mode, profile


def _name_source(source: Source, name: str) -> str:
    return f"{name} {os.fspath(source)!r}" if isinstance(source, (str, os.PathLike)) else name


def _spell_size(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def _open_image(source: Source, label: str, max_pixels: int) -> Image.Image:
    """The decoded, upright image. Its size is checked before decoding."""
    if isinstance(source, Image.Image):
        return _decode(source, label, max_pixels)
    array = as_picture_array(source, label)
    if array is not None:
        _check_pixels(array.shape[0], array.shape[1], label, max_pixels)
        return Image.fromarray(array)
    try:
        file = _find_file(source, label)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
            image = Image.open(file, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise InputError(f"{label} has too many pixels ({error}): scale it down") from None
    except UnidentifiedImageError:
        raise InputError(f"{label} is not a picture that can be read: give one of {', '.join(_FORMATS)}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{label} cannot be read: {error}") from error
    with image:
        return _decode(image, label, max_pixels)


def _find_file(source: Source, label: str) -> Path | io.BytesIO:
    data = as_bytes(source, label)
    if data is not None:
        return io.BytesIO(data)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"{label} is a {type(source).__name__}: give a path, bytes, an open file, a PIL image, an array or a tensor"
        )
    if not Path(source).is_file():
        raise InputError(f"{label}: there is no such file")
    return Path(source)


def _decode(image: Image.Image, label: str, max_pixels: int) -> Image.Image:
    _check_pixels(image.height, image.width, label, max_pixels)
    try:
        image.load()
        upright = image.getexif().get(_ORIENTATION, 1) == 1
        return image if upright else ImageOps.exif_transpose(image)
    except _DAMAGE as error:
        raise InputError(f"{label} is damaged or truncated ({error}): save it again") from error


def _check_pixels(height: int, width: int, label: str, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise InputError(
            f"{label} is {width}x{height}, {height * width / 1e6:.0f} million pixels; at most {max_pixels / 1e6:.0f} "
            "million are accepted: scale it down"
        )
    if height * width == 0:
        raise InputError(f"{label} is {width}x{height}: it has no pixels")


def _convert_mode(image: Image.Image, label: str) -> Image.Image:
    """The image as L, LA, RGB or RGBA."""
    mode, see_through = image.mode, "transparency" in image.info
    if mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if mode in ("I", "F"):
        raise InputError(f"{label} has 32-bit values, whose range is unknown: save it with 8 or 16 bits a channel")
    if mode in ("1", "L"):
        return image.convert("LA" if see_through else "L")
    if mode in ("LA", "RGBA"):
        return image
    if mode in ("PA", "RGBa", "La") or see_through:
        return image.convert("RGBA")
    return image.convert("RGB")
