"""The request that takes something out: ASUKA's prior in place of a prompt, its decoder, no guidance, no subject."""

from __future__ import annotations

from typing import Final

from dreammix_trt.core.request import RequestFields

REMOVAL: Final[RequestFields] = {
    "prior": "alone",
    "prior_weight": 1.5,  # the paper has 1; less is seen in holes with this (docs/evidence.md)
    "decoder": "asuka",
    "guidance_scale": 1.0,
    "subject": "",
    "patched_fraction": 1.0,  # the alignment learnt on the patched UNet alone
}
