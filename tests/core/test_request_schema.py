"""The schema of a request against the checks themselves, which are the oracle."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.request import Request
from dreammix_trt.core.request_schema import describe_request

SCHEMA = describe_request()
FIELDS = SCHEMA["properties"]


def takes(name: str, value: Any) -> bool:
    """Whether a request takes a value; rules that tie fields together are kept out of the way."""
    around: dict[str, Any] = {"prompt": "a"}
    around |= {"reference_resize": {"mode": "reference"}, "lcg_steps": {"num_inference_steps": 1000}}.get(name, {})
    around |= {"strength": {"num_inference_steps": 1000}, "num_images_per_prompt": {"seed": 0}}.get(name, {})
    if name == "prior":
        around["guidance_scale"] = 1 if value == "alone" else 4
    try:
        Request.of(**{**around, name: value})
    except InputError:
        return False
    return True


def test_it_has_every_field_in_order_with_its_default_and_what_it_means() -> None:
    fields = dataclasses.fields(Request)
    assert list(FIELDS) == [each.name for each in fields]
    assert SCHEMA["required"] == ["prompt"]
    for each in fields[1:]:
        default = list(each.default) if isinstance(each.default, tuple) else each.default
        assert FIELDS[each.name]["default"] == default
    assert FIELDS["gch_field"]["description"] == FIELDS["lcg_field"]["description"]
    assert FIELDS["seed"]["description"].endswith("which the result's request has.")
    assert all(each["description"].endswith(".") for each in FIELDS.values())
    json.dumps(SCHEMA)


@pytest.mark.parametrize("name", FIELDS)
def test_bounds_and_choices_are_those_of_the_checks(name: str) -> None:
    schema = FIELDS[name]
    kinds = schema["type"] if isinstance(schema.get("type"), list) else [schema.get("type")]
    assert takes(name, None) == ("null" in kinds)
    for choice in schema.get("enum", ()):
        assert takes(name, choice)
    if "enum" in schema:
        assert not takes(name, "another")
    for bound, side in (("minimum", -1), ("maximum", 1)):
        if bound in schema and name != "seed":
            assert takes(name, schema[bound]) and not takes(name, schema[bound] + side)
    if "exclusiveMinimum" in schema:
        assert not takes(name, schema["exclusiveMinimum"]) and takes(name, schema["maximum"])
    if "boolean" in kinds:
        assert takes(name, True) and not takes(name, 1)
    if "string" in kinds and "enum" not in schema:
        assert takes(name, "words") and not takes(name, "\0") and not takes(name, 3)


def test_values_of_several_parts() -> None:
    assert FIELDS["seed"]["maximum"] == 2**64 - 1 and takes("seed", 2**64 - 2) and not takes("seed", 2**64)
    words, auto = FIELDS["substitute"]["anyOf"]
    assert words["type"] == "array" and auto["enum"] == ["auto"]
    assert takes("substitute", ["a"]) and takes("substitute", "auto") and not takes("substitute", "other")
    side = FIELDS["reference_resize"]["items"]
    assert takes("reference_resize", [side["minimum"], side["maximum"]])
    assert not takes("reference_resize", [side["minimum"] - 1, 64]) and not takes("reference_resize", [64])
    assert FIELDS["reference_resize"]["minItems"] == FIELDS["reference_resize"]["maxItems"] == 2
    assert set(FIELDS["tas_stages"]["items"]["enum"]) == {"tokens_lcg", "tokens_gch", "pooled_lcg", "pooled_gch"}


def make_values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a field's schema allows."""
    if "anyOf" in schema:
        return st.one_of(*(make_values(each) for each in schema["anyOf"]))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    least, most = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    made = {
        "null": lambda: st.none(),
        "boolean": lambda: st.booleans(),
        "string": lambda: st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30),
        "integer": lambda: st.integers(least, most),
        "number": lambda: st.floats(least, most, exclude_min="exclusiveMinimum" in schema),
        "array": lambda: st.lists(
            make_values(schema["items"]), min_size=schema.get("minItems", 0), max_size=schema.get("maxItems", 3)
        ),
    }
    return st.one_of(*(made[kind]() for kind in kinds))


BETWEEN = ("seed", "strength", "num_inference_steps", "lcg_steps", "guidance_scale", "prior", "reference_resize")


@hypothesis.given(
    st.fixed_dictionaries(
        {"prompt": make_values(FIELDS["prompt"])},
        optional={name: make_values(schema) for name, schema in FIELDS.items() if name != "prompt"},
    )
)
@hypothesis.settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip
def test_what_the_schema_allows_is_refused_for_rules_between_fields_alone(fields: dict[str, Any]) -> None:
    try:
        Request.of(**fields)
    except InputError as error:
        assert str(error).partition(" ")[0] in BETWEEN
