"""Checks of single values, each of which also says what it allows as JSON Schema (draft 2020-12)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from dreammix_trt.core.errors import InputError


@dataclass(frozen=True)
class Check:
    """Call it with a name and a value: it returns the value as it is kept, or raises InputError with what is allowed.

    run: does it.
    schema: what it allows, as JSON Schema.
    """

    run: Callable[[str, Any], Any]
    schema: Mapping[str, Any] = field(repr=False)

    def __call__(self, name: str, value: Any) -> Any:
        """Check the value of a field."""
        return self.run(name, value)


def refuse(name: str, value: Any, allowed: str) -> InputError:
    """The error for a value that is not allowed; it begins with the field's name."""
    return InputError(f"{name} is {value!r}; allowed: {allowed}")


def whole(least: int, most: int) -> Check:
    """A whole number within bounds, which are allowed themselves."""

    def check(name: str, value: Any) -> int:
        allowed = f"a whole number from {least} to {most}"
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise refuse(name, value, allowed)
        try:
            number = value.__index__()
        except TypeError:  # an array of several numbers
            raise refuse(name, value, allowed) from None
        if not least <= number <= most:
            raise refuse(name, value, allowed)
        return int(number)

    return Check(check, {"type": "integer", "minimum": least, "maximum": most})


def number(least: float, most: float, *, above: bool = False) -> Check:
    """A finite number within bounds. above: the lower one is not allowed itself."""

    def check(name: str, value: Any) -> float:
        allowed = f"a number {'above' if above else 'from'} {least:g} {'up ' if above else ''}to {most:g}"
        if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
            raise refuse(name, value, allowed)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):  # an array of several numbers; an integer beyond all floats
            raise refuse(name, value, allowed) from None
        if not math.isfinite(number) or not least <= number <= most or (above and number == least):
            raise refuse(name, value, allowed)
        return number

    return Check(check, {"type": "number", "exclusiveMinimum" if above else "minimum": least, "maximum": most})


def one_of(kind: Any) -> Check:
    """One of the words of a Literal."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value not in get_args(kind):
            raise refuse(name, value, " or ".join(repr(choice) for choice in get_args(kind)))
        return value

    return Check(check, {"type": "string", "enum": list(get_args(kind))})


def or_none(check: Check) -> Check:
    """What another check allows, or None."""
    schema = {**check.schema, "type": [check.schema["type"], "null"]}
    if "enum" in schema:
        schema["enum"] = [*schema["enum"], None]
    return Check(lambda name, value: None if value is None else check(name, value), schema)


def several(check: Check, what: str) -> Check:
    """A list or tuple of values, kept as a tuple. what: their name in messages."""

    def check_items(name: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise refuse(name, value, f"a list of {what}")
        return tuple(check(name, item) for item in value)

    return Check(check_items, {"type": "array", "items": check.schema})


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or "\x00" in value or any(0xD800 <= ord(letter) < 0xE000 for letter in value):
        raise refuse(name, value, "text")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise refuse(name, value, "true or false")
    return value


def _size(name: str, value: Any) -> tuple[int, int]:
    sides = several(_SIDE, "two sides")(name, value)
    if len(sides) != 2:
        raise refuse(name, value, "(height, width)")
    return sides[0], sides[1]


def _words_or_auto(name: str, value: Any) -> Any:
    if isinstance(value, str) and value == "auto":
        return value
    return several(TEXT, "words, or 'auto'")(name, value)


TEXT = Check(_text, {"type": "string", "pattern": r"^[^\u0000]*$"})
FLAG = Check(_flag, {"type": "boolean"})
SHARE = number(0, 1)
_SIDE = whole(64, 8192)
SIZE = Check(_size, {"type": "array", "items": _SIDE.schema, "minItems": 2, "maxItems": 2})
WORDS_OR_AUTO = Check(
    _words_or_auto, {"anyOf": [{"type": "array", "items": TEXT.schema}, {"type": "string", "enum": ["auto"]}]}
)
