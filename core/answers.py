"""A question whose answer is a JSON object; one that cannot be used is sent back once, with what is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from dreammix_trt.core.chat import Answer, Chat
from dreammix_trt.core.errors import EndpointError, InputError

_LONGEST: Final = 8000  # characters of an answer
_SHOWN: Final = 60  # of an answer in an error
_T = TypeVar("_T")


def ask_for_json(
    chat: Chat,
    content: str | list[dict[str, Any]],
    name: str,
    schema: Mapping[str, Any],
    read: Callable[[dict[str, Any]], _T],
    remedy: str,
) -> _T:
    """What `read` makes of the object that the model answers with.

    content: of the question, as the API takes it.
    name, schema: of the object.
    read: raises InputError for an object that cannot be used, in words that a model can follow.
    remedy: what a person can do about a model that does not answer properly.

    Raises EndpointError when the second answer cannot be used either, and as `Chat.ask` does.
    """
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    answer = chat.ask(messages, name, schema)
    try:
        return read(_read_object(answer))
    except InputError as fault:
        messages += [
            {"role": "assistant", "content": answer.text[:_LONGEST] or "(nothing)"},
            {"role": "user", "content": f"That cannot be used: {fault}. Answer again, with the JSON object alone."},
        ]
    try:
        return read(_read_object(chat.ask(messages, name, schema)))
    except InputError as fault:
        raise EndpointError(
            f"{chat.url}: {chat.model} answered twice what cannot be used: {fault}; try another model, or {remedy}"
        ) from fault


def _read_object(answer: Answer) -> dict[str, Any]:
    """The object in an answer; a fence of Markdown around all of it is no fault."""
    text = answer.text.strip()
    if answer.cut_off:
        raise InputError("your answer was cut off before its end; name less")
    if not text:
        raise InputError("your answer is empty")
    if len(text) > _LONGEST:
        raise InputError(f"your answer has {len(text)} characters; at most {_LONGEST} are taken: name less")
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?\s*```", text, re.DOTALL)
    try:
        record = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        start = " ".join(text.split())[:_SHOWN]
        raise InputError(f"your answer is no JSON object alone, it begins {start!r}") from None
    if not isinstance(record, dict):
        raise InputError(f"your answer is a JSON {type(record).__name__}, not an object")
    return record
