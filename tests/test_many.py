"""Jobs in turn: in a process of its own, which may die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dreammix_trt.many import Begun, Outcome, run_in_turn
from tests.conftest import ROOT
from tests.support.jobs import is_alive, job


def test_jobs_end_as_they_end_and_none_ends_the_others(tmp_path: Path) -> None:
    asked = {
        "wrong": {"error": "a.png is no picture; give another"},
        "made": {},
        "dies-once": {"deaths": 1},
        "dies": {"deaths": 9},
        "faulty": {"fault": True},
        "stops": {"stop": True},
        "there": {},
    }
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "made").touch()
    jobs = [job(tmp_path, name, **given) for name, given in asked.items()]
    jobs.append(replace(jobs[0], name="far", home=Path("/nowhere/at/all")))
    events = list(run_in_turn(jobs))
    found = {event.name: event for event in events if isinstance(event, Outcome)}
    assert {name: (each.state, each.deaths) for name, each in found.items()} == {
        "wrong": ("failed", 0), "made": ("made", 0), "dies-once": ("made", 1), "dies": ("failed", 2),
        "faulty": ("failed", 0), "stops": ("failed", 0), "there": ("already there", 0), "far": ("failed", 0),
    }  # fmt: skip
    assert found["wrong"].error == "a.png is no picture; give another"
    assert found["stops"].error == "look at the masks"
    assert "ZeroDivisionError: by zero" in found["faulty"].error and str(jobs[4].log) in found["faulty"].error
    assert "died 2 times (SIGKILL)" in found["dies"].error
    assert "/nowhere/at/all cannot be reached" in found["far"].error
    begun = [(event.name, event.deaths) for event in events if isinstance(event, Begun)]
    assert [each for each in begun if each[0].startswith("dies")] == [
        ("dies-once", 0), ("dies-once", 1), ("dies", 0), ("dies", 1),
    ]  # fmt: skip
    pids = {event.process for event in events if isinstance(event, Begun)}
    assert len(pids) == 4, "a process lasts until it dies"
    assert found["made"].warnings == (f"{tmp_path / 'made'} is odd",)
    log = jobs[1].log.read_text()
    assert f"making {tmp_path / 'made'}\nwarning: {tmp_path / 'made'} is odd\n" in log, "all that it said"
    assert "Traceback" in jobs[4].log.read_text() and "error: a.png is no picture" in jobs[0].log.read_text()


def test_a_job_that_runs_is_interrupted_where_its_events_are_left(tmp_path: Path) -> None:
    events = run_in_turn([job(tmp_path, "endless", wait=True), job(tmp_path, "next")])
    begun = next(events)
    assert isinstance(begun, Begun)
    events.close()  # before it was sent to the process
    events = run_in_turn([job(tmp_path, "endless", wait=True)])
    next(events)
    interrupter = threading.Thread(target=_interrupt_when_there, args=(tmp_path / "endless" / "waits",))
    previous = signal.signal(signal.SIGUSR1, signal.default_int_handler)  # Ctrl-C, while it waits
    try:
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            next(events)
    finally:
        interrupter.join()
        signal.signal(signal.SIGUSR1, previous)
    assert (tmp_path / "endless" / "cleaned").exists() and not (tmp_path / "next").exists()


def test_the_process_of_the_jobs_ends_with_a_killed_parent(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from dreammix_trt.many import run_in_turn
        from tests.support.jobs import job
        if __name__ == "__main__":
            for event in run_in_turn([job(Path(sys.argv[1]), "endless", wait=True)]):
                print(event.process, flush=True)
    """
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(script))
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, file, tmp_path], stdout=subprocess.PIPE, text=True, env=variables)
    assert parent.stdout is not None
    child = int(parent.stdout.readline().split()[-1])
    until = time.monotonic() + 60
    while not (tmp_path / "endless").exists() and time.monotonic() < until:
        time.sleep(0.05)
    parent.kill()
    parent.communicate()
    while is_alive(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_alive(child)


def _interrupt_when_there(file: Path) -> None:
    """Interrupt the main thread when a job has made a file."""
    until = time.monotonic() + 60
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.05)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
