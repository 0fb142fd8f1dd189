"""The bodies of answers, as OpenAPI describes them, and of forms, which are read by hand within limits."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel

from dreammix_trt.core.request import Request
from dreammix_trt.core.request_schema import describe_request
from dreammix_trt.service.jobs import Event, Job, State
from dreammix_trt.service.refusals import ErrorFacts
from dreammix_trt.service.served import Card, Served

FILE = {"type": "string", "contentMediaType": "application/octet-stream"}
TEXT = {"type": "string"}


def describe_form(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    """For OpenAPI: an endpoint that takes a multipart form of these parts."""
    schema = {"type": "object", "properties": properties, "required": required}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def describe_json(schema: dict[str, Any]) -> dict[str, Any]:
    """For OpenAPI: an endpoint that takes a JSON body."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


REQUEST_PART = {
    "type": "string", "contentMediaType": "application/json", "contentSchema": describe_request(),
    "description": "The fields of a request as JSON.",
}  # fmt: skip


class Limits(BaseModel):
    """The most of everything that a client may send."""

    pixels: int
    bytes: int
    fields: int
    pictures: int


class EngineFacts(BaseModel):
    """An engine that is served."""

    name: str
    native_size: int
    backend: str
    context: int | None

    @classmethod
    def of(cls, served: Served) -> EngineFacts:
        """Those of one."""
        return cls(name=served.name, native_size=served.native_size, backend=served.backend, context=served.context)


class Schema(BaseModel):
    """What a client needs to know before it asks. `engine` is the one that was asked for, `engines` are all."""

    request: dict[str, Any]
    defaults: dict[str, Any]
    limits: Limits
    engine: EngineFacts
    engines: list[EngineFacts]
    can_enroll: bool


class SubjectFacts(BaseModel):
    """A subject that requests may name."""

    name: str
    token: str
    class_name: str
    kind: Literal["lora", "tokens", "both"]
    attributes: dict[str, list[str]]
    thumbnail: bool
    removable: bool

    @classmethod
    def of(cls, card: Card) -> SubjectFacts:
        """Those of one."""
        return cls(
            name=card.name,
            token=card.token,
            class_name=card.class_name,
            kind=card.kind,  # type: ignore[arg-type]
            attributes=card.attributes,
            thumbnail=card.thumbnail is not None,
            removable=card.removable,
        )


class Subjects(BaseModel):
    """All subjects of an engine. default: the one that is painted where a request names none."""

    subjects: list[SubjectFacts]
    default: str | None


class Links(BaseModel):
    """Where to go on."""

    self: str
    events: str
    images: list[str]


class Accepted(BaseModel):
    """A job that was accepted."""

    id: str
    state: State
    position: int | None
    links: Links

    @classmethod
    def of(cls, job: Job) -> Accepted:
        """A job as it was accepted."""
        place = f"/v1/jobs/{job.id}"
        links = Links(self=place, events=f"{place}/events", images=list_images(job))
        return cls(id=job.id, state=job.state, position=job.position, links=links)


class Seconds(BaseModel):
    """How long a job waited and ran so far."""

    waited: float
    ran: float


class HistoryFacts(BaseModel):
    """Something that has happened to a job. retried: it was begun anew, since `why`."""

    event: Event
    at: str
    why: str | None


class JobFacts(BaseModel):
    """A job now. `request` is as it was painted, once it is done: with its seed and the words of substitute."""

    id: str
    engine: str
    state: State
    position: int | None
    step: int
    steps: int
    created: str
    seconds: Seconds
    history: list[HistoryFacts]
    images: list[str]
    request: dict[str, Any]
    warnings: list[str]
    error: ErrorFacts | None

    @classmethod
    def of(cls, job: Job) -> JobFacts:
        """Those of one."""
        step, steps = job.steps
        return cls(
            id=job.id,
            engine=job.served.name,
            state=job.state,
            position=job.position,
            step=step,
            steps=steps,
            created=job.created.isoformat(timespec="milliseconds"),
            seconds=Seconds(**job.seconds),
            history=[
                HistoryFacts(event=event, at=at.isoformat(timespec="milliseconds"), why=why or None)
                for event, at, why in job.history
            ],
            images=list_images(job) if job.result else [],
            request=spell_request(job.result.request if job.result else job.request),
            warnings=list(job.result.warnings) if job.result else [],
            error=ErrorFacts(**job.error.to_body()["error"]) if job.error else None,
        )


class ReadRequest(BaseModel):
    """The request that a finished picture carries."""

    request: dict[str, Any]


def list_images(job: Job) -> list[str]:
    """Where the pictures of a job are, or will be."""
    count = len(job.result.images) if job.result else job.request.num_images_per_prompt
    return [f"/v1/jobs/{job.id}/images/{k}" for k in range(count)]


def spell_request(request: Request) -> dict[str, Any]:
    """A request's fields as JSON values."""
    fields: dict[str, Any] = json.loads(request.to_json())
    del fields["schema"]
    return fields
