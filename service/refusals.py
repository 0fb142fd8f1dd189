"""Every error that a client sees: one shape, with a type, a message, and the field at fault where there is one."""

from __future__ import annotations

import logging
import math
import traceback
from typing import Any, Literal, get_args

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dreammix_trt.core.errors import (
    Cancelled,
    DreamMixError,
    FileFormatError,
    InputError,
    QueueFull,
    TimedOut,
    TooManyPixels,
)
from dreammix_trt.core.request import CHECKS

log = logging.getLogger(__name__)

Kind = Literal[
    "invalid_request", "too_large", "unauthorized", "forbidden", "not_found", "method_not_allowed", "queue_full",
    "too_slow", "timed_out", "cancelled", "draining", "unavailable", "conflict", "engine_error",
]  # fmt: skip
STATUS: dict[Kind, int] = {
    "invalid_request": 422, "too_large": 413, "unauthorized": 401, "forbidden": 403, "not_found": 404,
    "method_not_allowed": 405, "queue_full": 429, "too_slow": 408, "timed_out": 504, "cancelled": 409, "draining": 503,
    "unavailable": 503, "conflict": 409, "engine_error": 500,
}  # fmt: skip
#: messages of the engine begin with the field at fault
_FIELDS = {*CHECKS, "image", "mask_image", "mask", "init_images", "name", "class_name", "file"}


class ErrorFacts(BaseModel):
    """What went wrong.

    code: the same as `type`, where clients of OpenAI look for it.
    """

    type: Kind
    message: str
    field: str | None = None
    code: Kind


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorFacts


class Refusal(Exception):
    """An answer that is an error.

    kind: what clients tell cases apart by.
    field: name of the field at fault.
    retry_after: seconds after which trying again makes sense.
    """

    def __init__(self, kind: Kind, message: str, field: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.message, self.field, self.retry_after = message, field, retry_after

    def to_body(self) -> dict[str, Any]:
        """The body of the answer."""
        field = None if self.field is None else _make_printable(self.field)
        facts = {"type": self.kind, "message": _make_printable(self.message), "field": field, "code": self.kind}
        return {"error": facts}

    def to_response(self) -> JSONResponse:
        """The answer."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.kind == "unauthorized":
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.to_body(), STATUS[self.kind], headers)


def _make_printable(text: str) -> str:
    """The text, with escapes for halves of characters, which JSON may bring and no answer can hold."""
    return text.encode(errors="backslashreplace").decode()


def invalid(field: str, message: str) -> Refusal:
    """The refusal of one field."""
    return Refusal("invalid_request", f"{field} {message}", field)


def explain(error: BaseException) -> Refusal:
    """Any error as the refusal that a client sees. What nobody expected is logged whole and shown by its kind alone."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ClientDisconnect):  # nobody reads this
        return Refusal("cancelled", "the client has gone before its body was whole")
    text = str(error)
    if isinstance(error, QueueFull):
        return Refusal("queue_full", text, retry_after=1)
    if isinstance(error, TimedOut):
        return Refusal("timed_out", text)
    if isinstance(error, Cancelled):
        return Refusal("cancelled", text)
    if isinstance(error, InputError | FileFormatError):
        first = text.partition(" ")[0].rstrip(":")
        kind: Kind = "too_large" if isinstance(error, TooManyPixels) else "invalid_request"
        return Refusal(kind, text, first if first in _FIELDS else None)
    if isinstance(error, DreamMixError):
        return Refusal("engine_error", text)
    place = "".join(traceback.format_tb(error.__traceback__))
    log.error("an error that nobody expected: %s\n%s", type(error).__name__, place)
    log.debug("its message, which may quote a request: %s", error)
    return Refusal("engine_error", f"the service failed ({type(error).__name__}); its log says more")


Answers = dict[int | str, dict[str, Any]]


def describe_errors(*kinds: Kind) -> Answers:
    """For OpenAPI: the answers of these kinds, and of those that every request can meet."""
    always: tuple[Kind, ...] = ("unauthorized", "forbidden", "not_found", "method_not_allowed", "engine_error")
    found: Answers = {}
    for status in sorted({STATUS[kind] for kind in (*always, *kinds)}):
        names = [kind for kind in get_args(Kind) if STATUS[kind] == status]
        found[status] = {"model": ErrorBody, "description": ", ".join(names)}
    return found


def install(app: FastAPI) -> None:
    """Have an app answer all its errors in this shape."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return explain(error).to_response()

    async def answer_framework(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        kinds: dict[int, Kind] = {404: "not_found", 405: "method_not_allowed"}
        kind = kinds.get(error.status_code, "invalid_request" if error.status_code < 500 else "engine_error")
        response = Refusal(kind, f"{request.url.path}: {error.detail}").to_response()
        response.headers.update(error.headers or {})
        return response

    async def answer_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return invalid(name, f"cannot be used: {first['msg']}").to_response()

    app.add_exception_handler(Refusal, answer)
    app.add_exception_handler(DreamMixError, answer)
    app.add_exception_handler(HTTPException, answer_framework)
    app.add_exception_handler(RequestValidationError, answer_validation)
