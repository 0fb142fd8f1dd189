"""What a training learns from, made before its first step: encoded views, regular pictures, and texts.

Text encoders and VAE are loaded for this and let go again; only the UNet stays. What was made is kept in the work
folder, so that a training that goes on, or a second one with another rank, need not make it again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.trainer.captions import regular_captions
from dreammix_trt.trainer.data import TrainingView, draw_view
from dreammix_trt.trainer.photographs import Album, PhotographFile
from dreammix_trt.trainer.samples import Samples, encode_views
from dreammix_trt.trainer.state_files import read_state, write_state
from dreammix_trt.trainer.task import Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dreammix_trt.trainer.networks import TrainingUNet

log = logging.getLogger(__name__)
Progress = Callable[[str, float, str], None]
_REVISION = 1  # of how samples are made; when that changes, those that are kept are not used


def say_nothing(*_: object) -> None:
    """Progress that nobody asked for."""


@dataclass(frozen=True)
class Prepared:
    """The samples of a training. `captions` of samples are rows of the texts; the first texts are the subject's own.

    regular: None: none are trained on.
    states, pooled: (T, 77, D) and (T, Dp), of every caption.
    """

    subject: Samples
    regular: Samples | None
    states: Tensor
    pooled: Tensor


def prepare(
    task: Task, work: Path | None, unet: Callable[[], TrainingUNet], dice: torch.Generator, progress: Progress
) -> Prepared:
    """Make the samples, or read those that are kept.

    work: where they are kept; None: nowhere. unet: gives the UNet without adapters; asked only to paint with it.
    dice: left in the same state whether they were made or read.
    """
    file = work / f"prepared-{_key(task)}.safetensors" if work else None
    kept = _read(file, dice) if file else None
    if kept is not None:
        log.info("%s: the encoded photographs of an earlier training are used", file)
        return kept
    made = _make(task, unet, dice, progress)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        for old in file.parent.glob("prepared-*.safetensors"):
            old.unlink()
        write_state(file, _flatten(made) | {"dice": dice.get_state()})
    return made


def free_memory(device: str) -> None:
    """Give back what networks that are no longer named have taken."""
    import torch

    if device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()


def _make(task: Task, unet: Callable[[], TrainingUNet], dice: torch.Generator, progress: Progress) -> Prepared:
    import torch

    progress("train", 0.005, "encoding captions")
    texts = _encode_texts(task)
    free_memory(task.hardware.device)
    subject, regular = _encode_pictures(task, texts, progress)
    free_memory(task.hardware.device)
    if task.paints_regular:
        from dreammix_trt.trainer.regular import repaint

        count = task.recipe.regular_pictures
        start = subject.rows(torch.arange(count) % len(subject))

        def report(fraction: float) -> None:
            progress("train", 0.02 + 0.08 * fraction, f"painting {count} regular pictures of the class")

        painted = repaint(unet(), start, texts.painting, dice, report)
        regular = replace(start, latents=painted, captions=texts.numbers)
    return Prepared(subject, regular, texts.states, texts.pooled)


@dataclass(frozen=True)
class _Texts:
    """states, pooled: of all captions. numbers: the caption of each regular picture. painting: as `repaint` takes."""

    states: Tensor
    pooled: Tensor
    numbers: Tensor
    painting: list[tuple[Tensor, Tensor]]


def _encode_texts(task: Task) -> _Texts:
    import torch

    from dreammix_trt.trainer.networks import TextEncoders
    from dreammix_trt.trainer.regular import count_at_once

    encoders = TextEncoders(task.base, task.hardware.device, task.merged)
    own = [encoders.encode([prompt]) for prompt in task.names.prompts]
    captions = _list_captions(task)
    distinct = list(dict.fromkeys(captions))
    painting, at_once = [], count_at_once(task.base.native_side)
    for first in range(0, len(captions), at_once) if task.paints_regular else ():
        part = captions[first : first + at_once]
        painting.append(encoders.encode([""] * len(part) + part))
    found = [*own, encoders.encode(distinct)] if distinct else own
    states, pooled = (torch.cat([pair[side] for pair in found]) for side in (0, 1))
    return _Texts(states, pooled, torch.tensor([len(own) + distinct.index(each) for each in captions]), painting)


def _list_captions(task: Task) -> list[str]:
    """The caption of each regular picture."""
    if task.paints_regular:
        words = task.attributes if task.regular_attributes else None
        return regular_captions(task.names.class_name, task.recipe.regular_pictures, words, task.seed)
    return [caption for _, caption in _list_regular(task)]


def _list_regular(task: Task) -> list[tuple[PhotographFile, str]]:
    """The given regular pictures that have masks, with their captions; [] where they have no weight."""
    if task.regular is None or not task.takes_regular:
        return []
    found = [(PhotographFile(each.image, each.mask), each.caption) for each in task.regular if each.mask is not None]
    if not found:
        raise InputError("none of the regular pictures has a mask; make masks for them, or leave --regular")
    return found


def _encode_pictures(task: Task, texts: _Texts, progress: Progress) -> tuple[Samples, Samples | None]:
    """The subject's views, and those of the given regular pictures."""
    import torch

    from dreammix_trt.trainer.networks import Vae

    count = max(task.recipe.views, len(task.photographs))
    progress("train", 0.01, f"encoding {count} views of {len(task.photographs)} photographs")
    vae = Vae(task.base, task.hardware.device)
    subject = encode_views(vae, _draw_views(task, task.photographs, count, 11))
    given = _list_regular(task)
    if not given:
        return subject, None
    count = max(task.recipe.views, len(given))
    progress("train", 0.02, f"encoding {count} views of {len(given)} regular pictures")
    regular = encode_views(vae, _draw_views(task, [file for file, _ in given], count, 12))
    return subject, replace(regular, captions=texts.numbers[torch.arange(count) % len(given)])


def _draw_views(task: Task, files: Any, count: int, stream: int) -> Iterator[TrainingView]:
    """`count` views, the pictures in turn. stream: of random numbers."""
    rng, album = np.random.default_rng([task.seed, stream]), Album(files)
    for number in range(count):
        yield draw_view(rng, album.open(number), task.base.native_side, task.recipe.crop_share)


def _key(task: Task) -> str:
    told = json.dumps([_REVISION, task.preparing_settings()], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _flatten(made: Prepared) -> dict[str, Tensor]:
    tensors = {"states": made.states, "pooled": made.pooled}
    for name, samples in (("subject", made.subject), ("regular", made.regular)):
        if samples is not None:
            tensors |= {f"{name}.{each.name}": getattr(samples, each.name) for each in fields(Samples)}
    return tensors


def _read(file: Path, dice: torch.Generator) -> Prepared | None:
    """What is kept in a file; None: there is none, or a damaged one."""
    if not file.exists():
        return None
    try:
        held = read_state(file)
        subject, regular = (
            Samples(**{each.name: held[f"{name}.{each.name}"] for each in fields(Samples)})
            if f"{name}.latents" in held
            else None
            for name in ("subject", "regular")
        )
        found, states, pooled = subject, held["states"], held["pooled"]
        dice.set_state(held["dice"])  # last: a file that is damaged leaves the dice as they were
    except (FileFormatError, KeyError, RuntimeError, ValueError, TypeError) as error:
        log.warning("%s is damaged (%s); the photographs are encoded again", file, error)
        return None
    return None if found is None else Prepared(found, regular, states, pooled)
