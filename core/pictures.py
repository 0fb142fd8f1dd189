"""Reads pictures as users have them into plain arrays, and returns results in the kind of the input.

The one reader of the engine, the trainer and the command line. Every fault of a picture is reported here, before any
network runs; what `core/masks.py` makes of masks starts here as well.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from dreammix_trt.core.errors import InputError, TooManyPixels
from dreammix_trt.core.picture_info import is_grey, keep_dpi, keep_exif, keep_profile, through_profile
from dreammix_trt.core.png_chunks import shorten_chunks
from dreammix_trt.core.remarks import remark
from dreammix_trt.core.sources import Source, as_bytes, as_picture_array
from dreammix_trt.core.transparency import composite, spread_colours, uncover

log = logging.getLogger(__name__)
U8 = npt.NDArray[np.uint8]

#: Pictures of more pixels are refused before they are decoded.
MAX_PIXELS = 89_000_000

_ORIENTATION = 0x0112  # the EXIF tag

#: What Pillow's decoders raise on damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, TypeError, RuntimeError, struct.error)

#: What other files begin with that are taken for pictures, in lower case.
_OTHERS = {
    b"<svg": "a drawing (SVG)",
    b"<": "a web page or XML file",
    b"%pdf": "a PDF file",
    b"%!ps": "a PostScript file",
    b"version https://git-lfs": "a Git LFS pointer",
    b"8bps": "a Photoshop file",
    b"gimp xcf": "a GIMP file",
}

#: Raster formats whose decoders start no other program and load nothing else.
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "TGA")


@dataclass(frozen=True)
class PictureIn:
    """A picture as the canvas works on it, and what is needed to return a result of the same kind.

    rgb: uint8 (H, W, 3), upright.
    alpha: uint8 (H, W) or None.
    grey: the user gave one channel.
    icc_profile: the colour profile, which still holds for the result.
    exif: what the result keeps of the EXIF block (`keep_exif`).
    dpi: dots per inch, across and down.
    """

    rgb: U8
    alpha: U8 | None = None
    grey: bool = False
    icc_profile: bytes | None = None
    exif: bytes | None = None
    dpi: tuple[float, float] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        height, width = self.rgb.shape[:2]
        return height, width

    @cached_property
    def seen(self) -> U8:
        """What networks may see, uint8 (H, W, 3): the picture over its own visible colours, spread under the rest.

        What lies hidden under full transparency is not in it.
        """
        return self.rgb if self.alpha is None else composite(self.rgb, self._ground, self.alpha)

    def on(self, level: int) -> U8:
        """The picture over a ground of one grey level, uint8 (H, W, 3)."""
        if self.alpha is None:
            return self.rgb
        return composite(self.rgb, np.full_like(self.rgb, level), self.alpha)

    def with_pixels(self, rgb: U8, weight: U8 | None = None) -> Image.Image:
        """Pixels as an image of the input's kind: RGB, RGBA, L or LA.

        rgb: uint8, of the picture's size: what became of `seen`.
        weight: uint8 (H, W), how far each pixel was repainted. What was repainted becomes visible: alpha rises to 255
            with the weight. Where the weight is 0, alpha and colours stay as given, hidden ones too. None: `rgb` is
            taken as it is, under the old alpha.

        Grey pixels keep their value exactly: luminance weights sum to one.
        """
        alpha = self.alpha
        if alpha is not None and weight is not None:
            rgb, alpha = uncover(rgb, weight, self.rgb, alpha, self._ground)
        image = Image.fromarray(np.ascontiguousarray(rgb))
        if self.grey:
            image = image.convert("L")
        if alpha is not None:
            image.putalpha(Image.fromarray(alpha))
        kept = {"icc_profile": self.icc_profile, "exif": self.exif, "dpi": self.dpi}
        image.info |= {name: value for name, value in kept.items() if value is not None}
        return image

    @cached_property
    def _ground(self) -> U8:
        assert self.alpha is not None
        return spread_colours(self.rgb, self.alpha)


def read_image(source: Source, *, name: str = "image", max_pixels: int = MAX_PIXELS) -> PictureIn:
    """Read a picture.

    source: a path, a PIL image, the bytes of a file, an open binary file, or an array or tensor
        (`core.sources.as_picture_array`).
    name: what errors call it, where there is no file name.
    max_pixels: the largest picture.

    EXIF orientation is applied. RGB, RGBA, L and LA stay what they are, 1 becomes L, palette RGB or RGBA (L where its
    profile is a grey one), 16-bit values their upper 8 bits, CMYK sRGB through its profile, the other colour spaces
    RGB. A 16-bit file whose values end at 255 holds 8-bit values, and is read so. Of an animation the first frame
    counts. Images of 32-bit values are refused: nothing says whether 1.0 or 255 is white.

    Raises InputError, with `name` or the file, for a source that is missing, truncated, not a picture, or above
    `max_pixels`.
    """
    label = name_source(source, name)
    with _hush_pillow():
        image = _open_image(source, label, max_pixels)
        upright = _turn_upright(image, label)
        plain = _convert_mode(upright, label)
        exif, dpi = keep_exif(image, label), keep_dpi(image)
    pixels = np.asarray(plain).reshape(plain.height, plain.width, -1)
    grey, alpha = plain.mode in ("L", "LA"), None
    if plain.mode in ("LA", "RGBA"):
        alpha = np.ascontiguousarray(pixels[..., -1])
    rgb = np.empty((*pixels.shape[:2], 3), np.uint8)
    rgb[...] = pixels[..., :1] if grey else pixels[..., :3]
    profile = keep_profile(upright, plain, label)
    return PictureIn(rgb, alpha, grey, profile, exif, dpi)


def read_size(data: bytes, *, name: str = "image") -> tuple[int, int]:
    """(height, width) in pixels that the header of a picture's file says, as stored. Decodes no pixel.

    data: of the file.
    name: what errors call it.

    Raises InputError for what is not a picture that `read_image` reads, TooManyPixels beyond Pillow's own limit.
    """
    with _hush_pillow():
        try:
            with Image.open(io.BytesIO(data), formats=readable_formats()) as image:
                return image.height, image.width
        except Image.DecompressionBombError as error:
            raise TooManyPixels(f"{name} has too many pixels ({error}): scale it down") from None
        except UnidentifiedImageError:
            raise InputError(_explain_unknown(data, name)) from None
        except _DAMAGE as error:
            shortened = shorten_chunks(data)
            if shortened is not None and shortened.data != data:
                return read_size(shortened.data, name=name)
            raise InputError(f"{name} cannot be read: {error}") from error


def name_source(source: Source, name: str) -> str:
    """What messages call a source: `name`, and the path where it has one."""
    return f"{name} {os.fspath(source)!r}" if isinstance(source, (str, os.PathLike)) else name


def spell_size(size: tuple[int, int]) -> str:
    """(height, width) as people write it, width first."""
    return f"{size[1]}x{size[0]}"


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read. HEIC is among them where pillow-heif is installed."""
    try:
        from pillow_heif import register_heif_opener  # type: ignore[import-not-found]
    except ImportError:
        return _FORMATS
    register_heif_opener()
    return (*_FORMATS, "HEIF")


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """File suffixes of the formats that are read, in lower case with their dot."""
    formats = readable_formats()
    known = Image.registered_extensions().items()
    return frozenset({suffix for suffix, kind in known if kind in formats} | {".mpo"})  # a JPEG with a second picture


