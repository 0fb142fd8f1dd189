"""The images API of OpenAI, as its stock clients speak it: `models.list` and `images.edit`, plain and streaming.

What it cannot do is answered by name. Further fields (`extra_body`) are those of `Request`.
"""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from dreammix_trt.core.pictures import read_image
from dreammix_trt.core.presets import Preset
from dreammix_trt.service.events import EVENTS, EventStream, spell_event
from dreammix_trt.service.forms import Form, check_picture, parse_fields, read_form
from dreammix_trt.service.house import Here
from dreammix_trt.service.jobs import Job
from dreammix_trt.service.previews import Watcher, evenly
from dreammix_trt.service.refusals import describe_errors, explain, invalid
from dreammix_trt.service.schemas import FILE, TEXT, describe_form

_HEARTBEAT = 15.0
_PRESETS: dict[str, Preset | None] = {
    "auto": None, "standard": None, "low": "fast", "medium": "balanced", "high": "best",
}  # fmt: skip
#: fields with one value that holds here; the others are refused
_FIXED = {
    "background": ("auto",), "input_fidelity": ("high",), "response_format": ("b64_json",),
    "output_compression": ("100",),
}  # fmt: skip
_IGNORED = ("user", "safety_identifier")  # they name the client's own users, and change no picture
_UNABLE = ("moderation", "complexity", "frame_count", "frame_duration_ms", "svg", "markup")
_OURS = ("model", "prompt", "n", "size", "quality", "output_format", "stream", "partial_images", *_FIXED, *_IGNORED)
router = APIRouter(prefix="/v1", tags=["OpenAI"])


