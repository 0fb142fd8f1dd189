"""Whether a thing stands in a hole that is to be empty, in the embedded model's world.

The judge has no word for nothing: of an empty room it says "unclear", as it does of a smeared thing. But here the empty
room is known, to the pixel. So a thing is seen where a large part of the hole is far from it: farther than colour drift
and wrong texture bring it. Both bounds were searched on renderings, and how often they are right was measured on others
(`benchmarks/object_seen.py`).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.evaluation.metrics.metric import U8, Mask, Metric, Sample
from dreammix_trt.evaluation.metrics.truth import sum_boxes

FAR: Final = 50.0  # levels, length in RGB
SHARE: Final = 0.22  # of the hole that may be farther
_SOFT: Final = 64  # colours are averaged over squares of this part of the short side


class ObjectSeen(Metric):
    """1 where a thing is seen in the hole of a room that is to be empty, else 0."""

    name, better = "object_seen", "lower"
    about = f"share of holes in which a thing is seen: more than {SHARE:.0%} is {FAR:g} levels from the empty room"

    def add(self, sample: Sample) -> float | None:
        if sample.truth is None:
            return None
        distances = measure_distances(sample.image, sample.truth, sample.mask)
        return float((distances > FAR).mean() > SHARE)


def measure_distances(picture: U8, empty: U8, mask: Mask) -> NDArray[np.float32]:
    """How far each pixel of a hole is from the empty room, length in RGB, float32 (N,); texture is averaged away.

    picture, empty: uint8 (H, W, 3). mask: bool (H, W), True somewhere.
    """
    reach = max(1, min(mask.shape) // _SOFT)
    counts = sum_boxes(np.ones(mask.shape), reach)[..., None]
    drift = sum_boxes(picture.astype(np.float64) - empty, reach) / counts
    return np.asarray(np.linalg.norm(drift[mask], axis=1), np.float32)