def _open_image(source: Source, label: str, max_pixels: int) -> Image.Image:
    """The decoded image. Its size is checked before decoding."""
    if isinstance(source, Image.Image):
        return _decode(source, label, max_pixels)
    array = as_picture_array(source, label)
    if array is not None:
        _check_pixels(array.shape[0], array.shape[1], label, max_pixels)
        return Image.fromarray(array)
    file = _find_file(source, label)
    try:
        return _open_file(file, label, max_pixels)
    except Image.DecompressionBombError as error:
        raise TooManyPixels(f"{label} has too many pixels ({error}): scale it down") from None
    except UnidentifiedImageError:
        raise InputError(_explain_unknown(file, label)) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{label} cannot be read: {error}") from error


def _find_file(source: Source, label: str) -> Path | bytes:
    """Where a picture's file is, or its bytes."""
    data = as_bytes(source, label)
    if data is not None:
        return data
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"{label} is a {type(source).__name__}: give a path, bytes, an open file, a PIL image, an array or a tensor"
        )
    try:
        if Path(source).is_dir():
            raise InputError(f"{label} is a folder: name a picture in it")
        if not Path(source).is_file():
            raise InputError(f"{label}: there is no such file")
    except (OSError, ValueError) as error:
        raise InputError(f"{label} cannot be read: {error}") from error
    return Path(source)


def _open_file(file: Path | bytes, label: str, max_pixels: int) -> Image.Image:
    """The decoded image of a file. Of a PNG, text that inflates beyond Pillow's limit is left out.

    file: where it is, or its bytes.
    """
    try:
        return _load(io.BytesIO(file) if isinstance(file, bytes) else file, label, max_pixels)
    except (ValueError, InputError) as error:
        shortened = shorten_chunks(file)
        if shortened is None:
            raise
        log.debug("%s: %s", label, error)
    if shortened.dropped:
        remark(f"{label}: its {shortened.dropped} is absurdly large and is left out")
    image = _load(io.BytesIO(shortened.data), label, max_pixels)
    if shortened.profile is not None:
        image.info["icc_profile"] = shortened.profile
    return image


