"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

#: for OpenAPI: the answer of an endpoint that sends events
EVENTS: dict[str, Any] = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "description": "Of each event. `data` is JSON.",
            "properties": {"event": {"type": "string"}, "data": {"type": "string"}, "id": {"type": "string"}},
            "required": ["event", "data"],
        }
    }
}


class EventStream(StreamingResponse):
    """An answer of events.

    at_end: called once it is over, also where the client has gone before the first event and nothing of `events` runs.
    """

    def __init__(self, events: AsyncIterator[str], at_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()


def spell_event(name: str, data: dict[str, Any], number: int | None = None) -> str:
    """One event. JSON has no line breaks, so its data is one line."""
    count = "" if number is None else f"id: {number}\n"
    return f"{count}event: {name}\ndata: {json.dumps(data)}\n\n"


def as_data_url(data: bytes, kind: str = "image/webp") -> str:
    """A file as a URL that holds it."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
