"""The judge: a small CNN, run in numpy, that names the parts of a thing in a crop and tells how alike two things are.

Every head is a choice of words. "none" is a part that is not there (for ``top``: one in the body's colour), "other" a
decal of no known form, "unclear" a shape that cannot be made out: the judge was trained on smeared, warped and doubled
renderings too, so that it does not forgive them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from dreammix_trt.trainer.micro import world
from dreammix_trt.trainer.micro.objects import COLOURS, DECALS, FINISHES, PATTERNS, SHAPES, Attributes

SIDE: Final = 96
LAYERS: Final = 4
WEIGHTS_FILE: Final = "judge.safetensors"
FACTS_FILE: Final = "judge.json"
HEADS: Final[dict[str, tuple[str, ...]]] = {
    "shape": (*SHAPES, "unclear"),
    "colour": COLOURS,
    "pattern": PATTERNS,
    "foot": ("none", *COLOURS),
    "band": ("none", *COLOURS),
    "top": ("none", *COLOURS),
    "decal_colour": ("none", *COLOURS),
    "finish": FINISHES,
    "decal": ("none", *DECALS, "other"),  # last: it has a trunk of its own
}
Reading = dict[str, str]


def expected_reading(what: Attributes) -> Reading:
    """What a flawless judge reads off a rendering of `what`."""
    reading = {name: getattr(what, name) or "none" for name in HEADS}
    if reading["decal"] not in HEADS["decal"]:
        reading["decal"] = "other"
    return reading


def _convolve(x: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32]) -> NDArray[np.float32]:
    """3x3, zero padding: (N, C, H, W) -> (N, O, H, W)."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    out = np.tensordot(windows, weight, axes=((1, 4, 5), (1, 2, 3)))
    return np.asarray(np.moveaxis(out + bias, -1, 1), np.float32)


def _pool(x: NDArray[np.float32]) -> NDArray[np.float32]:
    n, c, h, w = x.shape
    return np.asarray(x.reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5)), np.float32)


@dataclass(frozen=True)
class Judge:
    """Weights and the accuracy they reached on held-out renderings (``facts``)."""

    weights: dict[str, NDArray[np.float32]]
    facts: dict[str, object]

    @classmethod
    def load(cls, model_dir: Path | str) -> Judge:
        """From a model folder holding ``judge.safetensors`` and ``judge.json``."""
        folder = Path(model_dir)
        weights = {name: value.astype(np.float32) for name, value in load_file(folder / WEIGHTS_FILE).items()}
        return cls(weights, json.loads((folder / FACTS_FILE).read_text()))

    def scores(self, crops: Sequence[world.Picture]) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.float32]]:
        """crops: uint8 (h, w, 3), any size. Returns ({head: logits (N, words)}, embeddings (N, 64) of unit length)."""
        rows = [self._run(crops[start : start + 16]) for start in range(0, len(crops), 16)]
        logits = np.concatenate([row[0] for row in rows])
        heads, at = {}, 0
        for name, words in HEADS.items():
            heads[name], at = logits[:, at : at + len(words)], at + len(words)
        return heads, np.concatenate([row[1] for row in rows])

    def _run(self, crops: Sequence[world.Picture]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        small = [world.resize(np.ascontiguousarray(crop), SIDE, SIDE) for crop in crops]
        x = np.moveaxis(np.stack(small).astype(np.float32) / np.float32(127.5) - 1, -1, 1)
        hidden = self._see(x, "whole")
        same = self._map(hidden, "same")
        same = same / (np.linalg.norm(same, axis=1, keepdims=True) + 1e-6)
        logits = np.concatenate([self._map(hidden, "out"), self._map(self._see(x, "form"), "decal")], 1)
        return logits, np.asarray(same, np.float32)

    def _see(self, x: NDArray[np.float32], trunk: str) -> NDArray[np.float32]:
        w = self.weights
        for layer in range(LAYERS):
            name = f"{trunk}.conv{layer}"
            x = _pool(np.maximum(_convolve(x, w[f"{name}.weight"], w[f"{name}.bias"]), 0))
        return np.maximum(self._map(x.reshape(len(x), -1), f"{trunk}.hidden"), 0)

    def _map(self, x: NDArray[np.float32], name: str) -> NDArray[np.float32]:
        return np.asarray(x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"], np.float32)

    def read(self, crops: Sequence[world.Picture]) -> list[Reading]:
        """The word of every head for each crop."""
        heads, _ = self.scores(crops)
        picks = {name: values.argmax(1) for name, values in heads.items()}
        return [{name: HEADS[name][picks[name][row]] for name in HEADS} for row in range(len(crops))]

    def embed(self, crops: Sequence[world.Picture]) -> NDArray[np.float32]:
        """float32 (N, 64) of unit length: the dot product of two is how alike the things are (1: the same)."""
        return self.scores(crops)[1]


def crop_around(image: world.Picture, box: world.Box, grow: float = 0.1) -> world.Picture:
    """The square around `box`, `grow` larger, clipped to the frame (the crop may then be no square)."""
    x0, y0, x1, y1 = box
    half = max(x1 - x0, y1 - y0) / 2 * (1 + grow)
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    height, width = image.shape[:2]
    left, top = max(0, round(cx - half)), max(0, round(cy - half))
    right, bottom = min(width, max(left + 2, round(cx + half))), min(height, max(top + 2, round(cy + half)))
    return image[top:bottom, left:right]


def crop_of_mask(image: world.Picture, mask: NDArray[np.bool_]) -> world.Picture:
    """What the judge sees of a finished picture: the mask's square and little more."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return np.ascontiguousarray(crop_around(image, box, 0.02))
