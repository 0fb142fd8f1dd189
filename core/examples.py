"""Random inputs of networks, for comparing their forms."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.axes import Tensor


def draw_inputs(
    inputs: Sequence[Tensor], weights: Collection[str], tokens: int, sizes: Mapping[str, int], seed: int
) -> dict[str, NDArray[Any]]:
    """Draw a network's inputs, each of a size as in use.

    weights: the inputs that are weights of slots.
    tokens: in the vocabulary of a text encoder.
    sizes: of the named axes.

    Returns input name -> array.
    """
    rng = np.random.default_rng(seed)
    shapes = {each: tuple(sizes[side] if isinstance(side, str) else side for side in each.shape) for each in inputs}
    return {
        each.name: (
            _draw_ids(rng, shape, tokens) if each.dtype == "int64" else _draw(rng, each, shape, weights)
        ).astype(each.dtype)
        for each, shape in shapes.items()
    }


def _draw_ids(rng: np.random.Generator, shape: tuple[int, ...], tokens: int) -> NDArray[Any]:
    ids = rng.integers(1, tokens - 2, shape)
    ids[:, 9:] = tokens - 1
    return ids


def _draw(
    rng: np.random.Generator, tensor: Tensor, shape: tuple[int, ...], weights: Collection[str]
) -> NDArray[np.float32]:
    if tensor.name == "timestep":
        return rng.uniform(0, 999, shape).astype(np.float32)
    values: NDArray[Any] = rng.standard_normal(shape)
    if tensor.name == "time_ids":
        values = 128 * np.abs(values)
    elif tensor.name in weights:
        values = values / np.sqrt(shape[-2])
    elif tensor.name == "mask":
        values = values > 0 if "h" in tensor.shape else _draw_hole(rng, shape)
    elif tensor.name == "image":
        values = np.tanh(values)
    elif tensor.name == "features":
        values = _draw_features(rng, shape)
    elif tensor.name == "inside":
        values = values > 0
    return values.astype(np.float32)


def _draw_hole(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[Any]:
    """A mask in pixels (N, 1, H, W): a rectangle in each picture. Whole patches are known, others in part."""
    mask = np.zeros(shape)
    for each in mask:
        (top, bottom), (left, right) = (np.sort(rng.choice(np.arange(1, side), 2, False)) for side in shape[2:])
        each[:, top:bottom, left:right] = 1
    return mask


def _draw_features(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[Any]:
    """Features of cells (N, T, D), each less like the others than the next one, in random order: rounding cannot change
    which are chosen."""
    count, cells, width = shape
    common = rng.standard_normal((count, 1, width))
    shares = np.stack([rng.permutation(np.linspace(0, 1, cells)) for _ in range(count)])[..., None]
    return shares * common + 0.05 * rng.standard_normal(shape)
