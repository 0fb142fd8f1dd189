"""`dreammix-trt train-many` and `build-many`: one command for each subject of a folder, here or on a Ray cluster."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from dreammix_trt.build_cli import PANELS as BUILD
from dreammix_trt.build_cli import build
from dreammix_trt.core.errors import Cancelled, DreamMixError, FileFormatError, InputError
from dreammix_trt.core.files import folder_bytes, read_json
from dreammix_trt.core.passport import FILE_NAME as PASSPORT
from dreammix_trt.many import Begun, Events, Job, Outcome, run_in_turn, run_on_ray
from dreammix_trt.many_subjects import ATTRIBUTES, explain_no_class, find_learnt, find_photographed, read_names
from dreammix_trt.terminal import AsJson, print_json, print_table, say, say_error, warn
from dreammix_trt.train_cli import PANELS as TRAIN
from dreammix_trt.train_cli import train

_F = TypeVar("_F", bound=Callable[..., Any])

Photos = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with one folder of photographs a subject.")]
Loras = Annotated[
    Path,
    typer.Argument(metavar="FOLDER", help="Folder with one LoRA or subject file a subject, as `train-many` makes it."),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of what is made, OUT/NAME of each subject.")]
ClassName = Annotated[
    str | None, typer.Option(help="What all subjects are, in a word: mug; default: as each subject's folder says.")
]
Token = Annotated[
    str | None, typer.Option(help="The word that will mean a subject; default: as its folder says, or sks.")
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Train anew what other settings trained.")]
OnRay = Annotated[bool, typer.Option("--ray", help="Several at once, a task each, on a Ray cluster.")]
RayAddress = Annotated[
    str | None,
    typer.Option(
        help="Of a cluster that runs; auto: the one of this machine. Default: one that lasts as long as this."
    ),
]
CpusPerTask = Annotated[
    int | None, typer.Option(min=1, help="Cores of a task; the cluster's decide how many run at once. Default: 1.")
]

_WHERE = {"Where it runs": ("ray", "ray_address", "cpus_per_task")}
_WORDS = {"photos", "class_name", "token", "attributes", "out", "work", "resume", "force", "as_json"}
_PLACES = {"lora", "subject", "name", "attributes", "out", "keep", "as_json"}
TRAIN_PANELS = {**TRAIN, **_WHERE, "What is written": ("out", "merged", "force", "as_json")}
BUILD_PANELS = {**BUILD, **_WHERE, "What is written": ("out", "self_contained", "store", "verify", "as_json")}
TRAIN_EXAMPLES = """
Examples:

dreammix-trt train-many photos/ -o loras/ --class-name mug

dreammix-trt train-many photos/ -o loras/ --base sdxl/ --device cuda --ray --ray-address auto
"""
BUILD_EXAMPLES = """
Examples:

dreammix-trt build-many loras/ -o engines/

dreammix-trt build-many loras/ -o engines/ --base sdxl/ --target sm_89 --ray --cpus-per-task 4
"""


def _with_options_of(command: Callable[..., Any], without: set[str]) -> Callable[[_F], _F]:
    """Let a function take a command's options as its **options; `without`: those that it has itself, or sets."""

    def decorate(function: _F) -> _F:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[:-1]
        others = inspect.signature(command, eval_str=True).parameters.values()
        given = [*own, *(each for each in others if each.name not in without)]
        given.sort(key=lambda each: each.default is not inspect.Parameter.empty)
        function.__signature__ = inspect.Signature(given)  # type: ignore[attr-defined]
        return function

    return decorate


