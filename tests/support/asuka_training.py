"""ASUKA's trainers on a tiny random base, in a second: what their tests share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.trainer.asuka.recipes import SMALL, AsukaRecipe, Part
from dreammix_trt.trainer.asuka.training import AsukaTrained, train_asuka


def tiny_recipe(part: Part, **fields: Any) -> AsukaRecipe:
    """Three steps of two pictures, a checkpoint after the second."""
    small = {"steps": 3, "batch": 2, "side": 64, "warmup": 1, "checkpoint_every": 2, "reveal_steps": 2, "views": 0}
    return replace(SMALL[part], **small | fields)


def write_pictures(folder: Path) -> Path:
    """Three pictures of soft noise, of different sizes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, size in enumerate(((90, 70), (64, 64), (100, 140))):
        few = Image.fromarray(rng.integers(0, 256, (7, 7, 3), np.uint8))
        few.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def train(part: Part, out: Path, base: BaseFiles, images: Path, **fields: Any) -> AsukaTrained:
    """`tiny_recipe` on one thread, unless `fields` say otherwise."""
    given = {"recipe": tiny_recipe(part), "threads": 1} | fields
    return train_asuka(part, out, base=base, images=images, **given)
