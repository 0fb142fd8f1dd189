"""The result of a request: pictures, how they were made, and the request itself inside the PNG."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.request import Request
from dreammix_trt.core.schedule import Schedule
from dreammix_trt.engine.painting import Progress

U8 = npt.NDArray[np.uint8]
METADATA = "dreammix"  # the PNG text chunk that holds the request

_KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_LONGEST = {"PNG": 2**31 - 1, "JPEG": 65500, "WEBP": 16383}  # pixels a side


@dataclass(frozen=True)
class Result:
    """The result of a request.

    images: PIL images of the input's size and kind (RGB, RGBA, L), in their order; in reference mode RGB at the size it
        worked on.
    request: as it was painted.
    seeds: of each picture.
    timings: seconds per phase, summed over the pictures, disjoint. "network:..." are the networks. On a GPU the
        device's seconds are in "upload", "text", "start", "loop", "hand over", "finish" and "download", networks
        included, and the host's in "read", "canvas", "write" and "weights" (loaded for this request).
    stages: named pictures of what each stage did, when asked for; on a GPU "local result" and "last result".
    warnings: words of the request that do nothing, one sentence each.
    """

    images: list[Image.Image]
    request: Request
    seeds: tuple[int, ...]
    schedule: Schedule = field(repr=False)
    timings: dict[str, float]
    stages: dict[str, Image.Image] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


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
    """

    index: int
    total: int
    stage: str
    picture: int
    look: Callable[[int], U8] = field(repr=False)
    taken: Any = field(default=None, repr=False)
    result: Result | None = None

    @classmethod
    def of(cls, progress: Progress, index: int, total: int, picture: int) -> StepEvent:
        """Make the event of a batch's progress."""
        return cls(index, total, progress.step.stage, picture, progress.preview, progress.taken)

    def preview(self) -> Image.Image:
        """The network's present idea of the stage's frame. Costs one VAE decoding. Call it before the next step."""
        return Image.fromarray(self.look(0))


def save(result: Result, path: str | os.PathLike[str], *, index: int = 0, metadata: bool = True) -> None:
    """Write one picture of a result (.png, .jpg, .webp), atomically.

    index: which picture.
    metadata: whether a PNG carries the request that makes exactly this picture; `read_request` reads it.

    Raises InputError for another format or a picture too large for it.
    """
    image = result.images[index]
    request = result.request.replace(seed=result.seeds[index], num_images_per_prompt=1)
    write_picture(image, path, request if metadata else None)


def write_picture(image: Image.Image, path: str | os.PathLike[str], request: Request | None = None) -> None:
    """Write a picture (.png, .jpg, .webp), atomically.

    request: stored in a PNG; other formats do not carry it.

    Raises InputError for another format or a picture too large for it.
    """
    from dreammix_trt.core.files import atomic_file

    target = Path(path)
    kind = _KINDS.get(target.suffix.lower())
    if kind is None:
        raise InputError(f"{target}: unknown picture format {target.suffix!r}; use .png, .jpg or .webp")
    if max(image.size) > _LONGEST[kind]:
        raise InputError(
            f"{target}: {image.width}x{image.height}, but {kind} holds {_LONGEST[kind]} pixels a side; use .png"
        )
    options: dict[str, Any] = {"icc_profile": image.info.get("icc_profile")}
    if kind == "PNG" and request is not None:
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt(METADATA, request.to_json())
    if kind != "PNG":
        options["quality"] = 95
    if kind == "JPEG" and image.mode not in ("RGB", "L"):
        image = image.convert("RGB")
    with atomic_file(target) as temporary:
        image.save(temporary, kind, **options)


def read_request(path: str | os.PathLike[str]) -> Request:
    """Read a request from a JSON file or from the metadata of a PNG that `save` wrote.

    Raises InputError when the file holds no request.
    """
    source = Path(path)
    try:
        if source.suffix.lower() == ".png":
            with Image.open(source) as image:
                image.load()
                text = image.info.get(METADATA)
            if not isinstance(text, str):
                raise InputError(f"{source} carries no request: it was not made here, or metadata was switched off")
        else:
            text = source.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{source} is missing: give a request's JSON file or a PNG made here") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{source} cannot be read as a request ({error}): give its JSON or a PNG made here") from error
    try:
        return Request.from_json(text)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
