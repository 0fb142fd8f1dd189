"""Training a subject's LoRA on the patched UNet (paper, section 3.3; docs/algorithm.md, section 13)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from dreammix_trt.core.attributes import AttributeDictionary
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.extras import require_training
from dreammix_trt.core.files import atomic_directory, sha256_of
from dreammix_trt.core.lora import LoraSpec, parse_lora, read_lora
from dreammix_trt.core.network_weights import BaseLora
from dreammix_trt.trainer.checkpoints import Checkpoints, check_places, find_work, has_checkpoint, hold_places
from dreammix_trt.trainer.events import Events
from dreammix_trt.trainer.folder import RECORD, TrainRecord, lora_metadata, read_finished, write_folder
from dreammix_trt.trainer.hardware import Hardware
from dreammix_trt.trainer.photographs import PhotographFile, read_photographs
from dreammix_trt.trainer.preparing import Progress, say_nothing
from dreammix_trt.trainer.processes import Processes, join_processes, use_threads
from dreammix_trt.trainer.recipes import FULL, SMALL, Recipe, recipe_for
from dreammix_trt.trainer.regular_folder import read_regular
from dreammix_trt.trainer.task import Names, RegularPicture, Task, check_options
from dreammix_trt.trainer.training import Training
from dreammix_trt.trainer.watching import Unwatched, Watch, tell_memory

__all__ = ["FULL", "SMALL", "Hardware", "Recipe", "TrainRecord", "train_lora"]

log = logging.getLogger(__name__)


def train_lora(
    photos: str | Path,
    class_name: str,
    out: str | Path,
    *,
    base: str | Path | BaseFiles | None = None,
    base_loras: Sequence[str | Path | LoraSpec] = (),
    token: str = "sks",
    prompt: str | None = None,
    captions: Sequence[str] = (),
    attributes: str | Path | AttributeDictionary | None = None,
    attribute_captions: bool = True,
    regular_attributes: bool = True,
    regular: str | Path | Sequence[RegularPicture] | None = None,
    rank: int | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    loss: str = "reference",
    seed: int = 0,
    merged: bool = False,
    threads: int | None = None,
    hardware: Hardware | None = None,
    resume: bool = False,
    work: str | Path | None = None,
    watch: Watch | None = None,
    events: Events | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
    recipe: Recipe | None = None,
    invert_masks: bool = False,
    large_masks: bool = False,
) -> TrainRecord:
    """Train a LoRA of one subject and write it to the directory `out`, whole or not at all.

    photos: folder with image/ and mask/, or as `listing` finds them.
    class_name: what the subject is, e.g. "mug".
    base: diffusers folder or single file (None: the embedded model); with a patch, VAE or tokenizer of other places as
        `BaseFiles.open` gives it.
    base_loras: merged into the base, as `build` takes them.
    token: the word that will mean this subject.
    prompt: instance caption, default "a photo of a {token} {class_name}".
    captions: further captions that name attributes of the subject ("a photo of a blue sks mug"), so that an attribute
        belongs to its word and not to the token (paper, section 3.3).
    attributes: the subject's dictionary or its file: further captions are made of it, and those of the regular pictures
        that the base paints. It travels with the LoRA.
    attribute_captions: False leaves the former out, as the authors' code does.
    regular_attributes: False leaves the latter out: the base paints members of the class in plain colours.
    regular: pictures of the class (eq. 8), or their folder, as `regularize` makes it; None: the base paints some.
    rank, steps, learning_rate: None takes what suits the base.
    loss: "reference" or "paper".
    merged: also write the merged UNet as `unet/`.
    threads: CPU threads (None: torch's choice).
    hardware: device, precision and optimizer; None: the CPU.
    resume: go on from the checkpoint of a training that was stopped; it must have had the same settings. Where there is
        none and `out` has the LoRA of these settings, that stays.
    work: folder of the checkpoint and of encoded photographs, where the recipe asks for checkpoints; None: OUT.work.
    watch: called before, after each step and at the end, as `trainer.watching.Watch` says.
    events: get the loss and the learning rate of every step, for TensorBoard; `close` belongs to the caller.
    progress: called with (name, fraction, message) each step.
    notice: called with what a person should know.
    recipe: everything else; None takes what suits the base.
    invert_masks, large_masks: as `photographs.read_photographs` takes them.

    Writes `pytorch_lora_weights.safetensors` (diffusers' names, alpha = rank), the same as `TOKEN_CLASS.safetensors` in
    kohya's format (for ComfyUI, A1111, Fooocus) and `subject.json`. Same seed, threads and machine: the same bytes in
    the LoRA file, also when it was stopped and resumed.

    Raises InputError for parameters, photographs or a place that cannot be used, for a loss that is not finite, and
    where float16 overflowed in nearly all steps, FileFormatError for the base, DeviceError for a GPU that is not there
    or too small, BuildError for a full disk, MissingExtraError without the `train` extra.
    """
    require_training()
    class_name, token = class_name.strip(), token.strip()
    check_options(class_name, token, loss, rank, steps, learning_rate, seed, threads)
    given = hardware or Hardware()
    given.check()
    files = base if isinstance(base, BaseFiles) else BaseFiles.open(base)
    recipe = recipe or recipe_for(files.native_side)
    recipe.check()
    dictionary = _read_attributes(attributes, class_name)
    photographs = read_photographs(photos, invert_masks=invert_masks, large_masks=large_masks)
    _warn(files, photographs)
    with join_processes(given) as (processes, own):
        task = Task(
            base=files,
            photographs=photographs,
            names=Names.of(token, class_name, prompt, captions, dictionary if attribute_captions else None),
            recipe=recipe,
            rank=rank or recipe.rank,
            steps=steps or recipe.steps,
            learning_rate=learning_rate or recipe.learning_rate,
            loss=loss,
            seed=seed,
            attributes=dictionary,
            regular_attributes=regular_attributes,
            regular=read_regular(regular) if isinstance(regular, str | Path) else regular,
            hardware=own,
            base_loras=_read_base_loras(base_loras, files),
        )
        place = Path(work) if work else find_work(out)
        job = _Job(task, Path(out), place, merged, watch or Unwatched(), events, processes, threads)
        return job.run(resume=resume, progress=progress, notice=notice)


class _Job:
    """A task with its places."""

    def __init__(
        self,
        task: Task,
        out: Path,
        work: Path,
        merged: bool,
        watch: Watch,
        events: Events | None,
        processes: Processes,
        threads: int | None,
    ) -> None:
        self._task, self._out, self._work, self._merged = task, out, work, merged
        self._watch, self._events, self._processes, self._threads = watch, events, processes, threads

    def run(self, *, resume: bool, progress: Progress | None, notice: Callable[[str], None] | None) -> TrainRecord:
        """Train and write the folder; the processes that do not lead only train."""
        check_places(self._out, self._work, RECORD, self._events)
        held = hold_places(self._out, self._work, "another training is at work")
        with held if self._processes.leads else nullcontext():
            return self._run(resume, progress, notice)

    def _run(self, resume: bool, progress: Progress | None, notice: Callable[[str], None] | None) -> TrainRecord:
        task, leads = self._task, self._processes.leads
        settings = task.settings() | {"processes": self._processes.count}
        checkpoints = Checkpoints(
            self._work, lora_metadata(task.base.name, settings), settings, task.recipe.checkpoint_every
        )
        if resume and not has_checkpoint(self._work) and (self._out / RECORD).exists():
            found = read_finished(self._out, task, settings)
            if self._merged and not (self._out / "unet").is_dir():
                raise InputError(f"{self._out}: trained before without merged weights; train anew with --force")
            if notice and leads:
                notice(f"{self._out}: trained before, with these settings")
            return found
        checkpoints.check(resume=resume)
        plan = tell_memory(task, notice if notice and leads else log.info)
        tell = progress if progress and leads else say_nothing
        kept = self._work if task.recipe.checkpoint_every and leads else None
        watch = self._watch if leads else Unwatched()
        watch.begin(task)
        with use_threads(self._threads) as used:
            training = Training(task, checkpoints, tell, self._processes, self._events)
            done = training.run(kept, resume=resume, after_step=watch.after_step)
            record = TrainRecord.of(task, settings, done.history, done.seconds, used, training.parameters, done.skipped)
            if leads:
                with atomic_directory(self._out, marker=RECORD) as folder:
                    write_folder(folder, record, training.factors(), task, merged=self._merged)
                    watch.finish(folder, record, done.history, plan)
                checkpoints.remove()
            self._processes.wait()
        log.info("%s: %d steps in %.0f s, loss %.4f", self._out, task.steps, record.seconds, record.loss)
        return record


def _read_attributes(given: str | Path | AttributeDictionary | None, class_name: str) -> AttributeDictionary | None:
    found = given if isinstance(given, AttributeDictionary) or given is None else AttributeDictionary.read(given)
    if found is not None and found.class_name.lower() != class_name.lower():
        where = "" if isinstance(given, AttributeDictionary) else f"{given}: "
        raise InputError(
            f"{where}the attributes are those of a {found.class_name!r}, but the class name is {class_name!r}; "
            "give the dictionary of this subject, or call it the same"
        )
    return found


def _read_base_loras(given: Sequence[str | Path | LoraSpec], files: BaseFiles) -> list[tuple[BaseLora, str]]:
    specs = [each if isinstance(each, LoraSpec) else parse_lora(str(each), "both") for each in given]
    read = [(read_lora(spec.file, files.configs["unet"]), spec) for spec in specs]
    return [(BaseLora(lora, spec.scale, spec.target), sha256_of(lora.source_path)) for lora, spec in read]


def _warn(files: BaseFiles, photographs: Sequence[PhotographFile]) -> None:
    for remark in files.remarks:
        log.warning("%s", remark)
    if len(photographs) == 1:
        log.warning(
            "one photograph (%s): the subject is learnt from one side, and its surroundings with it; five to ten are "
            "better",
            photographs[0].name,
        )