class Model(BaseModel):
    """A name for `model`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dreammix-trt"


class Models(BaseModel):
    """All names for `model`: engines, and their subjects."""

    object: Literal["list"] = "list"
    data: list[Model]


class Picture(BaseModel):
    """A finished picture in base64."""

    b64_json: str


class Edited(BaseModel):
    """The answer of `images.edit`."""

    created: int
    data: list[Picture]
    output_format: str
    size: str


@dataclass(frozen=True)
class _Order:
    """What a client wants beside the request. kind: of the files; partials: how many, None: no stream."""

    kind: Literal["png", "webp", "jpeg"]
    size: str
    quality: str
    partials: int | None

    def describe(self, data: bytes) -> dict[str, Any]:
        """What every event of a stream says of a picture."""
        return {
            "b64_json": base64.b64encode(data).decode(),
            "background": "auto",
            "created_at": int(time.time()),
            "output_format": self.kind,
            "quality": "auto" if self.quality == "standard" else self.quality,
            "size": self.size,
        }


@router.get("/models", responses=describe_errors())
async def get_models(house: Here) -> Models:
    """What `model` may be: an engine, or one of its subjects."""
    return Models(data=[Model(id=name, created=house.begun) for name in house.list_models()])


@router.post(
    "/images/edits",
    response_model=Edited,
    responses={
        **describe_errors(
            "invalid_request", "too_large", "queue_full", "draining", "timed_out", "cancelled", "too_slow"
        ),
        200: {"content": EVENTS, "model": Edited},
    },
    openapi_extra=describe_form({"image": FILE, "mask": FILE, **dict.fromkeys(_OURS, TEXT)}, ["image", "prompt"]),
)
async def post_edit(http: HttpRequest, house: Here) -> Response:
    """Repaint what is transparent in `mask`, or in `image` where there is no mask."""
    form = await read_form(http, house.settings)
    image, mask = _take_pictures(form)
    height, width = await run_in_threadpool(check_picture, image, "image", house.settings)
    order = _read_order(form, f"{width}x{height}")
    served, subject = house.choose_model(form.take_text("model"))
    others = {name: texts for name, texts in form.texts.items() if name not in _OURS}
    fields = parse_fields(others)
    prompt, count = form.take_text("prompt"), form.take_text("n")
    if prompt is not None:
        fields["prompt"] = prompt
    if count is not None:
        fields["num_images_per_prompt"] = _read_whole("n", count, house.settings.pictures)
    if subject is not None:
        fields.setdefault("subject", subject)
    request = served.make_request(fields, _read_quality(order.quality))
    marked = None
    if mask is not None:
        await run_in_threadpool(check_picture, mask, "mask", house.settings)
        marked = await run_in_threadpool(read_hole, mask)
    watcher = None if order.partials is None else Watcher(evenly(order.partials), order.kind)
    job = await house.accept(served, image, marked, request, door="openai", watcher=watcher)
    if watcher is not None:
        return EventStream(_stream(job, watcher, order), lambda: _leave(job, watcher))
    await house.wait_for(job, http)
    files = await run_in_threadpool(_encode, job, order.kind)
    pictures = [Picture(b64_json=base64.b64encode(data).decode()) for data in files]
    body = Edited(created=int(time.time()), data=pictures, output_format=order.kind, size=order.size)
    return Response(body.model_dump_json(), media_type="application/json")


def read_hole(mask: bytes) -> npt.NDArray[np.uint8]:
    """A mask by OpenAI's convention as one of ours: uint8 (H, W), 255 where it is more than half transparent.

    Raises Refusal for a picture without transparency.
    """
    alpha = read_image(mask, name="mask").alpha
    if alpha is None or alpha.min() > 127:
        raise invalid("mask", "has no transparent part: what is transparent in it is repainted")
    return np.where(alpha > 127, 0, 255).astype(np.uint8)


def _take_pictures(form: Form) -> tuple[bytes, bytes | None]:
    for name in form.files:
        if name in _UNABLE:
            raise invalid(name, "is not supported here; leave it out")
        if name not in ("image", "image[]", "mask"):
            raise invalid(name[:40], "is no file of this form; it has image, mask")
    images = [*form.take_files("image"), *form.take_files("image[]")]
    if len(images) != 1:
        raise invalid("image", f"is given {len(images)} times; give one picture: subjects come as `model`")
    return images[0], form.take_file("mask")


def _read_order(form: Form, size: str) -> _Order:
    """What is asked for beside the request. Raises Refusal, by name, for what cannot be done here."""
    for name, allowed in _FIXED.items():
        if (given := form.take_text(name)) is not None and given not in allowed:
            raise invalid(name, f"is {given[:40]!r}; supported: {', '.join(allowed)}")
    for name in form.texts:
        if name.partition("[")[0] in _UNABLE:
            raise invalid(name[:40], "is not supported here; leave it out")
    wanted = form.take_text("size") or "auto"
    if wanted not in ("auto", size):
        raise invalid("size", f"is {wanted[:40]!r}; supported: auto, which is the picture's own {size}")
    kind = form.take_text("output_format") or "png"
    if kind not in ("png", "webp", "jpeg"):
        raise invalid("output_format", f"is {kind[:40]!r}; supported: png, webp, jpeg")
    quality = form.take_text("quality") or "auto"
    _read_quality(quality)
    stream = (form.take_text("stream") or "false").lower()
    if stream not in ("true", "false"):
        raise invalid("stream", f"is {stream[:40]!r}; supported: true, false")
    partials = _read_whole("partial_images", form.take_text("partial_images") or "0", 3, least=0)
    return _Order(kind, size, quality, partials if stream == "true" else None)  # type: ignore[arg-type]


def _read_quality(quality: str) -> Preset | None:
    if quality not in _PRESETS:
        raise invalid("quality", f"is {quality[:40]!r}; supported: {', '.join(_PRESETS)}")
    return _PRESETS[quality]


def _read_whole(name: str, text: str, most: int, least: int = 1) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6 and least <= int(text) <= most):
        raise invalid(name, f"is {text[:40]!r}; allowed: a whole number from {least} to {most}")
    return int(text)


def _encode(job: Job, kind: str) -> list[bytes]:
    """All pictures of a finished job as files."""
    assert job.result is not None
    return [job.result.to_bytes(kind, k) for k in range(len(job.result.images))]


async def _stream(job: Job, watcher: Watcher, order: _Order) -> AsyncIterator[str]:
    """Partial pictures, then the finished ones."""
    shown = 0
    try:
        while True:
            over = job.ended is not None
            while watcher.previews:
                event = order.describe(watcher.previews.popleft().data)
                kind = "image_edit.partial_image"
                yield spell_event(kind, {"type": kind, **event, "partial_image_index": shown})
                shown += 1
            if over:
                break
            if not await watcher.wait(_HEARTBEAT):
                yield ": still here\n\n"
        if job.error is not None:
            yield spell_event("error", job.error.to_body())
            return
        for data in await run_in_threadpool(_encode, job, order.kind):
            kind = "image_edit.completed"
            yield spell_event(kind, {"type": kind, **order.describe(data), "usage": _USAGE})
    except Exception as error:
        yield spell_event("error", explain(error).to_body())


def _leave(job: Job, watcher: Watcher) -> None:
    """A stream is over. A client that has gone before its end cancels the job."""
    job.remove_watcher(watcher)
    if job.ended is None:
        job.cancel()


#: clients want it; nothing is counted here
_USAGE = {
    "input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}  # fmt: skip