@_with_options_of(train, _WORDS)
def train_many(
    folder: Photos,
    out: Out,
    class_name: ClassName = None,
    token: Token = None,
    ray: OnRay = False,
    ray_address: RayAddress = None,
    cpus_per_task: CpusPerTask = None,
    force: Force = False,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Train a LoRA of each subject in a folder, as `train` does; what is done stays, what was stopped goes on."""
    from dreammix_trt.core.extras import require_training
    from dreammix_trt.trainer.folder import RECORD

    require_training()
    _check_out(out, folder)
    where = _check_ray(ray, ray_address, cpus_per_task, options["device"])
    if ray and options["threads"] is None:
        options["threads"] = where["cpus"]
    jobs, refused = list[Job](), list[Outcome]()
    for name, photos in find_photographed(folder, warn).items():
        try:
            words = _choose_words(photos, class_name, token, options)
        except DreamMixError as error:
            refused.append(Outcome(name, "failed", error=str(error)))
            continue
        place = out / name
        jobs.append(_make_job(name, train_subject, {"photos": photos, "force": force, **words}, place, RECORD))
    _run(jobs, refused, out, where, "steps", _read_steps, as_json)


@_with_options_of(build, _PLACES)
def build_many(
    folder: Loras,
    out: Out,
    ray: OnRay = False,
    ray_address: RayAddress = None,
    cpus_per_task: CpusPerTask = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Build an engine of each subject in a folder, as `build` does; what the same files made stays."""
    _check_out(out, folder)
    on_gpu = options["backend"] == "tensorrt" or "current" in (options["target"] or ())
    where = _check_ray(ray, ray_address, cpus_per_task, "cuda" if on_gpu else "cpu")
    jobs = [
        _make_job(name, build, {"lora": [str(lora)], "keep": True, **options}, out / name, PASSPORT)
        for name, lora in find_learnt(folder, warn).items()
    ]
    _run(jobs, [], out, where, "MB", _read_size, as_json)


def train_subject(*, out: Path, force: bool, **given: Any) -> None:
    """Train one subject: go on where it stands. force: begin anew where other settings stand in the way."""
    from dreammix_trt.trainer.checkpoints import find_work, has_checkpoint
    from dreammix_trt.trainer.folder import RECORD

    stopped = has_checkpoint(find_work(out))
    stands = stopped or (out / RECORD).exists()
    try:
        train(out=out, resume=stands, force=stopped, **given)
    except (InputError, FileFormatError):
        if not (force and stands):
            raise
        train(out=out, force=True, **given)


def _choose_words(
    photos: Path, class_name: str | None, token: str | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The options of `train` for one subject: those that were given, else what its folder says."""
    given = {**options, "class_name": class_name, "token": token}
    words = {
        "token": "sks",
        **read_names(photos),
        **{name: value for name, value in given.items() if value is not None},
    }
    if not words.get("class_name"):
        raise InputError(explain_no_class(photos))
    if options["captions"] == "attributes" and "attributes" not in words:
        raise InputError(
            f"--captions attributes needs {photos / ATTRIBUTES}, which has the words; `attributes` makes it"
        )
    if options["tensorboard"] is not None:
        words["tensorboard"] = options["tensorboard"] / photos.name
    return {**given, **words}


def _make_job(name: str, command: Callable[..., None], given: Mapping[str, Any], out: Path, record: str) -> Job:
    return Job(name, command, {**given, "out": out}, out, record, logging.getLogger().level)


def _check_out(out: Path, folder: Path) -> None:
    if out.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"--out {out} lies in {folder}, where everything is a subject; name a folder outside it")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a folder")


def _check_ray(ray: bool, address: str | None, cpus: int | None, device: str) -> dict[str, Any]:
    """What `_start` needs to know."""
    if not ray and (address is not None or cpus is not None):
        raise InputError("--ray-address and --cpus-per-task need --ray")
    if ray and device.startswith("cuda:"):
        raise InputError(f"--device {device}: Ray hands each task a GPU of its own; give --device cuda")
    if ray:
        from dreammix_trt.core.extras import require_cluster

        require_cluster()
    return {"ray": ray, "address": address, "cpus": cpus or 1, "device": device}


@contextmanager
def _start(jobs: Sequence[Job], where: Mapping[str, Any]) -> Iterator[Events]:
    """The events of jobs, here or on a cluster."""
    if not where["ray"]:
        with closing(run_in_turn(jobs)) as events:
            yield events
        return
    from dreammix_trt.ray_cluster import describe_need, open_cluster

    need = describe_need(where["device"], where["cpus"])
    with open_cluster(where["address"]), closing(run_on_ray(jobs, need)) as events:
        yield events


def _run(
    jobs: Sequence[Job],
    refused: Sequence[Outcome],
    out: Path,
    where: Mapping[str, Any],
    unit: str,
    measure: Callable[[Path], float],
    as_json: bool,
) -> None:
    """Run jobs, report each as it begins and ends, and all of them at the end.

    refused: subjects that need no try. unit, measure: what is said of the size of an output.

    Raises Cancelled for Ctrl-C; leaves the program with 1 where a subject failed.
    """
    total, done = len(jobs) + len(refused), {each.name: each for each in refused}
    for job in jobs:
        job.out.parent.mkdir(parents=True, exist_ok=True)
        job.log.touch()
    stopped = False
    try:
        with _start(jobs, where) as events:
            for event in events:
                if isinstance(event, Outcome):
                    done[event.name] = event
                _tell(event, f"{len(done)} of {total}")
    except KeyboardInterrupt:
        stopped = True
    outcomes = sorted(
        [*done.values(), *(Outcome(job.name, "unfinished") for job in jobs if job.name not in done)],
        key=lambda each: each.name,
    )
    told = [_describe(each, out / each.name, unit, measure) for each in outcomes]
    if as_json and not stopped:
        print_json({"subjects": told})
    elif not as_json:
        _print(told, unit)
    failed = [each for each in outcomes if each.state == "failed"]
    for each in failed:
        say_error(f"{each.name}: {each.error}")
    if stopped:
        left = sum(each.state == "unfinished" for each in outcomes)
        raise Cancelled(f"stopped; {left} of {total} are unfinished, and the same command goes on with them")
    if failed:
        say(f"{len(failed)} of {total} failed; the same command tries them again and leaves the others as they are")
        raise typer.Exit(1)


def _tell(event: Begun | Outcome, count: str) -> None:
    if isinstance(event, Begun):
        again = "its process died; it begins once more" if event.deaths else "begins"
        say(f"{event.name}: {again} ({event.process})")
        return
    for warning in event.warnings:
        warn(f"{event.name}: {warning}")
    say(f"{event.name}: {event.state} after {event.seconds:.1f} s ({count})")


def _describe(outcome: Outcome, place: Path, unit: str, measure: Callable[[Path], float]) -> dict[str, Any]:
    """A row of the table, and an object of --json."""
    row: dict[str, Any] = {"name": outcome.name, "state": outcome.state, "seconds": round(outcome.seconds, 1)}
    there = outcome.state in ("made", "already there")
    row |= {unit: measure(place) if there else None, "out": str(place) if there else None}
    return row | {"processes_died": outcome.deaths, "error": outcome.error or None}


def _print(rows: Sequence[Mapping[str, Any]], unit: str) -> None:
    lines = []
    for row in rows:
        died = f", a process died ({row['processes_died']})" if row["processes_died"] else ""
        seconds = "-" if row["state"] == "unfinished" else f"{row['seconds']:.1f}"
        size = "-" if row[unit] is None else f"{row[unit]:g}"
        lines.append([row["name"], row["state"] + died, seconds, size, row["out"] or "-"])
    print_table(lines, header=["subject", "state", "seconds", unit, "where"], right=(2, 3))


def _read_steps(out: Path) -> float:
    from dreammix_trt.trainer.folder import RECORD

    return int(read_json(out / RECORD)["settings"]["steps"])


def _read_size(out: Path) -> float:
    return round(folder_bytes(out) / 1e6, 1)
