"""Training a token adapter for a base: `train_tokens`."""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.core.extras import require_training
from dreammix_trt.core.files import atomic_directory
from dreammix_trt.core.subject_tokens import TokenConfig
from dreammix_trt.core.token_adapter import FILE_NAME, Card, TokenAdapter
from dreammix_trt.core.token_factors import write_adapter
from dreammix_trt.trainer.checkpoints import Checkpoints, Progressed, check_places, find_work, hold_places
from dreammix_trt.trainer.events import Events
from dreammix_trt.trainer.hardware import Hardware
from dreammix_trt.trainer.preparing import Progress, say_nothing
from dreammix_trt.trainer.processes import Processes, join_processes, use_threads
from dreammix_trt.trainer.recipes import check_range
from dreammix_trt.trainer.tokens.objects import FolderObjects, ObjectPool, RenderedObjects
from dreammix_trt.trainer.tokens.recipes import TokenRecipe, recipe_for
from dreammix_trt.trainer.tokens.shelf import Shelf

log = logging.getLogger(__name__)
_STEPS = 63  # of the seeds of rows
_REVISION = 2  # of how objects are encoded; when that changes, those that are kept are not used
#: of a recipe, what the numbers do not depend on
_NO_SETTINGS = ("checkpoint_every", "gradient_checkpointing")
#: of the settings, what decides the encoded objects
_ENCODED = ("objects", "base", "patch_biases", "config", "views", "crop_share", "seed", "device")


@dataclass(frozen=True)
class TokensTrained:
    """What a training did; the adapter's card holds it. loss: mean of the last tenth of the steps.

    parameters: how many numbers learnt.
    """

    steps: int
    seconds: float
    loss: float
    first_loss: float
    parameters: int


@dataclass(frozen=True)
class TokenTask:
    """What is asked for, checked.

    work: where checkpoints and encoded objects are kept. start: the adapter that learning begins with.
    """

    base: BaseFiles
    pool: ObjectPool
    recipe: TokenRecipe
    config: TokenConfig
    hardware: Hardware
    seed: int
    work: Path
    start: TokenAdapter | None = None

    def settings(self) -> dict[str, Any]:
        """All that decides the numbers but the number of threads, as plain JSON values."""
        recipe = {name: value for name, value in asdict(self.recipe).items() if name not in _NO_SETTINGS}
        return {
            **{name: list(value) if isinstance(value, tuple) else value for name, value in recipe.items()},
            "objects": self.pool.describe(),
            "base": self.base.hash_contents(),
            "patch_biases": self.base.patch_biases,
            "config": self.config.to_dict(),
            "seed": self.seed,
            "earlier": _list_earlier(self.start),
            **self.hardware.settings(),
        }

    def open_shelf(self, processes: Processes, tell: Progress) -> Shelf:
        """The encoded objects; those of an earlier run in the work folder are used."""
        from dreammix_trt.trainer.preparing import free_memory
        from dreammix_trt.trainer.tokens.encoding import ObjectEncoder

        settings = self.settings()
        told = json.dumps([_REVISION, {name: settings[name] for name in _ENCODED}], sort_keys=True)
        folder = self.work / f"objects-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
        shelf = Shelf(folder, self.pool, self.recipe, self.seed)
        said = f"encoding {len(self.pool)} objects"
        shelf.fill(
            lambda: ObjectEncoder(self.base, self.config, self.hardware),
            processes,
            lambda share: tell("objects", share, said),
        )
        free_memory(self.hardware.device)
        return shelf


