"""Training a subject's LoRA on the patched UNet (paper, section 3.3; docs/algorithm.md, section 4)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.extras import require_training
from dreammix_trt.core.files import atomic_directory
from dreammix_trt.trainer.folder import RECORD, TrainRecord, write_folder
from dreammix_trt.trainer.photographs import read_photographs
from dreammix_trt.trainer.recipes import FULL, SMALL, Recipe, recipe_for
from dreammix_trt.trainer.task import Names, Task, check_options
from dreammix_trt.trainer.training import Progress, Training

__all__ = ["FULL", "SMALL", "Recipe", "TrainRecord", "train_lora"]

log = logging.getLogger(__name__)


def train_lora(
    photos: str | Path,
    class_name: str,
    out: str | Path,
    *,
    base: str | Path | BaseFiles | None = None,
    token: str = "sks",
    prompt: str | None = None,
    captions: Sequence[str] = (),
    rank: int = 4,
    steps: int | None = None,
    learning_rate: float | None = None,
    loss: str = "reference",
    seed: int = 0,
    merged: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    recipe: Recipe | None = None,
    invert_masks: bool = False,
    large_masks: bool = False,
) -> TrainRecord:
    """Train a LoRA of one subject and write it to the directory `out`, whole or not at all.

    photos: folder with image/ and mask/, or as `listing` finds them.
    class_name: what the subject is, e.g. "mug".
    base: diffusers folder (None: the embedded model).
    token: the word that will mean this subject.
    prompt: instance caption, default "a photo of a {token} {class_name}".
    captions: further captions that name attributes of the subject ("a photo of a blue sks mug"), so that an attribute
        belongs to its word and not to the token (paper, section 3.3).
    rank: of the factors.
    steps, learning_rate: None takes what suits the base.
    loss: "reference" or "paper".
    merged: also write the merged UNet as `unet/`.
    threads: CPU threads (None: torch's choice).
    progress: called with (name, fraction, message) each step.
    recipe: everything else; None takes what suits the base.
    invert_masks, large_masks: as `photographs.read_photographs` takes them.

    Writes `pytorch_lora_weights.safetensors` (diffusers' names, alpha = rank), the same as `TOKEN_CLASS.safetensors` in
    kohya's format (for ComfyUI, A1111, Fooocus) and `train.json`. Same seed, threads and machine: the same bytes in the
    LoRA file.

    Raises InputError for parameters, photographs or a place that cannot be used, FileFormatError for the base,
    MissingExtraError without the `train` extra.
    """
    require_training()
    class_name, token = class_name.strip(), token.strip()
    check_options(class_name, token, loss, rank, steps, learning_rate, seed, threads)
    files = base if isinstance(base, BaseFiles) else BaseFiles.open(base)
    for remark in files.remarks:
        log.warning("%s", remark)
    recipe = recipe or recipe_for(files.native_side)
    steps, rate = steps or recipe.steps, learning_rate or recipe.learning_rate
    names = Names.of(token, class_name, prompt, captions)
    photographs = read_photographs(photos, invert_masks=invert_masks, large_masks=large_masks)
    task = Task(files, photographs, names, recipe, rank, steps, rate, loss, seed)
    started = time.monotonic()
    with atomic_directory(out, marker=RECORD) as folder, _torch_threads(threads) as used:
        training = Training(task, progress or (lambda *_: None))
        history = training.run()
        record = TrainRecord.of(task, history, time.monotonic() - started, used, training.parameters)
        write_folder(folder, record, training.factors(), files, merged=merged)
    log.info("%s: %d steps in %.0f s, loss %.4f", out, steps, record.seconds, record.loss)
    return record


@contextmanager
def _torch_threads(count: int | None) -> Iterator[int]:
    """Use `count` threads for the block, then as many as before; gives the number in use."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
