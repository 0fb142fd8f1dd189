"""Training ASUKA's prior, its alignment with a base, and its decoder: `train_asuka`."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dreammix_trt.core.asuka_folder import CONFIG, AsukaFolder, write_asuka
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.extras import require_training
from dreammix_trt.core.files import folder_bytes
from dreammix_trt.trainer.asuka.recipes import PARTS, AsukaRecipe, Part, recipe_for
from dreammix_trt.trainer.asuka.task import NETWORKS, AsukaTask, check_parts, config_for
from dreammix_trt.trainer.checkpoints import Checkpoints, Progressed, check_places, find_work, hold_places
from dreammix_trt.trainer.events import Events
from dreammix_trt.trainer.hardware import Hardware
from dreammix_trt.trainer.picture_pool import FolderPool, PicturePool, ScenePool
from dreammix_trt.trainer.preparing import Progress, say_nothing
from dreammix_trt.trainer.processes import Processes, join_processes, use_threads

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AsukaTrained:
    """What a training did; the folder's train.json holds it for each part. loss: mean of the last tenth of the steps.

    parameters: how many numbers learnt.
    """

    part: Part
    steps: int
    seconds: float
    loss: float
    first_loss: float
    parameters: int


def train_asuka(
    part: Part,
    out: str | Path,
    *,
    images: str | Path | None = None,
    objects: str | Path | None = None,
    base: str | Path | BaseFiles | None = None,
    recipe: AsukaRecipe | None = None,
    start: str | Path | None = None,
    perceptual: str | Path | None = None,
    hardware: Hardware | None = None,
    seed: int = 0,
    threads: int | None = None,
    work: str | Path | None = None,
    resume: bool = False,
    events: Events | None = None,
    progress: Progress | None = None,
) -> AsukaTrained:
    """Train one part and write the ASUKA folder `out`, whole or not at all; what is there of other parts is kept.

    part: "prior", then "align", which needs it; "decoder" needs neither. A new prior removes the old alignment.
    images: folder of pictures of any sizes; None: rooms are rendered, for the embedded base alone.
    objects: folder of silhouettes, white on black, for holes in the shape of things; None: made-up outlines, or of
        rendered rooms the things in them.
    base: as `train_lora` takes it.
    recipe: None: what suits the part and the base.
    start: what the part begins with, an ASUKA folder or a public file, as `task.read_start` takes it; None: random
        weights, of the decoder the base's VAE.
    perceptual: VGG-16's weights as torchvision has them, for LPIPS in the decoder's loss; None: slopes at three scales.
    work: folder of checkpoints and rendered rooms; None: OUT.work.
    hardware, seed, threads, resume, events, progress: as `train_lora` takes them.

    Same seed, threads and machine: the same bytes, also when it was stopped and resumed.

    Raises InputError for options and pictures that cannot be used and a loss that is not finite, FileFormatError for a
    base, folder or weights that do not fit, DeviceError without a GPU, BuildError for a full disk, MissingExtraError.
    """
    require_training()
    given = hardware or Hardware()
    _check_options(part, given, seed, perceptual, start)
    files = base if isinstance(base, BaseFiles) else BaseFiles.open(base)
    place, folder = Path(out).resolve(), Path(work) if work else find_work(out)
    before = _open_before(part, files, place, folder, events)
    recipe = recipe or recipe_for(part, files.native_side)
    with join_processes(given) as (processes, own):
        task = AsukaTask(
            part=part,
            base=files,
            pool=_open_pool(files, images, objects, recipe.rooms, folder, seed),
            recipe=recipe,
            config=before.config if before is not None else config_for(files),
            folder=before,
            hardware=own,
            seed=seed,
            start=None if start is None else Path(start),
            perceptual=None if perceptual is None else Path(perceptual),
            work=folder if processes.leads else None,
        )
        tell = progress if progress and processes.leads else say_nothing
        return _run(task, place, folder / part, processes, resume, events, tell, threads)


def _open_before(part: Part, base: BaseFiles, place: Path, work: Path, events: Events | None) -> AsukaFolder | None:
    """What was trained in the place before; None: nothing. It and the places are checked."""
    check_places(place, work, CONFIG, events)
    before = AsukaFolder.open(place) if (place / CONFIG).is_file() else None
    check_parts(part, before, place)
    if before is not None:
        before.check_fit(base.configs)
    return before


def _check_options(
    part: Part, hardware: Hardware, seed: int, perceptual: str | Path | None, start: str | Path | None
) -> None:
    """Raise InputError for what no training can have, DeviceError for a missing GPU, before anything is read."""
    hardware.check()
    if not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}; it must be 0 to 2^63 - 1")
    if perceptual is not None and part != "decoder":
        raise InputError("--perceptual is of the decoder's loss; leave it, or train the part decoder")
    if perceptual is not None and not Path(perceptual).is_file():
        raise InputError(f"--perceptual {perceptual}: no such file; give torchvision's vgg16-397923af.pth")
    if start is not None and not Path(start).exists():
        raise InputError(f"--start {start}: no such file or folder; name what the part shall begin with, or leave it")


def _open_pool(
    base: BaseFiles, images: str | Path | None, objects: str | Path | None, rooms: int, work: Path, seed: int
) -> PicturePool:
    if images is not None:
        return FolderPool(images, objects)
    if objects is not None:
        raise InputError("--objects needs a folder of pictures; rendered rooms have silhouettes of their own")
    return ScenePool(base, work, rooms, seed)


def _prepare(task: AsukaTask, processes: Processes, tell: Progress) -> None:
    """Make the pictures in one process: rooms are rendered once, and the others read them."""

    def prepare() -> None:
        task.pool.prepare(lambda share: tell("rooms", share, f"rendering {task.recipe.rooms} rooms"))

    if processes.leads:
        prepare()
    processes.wait()
    prepare()


def _run(
    task: AsukaTask,
    out: Path,
    work: Path,
    processes: Processes,
    resume: bool,
    events: Events | None,
    tell: Progress,
    threads: int | None,
) -> AsukaTrained:
    from dreammix_trt.trainer.learning import learn
    from dreammix_trt.trainer.stepping import Course

    held = hold_places(out, work, "another training is at work")
    with held if processes.leads else nullcontext(), use_threads(threads):
        settings = task.settings() | {"processes": processes.count}
        file = f"{NETWORKS[task.part][0]}.safetensors"
        metadata = {"format": "pt", "part": task.part, "base": task.base.name}
        checkpoints = Checkpoints(work, metadata, settings, task.recipe.checkpoint_every, file)
        checkpoints.check(resume=resume)
        _prepare(task, processes, tell)
        tell(task.part, 0.0, "reading the base")
        lesson, network = task.make_lesson(tell)
        course = Course(
            task.part,
            task.recipe.steps,
            task.recipe.learning_rate,
            task.recipe.rate_at,
            task.hardware,
            checkpoints,
            processes,
            tell,
            events,
        )
        done = learn(lesson, task.recipe, (task.seed, PARTS.index(task.part)), course, resume=resume)
        found = _sum_up(task.part, done, sum(value.numel() for value in lesson.trained().values()))
        if processes.leads:
            _write(task, out, network, found, settings)
            checkpoints.remove()
        processes.wait()
    log.info("%s: %s, %d steps in %.0f s, loss %.4f", out, task.part, found.steps, found.seconds, found.loss)
    return found


def _sum_up(part: Part, done: Progressed, parameters: int) -> AsukaTrained:
    first, last = done.find_ends()
    return AsukaTrained(part, len(done.history), round(done.seconds, 2), last, first, parameters)


def _write(task: AsukaTask, out: Path, network: Any, found: AsukaTrained, settings: dict[str, Any]) -> None:
    record = task.folder.read_record() if task.folder is not None else {}
    if task.part == "prior":
        record.pop("align", None)
    record[task.part] = {**asdict(found), "settings": settings}
    write_asuka(out, task.config, task.collect(network), record=record)
    log.info("%s: %d bytes", out, folder_bytes(out))
