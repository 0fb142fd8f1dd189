"""Bodies as values: multipart forms and JSON, within the limits of the settings. Nothing touches the disk."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from dreammix_trt.core.pictures import read_size
from dreammix_trt.core.request_schema import describe_request
from dreammix_trt.service.multipart import FormReader
from dreammix_trt.service.refusals import Refusal, invalid
from dreammix_trt.service.settings import Settings

_FIELDS: Mapping[str, Any] = describe_request()["properties"]


@dataclass(frozen=True)
class Form:
    """A multipart form.

    files: the bytes of each part that came as a file, by name. What clients call their files is not looked at.
    texts: the other parts.
    """

    files: dict[str, list[bytes]] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)

    def take_file(self, name: str) -> bytes | None:
        """The file of a part that comes at most once; None where it is left out."""
        found = self.take_files(name)
        if len(found) > 1:
            raise invalid(name, f"is given {len(found)} times; give it once")
        return found[0] if found else None

    def need_file(self, name: str) -> bytes:
        """The file of a part that must be there."""
        found = self.take_file(name)
        if found is None:
            raise invalid(name, "is missing: give it as a file")
        return found

    def take_files(self, name: str) -> list[bytes]:
        """All files of a part."""
        if name in self.texts:
            raise invalid(name, "is text, but must be a file")
        return self.files.get(name, [])

    def take_text(self, name: str) -> str | None:
        """The text of a part that comes at most once; None where it is left out."""
        if name in self.files:
            raise invalid(name, "is a file, but must be text")
        found = self.texts.get(name, [])
        if len(found) > 1:
            raise invalid(name, f"is given {len(found)} times; give it once")
        return found[0] if found else None

    def refuse_others(self, known: Collection[str]) -> None:
        """Refuse parts that nobody would look at."""
        for name in (*self.files, *self.texts):
            if name not in known:
                raise invalid(_shorten(name), f"is no part of this form; it has {', '.join(sorted(known))}")


async def read_form(request: Request, settings: Settings) -> Form:
    """Read a multipart form. Raises Refusal for another kind of body, damaged ones, and beyond the limits."""
    reader = FormReader(request.headers.get("content-type", ""), settings.fields, settings.field_bytes)
    async for data in request.stream():
        reader.write(data)
    form = Form()
    for part in reader.finish():
        if part.is_file:
            form.files.setdefault(part.name, []).append(bytes(part.data))
        else:
            text = part.data.decode(errors="backslashreplace")
            form.texts.setdefault(part.name, []).append(text)
    return form


async def read_json(request: Request) -> dict[str, Any]:
    """Read a body that is a JSON object. Raises Refusal for any other."""
    return await run_in_threadpool(parse_object, await request.body(), None)


def parse_object(text: str | bytes, field: str | None) -> dict[str, Any]:
    """A JSON object. field: the part of a form that it is; None: it is the whole body."""
    name = field or "the body"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refusal("invalid_request", f"{name} is not valid JSON ({error})", field) from None
    if not isinstance(value, dict):
        raise Refusal("invalid_request", f"{name} is not a JSON object", field)
    return value


def parse_fields(texts: Mapping[str, list[str]]) -> dict[str, Any]:
    """Fields of a `Request` that came as text parts of a form: text stays text, the rest is read as JSON.

    `name[]` and repeated parts are lists. Names that no request has are left for `Request` to refuse.
    """
    fields: dict[str, Any] = {}
    for given, values in texts.items():
        name = given.removesuffix("[]")
        schema = _FIELDS.get(name, {})
        kinds = schema.get("type", [])
        if given != name or len(values) > 1:
            fields[name] = [*fields.get(name, []), *values]
        elif "string" in kinds:
            fields[name] = values[0]
        else:
            fields[name] = _read_value(values[0])
    return fields


def _read_value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False}.get(text, text)


def check_picture(data: bytes, name: str, settings: Settings) -> tuple[int, int]:
    """(height, width) of a picture by its header. Raises Refusal for what is no picture, and for too many pixels."""
    if not data:
        raise invalid(name, "is empty: give a picture")
    height, width = read_size(data, name=name)
    if height * width > settings.pixels:
        raise Refusal(
            "too_large", f"{name} has {width}x{height} pixels, and {settings.pixels} are the most here: scale it", name
        )
    return height, width


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."
