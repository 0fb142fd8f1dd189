"""Subjects over HTTP: list, upload, enrol, remove."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from dreammix_trt.service.forms import check_picture, read_form
from dreammix_trt.service.house import Here
from dreammix_trt.service.refusals import Answers, Refusal, describe_errors, invalid
from dreammix_trt.service.schemas import FILE, TEXT, SubjectFacts, Subjects, describe_form

_MOST_PICTURES = 16
_THUMBNAIL: Answers = {
    200: {"content": {"image/webp": {"schema": {"type": "string", "format": "binary"}}}, "description": "The picture."}
}
Engine = Annotated[str | None, Query(max_length=200, description="Of several engines, which one.")]
Name = Annotated[str, Path(max_length=64)]
router = APIRouter(prefix="/v1/subjects", tags=["subjects"])


@router.get("", responses=describe_errors("invalid_request"))
async def get_subjects(house: Here, engine: Engine = None) -> Subjects:
    """The subjects that requests may name."""
    served = house.choose_engine(engine)
    cards = [SubjectFacts.of(card) for card in served.cards.values()]
    return Subjects(subjects=cards, default=served.default_subject)


@router.get(
    "/{name}/thumbnail", response_class=Response, responses={**describe_errors("invalid_request"), **_THUMBNAIL}
)
async def get_thumbnail(name: Name, house: Here, engine: Engine = None) -> Response:
    """A small picture of a subject that was enrolled here."""
    card = house.choose_engine(engine).find(name)
    if card.thumbnail is None:
        raise Refusal("not_found", f"subject {name!r} has no picture")
    return Response(card.thumbnail, media_type="image/webp")


@router.post(
    "",
    status_code=201,
    responses=describe_errors("invalid_request", "too_large", "queue_full", "conflict", "draining", "too_slow"),
    openapi_extra=describe_form({"file": FILE, "name": TEXT, "token": TEXT, "class_name": TEXT}, ["file"]),
)
async def post_subject(http: HttpRequest, house: Here, engine: Engine = None) -> SubjectFacts:
    """Load a subject file or a LoRA (safetensors). It is there until it is removed or the service ends."""
    served = house.choose_engine(engine)
    form = await read_form(http, house.settings)
    form.refuse_others(("file", "name", "token", "class_name"))
    words = [_read_word(form.take_text(name), name) for name in ("name", "token", "class_name")]
    return SubjectFacts.of(await run_in_threadpool(served.add, form.need_file("file"), *words))


@router.post(
    "/enroll",
    status_code=201,
    responses=describe_errors("invalid_request", "too_large", "queue_full", "conflict", "draining", "too_slow"),
    openapi_extra=describe_form(
        {
            "image": {"type": "array", "items": FILE, "minItems": 1},
            "mask": {"type": "array", "items": FILE},
            "name": TEXT,
            "class_name": TEXT,
        },
        ["image", "name", "class_name"],
    ),
)
async def post_enrolment(http: HttpRequest, house: Here, engine: Engine = None) -> SubjectFacts:
    """Make a subject of pictures alone, where the engine can. White in a mask is the subject; without masks, what is
    opaque."""
    served = house.choose_engine(engine)
    form = await read_form(http, house.settings)
    form.refuse_others(("image", "mask", "name", "class_name"))
    images, masks = form.take_files("image"), form.take_files("mask")
    if not 1 <= len(images) <= _MOST_PICTURES:
        raise invalid("image", f"is given {len(images)} times; give it 1 to {_MOST_PICTURES} times")
    if masks and len(masks) != len(images):
        raise invalid("mask", f"is given {len(masks)} times for {len(images)} pictures; give one for each, or none")
    for field, files in (("image", images), ("mask", masks)):
        for data in files:
            await run_in_threadpool(check_picture, data, field, house.settings)
    name, class_name = (_read_word(form.take_text(field), field) for field in ("name", "class_name"))
    if name is None or class_name is None:
        raise invalid("class_name" if name else "name", "is missing")
    card = await run_in_threadpool(served.enroll, images, masks or [None] * len(images), name, class_name)
    return SubjectFacts.of(card)


@router.delete(
    "/{name}",
    status_code=204,
    response_class=Response,
    responses=describe_errors("invalid_request", "conflict", "queue_full"),
)
async def delete_subject(name: Name, house: Here, engine: Engine = None) -> Response:
    """Remove a subject that was added here. Requests that wait for it fail."""
    await run_in_threadpool(house.choose_engine(engine).remove, name)
    return Response(status_code=204)


def _read_word(text: str | None, field: str) -> str | None:
    """A short text without line breaks; None where it is left out or empty."""
    if text and (len(text) > 64 or not text.isprintable()):
        raise invalid(field, "must be a short line of text, of 64 characters at most")
    return text or None
