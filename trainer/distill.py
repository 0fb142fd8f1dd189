"""A few-step LoRA for a base: its guided sampling in 4 to 8 steps without guidance, by consistency distillation.

The student is the teacher with adapters. Only the patched UNet is distilled: with few steps the raw one has the last
step at most, and a request can leave it out (`patched_fraction=1`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.extras import require_training
from dreammix_trt.core.files import atomic_directory, sha256_of, write_json
from dreammix_trt.trainer.checkpoints import Checkpoints, Progressed, check_places, find_work, hold_places
from dreammix_trt.trainer.distill_task import FULL, SMALL, DistillRecipe, DistillTask, recipe_for
from dreammix_trt.trainer.distiller import Distiller
from dreammix_trt.trainer.events import Events
from dreammix_trt.trainer.folder import lora_tensors, write_tensor_file
from dreammix_trt.trainer.hardware import Hardware
from dreammix_trt.trainer.preparing import Progress
from dreammix_trt.trainer.processes import use_threads
from dreammix_trt.trainer.recipes import check_range
from dreammix_trt.trainer.regular_folder import read_regular

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FULL", "SMALL", "DistillRecipe", "Distilled", "distill_lora", "recipe_for"]

RECORD = "distill.json"
FILE_NAME = "lcm_lora.safetensors"  # `build` knows by the name which sampler requests need


@dataclass(frozen=True)
class Distilled:
    """What a distillation did; `distill.json` is made of it. loss: mean of the last tenth of the steps."""

    steps: int
    seconds: float
    loss: float
    first_loss: float
    file: str
    bytes: int


def distill_lora(
    out: str | Path,
    *,
    base: str | Path | BaseFiles | None = None,
    pictures: str | Path | None = None,
    recipe: DistillRecipe | None = None,
    hardware: Hardware | None = None,
    seed: int = 0,
    threads: int | None = None,
    work: str | Path | None = None,
    resume: bool = False,
    events: Events | None = None,
    progress: Progress | None = None,
) -> Distilled:
    """Distil a base into a LoRA for `build --base-lora`, and write it to the directory `out`, whole or not at all.

    base: as `train_lora` takes it.
    pictures: folder of pictures with masks, laid out as `regularize` does; None: rendered scenes, for the embedded base
        alone.
    recipe: None: what suits the base.
    work: folder of the checkpoint and the encoded pictures; None: OUT.work.
    resume: go on from the checkpoint of a distillation with the same settings.
    events: as `train_lora` takes them.
    progress: called with (name, fraction, message) each step.

    Writes `lcm_lora.safetensors` and `distill.json`. Same seed, threads and machine: the same bytes, also
    when it was stopped and resumed.

    Raises InputError for options and pictures that cannot be used and for a loss that is not finite, FileFormatError
    for the base, DeviceError for a GPU that is not there, BuildError for a full disk, MissingExtraError.
    """
    require_training()
    check_range("seed", seed, 0, 2**63 - 1)
    given = hardware or Hardware()
    given.check()
    files = base if isinstance(base, BaseFiles) else BaseFiles.open(base)
    listed = None if pictures is None else read_regular(pictures)
    if listed is None and files.folder != BaseFiles.open().folder:
        raise InputError(
            f"{files.name} needs pictures to be distilled on (--pictures FOLDER, laid out as `regularize` does); "
            "scenes are rendered for the embedded base alone"
        )
    place = Path(out).resolve()
    task = DistillTask(files, recipe or recipe_for(files.native_side), listed, given, seed)
    folder = Path(work) if work else find_work(out)
    check_places(place, folder, RECORD, events)
    with hold_places(place, folder, "another distillation is at work"):
        return _run(task, place, folder, resume, events, progress or (lambda *_: None), threads)


def _run(
    task: DistillTask,
    out: Path,
    work: Path,
    resume: bool,
    events: Events | None,
    progress: Progress,
    threads: int | None,
) -> Distilled:
    settings = task.settings()
    checkpoints = Checkpoints(work, task.metadata(), settings, task.recipe.checkpoint_every)
    checkpoints.check(resume=resume)
    with use_threads(threads):
        distiller = Distiller(task, work, progress)
        done = distiller.run(checkpoints, resume=resume, events=events)
        with atomic_directory(out, marker=RECORD) as folder:
            found = _write(folder, task, settings, distiller.factors(), done)
    checkpoints.remove()
    return found


def _write(
    folder: Path,
    task: DistillTask,
    settings: Mapping[str, Any],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    done: Progressed,
) -> Distilled:
    tensors = lora_tensors(factors)
    if task.recipe.half:
        tensors = {name: value.half() for name, value in tensors.items()}
    file = folder / FILE_NAME
    write_tensor_file(file, tensors, task.metadata())
    first, last = done.find_ends()
    found = Distilled(len(done.history), round(done.seconds, 2), last, first, FILE_NAME, file.stat().st_size)
    write_json(folder / RECORD, {"schema": 1, **asdict(found), "sha256": sha256_of(file), "settings": dict(settings)})
    return found