def train_tokens(
    out: str | Path,
    data: str | Path | None = None,
    *,
    base: str | Path | BaseFiles | None = None,
    recipe: TokenRecipe | None = None,
    start: str | Path | None = None,
    hardware: Hardware | None = None,
    seed: int = 0,
    threads: int | None = None,
    work: str | Path | None = None,
    resume: bool = False,
    events: Events | None = None,
    progress: Progress | None = None,
) -> TokensTrained:
    """Train a base to draw a subject from one picture; writes token_adapter.safetensors to `out`, whole or not at all.

    data: folder of objects, as `objects.FolderObjects` reads it; None: objects are rendered, for the embedded base
        alone.
    base: as `train_lora` takes it. The adapter is of its patched UNet.
    recipe: None: what suits the base.
    start: an adapter of this base, of the recipe's rank, that learning begins with; None: it begins anew. The card of
        what is written has the settings of both.
    work: folder of checkpoints and encoded objects; None: OUT.work.
    hardware, seed, threads, resume, events, progress: as `train_lora` takes them.

    Same seed, threads and machine: the same bytes, also when it was stopped and resumed.

    Raises InputError for options and objects that cannot be used and a loss that is not finite, FileFormatError for a
    base, DeviceError without a GPU, BuildError for a full disk, MissingExtraError.
    """
    require_training()
    given = hardware or Hardware()
    given.check()
    check_range("seed", seed, 0, 2**63 - 1)
    files = base if isinstance(base, BaseFiles) else BaseFiles.open(base)
    recipe = recipe or recipe_for(files.native_side)
    config = TokenConfig.of_base(files.configs)
    begun = None if start is None else _open_start(start, files, recipe)
    place, folder = Path(out).resolve(), Path(work) if work else find_work(out)
    check_places(place, folder, FILE_NAME, events)
    pool = FolderObjects(data) if data is not None else RenderedObjects(files, recipe.objects, recipe.views, seed)
    with join_processes(given) as (processes, own):
        task = TokenTask(files, pool, recipe, config, own, seed, folder, begun)
        tell = progress if progress and processes.leads else say_nothing
        return _run(task, place, processes, resume, events, tell, threads)


def _run(
    task: TokenTask,
    out: Path,
    processes: Processes,
    resume: bool,
    events: Events | None,
    tell: Progress,
    threads: int | None,
) -> TokensTrained:
    from dreammix_trt.trainer.learning import learn
    from dreammix_trt.trainer.stepping import Course
    from dreammix_trt.trainer.tokens.lesson import TokenLesson

    recipe = task.recipe
    held = hold_places(out, task.work, "another training is at work")
    with held if processes.leads else nullcontext(), use_threads(threads):
        settings = task.settings() | {"processes": processes.count}
        metadata = {"format": "pt", "base": task.base.name}
        checkpoints = Checkpoints(task.work, metadata, settings, recipe.checkpoint_every, FILE_NAME)
        checkpoints.check(resume=resume)
        shelf = task.open_shelf(processes, tell)
        tell("tokens", 0.0, "reading the base")
        lesson = TokenLesson(task.base, task.config, task.hardware, shelf, recipe, task.seed, task.start)
        given = task.hardware, checkpoints, processes, tell, events
        course = Course("tokens", recipe.steps, recipe.learning_rate, recipe.rate_at, *given)
        done = learn(lesson, recipe, (task.seed, _STEPS), course, resume=resume)
        found = _sum_up(done, sum(value.numel() for value in lesson.trained().values()))
        if processes.leads:
            card = _make_card(task, settings, found)
            with atomic_directory(out, marker=FILE_NAME) as folder:
                write_adapter(folder / FILE_NAME, card, *lesson.weights())
            checkpoints.remove()
        processes.wait()
    log.info("%s: %d steps in %.0f s, loss %.4f", out, found.steps, found.seconds, found.loss)
    return found


def _open_start(path: str | Path, base: BaseFiles, recipe: TokenRecipe) -> TokenAdapter:
    """The adapter to begin with. Raises FileFormatError for one of another base, InputError for another rank."""
    found = TokenAdapter.open(path)
    found.check_fit(base.configs)
    if found.card.base != base.hash_contents():
        raise FileFormatError(f"{found.file}: it was trained with other weights than {base.name}'s; begin anew")
    if found.card.rank != recipe.rank:
        raise InputError(
            f"rank is {recipe.rank}, but {found.file} has {found.card.rank}: give --rank {found.card.rank}"
        )
    return found


def _list_earlier(start: TokenAdapter | None) -> list[dict[str, Any]]:
    """The settings of the trainings that an adapter had, the first one first."""
    if start is None:
        return []
    own = dict(start.card.settings)
    return [*own.pop("earlier", []), own]


def _make_card(task: TokenTask, settings: dict[str, Any], found: TokensTrained) -> Card:
    """Nothing in it depends on how long the training took: equal adapters are equal files."""
    told = {name: value for name, value in settings.items() if name not in ("base", "config")}  # it has them itself
    told["trained"] = {name: value for name, value in asdict(found).items() if name != "seconds"}
    return Card(task.config, task.base.hash_contents(), task.pool.trained_on, task.recipe.rank, told)


def _sum_up(done: Progressed, parameters: int) -> TokensTrained:
    first, last = done.find_ends()
    return TokensTrained(len(done.history), round(done.seconds, 2), last, first, parameters)
