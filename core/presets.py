"""Named trades of speed against quality: how many steps a request takes. Figures: docs/few-steps.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.request import Request

Preset = Literal["fast", "balanced", "best"]
GUIDED: Final[Mapping[str, int]] = {"fast": 12, "balanced": 20, "best": 30}  # two rows of the UNet a step
FEW_STEP: Final[Mapping[str, int]] = {"fast": 4, "balanced": 6, "best": 8}  # one row, on a base that was distilled
_FEW_STEP_SAMPLERS: Final = ("lcm", "euler")


def choose_fields(preset: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request that a preset sets on a base.

    defaults: the base's own fields, or those that count more; a few-step sampler without guidance among them tells
        that it is a few-step base.

    Raises InputError for another word.
    """
    few = defaults.get("sampler") in _FEW_STEP_SAMPLERS and float(defaults.get("guidance_scale", 4)) <= 1
    steps = FEW_STEP if few else GUIDED
    if preset not in steps:
        raise InputError(f"preset is {preset!r}; choose one of {', '.join(steps)}")
    # distilled is the patched UNet; of so few steps the raw one would have one at most, and its weights in memory
    return {"num_inference_steps": steps[preset], **({"patched_fraction": 1.0} if few else {})}


def fill_request(prompt: str, preset: str | None, defaults: Mapping[str, Any], fields: Mapping[str, Any]) -> Request:
    """The request of a prompt: `fields` first, then the preset's, the base's `defaults`, those of `Request`."""
    chosen = choose_fields(preset, {**defaults, **fields}) if preset is not None else {}
    return Request.of(**{**defaults, **chosen, **fields, "prompt": prompt})
