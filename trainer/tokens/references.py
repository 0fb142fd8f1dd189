"""References as people give them: the object of a photograph, a little turned, stretched, and of less detail."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from dreammix_trt.trainer.data import Mask, Photograph, Picture

_TURN = (6.0, 15.0)  # degrees: deviation, and the most
_STRETCH = 0.1  # of the width, as a logarithm
_LEAST_DETAIL = 0.4  # of the reference's side, that the object's longer side keeps in pixels
_WHITE = 255


def vary_reference(rng: np.random.Generator, photograph: Photograph, side: int) -> tuple[Picture, Mask]:
    """The object of a photograph, cut out, as a picture on white and its mask.

    It is turned, stretched and perhaps made smaller, so that the same object is not always seen alike. Nothing is
    mirrored and no colour changes: an object's left, right and colours are part of it.

    side: of the reference that is made of it, in pixels.
    """
    x0, y0, x1, y1 = photograph.box
    cut, mask = photograph.image[y0:y1, x0:x1], photograph.subject[y0:y1, x0:x1]
    on_white = Image.fromarray(np.where(mask[..., None], cut, np.uint8(_WHITE)))
    share = Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0)))
    turn = float(np.clip(rng.normal(0, _TURN[0]), -_TURN[1], _TURN[1]))
    stretch, kept = math.exp(rng.uniform(-_STRETCH, _STRETCH)), rng.uniform(_LEAST_DETAIL, 1.0) * side
    scale = min(1.0, kept / max(cut.shape[:2]))
    size = max(1, round(cut.shape[1] * scale * stretch)), max(1, round(cut.shape[0] * scale))
    fine, rough = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
    picture = on_white.resize(size, Image.Resampling.LANCZOS).rotate(turn, fine, True, fillcolor=(_WHITE,) * 3)
    turned = np.asarray(share.resize(size, rough).rotate(turn, rough, True)) > 127
    if not turned.any():  # a thing of a pixel or two
        return photograph.image, photograph.subject
    return np.asarray(picture), turned
