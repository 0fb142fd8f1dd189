"""A subject's attributes from a vision-language model behind an OpenAI-compatible endpoint (paper, section 3.3)."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from PIL import Image

from dreammix_trt.core.attributes import BEFORE, KINDS, AttributeDictionary
from dreammix_trt.core.chat import Answer, Chat
from dreammix_trt.core.errors import EndpointError, InputError
from dreammix_trt.core.vocabulary import USUAL
from dreammix_trt.trainer.attributes.describing import cut_out
from dreammix_trt.trainer.data import Photograph, Picture

_LONGEST: Final = 8000  # characters of an answer
_SHOWN: Final = 60  # of an answer in an error
_MOST_VALUES: Final = 4  # asked for, of a kind
_HINTS: Final = {
    "part": "parts that stand out, each with its colour or material, as in: cream foot",
    "decal": "what is painted or printed on it, as in: orange star",
    "accessory": "what it wears or holds, as in: red scarf",
}

SCHEMA: Final[Mapping[str, Any]] = {
    "type": "object",
    "properties": {kind: {"type": "array", "items": {"type": "string"}} for kind in KINDS},
    "required": list(KINDS),
    "additionalProperties": False,
}


class EndpointDescriber:
    """Asks a model to look at the photographs.

    chat: where it is asked; its `tokens` say what that cost.
    side: pixels of the pictures' longer side, at most.
    """

    def __init__(self, chat: Chat, side: int = 768) -> None:
        self.chat, self._side = chat, side

    def describe(self, pictures: Sequence[Photograph], class_name: str) -> AttributeDictionary:
        """The model's answer, checked. One that cannot be used is sent back once, with what is wrong with it.

        pictures: with a mask, the model sees the subject alone on grey.

        Raises EndpointError when the second answer cannot be used either, and as `Chat.ask` does.
        """
        shown = [_show(picture, self._side) for picture in pictures]
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "text", "text": _question(class_name)}, *shown]}
        ]
        answer = self._ask(messages)
        try:
            return self._read(answer, class_name)
        except InputError as fault:
            messages += [
                {"role": "assistant", "content": answer.text[:_LONGEST] or "(nothing)"},
                {"role": "user", "content": f"That cannot be used: {fault}. Answer again, with the JSON object alone."},
            ]
        try:
            return self._read(self._ask(messages), class_name)
        except InputError as fault:
            raise EndpointError(
                f"{self.chat.url}: {self.chat.model} answered twice what cannot be used: {fault}; try another model, "
                "or write the file by hand"
            ) from fault

    def _ask(self, messages: Sequence[Mapping[str, Any]]) -> Answer:
        return self.chat.ask(messages, "attributes", SCHEMA)

    def _read(self, answer: Answer, class_name: str) -> AttributeDictionary:
        """The dictionary in an answer. Raises InputError, in words that a model can follow."""
        record = _read_json(answer)
        found = AttributeDictionary.of(class_name, record, self.chat.model, "your answer")
        if not found.attributes:
            raise InputError("your answer names no attribute of the object at all")
        return found


def _question(class_name: str) -> str:
    kinds = [f"- {kind}: such as {', '.join(USUAL[kind][:6])}" for kind in BEFORE]
    kinds += [f"- {kind}: {hint}" for kind, hint in _HINTS.items()]
    return (
        f"The pictures show one and the same {class_name}. Name its attributes, as words for a caption of it.\n"
        "Answer with one JSON object and nothing else: for each kind a list of at most "
        f"{_MOST_VALUES} texts of one to four plain words in lower case, without article; an empty list where the "
        f"kind does not apply. Name only what the pictures show of the {class_name} itself, nothing of what is around "
        "it, and nothing twice. Kinds:\n" + "\n".join(kinds)
    )


def _show(photograph: Photograph, side: int) -> dict[str, Any]:
    """A photograph as the API takes it: a JPEG in a data URL. None of the file's EXIF goes with it."""
    picture: Picture = cut_out(photograph)
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=90, subsampling=0)  # colours are what it is about
    url = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": url}}


def _read_json(answer: Answer) -> dict[str, Any]:
    """The object in an answer; a fence of Markdown around all of it is no fault."""
    text = answer.text.strip()
    if answer.cut_off:
        raise InputError("your answer was cut off before its end; name fewer attributes")
    if not text:
        raise InputError("your answer is empty")
    if len(text) > _LONGEST:
        raise InputError(f"your answer has {len(text)} characters; at most {_LONGEST} are taken: name fewer attributes")
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?\s*```", text, re.DOTALL)
    try:
        record = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        start = " ".join(text.split())[:_SHOWN]
        raise InputError(f"your answer is no JSON object alone, it begins {start!r}") from None
    if not isinstance(record, dict):
        raise InputError(f"your answer is a JSON {type(record).__name__}, not an object: kind -> list of words")
    return record
