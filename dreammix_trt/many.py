"""Many subjects, each of them one job: a command in another process, in turn on this machine or on a Ray cluster.

A job whose process dies is begun once more. What a command says goes to the job's log.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import typer

from dreammix_trt.core.errors import DreamMixError, InputError
from dreammix_trt.ray_cluster import list_nodes
from dreammix_trt.terminal import begin_messages, say_error, write_messages

State = Literal["made", "already there", "failed", "unfinished"]
_TRIES = 2  # of a job whose process dies
_GRACE = 10.0  # seconds that a job which is to end has for it
_WARNING = "warning: "


@dataclass(frozen=True)
class Job:
    """One command for one subject; it is sent to another process.

    name: the subject's.
    command: a function of a module, called with `arguments`.
    out: the directory that it makes. record: the file in it that is new when something was made.
    """

    name: str
    command: Callable[..., None]
    arguments: Mapping[str, Any]
    out: Path
    record: str
    log_level: int = logging.WARNING
    home: Path = field(default_factory=Path.cwd)

    @property
    def log(self) -> Path:
        """The file of what the command says; it is added to."""
        return self.out.with_name(f"{self.out.name}.log")

    def carry_out(self) -> Outcome:
        """Run the command in this process, where relative paths are those of `home`. Raises nothing but interrupts."""
        begun, error, stopped = time.perf_counter(), "", False
        try:
            os.chdir(self.home)
            before, start = _stamp(self.out / self.record), self.log.stat().st_size
        except OSError as failure:
            return Outcome(
                self.name,
                "failed",
                error=f"{failure.filename} cannot be reached on {socket.gethostname()} ({failure.strerror}); FOLDER, "
                "--out and what other options name must lie where every node of the cluster finds them",
            )
        with _log_to(self.log):
            begin_messages(logging.getLevelName(self.log_level), quiet=False)
            try:
                self.command(**self.arguments)
            except DreamMixError as failure:
                error = str(failure)
                say_error(error)
            except typer.Exit as end:
                stopped = end.exit_code != 0  # it has told why
            except Exception as failure:
                traceback.print_exc()
                error = f"{type(failure).__name__}: {failure}; this is a fault of the program, see {self.log}"
        with self.log.open(encoding="utf-8", errors="replace") as stream:
            stream.seek(start)
            said = tuple(line.removeprefix(_WARNING).rstrip() for line in stream if line.startswith(_WARNING))
        if stopped:
            error, said = (said or (f"it stopped; see {self.log}",))[-1], said[:-1]
        made = _stamp(self.out / self.record) != before
        state: State = "failed" if error else "made" if made else "already there"
        return Outcome(self.name, state, time.perf_counter() - begun, error, said)


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    seconds: that its last try took.
    error: why it failed, and what to do.
    warnings: of the command.
    deaths: how many of its processes died.
    """

    name: str
    state: State
    seconds: float = 0.0
    error: str = ""
    warnings: tuple[str, ...] = ()
    deaths: int = 0


@dataclass(frozen=True)
class Begun:
    """A try of a job has begun. process: on which machine, and its number. deaths: of earlier tries."""

    name: str
    process: str
    deaths: int = 0


Events = Generator[Begun | Outcome, None, None]


def run_in_turn(jobs: Sequence[Job]) -> Events:
    """Run jobs one after the other in a process of its own, which is started anew where it dies."""
    worker = _Worker()
    try:
        for job in jobs:
            for deaths in range(_TRIES):
                yield Begun(job.name, worker.start(), deaths)
                begun = time.perf_counter()
                outcome = worker.run(job)
                if outcome is not None:
                    break
            else:
                outcome, deaths = _give_up(job, worker.describe_end(), time.perf_counter() - begun), _TRIES
            yield replace(outcome, deaths=deaths)
    finally:
        worker.end()


