"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import base64
import json
from typing import Any

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


def spell_event(name: str, data: dict[str, Any], number: int | None = None) -> str:
    """One event. JSON has no line breaks, so its data is one line."""
    count = "" if number is None else f"id: {number}\n"
    return f"{count}event: {name}\ndata: {json.dumps(data)}\n\n"


def as_data_url(data: bytes, kind: str = "image/webp") -> str:
    """A file as a URL that holds it."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
