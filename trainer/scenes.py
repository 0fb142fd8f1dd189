"""What a distillation learns on: encoded pictures with a random hole and a caption each.

For the embedded base they are rendered, as it was trained on; for others they are a folder of pictures, laid out like
regular ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import InputError
from dreammix_trt.trainer.data import TrainingView, draw_view
from dreammix_trt.trainer.hardware import Hardware
from dreammix_trt.trainer.photographs import Album, PhotographFile
from dreammix_trt.trainer.preparing import free_memory
from dreammix_trt.trainer.samples import BATCH, Samples, encode_views
from dreammix_trt.trainer.state_files import keep_tensors
from dreammix_trt.trainer.task import RegularPicture

if TYPE_CHECKING:
    from torch import Tensor

CaptionedView = tuple[str, TrainingView]


@dataclass(frozen=True)
class Scenes:
    """samples: their captions are rows of states (T, 77, D) and pooled (T, Dp); row 0 is the empty text."""

    samples: Samples
    states: Tensor
    pooled: Tensor

    def text(self, captions: Tensor) -> tuple[Tensor, Tensor]:
        """(states, pooled) of captions, int64 (N,)."""
        return self.states[captions], self.pooled[captions]


def render_views(count: int, side: int, seed: int) -> Iterator[CaptionedView]:
    """Scenes of the embedded model's world, one after the other; never of held-out combinations."""
    from dreammix_trt.trainer.micro import world
    from dreammix_trt.trainer.micro.captions import caption

    rng = np.random.default_rng([seed, 21])
    for _ in range(count):
        scene = world.render_scene(rng, size=side)
        hole = world.draw_mask(rng, scene.box, side, side)
        yield caption(rng, scene.attributes, scene.surface), TrainingView(scene.image, hole, side)


def open_views(pictures: Sequence[RegularPicture], count: int, side: int, seed: int) -> Iterator[CaptionedView]:
    """`count` views of pictures in turn. Raises InputError where none has a mask."""
    usable = [each for each in pictures if each.mask is not None]
    if not usable:
        raise InputError("none of the pictures has a mask; give each the mask of what it shows, white on the thing")
    rng, album = np.random.default_rng([seed, 22]), Album([PhotographFile(each.image, each.mask) for each in usable])
    for number in range(count):
        yield usable[number % len(usable)].caption, draw_view(rng, album.open(number), side)


def encode_scenes(base: BaseFiles, hardware: Hardware, drawn: Iterable[CaptionedView]) -> Scenes:
    """Encode views and their captions; VAE and encoders are let go again."""
    import torch

    from dreammix_trt.trainer.networks import TextEncoders, Vae

    captions: list[str] = []

    def views() -> Iterator[TrainingView]:
        for caption, view in drawn:
            captions.append(caption)
            yield view

    samples = encode_views(Vae(base, hardware.device), views())
    free_memory(hardware.device)
    distinct = list(dict.fromkeys(["", *captions]))
    encoders = TextEncoders(base, hardware.device)
    parts = [encoders.encode(distinct[first : first + BATCH]) for first in range(0, len(distinct), BATCH)]
    numbers = torch.tensor([distinct.index(each) for each in captions])
    states, pooled = (torch.cat([pair[side] for pair in parts]) for side in (0, 1))
    return Scenes(replace(samples, captions=numbers), states, pooled)


def keep_scenes(file: Path, make: Callable[[], Scenes]) -> Scenes:
    """The scenes of a file; where there is none, or a damaged one, they are made and written."""

    def flatten() -> dict[str, Tensor]:
        made = make()
        tensors = {each.name: getattr(made.samples, each.name) for each in fields(Samples)}
        return tensors | {"states": made.states, "pooled": made.pooled}

    names = [each.name for each in fields(Samples)]
    held = keep_tensors(file, (*names, "states", "pooled"), flatten)
    return Scenes(Samples(*(held[name] for name in names)), held["states"], held["pooled"])
