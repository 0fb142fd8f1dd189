"""What a set of readings is worth: shares of right parts, each with how often it was asked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dreammix_trt.trainer.micro.judge import HEADS, Reading

PARTS = ("foot", "band", "top", "decal", "decal_colour")  # may be absent


def is_right(reading: Reading, wanted: Reading, part: str) -> bool:
    return reading[part] == wanted[part]


def score(readings: Sequence[Reading], wanted: Sequence[Reading]) -> dict[str, float]:
    """Share of right words a head, over the scenes where the part is there; "all": everything named right together.

    Also "scenes", their number. A part that no scene has is left out of the result.
    """
    shares: dict[str, float] = {}
    everything = np.ones(len(wanted), bool)
    for part in HEADS:
        asked = np.array([part not in PARTS or want[part] != "none" for want in wanted])
        hits = np.array([is_right(r, w, part) for r, w in zip(readings, wanted, strict=True)])
        everything &= hits | ~asked
        if asked.any():
            shares[part] = float(hits[asked].mean())
    return shares | {"all": float(everything.mean()), "scenes": float(len(wanted))}
