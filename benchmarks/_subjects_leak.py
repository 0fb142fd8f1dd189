"""What a picture took from its reference beside the object: the pose in which it is seen, and the white around it.

Every subject has five photographs from different views, and the one that is the reference changes from scene to scene.
So a picture can be held against the reference *and* against the four other views of the same object; who draws the
object and nothing else is as near to the ones as to the other.

**Pose.** The object of each photograph is moved and scaled over the painted hole to where it fits best: the normalised
cross-correlation of brightness gradients within its outline, the best of some sizes and all places. Gradients, as edges
are where the handle, the band or the sticker is, while a changed colour changes little. Two figures come of it:

- `nearest`: 1 where the reference fits better than the other views. Chance is 0.2.
- `pose`: the fit of the reference less the mean fit of the others. Chance is 0.

Both are read from real renderings as well: seen as the reference, and seen from where the scene has it.

**Background.** References stand on white. `white` is the share of white pixels in the hole where the true object does
not stand, less that of the true room.

Light has no figure of its own: the world's light falls on the object by smooth shades, which gradients hardly see.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
from _ablation_cases import Place, draw_place
from _subjects_cases import PHOTOGRAPHS, portraits, reference_of
from numpy.typing import NDArray

from dreammix_trt.trainer.micro import world
from dreammix_trt.trainer.micro.judge import crop_of_mask

Floats = NDArray[np.float64]
FIGURES: Final = ("nearest", "pose", "white")
SIDE: Final = 48  # of the hole's square, for the search
SIZES: Final = (34, 37, 40, 43, 46)  # of the object's longer side in it: a mask is up to a third larger than the object
_WHITE: Final = 245
_LEAST: Final = 1e-6


def read_leak(picture: world.Picture, place: Place) -> dict[str, float | None]:
    """The figures of a picture painted at a place, by the names of FIGURES."""
    scene, mask = draw_place(place)
    fits = fit_portraits(crop_of_mask(picture, mask), place.subject)
    own = reference_of(place)
    others = [fit for number, fit in enumerate(fits) if number != own]
    white = count_white(picture, scene, mask) - count_white(scene.background, scene, mask)
    return {"nearest": float(fits[own] > max(others)), "pose": fits[own] - float(np.mean(others)), "white": white}


def count_white(picture: world.Picture, scene: world.Scene, mask: NDArray[np.bool_]) -> float:
    """The share of white pixels in the hole, where the true object does not stand."""
    free = mask & (scene.alpha < 0.05)
    return float((picture[free] >= _WHITE).all(-1).mean()) if free.any() else 0.0


def fit_portraits(crop: world.Picture, number: int) -> list[float]:
    """How well each photograph of a subject fits into a painted hole's square, -1 to 1."""
    seen = find_gradients(world.resize(np.ascontiguousarray(crop), SIDE, SIDE))
    return [max(_fit(seen, number, photograph, size) for size in SIZES) for photograph in range(PHOTOGRAPHS)]


def find_gradients(picture: world.Picture) -> Floats:
    """Of brightness, down and to the right: (h, w, 2)."""
    return np.stack(np.gradient(picture.astype(np.float64).mean(-1)), -1)


def _fit(seen: Floats, number: int, photograph: int, size: int) -> float:
    """The best normalised cross-correlation over all places, within the object's outline."""
    weighted, weights, energy = _cut_object(number, photograph, size)
    height, width = weights.shape
    windows = np.lib.stride_tricks.sliding_window_view(seen, (height, width), (0, 1))
    matched = np.einsum("yxchw,hwc->yx", windows, weighted)
    squares = np.lib.stride_tricks.sliding_window_view((seen**2).sum(-1), (height, width))
    own = np.einsum("yxhw,hw->yx", squares, weights)
    return float((matched / np.sqrt(np.maximum(own, _LEAST) * energy)).max())


@lru_cache(maxsize=4 * PHOTOGRAPHS * len(SIZES))
def _cut_object(number: int, photograph: int, size: int) -> tuple[Floats, Floats, float]:
    """The object of a photograph on white, its longer side `size`.

    Returns its gradients times the weights (h, w, 2), the weights (h, w): its share of each pixel, and its energy.
    """
    scene = portraits(number)[photograph]
    x0, y0, x1, y1 = scene.box
    scale = size / max(x1 - x0, y1 - y0)
    width, height = (min(SIDE, max(3, round(scale * side))) for side in (x1 - x0, y1 - y0))
    inside = scene.alpha[y0:y1, x0:x1] > 0.5
    cut = np.where(inside[..., None], scene.image[y0:y1, x0:x1], np.uint8(255))
    weights = world.resize(np.where(inside, np.uint8(255), np.uint8(0)), width, height).astype(np.float64) / 255
    gradients = find_gradients(world.resize(cut, width, height))
    return gradients * weights[..., None], weights, float((gradients**2 * weights[..., None]).sum())
