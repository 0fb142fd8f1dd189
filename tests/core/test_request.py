"""A request is checked when it is made, and survives JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import reduce
from operator import or_
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.request import LCM_STEPS, SCHEMA, Request, RequestFields, Sampler, TasStage, draw_seed

share = st.floats(0, 1)
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=30)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "prompt": text,
    "negative_prompt": st.none() | text,
    "subject": st.none() | text,
    "subject_scale": st.floats(0, 2),
    "token_subject": st.none() | text,
    "token_count": st.integers(1, 48),
    "token_weight": st.floats(0, 2),
    "substitute": st.just("auto") | st.lists(text, max_size=3),
    "substitute_prefix": st.none() | text,
    "sampler": st.sampled_from(get_args(Sampler)),
    "num_inference_steps": st.integers(20, 1000),
    "guidance_scale": st.floats(0, 100),
    "seed": st.none() | st.integers(0, 2**64 - 2000),
    "num_images_per_prompt": st.integers(1, 1024),
    "strength": st.floats(0.05, 1),
    "mode": st.sampled_from(["native", "reference"]),
    "lcg_steps": st.none() | st.integers(0, 20),
    "lcg_fraction": share,
    "lcg_field": share,
    "gch_field": share,
    "lcg_mask_dilate": st.integers(0, 4096),
    "gch_background": st.sampled_from(["original", "intermediate"]),
    "patched_fraction": share,
    "sharpness": st.floats(0, 100),
    "size_guidance_positive": st.floats(0.1, 10),
    "size_guidance_negative": st.floats(0.1, 10),
    "size_guidance_end": share,
    "guidance_rescale": share,
    "blend_noise": st.sampled_from(["fresh", "fixed"]),
    "blend_output": st.booleans(),
    "soft_blending": st.booleans(),
    "decoder": st.sampled_from(["vae", "asuka"]),
    "prior": st.none()
    | st.just("concat"),  # the others take guidance, or its absence: tests/engine/test_asuka_requests.py
    "prior_weight": st.floats(0, 2, exclude_min=True),
    "tas_stages": st.lists(st.sampled_from(get_args(TasStage)), unique=True),
    "tas_indexing": st.none() | st.sampled_from(["bpe", "words"]),
    "vae_sample": st.none() | st.booleans(),
    "truncate_prompt": st.booleans(),
    "prompt_weights": st.none() | st.booleans(),
    "feather": st.none() | st.integers(0, 4096),
}


@given(st.fixed_dictionaries({"prompt": text}, optional={name: FIELDS[name] for name in FIELDS if name != "prompt"}))
def test_json_gives_the_same_request_back(fields: dict[str, Any]) -> None:
    if fields.get("sampler") == "lcm":
        fields["num_inference_steps"] = min(fields.get("num_inference_steps", 30), LCM_STEPS)
    request = Request(**fields)
    again = Request.from_json(request.to_json())
    assert again == request
    assert hash(again) == hash(request)
    assert again.to_json() == request.to_json()
    assert json.loads(request.to_json(indent=2))["schema"] == SCHEMA


def test_every_field_is_drawn_above() -> None:
    assert set(FIELDS) == {field.name for field in dataclasses.fields(Request)} - {"reference_resize"}


def test_a_stretched_size_survives_json() -> None:
    request = Request("x", mode="reference", reference_resize=(768, 512))
    assert Request.from_json(request.to_json()).reference_resize == (768, 512)


REFUSED = [
    ("prompt", None, "text"),
    ("prompt", "a\x00b", "text"),
    ("prompt", "\ud800", "text"),
    ("negative_prompt", 3, "text"),
    ("substitute", "clay", "list of words, or 'auto'"),
    ("substitute", b"auto", "list of words, or 'auto'"),
    ("sampler", "ddim", "'dpmpp_2m_sde' or 'euler' or 'lcm'"),
    ("sampler", None, "'dpmpp_2m_sde' or 'euler' or 'lcm'"),
    ("num_inference_steps", 0, "1 to 1000"),
    ("num_inference_steps", 1001, "1 to 1000"),
    ("num_inference_steps", 30.0, "whole number"),
    ("num_inference_steps", True, "whole number"),
    ("guidance_scale", math.nan, "0 to 100"),
    ("guidance_scale", math.inf, "0 to 100"),
    ("guidance_scale", "4", "number"),
    ("guidance_scale", -0.1, "0 to 100"),
    ("seed", -1, "whole number from 0"),
    ("seed", 2**64, "whole number from 0"),
    ("num_images_per_prompt", 0, "1 to 1024"),
    ("strength", 0, "above 0"),
    ("strength", 1.01, "1"),
    ("mode", "fast", "'native' or 'reference'"),
    ("lcg_steps", -1, "0 to 1000"),
    ("lcg_fraction", 1.5, "0 to 1"),
    ("gch_background", "black", "'original' or 'intermediate'"),
    ("patched_fraction", -0.5, "0 to 1"),
    ("size_guidance_positive", 0, "0.1 to 10"),
    ("guidance_rescale", 2, "0 to 1"),
    ("blend_noise", 1, "'fresh' or 'fixed'"),
    ("blend_output", 1, "true or false"),
    ("tas_stages", ["tokens"], "'tokens_lcg'"),
    ("tas_indexing", "letters", "'bpe' or 'words'"),
    ("vae_sample", "yes", "true or false"),
    ("prompt_weights", 1, "true or false"),
    ("feather", -1, "0 to 4096"),
    ("feather", 1.5, "whole number"),
    ("reference_resize", (1024,), "(height, width)"),
    ("reference_resize", (10, 1024), "64 to 8192"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), REFUSED, ids=lambda v: repr(v)[:24])
def test_a_refusal_names_field_value_and_what_is_allowed(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(InputError) as caught:
        Request(**{"prompt": "a mug", name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} is ")
    assert allowed in message
    faulty = value[0] if name == "tas_stages" or value == (10, 1024) else value
    assert repr(faulty) in message


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_inference_steps": 5, "lcg_steps": 6}, "lcg_steps is 6"),
        ({"num_inference_steps": 5, "strength": 0.1}, "strength is 0.1"),
        (
            {"num_inference_steps": 51, "sampler": "lcm"},
            "num_inference_steps is 51: sampler 'lcm' has at most 50 steps",
        ),
        ({"seed": 2**64 - 1, "num_images_per_prompt": 2}, "seed is 18446744073709551615"),
        ({"reference_resize": (512, 512)}, "reference_resize"),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Request("a mug", **fields)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not valid JSON"),
        ("[]", "schema number"),
        ('{"prompt": "x"}', "schema number"),
        ('{"schema": 99, "prompt": "x"}', "schema 99"),
        ('{"schema": 0, "prompt": "x"}', "schema 0"),
        ('{"schema": 1}', "prompt"),
        ('{"schema": 1, "prompt": "x", "steps": 3}', "no field steps"),
        ('{"schema": 1, "prompt": "x", "guidance_scale": NaN}', "guidance_scale is nan"),
        ('{"schema": 1, "prompt": "x", "seed": 1.5}', "seed is 1.5"),
        ('{"schema": 1, "prompt": "x", "seed": "null"}', "seed is 'null'"),
    ],
)
def test_json_that_is_no_request(text: str, named: str) -> None:
    with pytest.raises(InputError, match=named):
        Request.from_json(text)


def test_a_seed_that_is_to_be_drawn() -> None:
    request = Request.from_json('{"schema": 1, "prompt": "x", "seed": null, "num_images_per_prompt": 1024}')
    assert request.seed is None and Request.from_json(request.to_json()) == request == request.replace(seed=None)
    drawn = {draw_seed() for _ in range(99)}
    assert len(drawn) > 90 and all(0 <= seed < 2**32 for seed in drawn)


def test_a_request_of_schema_1_took_its_prompt_literally() -> None:
    old = Request.from_json('{"schema": 1, "prompt": "a (red:1.3) mug"}')
    assert (old.prompt_weights, old.weighs_prompts, old.feather) == (False, False, None)
    assert Request.from_json('{"schema": 1, "prompt": "x", "prompt_weights": true}').weighs_prompts
    assert Request.from_json('{"schema": 2, "prompt": "x"}').prompt_weights is None
    assert Request.from_json(old.to_json()) == old


def test_replace_changes_and_checks() -> None:
    request = Request("a mug").replace(seed=7, substitute=["blue"])
    assert (request.seed, request.substitute, request.prompt) == (7, ("blue",), "a mug")
    with pytest.raises(InputError, match="no field sed"):
        request.replace(sed=1)
    with pytest.raises(InputError, match="seed is -1"):
        request.replace(seed=-1)


def test_numpy_numbers_become_plain_ones() -> None:
    request = Request("x", seed=np.int64(5), guidance_scale=np.float32(2))  # type: ignore[arg-type]
    assert type(request.seed) is int
    assert type(request.guidance_scale) is float
    assert Request.from_json(request.to_json()) == request


def test_what_the_mode_decides() -> None:
    native, reference = Request("x"), Request("x", mode="reference")
    assert (native.indexing, native.samples_vae) == ("bpe", False)
    assert (reference.indexing, reference.samples_vae) == ("words", True)
    assert (native.weighs_prompts, reference.weighs_prompts) == (True, False)
    assert Request("x", mode="reference", tas_indexing="bpe", vae_sample=False).indexing == "bpe"
    assert Request("x", mode="reference", prompt_weights=True).weighs_prompts


@pytest.mark.parametrize(
    ("fields", "steps", "local"),
    [
        ({}, 30, 20),
        ({"num_inference_steps": 20}, 20, 13),
        ({"strength": 0.5}, 15, 10),
        ({"num_inference_steps": 50, "strength": 0.9999}, 49, 33),
        ({"lcg_steps": 0}, 30, 0),
        ({"lcg_steps": 30, "strength": 0.5}, 15, 15),
        ({"lcg_fraction": 1}, 30, 30),
        ({"sampler": "lcm", "num_inference_steps": 100, "strength": 0.5}, 50, 33),
    ],
)
def test_counts_of_steps(fields: dict[str, Any], steps: int, local: int) -> None:
    request = Request("x", **fields)
    assert (request.steps, request.local_steps) == (steps, local)


@pytest.mark.parametrize("steps", range(1, 9))
def test_few_steps_are_shared_by_both_stages(steps: int) -> None:
    shared = [1, 1, 2, 3, 3, 4, 5, 5][steps - 1]  # of the default two thirds
    assert Request("x", num_inference_steps=steps).local_steps == shared
    for fraction in (1e-6, 0.02, 0.5, 0.98, 1 - 1e-6):
        local = Request("x", num_inference_steps=steps, lcg_fraction=fraction).local_steps
        assert (1 <= local < steps) if steps > 1 else local in (0, 1)
    assert Request("x", num_inference_steps=steps, lcg_fraction=0).local_steps == 0
    assert Request("x", num_inference_steps=steps, lcg_fraction=1).local_steps == steps


def test_request_fields_are_those_of_a_request() -> None:
    """RequestFields repeats the fields of Request for editors and type checkers."""

    def accepted(kind: Any) -> Any:
        if get_origin(kind) in (Union, UnionType):
            return reduce(or_, map(accepted, get_args(kind)))
        several = get_origin(kind) is tuple and get_args(kind)[1:] == (...,)
        return list[get_args(kind)[0]] | kind if several else kind  # type: ignore[misc]

    expected = {name: accepted(kind) for name, kind in get_type_hints(Request).items() if name != "prompt"}
    assert list(get_type_hints(RequestFields).items()) == list(expected.items())
    assert RequestFields.__total__ is False
    assert set(expected) == {field.name for field in dataclasses.fields(Request)} - {"prompt"}


@pytest.mark.parametrize("several", [list, tuple])
def test_what_request_fields_allow_a_request_takes(several: type) -> None:
    fields: RequestFields = {"substitute": several(["blue"]), "tas_stages": several(["pooled_lcg"])}
    request = Request.of(prompt="x", **fields)
    assert (request.substitute, request.tas_stages) == (("blue",), ("pooled_lcg",))


def test_a_misspelt_field_is_guessed() -> None:
    with pytest.raises(InputError, match=r"no field lcg_fracton \(is lcg_fraction meant\?\); its fields are prompt, "):
        Request.of(prompt="x", lcg_fracton=0.5)