def _load(file: Path | io.BytesIO, label: str, max_pixels: int) -> Image.Image:
    with Image.open(file, formats=readable_formats()) as image:
        _check_pixels(image.height, image.width, label, max_pixels)
        _say_frames(image, label)
        low = _low_bytes_of(image)
        loaded = _decode(image, label, max_pixels)
        if low is None or np.asarray(loaded)[..., :3].any():
            return loaded
    with Image.open(file, formats=("PNG",)) as again:  # all upper bytes are 0: are the lower ones?
        again.tile = [again.tile[0]._replace(args=low)]
        lower = _decode(again, label, max_pixels)
    if np.asarray(lower)[..., :3].any():
        remark(f"{label} has 16 bits a channel, but its values end at 255: read as 8-bit values")
    return lower


@contextlib.contextmanager
def _hush_pillow() -> Iterator[None]:
    """Keep Pillow's warnings back: we check our own limit of pixels, and say in our words that EXIF is damaged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        yield


def _say_frames(image: ImageFile.ImageFile, label: str) -> None:
    """Say that an animation or a file of several pages counts with its first picture. Looks before decoding."""
    try:
        count = getattr(image, "n_frames", 1)
    except _DAMAGE:  # decoding will say so
        return
    if count > 1 and image.format != "MPO":  # a phone's second picture is of no interest
        remark(f"{label} holds {count} pictures: the first one is read")


def _low_bytes_of(image: ImageFile.ImageFile) -> str | None:
    """Pillow's name for the lower bytes of a 16-bit colour PNG that is not loaded yet; None: it is none."""
    mode = image.tile[0].args if image.format == "PNG" and image.tile else None
    return {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L"}.get(mode) if isinstance(mode, str) else None


def _explain_unknown(file: Path | bytes, label: str) -> str:
    """Why a file is not a picture that we read, and what to do."""
    suffix = "" if isinstance(file, bytes) else file.suffix.lower()
    if suffix in (".heic", ".heif", ".hif") and "HEIF" not in readable_formats():
        return f"{label} is HEIC, which needs pillow-heif: pip install pillow-heif, or save it as JPEG"
    with contextlib.suppress(OSError), io.BytesIO(file) if isinstance(file, bytes) else file.open("rb") as stream:
        start = stream.read(200).lstrip().lower()
        kind = next((kind for mark, kind in _OTHERS.items() if start.startswith(mark)), None)
        if kind is not None:
            return f"{label} is {kind}, not a picture: download or export it again"
    return f"{label} is not a picture that can be read: give one of {', '.join(readable_formats())}"


def _decode(image: Image.Image, label: str, max_pixels: int) -> Image.Image:
    _check_pixels(image.height, image.width, label, max_pixels)
    try:
        image.load()
        return image
    except _DAMAGE as error:
        raise InputError(f"{label} is damaged or truncated ({error}): save it again") from error


def _turn_upright(image: Image.Image, label: str) -> Image.Image:
    try:
        upright = image.getexif().get(_ORIENTATION, 1) == 1
        return image if upright else ImageOps.exif_transpose(image)
    except _DAMAGE as error:
        raise InputError(f"{label} is damaged or truncated ({error}): save it again") from error


def _check_pixels(height: int, width: int, label: str, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise TooManyPixels(
            f"{label} is {width}x{height}, {height * width / 1e6:.0f} million pixels; at most {max_pixels / 1e6:.0f} "
            "million are accepted: scale it down"
        )
    if height * width == 0:
        raise InputError(f"{label} is {width}x{height}: it has no pixels")


def _convert_mode(image: Image.Image, label: str) -> Image.Image:
    """The image as L, LA, RGB or RGBA."""
    mode, see_through = image.mode, "transparency" in image.info
    if mode == "I" or mode.startswith("I;16"):
        return _convert_deep(image, label)
    if mode == "F":
        raise InputError(f"{label} has 32-bit values, whose range is unknown: save it with 8 or 16 bits a channel")
    if mode in ("1", "L"):
        return image.convert("LA" if see_through else "L")
    if mode in ("LA", "RGBA"):
        return image
    if mode == "CMYK":
        return through_profile(image, label)
    if mode in ("P", "PA"):
        converted = image.convert("RGBA" if mode == "PA" or see_through else "RGB")
        return converted.convert("LA" if converted.mode == "RGBA" else "L") if is_grey(image, converted) else converted
    if mode == "La":
        return image.convert("LA")
    return image.convert("RGBA" if mode == "RGBa" or see_through else "RGB")


def _convert_deep(image: Image.Image, label: str) -> Image.Image:
    """16-bit grey values as 8-bit ones."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise InputError(f"{label} has 32-bit values, whose range is unknown: save it with 8 or 16 bits a channel")
    if 0 < high <= 255:
        remark(f"{label} has 16 bits a channel, but its values end at 255: read as 8-bit values")
    grey = Image.fromarray((values if high <= 255 else values >> 8).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey
