"""Our own API: jobs that are accepted, followed, and fetched. docs/serve.md tells it to users."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Path, Query
from fastapi import Request as HttpRequest
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from dreammix_trt.core.request import Request
from dreammix_trt.core.request_schema import describe_request
from dreammix_trt.engine import read_request
from dreammix_trt.service.events import EVENTS, EventStream, as_data_url, spell_event
from dreammix_trt.service.forms import check_picture, parse_object, read_form
from dreammix_trt.service.house import Here
from dreammix_trt.service.jobs import Job
from dreammix_trt.service.previews import Watcher, every
from dreammix_trt.service.refusals import Answers, Refusal, describe_errors, invalid
from dreammix_trt.service.schemas import (
    FILE,
    REQUEST_PART,
    TEXT,
    Accepted,
    EngineFacts,
    JobFacts,
    Limits,
    ReadRequest,
    Schema,
    describe_form,
    list_images,
    spell_request,
)
from dreammix_trt.service.served import Served

HEARTBEAT = 15.0  # seconds of silence before a comment is sent
_LOOK = 0.5  # seconds between two looks at the line, whose moves nobody tells
_PICTURES = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}
_EVENTS: Answers = {
    200: {"content": EVENTS, "description": "The events."},
}
_IMAGE: Answers = {
    200: {
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in _PICTURES.values()},
        "description": "The picture, with its request in it.",
    },
}
Id = Annotated[str, Path(max_length=64, description="Of a job.")]
router = APIRouter(prefix="/v1", tags=["jobs"])


@router.get("/schema", responses=describe_errors("invalid_request"))
async def get_schema(house: Here, engine: Annotated[str | None, Query(max_length=200)] = None) -> Schema:
    """What a request's fields may be, an engine's defaults, and the limits here."""
    served, limits = house.choose_engine(engine), house.settings
    return Schema(
        request=describe_request(),
        defaults=spell_request(served.make_request({"prompt": ""})),
        limits=Limits(pixels=limits.pixels, bytes=limits.body_bytes, fields=limits.fields, pictures=limits.pictures),
        engine=EngineFacts.of(served),
        engines=[EngineFacts.of(each) for each in house.engines.values()],
        can_enroll=served.can_enroll,
    )


@router.post(
    "/jobs",
    status_code=202,
    responses=describe_errors("invalid_request", "too_large", "queue_full", "draining", "conflict", "too_slow"),
    openapi_extra=describe_form(
        {"image": FILE, "mask": FILE, "request": REQUEST_PART, "engine": TEXT}, ["image", "request"]
    ),
)
async def post_job(
    http: HttpRequest,
    house: Here,
    idempotency_key: Annotated[str | None, Header(max_length=200, min_length=1)] = None,
) -> Accepted:
    """Accept a job. White in `mask` is repainted; without a mask, what is transparent in `image`.

    The same Idempotency-Key with the same form answers the same job, for as long as that is remembered.
    """
    form = await read_form(http, house.settings)
    form.refuse_others(("image", "mask", "request", "engine"))
    image, mask, text = form.need_file("image"), form.take_file("mask"), form.take_text("request")
    if text is None:
        raise invalid("request", 'is missing: give {"prompt": "..."} as JSON')
    served = house.choose_engine(form.take_text("engine"))
    request = read_fields(served, text)
    digest = _digest(image, mask, text.encode(errors="replace"), served.name.encode())
    job = await house.accept(served, image, mask, request, door="native", key=idempotency_key, digest=digest)
    return Accepted.of(job)


@router.get("/jobs/{id}", responses=describe_errors("invalid_request"))
async def get_job(id: Id, house: Here) -> JobFacts:
    """A job as it is now."""
    return JobFacts.of(house.jobs.find(id))


@router.delete("/jobs/{id}", status_code=202, responses=describe_errors("invalid_request"))
async def delete_job(id: Id, house: Here) -> JobFacts:
    """Cancel a job after its present step, or forget a finished one."""
    job = house.jobs.find(id)
    if job.ended is None:
        job.cancel()
    else:
        house.jobs.forget(job)
    return JobFacts.of(job)


@router.get(
    "/jobs/{id}/events",
    response_class=StreamingResponse,
    responses={**describe_errors("invalid_request", "queue_full"), **_EVENTS},
)
async def get_events(id: Id, house: Here, previews: Annotated[int, Query(ge=0, le=1000)] = 5) -> StreamingResponse:
    """Follow a job: queued, step, preview (every `previews` steps, 0: never), done, failed, cancelled.

    The first event is the present state, also for a client that comes again. A slow client misses steps, not the end.
    """
    job = house.jobs.find(id)
    watcher = Watcher(every(previews))
    job.add_watcher(watcher, house.settings.watchers)
    return EventStream(_follow(job, watcher), lambda: job.remove_watcher(watcher))


@router.get(
    "/jobs/{id}/images/{k}",
    response_class=Response,
    responses={**describe_errors("invalid_request", "conflict"), **_IMAGE},
)
async def get_image(
    id: Id,
    k: Annotated[int, Path(ge=0, le=1023)],
    house: Here,
    format: Annotated[Literal["png", "webp", "jpeg"], Query()] = "png",
) -> Response:
    """A finished picture. It carries its request, which makes it again."""
    job = house.jobs.find(id)
    if job.result is None:
        raise Refusal("conflict", f"the job is {job.state}, so it has no picture")
    if k >= len(job.result.images):
        raise Refusal("not_found", f"the job has {len(job.result.images)} pictures, from 0 on", "k")
    data = await run_in_threadpool(job.result.to_bytes, format, k)
    job.fetched.add(k)
    return Response(data, media_type=_PICTURES[format], headers={"Cache-Control": "private, no-store"})


@router.post(
    "/read-request",
    responses=describe_errors("invalid_request", "too_large", "queue_full", "draining", "too_slow"),
    openapi_extra=describe_form({"image": FILE}, ["image"]),
)
async def post_read_request(http: HttpRequest, house: Here) -> ReadRequest:
    """Read the request that a finished picture carries."""
    form = await read_form(http, house.settings)
    form.refuse_others(("image",))
    image = form.need_file("image")
    await run_in_threadpool(check_picture, image, "image", house.settings)
    return ReadRequest(request=spell_request(await run_in_threadpool(read_request, image)))


def read_fields(served: Served, text: str) -> Request:
    """The request of a form's part: fields beside the engine's defaults, or a whole one with its schema number."""
    fields = parse_object(text, "request")
    if "schema" in fields:
        return served.make_request(spell_request(Request.from_json(text)))
    return served.make_request(fields)


def _digest(*parts: bytes | None) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"-" if part is None else hashlib.sha256(part).digest())
    return digest.hexdigest()


async def _follow(job: Job, watcher: Watcher) -> AsyncIterator[str]:
    """The events of a job for one client, from now to its end."""
    number, said, quiet = 0, "", 0.0
    while True:
        over = job.ended is not None
        news = [("preview", _spell_preview(watcher)) for _ in range(len(watcher.previews))]
        name, data = _spell_state(job)
        now = f"{name} {data}"
        news += [(name, data)] if over or now != said else []
        for event, content in news:
            number, quiet = number + 1, 0.0
            yield spell_event(event, content, number)
        if over:
            return
        said = now
        if not await watcher.wait(_LOOK if name == "queued" else HEARTBEAT):
            quiet += _LOOK if name == "queued" else HEARTBEAT
            if quiet >= HEARTBEAT:
                quiet = 0.0
                yield ": still here\n\n"


def _spell_preview(watcher: Watcher) -> dict[str, Any]:
    preview = watcher.previews.popleft()
    return {"step": preview.step, "picture": preview.picture, "image": as_data_url(preview.data)}


def _spell_state(job: Job) -> tuple[str, dict[str, Any]]:
    """A job's state as an event."""
    if job.ended is None and job.state == "queued":
        return "queued", {"position": job.position}
    if job.ended is None:
        step, steps = job.steps
        return "step", {"step": step, "steps": steps}
    if job.result is not None:
        facts = {"images": list_images(job), "request": spell_request(job.result.request)}
        return "done", {**facts, "warnings": list(job.result.warnings), "seconds": job.seconds}
    assert job.error is not None
    return ("cancelled", {}) if job.state == "cancelled" else ("failed", job.error.to_body())
