"""How the site reads our docstrings: a parameter is a line `name: what it is`, and becomes an item of a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ITEM = re.compile(r"(?P<names>\w+(?:, \w+)*): (?P<text>\S.*)", re.DOTALL)


class Lines(griffe.Extension):
    """Turns the lines of every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once an object is known."""
        if obj.docstring is not None:
            obj.docstring.value = as_lists(obj.docstring.value)


def as_lists(text: str) -> str:
    """Paragraphs of lines `name: text`, with indented lines that go on, as lists; all else as it is."""
    return "\n\n".join(_as_list(paragraph) for paragraph in re.split(r"\n\s*\n", text))


def _as_list(paragraph: str) -> str:
    entries = re.split(r"\n(?=\S)", paragraph)
    found = [_ITEM.fullmatch(entry) for entry in entries]
    if not all(found):
        return paragraph
    return "\n".join(f"- `{each['names']}`: {' '.join(each['text'].split())}" for each in found if each)
