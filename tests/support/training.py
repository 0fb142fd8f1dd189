"""Training on a tiny random base, in a second: what the tests of the trainer share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.trainer.lora import SMALL, TrainRecord, train_lora

TINY = replace(SMALL, views=4, regular_pictures=2, rank=4)


def write_photographs(folder: Path, count: int = 2) -> Path:
    """Noise of 80 x 60 pixels with a rectangle as subject, in image/ and mask/."""
    rng = np.random.default_rng(0)
    for part in ("image", "mask"):
        (folder / part).mkdir(parents=True)
    for index in range(count):
        image, mask = rng.integers(0, 256, (60, 80, 3), np.uint8), np.zeros((60, 80), np.uint8)
        mask[20:45, 25:60] = 255
        Image.fromarray(image).save(folder / "image" / f"{index:02d}.png")
        Image.fromarray(mask).save(folder / "mask" / f"{index:02d}.png")
    return folder


def write_regular(folder: Path) -> Path:
    """Noise with a rectangle as mask under two captions, as `regularize` lays pictures out."""
    rng = np.random.default_rng(0)
    for caption in ("a_photo_of_a_red_mug", "a_photo_of_a_blue_mug"):
        (folder / caption).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (80, 80, 3), np.uint8)).save(folder / caption / "0-image.png")
        mask = np.zeros((80, 80), np.uint8)
        mask[20:60, 30:60] = 255
        Image.fromarray(mask).save(folder / caption / "0-mask.png")
    return folder


def train(photos: Path, out: Path, base: BaseFiles, **fields: Any) -> TrainRecord:
    """Three steps of `TINY` on one thread, unless `fields` say otherwise."""
    given = {"steps": 3, "threads": 1, "recipe": TINY, "learning_rate": 0.01} | fields
    return train_lora(photos, "mug", out, base=base, **given)
