"""What is seen of a subject, in words: the attribute dictionary (paper, section 3.3) and the captions made of it.

A file `attributes.json` holds {"schema": 1, "class_name": "mug", "source": "hand", "attributes": {"colour": ["blue"],
"part": ["cream foot"]}, "contrasts": {"colour": ["red", "green"]}}. People write such files by hand, so every fault is
named with its field; class_name and attributes are all that is needed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.files import read_json, write_json

SCHEMA: Final = 1
FILE_NAME: Final = "attributes.json"
BEFORE: Final = ("size", "finish", "colour", "pattern", "texture", "material", "shape")  # "a shiny blue clay mug"
BEHIND: Final = ("part", "decal", "accessory")  # "a mug with a cream foot"
KINDS: Final = (*BEFORE, *BEHIND)
MOST_WORDS: Final = 8  # of one attribute
MOST_VALUES: Final = 16  # of one kind
_VALUE = re.compile(r"[^\W_](?:[^\W_]|[ '\-])*")


@dataclass(frozen=True)
class AttributeDictionary:
    """The attributes of a subject by kind, in the words of a caption.

    class_name: what the subject is ("mug").
    attributes: kind, of KINDS -> values, lower case and without article: "blue", "cream foot".
    source: who said so: "hand", "judge", the name of a model.
    contrasts: kind -> words that other things of the class may have, for regular pictures; a kind that is not there has
        the usual ones of `core.vocabulary`.
    """

    class_name: str
    attributes: Mapping[str, tuple[str, ...]]
    source: str = "hand"
    contrasts: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(
        cls,
        class_name: str,
        attributes: Mapping[str, Any],
        source: str,
        where: str,
        contrasts: Mapping[str, Any] | None = None,
    ) -> AttributeDictionary:
        """Checked and tidied: spaces, capitals, articles and what is said twice are gone; kinds are in their order.

        where: names the origin in errors.
        Raises InputError for an empty class, an unknown kind and a value that is no short phrase.
        """
        if not isinstance(class_name, str) or not class_name.strip():
            raise InputError(f"{where}: class_name is {class_name!r}; say what the subject is, for example: mug")
        found = _tidy_kinds(attributes, f"{where}: attributes")
        return cls(class_name.strip(), found, source, _tidy_kinds(contrasts or {}, f"{where}: contrasts"))

    @classmethod
    def read(cls, file: str | Path) -> AttributeDictionary:
        """Read `attributes.json`. Raises InputError that names the file and the field."""
        record = read_json(Path(file))
        if record.get("schema", SCHEMA) != SCHEMA:
            raise InputError(f"{file} has schema {record['schema']!r}, this version reads {SCHEMA}")
        source = record.get("source", "hand")
        if not isinstance(source, str):
            raise InputError(f"{file}: source is {source!r}; it must be a text")
        contrasts = record.get("contrasts", {})
        return cls.of(record.get("class_name", ""), record.get("attributes", {}), source, str(file), contrasts)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as the file has them."""
        record: dict[str, Any] = {"schema": SCHEMA, "class_name": self.class_name, "source": self.source}
        record["attributes"] = {kind: list(values) for kind, values in self.attributes.items()}
        if self.contrasts:
            record["contrasts"] = {kind: list(values) for kind, values in self.contrasts.items()}
        return record

    def write(self, file: str | Path) -> None:
        """Write `attributes.json`, whole or not at all."""
        write_json(Path(file), self.to_dict())

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(kind, value) of every attribute, in the order of a caption."""
        return tuple((kind, value) for kind, values in self.attributes.items() for value in values)


def compose_phrase(class_name: str, pairs: Collection[tuple[str, str]], token: str = "") -> str:
    """The phrase "[token] [attributes] [class] with [attributes]", without a leading article (paper, section 3.3).

    pairs: (kind, value), in any order; token: "" for a generic member of the class.
    """
    before = [value for kind in BEFORE for each, value in pairs if each == kind]
    behind = [with_article(value) for kind in BEHIND for each, value in pairs if each == kind]
    phrase = " ".join(word for word in (token, *before, class_name) if word)
    if not behind:
        return phrase
    listed = behind[0] if len(behind) == 1 else f"{', '.join(behind[:-1])} and {behind[-1]}"
    return f"{phrase} with {listed}"


def with_article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"


def _tidy_kinds(attributes: object, where: str) -> Mapping[str, tuple[str, ...]]:
    if not isinstance(attributes, Mapping):
        raise InputError(f"{where} is {attributes!r}; it must be an object: kind -> list of words")
    unknown = [kind for kind in attributes if kind not in KINDS]
    if unknown:
        raise InputError(f"{where}.{unknown[0]}: no such kind; choose of {', '.join(KINDS)}")
    found = {kind: _tidy(attributes[kind], f"{where}.{kind}") for kind in KINDS if kind in attributes}
    return MappingProxyType({kind: each for kind, each in found.items() if each})


def _tidy(values: object, where: str) -> tuple[str, ...]:
    if isinstance(values, str):
        values = [values]
    if not isinstance(values, (list, tuple)):
        raise InputError(f"{where} is {values!r}; it must be a list of words")
    if len(values) > MOST_VALUES:
        raise InputError(f"{where} has {len(values)} values; at most {MOST_VALUES} fit")
    return tuple(dict.fromkeys(_tidy_value(value, where) for value in values))


def _tidy_value(value: object, where: str) -> str:
    text = " ".join(value.lower().split()) if isinstance(value, str) else ""
    text = re.sub(r"^(?:an?|the) ", "", text)
    if not _VALUE.fullmatch(text) or len(text.split()) > MOST_WORDS:
        raise InputError(
            f"{where} holds {value!r}; it must be one to {MOST_WORDS} plain words, for example: cream foot"
        )
    return text
