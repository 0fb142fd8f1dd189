"""The result of a request: pictures, how they were made, and files that keep both."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from PIL import Image, UnidentifiedImageError

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.picture_info import keep_profile
from dreammix_trt.core.png_chunks import shorten_chunks
from dreammix_trt.core.request import Request
from dreammix_trt.core.schedule import Schedule
from dreammix_trt.core.sources import as_bytes
from dreammix_trt.engine.imprint import Imprint, Origin, find_request

log = logging.getLogger(__name__)

_KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
#: how each format keeps what was not repainted. WebP has no 4:4:4 but lossless, which also keeps hidden colours. JPEG
#: at its best: 8-bit YCbCr and whole coefficients alone move some values in 10,000 by 4 levels, the rest by 3 or less.
_EXACTLY: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 100, "subsampling": "4:4:4"},
    "WEBP": {"lossless": True, "exact": True},
}
_LONGEST = {"PNG": 2**31 - 1, "JPEG": 65500, "WEBP": 16383}  # pixels a side


@dataclass(frozen=True)
class Result:
    """The result of a request.

    images: PIL images of the input's size and kind (RGB, RGBA, L), in their order; in reference mode RGB at the size it
        worked on.
    request: as it was painted.
    seeds: of each picture.
    timings: seconds per phase, summed over the pictures, disjoint. "network:..." are the networks. On a GPU the
        device's seconds are in "subject", "upload", "text", "start", "loop", "hand over", "finish" and "download",
        networks included, and the host's in "read", "canvas", "write" and "weights" (loaded for this request).
    stages: named pictures of what each stage did, when asked for; on a GPU "local result" and "last result".
    origin: what painted it.
    warnings: what its user should know of the pictures as they were read, and which words of the request do nothing;
        one sentence each. They are logged as well, before it is painted.
    """

    images: list[Image.Image]
    request: Request
    seeds: tuple[int, ...]
    schedule: Schedule = field(repr=False)
    timings: dict[str, float]
    stages: dict[str, Image.Image] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)
    warnings: tuple[str, ...] = ()

    def save(self, path: str | os.PathLike[str], index: int = 0, *, metadata: bool = True) -> None:
        """Write picture `index` (.png, .jpg, .webp), atomically; see `save`."""
        save(self, path, index=index, metadata=metadata)

    def to_bytes(self, kind: str = "png", index: int = 0, *, metadata: bool = True) -> bytes:
        """Picture `index` as the contents of a file, with what `save` writes.

        kind: "png", "jpg" or "webp".

        Raises InputError as `save` does.
        """
        known = _KINDS.get(f".{str(kind).lower().removeprefix('.')}")
        if known is None:
            raise InputError(f"kind is {kind!r}; allowed: png, jpg, webp")
        image, imprint = self.pick(index)
        _check_size(image, known, f"picture {index}")
        to = io.BytesIO()
        _encode(image, known, to, imprint if metadata else None)
        return to.getvalue()

    def pick(self, index: int) -> tuple[Image.Image, Imprint]:
        """Picture `index`, and what it says about itself. Raises InputError where there is no such picture."""
        if isinstance(index, bool) or not hasattr(index, "__index__") or not 0 <= index < len(self.images):
            raise InputError(f"index is {index!r}; this result has {len(self.images)} pictures, from 0 on")
        request = self.request.replace(seed=self.seeds[index], num_images_per_prompt=1)
        return self.images[index], Imprint(request, self.origin)


@dataclass(frozen=True)
class StepEvent:
    """The request has taken a step (on a GPU: has enqueued it).

    index: 0 to total - 1, over all pictures of the request; a batch of n pictures advances it by n.
    total: number of steps over all pictures.
    stage: "lcg" or "gch".
    picture: number of the picture, in a batch of the first one.
    look: what `preview` calls.
    taken: the step's latents, float32 (1, 4, h, w); None on a GPU, where they stay on the device.
    result: set in the last event.
    retry: why the request is begun anew, where its painter works elsewhere and has died. Such an event repeats the last
        step (index -1: there was none), and steps that were told are not told again. "": a step like any other.
    """

    index: int
    total: int
    stage: str
    picture: int
    look: Callable[[bool], Image.Image] = field(repr=False)
    taken: Any = field(default=None, repr=False)
    result: Result | None = None
    retry: str = ""

    def preview(self, whole: bool = True) -> Image.Image:
        """The network's present idea of the picture. Costs one VAE decoding. Call it before the next step.

        whole: the user's picture with the marked region painted as far as it is, of the result's size and kind;
            otherwise the part of it that the stage sees, RGB at the size of the networks.
        """
        return self.look(whole)


def save(result: Result, path: str | os.PathLike[str], *, index: int = 0, metadata: bool = True) -> None:
    """Write one picture of a result (.png, .jpg, .webp), atomically.

    index: which picture.
    metadata: whether it carries the request that makes exactly this picture (`read_request` reads it), what painted it,
        and A1111's text (`engine.imprint`).

    Raises InputError for an index without a picture, another format, or a picture too large for it.
    """
    image, imprint = result.pick(index)
    write_picture(image, path, imprint if metadata else None)


def write_picture(image: Image.Image, path: str | os.PathLike[str], imprint: Imprint | None = None) -> None:
    """Write a picture (.png, .jpg, .webp), atomically.

    imprint: what it says about itself.

    WebP is lossless, JPEG is 4:4:4 at quality 100. Colour profile, EXIF and dpi of the image's `info` are written.

    Raises InputError for another format or a picture too large for it.
    """
    from dreammix_trt.core.files import atomic_file

    target = Path(path)
    kind = _KINDS.get(target.suffix.lower())
    if kind is None:
        raise InputError(f"{target}: unknown picture format {target.suffix!r}; use .png, .jpg or .webp")
    _check_size(image, kind, str(target))
    with atomic_file(target) as temporary:
        _encode(image, kind, temporary, imprint)


def _check_size(image: Image.Image, kind: str, name: str) -> None:
    if max(image.size) > _LONGEST[kind]:
        raise InputError(
            f"{name}: {image.width}x{image.height}, but {kind} holds {_LONGEST[kind]} pixels a side; use .png"
        )


def _encode(image: Image.Image, kind: str, to: Path | io.BytesIO, imprint: Imprint | None) -> None:
    options: dict[str, Any] = dict(_EXACTLY[kind])
    options |= {name: image.info[name] for name in ("icc_profile", "exif", "dpi") if name in image.info}
    if imprint is not None:
        options |= imprint.make_options(image, kind)
    if kind == "WEBP" and image.mode in ("L", "LA"):  # WebP has colours only, to which a grey profile does not apply
        options["icc_profile"] = keep_profile(image, image.convert("RGB"), "a WebP has no grey")
    if kind == "JPEG" and image.mode not in ("RGB", "L"):
        image = _lay_on_white(image)
    image.save(to, kind, **options)


def _lay_on_white(image: Image.Image) -> Image.Image:
    """A picture with transparency as one without it, as it is shown on a white page."""
    log.warning("JPEG has no transparency: the picture is laid on white; .png and .webp keep it")
    grey, info = image.mode == "LA", image.info
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    flat = flat.convert("L" if grey else "RGB")
    flat.info = dict(info)
    return flat


def read_request(source: str | os.PathLike[str] | bytes | IO[bytes]) -> Request:
    """Read the request in a picture that `save` wrote (PNG, JPEG, WebP), or in a JSON file.

    source: a path, the file's bytes, or an open binary file.

    Raises InputError when it holds no request.
    """
    data = as_bytes(source, "request")
    name = "request" if data is not None else os.fspath(cast("str | os.PathLike[str]", source))
    try:
        data = Path(name).read_bytes() if data is None else data
        text = _find_text(data, name)
    except FileNotFoundError:
        raise InputError(f"{name} is missing: give a request's JSON file or a picture made here") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{name} cannot be read as a request ({error}): give its JSON or a picture made here"
        ) from error
    try:
        return Request.from_json(text)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _find_text(data: bytes, name: str) -> str:
    """The JSON of a request in the contents of a file."""
    try:
        try:
            text = _find_in_picture(data)
        except ValueError:  # a PNG whose profile inflates beyond Pillow's limit; we write those, too
            shortened = shorten_chunks(data)
            if shortened is None:
                raise
            text = _find_in_picture(shortened.data)
    except UnidentifiedImageError:
        return data.decode("utf-8")
    if text is None:
        raise InputError(f"{name} carries no request: it was not made here, or metadata was switched off")
    return text


def _find_in_picture(data: bytes) -> str | None:
    with Image.open(io.BytesIO(data), formats=tuple(_LONGEST)) as image:
        image.load()  # text may follow the pixels
        return find_request(image)
