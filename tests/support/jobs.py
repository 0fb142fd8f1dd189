"""Commands for jobs: they make a file, fail, die or wait."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path

import typer

from dreammix_trt.core.errors import InputError
from dreammix_trt.many import Job
from dreammix_trt.terminal import say, warn


def make(
    out: Path, *, deaths: int = 0, error: str = "", fault: bool = False, stop: bool = False, wait: bool = False
) -> None:
    """Make `out`/made unless it is there.

    deaths: how often the process dies first. error: what is wrong. fault: the program is. stop: it ends itself.
    wait: until it is interrupted.
    """
    say(f"making {out}")
    logging.getLogger("maker").warning("%s is odd", out)
    out.mkdir(exist_ok=True)
    tries = len(list(out.glob("try-*")))
    (out / f"try-{tries}").touch()
    if tries < deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    if error:
        raise InputError(error)
    if fault:
        raise ZeroDivisionError("by zero")
    if stop:
        warn("look at the masks")
        raise typer.Exit(1)
    try:
        while wait:
            (out / "waits").touch()
            time.sleep(0.05)
    except KeyboardInterrupt:
        (out / "cleaned").touch()
        raise
    if not (out / "made").exists():
        (out / "made").write_text(str(os.getpid()))


def job(folder: Path, name: str, **arguments: object) -> Job:
    """A job that makes FOLDER/NAME, with its log."""
    found = Job(name, make, {"out": folder / name, **arguments}, folder / name, "made")
    found.log.touch()
    return found


def is_alive(process: int) -> bool:
    """Whether a process of this number is there and has not ended."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