def run_on_ray(jobs: Sequence[Job], need: Mapping[str, float]) -> Events:
    """Run jobs as tasks of the Ray cluster that is open; as many at once as it has room for.

    need: of one task, as `ray_cluster.describe_need` gives it.

    Raises InputError where no node has that much.
    """
    import ray

    _check_room(need)
    task = ray.remote(_work).options(num_returns="streaming", max_retries=0, **need)
    deaths = dict.fromkeys((job.name for job in jobs), 0)
    begun: dict[str, float] = {}
    running: dict[Any, Job] = {task.remote(job): job for job in jobs}
    try:
        while running:
            stream: Any = ray.wait(list(running), num_returns=1)[0][0]
            job = running[stream]
            told: Begun | Outcome
            try:
                told = ray.get(next(stream))  # type: ignore[assignment]
            except ray.exceptions.RayTaskError as error:
                told = Outcome(job.name, "failed", error=f"{error.cause!r}; see the logs of Ray on that node")
            except ray.exceptions.RayError as error:
                deaths[job.name] += 1
                if deaths[job.name] < _TRIES:
                    del running[stream]
                    running[task.remote(job)] = job
                    continue
                told = _give_up(
                    job, type(error).__name__, time.perf_counter() - begun.get(job.name, time.perf_counter())
                )
            if isinstance(told, Begun):
                begun[job.name] = time.perf_counter()
            else:
                del running[stream]
            yield replace(told, deaths=deaths[job.name])
    finally:
        _cancel(ray, list(running))


def _work(job: Job) -> Events:
    """A task of Ray: says where it runs, then how it ended."""
    yield Begun(job.name, f"{socket.gethostname()}, process {os.getpid()}")
    yield job.carry_out()


def _check_room(need: Mapping[str, float]) -> None:
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    if any(all(node.get(names[kind], 0) >= amount for kind, amount in need.items()) for node in list_nodes()):
        return
    wanted = " and ".join(f"{amount:g} {names[kind]}" for kind, amount in need.items())
    raise InputError(
        f"a task asks for {wanted}, which no node of the Ray cluster has; see --cpus-per-task and --device"
    )


def _cancel(ray: Any, tasks: Sequence[Any]) -> None:
    """End tasks that are left: interrupted, as by Ctrl-C, they have some seconds to clean up; then they are killed."""
    for force in (False, True):
        for task in tasks:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.cancel(task, force=force)
        ends = [task.completed() for task in tasks]
        if not ends or not ray.wait(ends, num_returns=len(ends), timeout=_GRACE)[1]:
            return


def _give_up(job: Job, how: str, seconds: float) -> Outcome:
    told = f"its process died {_TRIES} times ({how}), perhaps for lack of memory; its last words are in {job.log}"
    return Outcome(job.name, "failed", seconds, told)


class _Worker:
    """A process that runs jobs one after the other. It ends with this one, however this one ends."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._pipe: Any = None

    def start(self) -> str:
        """Start it unless it runs; says where."""
        if self._process is None or not self._process.is_alive():
            self.end()
            self._pipe, theirs = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(theirs,), name="dreammix-trt jobs")
            self._process.start()
            theirs.close()
        return f"process {self._process.pid}"

    def run(self, job: Job) -> Outcome | None:
        """Run a job; None: the process died."""
        try:
            self._pipe.send(job)
            outcome: Outcome = self._pipe.recv()
            return outcome
        except (EOFError, OSError):
            self._process.join()
            return None

    def describe_end(self) -> str:
        """How the process ended."""
        code = self._process.exitcode
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def end(self) -> None:
        """End it: what runs is interrupted, as by Ctrl-C, and has some seconds to clean up."""
        if self._process is None:
            return
        self._process.terminate()
        self._process.join(_GRACE)
        self._process.kill()
        self._process.join()
        self._process.close()
        self._pipe.close()
        self._process = None


def _serve(pipe: Connection) -> None:
    """The worker's own process: jobs come, outcomes go."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too, which decides
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            pipe.send(pipe.recv().carry_out())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@contextlib.contextmanager
def _log_to(file: Path) -> Iterator[None]:
    """Add to a file what this process says, libraries in C++ included."""
    with file.open("a", encoding="utf-8", errors="backslashreplace", buffering=1) as stream, write_messages(stream):
        kept = [os.dup(number) for number in (1, 2)]
        try:
            for number in (1, 2):
                os.dup2(stream.fileno(), number)
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {socket.gethostname()}, process {os.getpid()}\n")
            yield
        finally:
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)


def _stamp(file: Path) -> tuple[int, int] | None:
    """What changes when a file is written anew; None: there is none."""
    with contextlib.suppress(OSError):
        told = file.stat()
        return told.st_mtime_ns, told.st_ino
    return None
