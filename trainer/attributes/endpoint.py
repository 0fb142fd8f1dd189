"""A subject's attributes from a vision-language model behind an OpenAI-compatible endpoint (paper, section 3.3)."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

from PIL import Image

from dreammix_trt.core.answers import ask_for_json
from dreammix_trt.core.attributes import BEFORE, KINDS, AttributeDictionary
from dreammix_trt.core.chat import Chat
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.vocabulary import USUAL
from dreammix_trt.trainer.attributes.describing import cut_out
from dreammix_trt.trainer.data import Photograph, Picture

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
        question = [{"type": "text", "text": _question(class_name)}, *shown]

        def read(record: dict[str, Any]) -> AttributeDictionary:
            found = AttributeDictionary.of(class_name, record, self.chat.model, "your answer")
            if not found.attributes:
                raise InputError("your answer names no attribute of the object at all")
            return found

        return ask_for_json(self.chat, question, "attributes", SCHEMA, read, "write the file by hand")


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
