"""A request as JSON Schema, made of the checks, defaults and docstring of `Request`: nothing of it is said twice."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from typing import Any

from dreammix_trt.core.request import CHECKS, Request


def describe_request() -> dict[str, Any]:
    """What a request's fields may be, as JSON Schema (draft 2020-12), in their order.

    Each property has type, bounds or enum, `default` where there is one, and `description`. Rules that tie fields
    together are not in it: `Request` checks them.
    """
    said = _read_descriptions(inspect.getdoc(Request) or "")
    properties: dict[str, Any] = {}
    for each in dataclasses.fields(Request):
        properties[each.name] = {**CHECKS[each.name].schema, "description": said[each.name]}
        if each.default is not dataclasses.MISSING:
            properties[each.name]["default"] = json.loads(json.dumps(each.default))  # tuples become lists
    return {"type": "object", "properties": properties, "required": ["prompt"], "additionalProperties": False}


def _read_descriptions(text: str) -> dict[str, str]:
    """name -> what a docstring says of it, in one line. A line `a, b: ...` speaks of both; indented ones go on."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in text.splitlines():
        begun = re.match(r"([a-z]\w*(?:, [a-z]\w*)*): (.*)", line)
        if begun:
            names = begun[1].split(", ")
            found |= dict.fromkeys(names, begun[2])
        elif line.startswith(" ") and names:
            found |= dict.fromkeys(names, f"{found[names[0]]} {line.strip()}")
    return found
