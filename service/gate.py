"""The gate: what is checked of every request before anything of it is read, and how much of it is read at all."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dreammix_trt.service.refusals import Refusal, explain
from dreammix_trt.service.settings import Settings, is_loopback

OPEN = ("/", "/healthz", "/readyz", "/favicon.ico")  # and the page's files: a browser asks for them without a key
PAGE = "/page/"
SUBJECTS = "/v1/subjects"
_STOPS = ("/sdapi/v1/interrupt", "/sdapi/v1/skip")  # posts that make no work


class Gate:
    """Middleware around the whole app.

    Checks the origin, the key, and whether new work is taken. Counts the bytes of the body and the seconds it takes;
    reading a body beyond them raises the Refusal where it is read.

    is_draining: whether new work is refused.
    """

    def __init__(self, app: ASGIApp, settings: Settings, is_draining: Callable[[], bool]) -> None:
        self._app, self._settings, self._is_draining = app, settings, is_draining
        self._key = settings.api_key.encode()
        self._reading = 0  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_origin(headers)
            self._check_key(scope["path"], headers)
            self._check_work(scope)
            limit = self._choose_limit(scope["path"])
            _check_length(headers, limit)
        except Refusal as refusal:
            await refusal.to_response()(scope, receive, send)
            return
        meter = _Meter(self, receive, limit)
        answered = False

        async def note(message: Message) -> None:
            nonlocal answered
            answered = answered or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, meter.receive, note)
        except Exception as error:
            if answered:
                raise
            await explain(error).to_response()(scope, receive, send)
        finally:
            self._reading -= meter.bytes

    def admit(self, count: int) -> None:
        """Take note of bytes that were read. Raises Refusal when all bodies together are too large."""
        self._reading += count
        if self._reading > self._settings.bodies_bytes:
            raise Refusal("queue_full", "too many large bodies are being read: try again later", retry_after=2)

    @property
    def seconds(self) -> float:
        """How long a client may take to send a body."""
        return self._settings.body_seconds

    def _check_origin(self, headers: Headers) -> None:
        """Refuse what a foreign web page sends through a user's browser, by another origin or by a rebound name."""
        host = headers.get("host", "")
        origin = headers.get("origin")
        if origin is not None and origin != "null" and _read_host(origin) != host:
            raise Refusal("forbidden", f"this service answers no page of another origin ({origin[:200]})")
        if origin == "null" or headers.get("sec-fetch-site") == "cross-site":
            raise Refusal("forbidden", "this service answers no page of another origin")
        if self._settings.is_private and not self._key and not is_loopback(_read_name(host)):
            raise Refusal("forbidden", f"this service is for this computer alone; {host[:200]!r} is not its name")

    def _check_key(self, path: str, headers: Headers) -> None:
        if not self._key or path in OPEN or path.startswith(PAGE):
            return
        if not hmac.compare_digest(_read_key(headers.get("authorization", "")), self._key):
            raise Refusal("unauthorized", "this service asks for a key: send `Authorization: Bearer KEY`")

    def _check_work(self, scope: Scope) -> None:
        if scope["method"] == "POST" and scope["path"] not in _STOPS and self._is_draining():
            raise Refusal("draining", "the service is about to end and takes no more work", retry_after=30)

    def _choose_limit(self, path: str) -> int:
        return self._settings.subject_bytes if path.startswith(SUBJECTS) else self._settings.body_bytes


class _Meter:
    """Counts what is received of one body."""

    def __init__(self, gate: Gate, receive: Receive, limit: int) -> None:
        self._gate, self._receive, self._limit = gate, receive, limit
        self._until: float | None = asyncio.get_running_loop().time() + gate.seconds
        self.bytes = 0

    async def receive(self) -> Message:
        """The next message; raises Refusal for a body that is too large or too slow."""
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            self._until = None
            raise Refusal("too_slow", f"the body took longer than {self._gate.seconds:g} s to arrive") from None
        if message["type"] == "http.request":
            count = len(message.get("body", b""))
            self.bytes += count
            self._gate.admit(count)
            if self.bytes > self._limit:
                raise _too_large(self._limit)
            if not message.get("more_body", False):
                self._until = None  # what comes next is the client's leaving, whenever that is
        return message


def _check_length(headers: Headers, limit: int) -> None:
    """Refuse a body that says itself that it is too large."""
    length = headers.get("content-length", "")
    if length.isascii() and length.isdigit() and (len(length) > 15 or int(length) > limit):
        raise _too_large(limit)


def _read_host(origin: str) -> str | None:
    """The host and port of an origin; None for what is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _read_name(host: str) -> str:
    """The name in a Host header; "" for what is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _too_large(limit: int) -> Refusal:
    return Refusal("too_large", f"the body has more than {limit} bytes, which is the limit here")


def _read_key(header: str) -> bytes:
    """The key in an Authorization header: a bearer's, or the password of Basic, which clients of A1111 send."""
    scheme, _, rest = header.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip().encode()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""
