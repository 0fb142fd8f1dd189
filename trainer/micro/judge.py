"""The attribute judge: a small CNN, run in numpy, that names shape, colour and pattern of an object crop."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from dreammix_trt.trainer.micro import world

SIDE: Final = 64
WEIGHTS_FILE: Final = "classifier.safetensors"
FACTS_FILE: Final = "classifier.json"


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
    """Weights and the accuracy they reached on held-out renders (``facts``)."""

    weights: dict[str, NDArray[np.float32]]
    facts: dict[str, object]

    @classmethod
    def load(cls, model_dir: Path | str) -> Judge:
        """From a model folder holding ``classifier.safetensors`` and ``classifier.json``."""
        folder = Path(model_dir)
        weights = {name: value.astype(np.float32) for name, value in load_file(folder / WEIGHTS_FILE).items()}
        return cls(weights, json.loads((folder / FACTS_FILE).read_text()))

    def scores(self, crops: NDArray[np.float32]) -> NDArray[np.float32]:
        """crops (N, 3, 64, 64) in -1..1 -> logits (N, 20): 8 shapes, 8 colours, 4 patterns."""
        x, w = crops, self.weights
        for layer in range(4):
            x = _pool(np.maximum(_convolve(x, w[f"conv{layer}.weight"], w[f"conv{layer}.bias"]), 0))
        x = np.maximum(x.reshape(len(x), -1) @ w["hidden.weight"].T + w["hidden.bias"], 0)
        return np.asarray(x @ w["out.weight"].T + w["out.bias"], np.float32)

    def attributes_of(self, crops: list[world.Picture]) -> list[tuple[str, str, str]]:
        """(shape, colour, pattern) of each uint8 (h, w, 3) crop of any size."""
        batch = np.stack([world.resize(crop, SIDE, SIDE) for crop in crops]).astype(np.float32)
        scores = self.scores(np.moveaxis(batch / np.float32(127.5) - 1, -1, 1))
        a, b = len(world.SHAPES), len(world.SHAPES) + len(world.COLOURS)
        picks = scores[:, :a].argmax(1), scores[:, a:b].argmax(1), scores[:, b:].argmax(1)
        return [(world.SHAPES[s], world.COLOURS[c], world.PATTERNS[p]) for s, c, p in zip(*picks, strict=True)]

    def attributes(self, crop: world.Picture) -> tuple[str, str, str]:
        """(shape, colour, pattern) of one uint8 (h, w, 3) crop around the object."""
        return self.attributes_of([crop])[0]


def crop_around(image: world.Picture, box: world.Box, grow: float = 0.1) -> world.Picture:
    """The square around `box`, `grow` larger, clipped to the frame (the crop may then be no square)."""
    x0, y0, x1, y1 = box
    half = max(x1 - x0, y1 - y0) / 2 * (1 + grow)
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    height, width = image.shape[:2]
    left, top = max(0, round(cx - half)), max(0, round(cy - half))
    right, bottom = min(width, max(left + 2, round(cx + half))), min(height, max(top + 2, round(cy + half)))
    return image[top:bottom, left:right]
