"""Presets: steps that suit a base."""

from __future__ import annotations

import json
from hashlib import sha256

import pytest

from dreammix_trt.core.checkpoint import EMBEDDED_LCM, BaseFiles
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.presets import FEW_STEP, GUIDED, choose_fields
from dreammix_trt.core.request import LCM_STEPS, Request
from dreammix_trt.core.tensors import open_tensors

FEW_STEP_BASE = {"sampler": "lcm", "num_inference_steps": 8, "guidance_scale": 1.0}


@pytest.mark.parametrize("defaults", [{}, FEW_STEP_BASE], ids=["guided", "few-step"])
def test_presets_are_requests_and_take_more_steps_in_order(defaults: dict[str, object]) -> None:
    steps = [Request.of(prompt="a mug", **{**defaults, **choose_fields(name, defaults)}).steps for name in GUIDED]
    assert list(GUIDED) == list(FEW_STEP) == ["fast", "balanced", "best"]
    assert steps == sorted(set(steps))


def test_a_few_step_base_takes_few_steps_and_never_the_raw_unet() -> None:
    for name in FEW_STEP:
        fields = choose_fields(name, FEW_STEP_BASE)
        assert fields["num_inference_steps"] <= 8 < LCM_STEPS and fields["patched_fraction"] == 1
        assert "patched_fraction" not in choose_fields(name, {})


def test_a_guided_base_on_eulers_steps_is_no_few_step_base() -> None:
    guided = {"sampler": "euler", "guidance_scale": 5.0, "num_inference_steps": 40}
    assert choose_fields("fast", guided) == choose_fields("fast", {}) == {"num_inference_steps": GUIDED["fast"]}


def test_another_word_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="preset is 'quick'; choose one of fast, balanced, best"):
        choose_fields("quick", {})


def test_the_shipped_few_step_lora_belongs_to_the_shipped_base() -> None:
    """New weights of the base want a new distillation."""
    metadata = open_tensors(EMBEDDED_LCM).metadata
    card = json.loads(EMBEDDED_LCM.with_suffix(".json").read_text())
    assert json.loads(metadata["base_hashes"]) == BaseFiles.open().hash_contents()
    assert card["sha256"] == sha256(EMBEDDED_LCM.read_bytes()).hexdigest()
    assert EMBEDDED_LCM.stat().st_size <= 1_000_000
