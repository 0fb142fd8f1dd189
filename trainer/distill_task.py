"""What a distillation is asked for, checked: how long and how gently, on which base and pictures."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.files import sha256_of
from dreammix_trt.core.schedule import lcm_timesteps
from dreammix_trt.trainer.hardware import Hardware
from dreammix_trt.trainer.recipes import check_range
from dreammix_trt.trainer.regular_folder import RegularPicture
from dreammix_trt.trainer.scenes import Scenes, encode_scenes, keep_scenes, open_views, render_views

GRID = lcm_timesteps(50)[::-1]  # 19, 39, .. 999


@dataclass(frozen=True)
class DistillRecipe:
    """How a base is distilled. Raises InputError for a value out of range.

    steps: of the optimizer. rank: of the factors. batch: pictures in memory at a time; accumulate: such batches in a
        step. views: encoded pictures.
    guidance: the least and the most guidance of the teacher; drawn for every row.
    skip: of the 50 timesteps, how many one step of the teacher's solver leaps (Luo et al., skipping-step).
    constant: share of the steps at the full learning rate, which then falls to zero in a straight line.
    half: whether the LoRA is written in float16.
    """

    steps: int
    learning_rate: float
    batch: int
    views: int
    rank: int
    accumulate: int = 1
    guidance: tuple[float, float] = (4.0, 4.0)
    skip: int = 5
    constant: float = 0.6
    checkpoint_every: int = 20
    gradient_checkpointing: bool = False
    half: bool = True

    def __post_init__(self) -> None:
        for name, most in (("steps", 100_000), ("batch", 4096), ("accumulate", 4096), ("views", 100_000)):
            check_range(name, getattr(self, name), 1, most)
        check_range("rank", self.rank, 1, 256)
        check_range("skip", self.skip, 1, len(GRID))
        check_range("checkpoint_every", self.checkpoint_every, 0, 100_000)
        if not (math.isfinite(self.learning_rate) and 0 < self.learning_rate <= 1):
            raise InputError(f"learning rate is {self.learning_rate}; it must be above 0 and at most 1")
        low, high = self.guidance
        if not 1 <= low <= high <= 100:
            raise InputError(f"guidance is {low:g} to {high:g}; give 1 to 100, the smaller one first")

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, 0-based."""
        left = (self.steps - step) / self.steps
        return self.learning_rate * (1.0 if self.constant >= 1 else min(1.0, left / (1 - self.constant)))


# Starting points for the embedded model and for full-size bases; neither was trained to its end yet.
SMALL = DistillRecipe(steps=480, learning_rate=1e-3, batch=8, views=320, rank=6)
FULL = DistillRecipe(
    steps=1000, learning_rate=1e-4, batch=1, accumulate=8, views=512, rank=64, skip=1, checkpoint_every=100,
    gradient_checkpointing=True,
)  # fmt: skip


def recipe_for(native_side: int) -> DistillRecipe:
    """What suits a base that was trained at so many pixels."""
    return SMALL if native_side <= 256 else FULL


@dataclass(frozen=True)
class DistillTask:
    """What is asked for, checked. pictures: None: rendered scenes."""

    base: BaseFiles
    recipe: DistillRecipe
    pictures: Sequence[RegularPicture] | None = None
    hardware: Hardware = field(default_factory=Hardware)
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """All that decides the LoRA's numbers but the number of threads, as plain JSON values."""
        told = {**asdict(self.recipe), "guidance": list(self.recipe.guidance)}
        free = ("checkpoint_every", "gradient_checkpointing")
        return {
            "base": self.base.hash_contents(),
            "patch_biases": self.base.patch_biases,
            "pictures": None if self.pictures is None else {each.name: _hash(each) for each in self.pictures},
            **{name: value for name, value in told.items() if name not in free},
            "seed": self.seed,
            **self.hardware.settings(),
        }

    def scenes(self, work: Path) -> Scenes:
        """The encoded pictures; those of an earlier run in `work` are used."""
        side, settings = self.base.native_side, self.settings()
        deciding = {name: settings[name] for name in ("base", "pictures", "views", "seed", "precision", "device")}
        key = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]
        count = self.recipe.views

        def make() -> Scenes:
            drawn = (
                render_views(count, side, self.seed)
                if self.pictures is None
                else open_views(self.pictures, count, side, self.seed)
            )
            return encode_scenes(self.base, self.hardware, drawn)

        return keep_scenes(work / f"scenes-{key}.safetensors", make)

    def metadata(self) -> dict[str, str]:
        """Of the LoRA's file."""
        low, high = self.recipe.guidance
        return {
            "format": "pt",
            "base": self.base.name,
            "base_hashes": json.dumps(self.base.hash_contents()),
            "distillation": "lcm",
            "guidance": f"{low:g}" if low == high else f"{low:g} to {high:g}",
            "steps": str(self.recipe.steps),
            "rank": str(self.recipe.rank),
        }


def _hash(picture: RegularPicture) -> str:
    return f"{sha256_of(picture.image)} {sha256_of(picture.mask) if picture.mask else ''}"
