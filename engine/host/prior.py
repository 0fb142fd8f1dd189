"""ASUKA's prior in the condition of a stage (docs/algorithm.md, 16)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.request import Request
from dreammix_trt.engine.host.denoiser import Conditioning

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PriorRows:
    """What `asuka_prior` says of one frame: context (1, T, D) and pooled (1, Dp)."""

    context: F32
    pooled: F32


def add_prior(conditioning: Conditioning, request: Request, rows: PriorRows, appended: int = 0) -> Conditioning:
    """The condition of one picture with the prior in it, as the request's `prior` says.

    appended: how many rows of the condition, the last ones, are a subject's tokens: they stay where the text goes.

    The empty condition is zeros, so a weight w gives c_empty + w (c - c_empty) = w c.
    """
    weight = np.float32(request.prior_weight)
    context, pooled = weight * rows.context, weight * rows.pooled
    if request.prior == "concat":
        count = len(conditioning.text)
        return replace(conditioning, text=np.concatenate([conditioning.text, np.repeat(context, count, 0)], axis=1))
    tokens = conditioning.text[:1, conditioning.text.shape[1] - appended :]
    alone = replace(conditioning, text=np.concatenate([context, tokens], axis=1), pooled=pooled)
    if request.prior == "alone":
        return alone
    positive = replace(conditioning, text=conditioning.text[1:], pooled=conditioning.pooled[1:])
    return replace(positive, negative=replace(alone, is_negative=True))
