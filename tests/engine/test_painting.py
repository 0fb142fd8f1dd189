"""What is told of a picture that could not be painted."""

from __future__ import annotations

import pytest

from dreammix_trt.core.networks import KINDS
from dreammix_trt.engine.painting import describe_overflow

SCALE, GUIDANCE, VAE, BFLOAT16 = "the subject's scale", "guidance_scale", "`--vae`", "--unet-precision bfloat16"
ASUKA, TOKENS = "`--asuka`", "`--tokens`"


@pytest.mark.parametrize("name", [kind.name for kind in KINDS])
def test_an_overflow_is_told_with_what_helps_against_it(name: str) -> None:
    """Guidance comes after the text and its keys and values, and these are float16 whatever the UNet computes in."""
    wanted = {
        "prompt": {SCALE},
        "stage": {SCALE},
        "step": {SCALE, GUIDANCE, BFLOAT16},
        "vae": {SCALE, GUIDANCE, VAE},
        "frame": {SCALE, GUIDANCE},
        "subject": {TOKENS},
        "asuka_prior": {ASUKA},
        "asuka_decoder": {SCALE, GUIDANCE, ASUKA},
    }
    call = next(kind.call for kind in KINDS if kind.name == name)
    told = describe_overflow(name, "in float16")
    assert told.startswith(f"{name} gave values that are not numbers in float16: ")
    assert {each for each in (SCALE, GUIDANCE, VAE, BFLOAT16, ASUKA, TOKENS) if each in told} == wanted.get(
        name, wanted[call]
    )
