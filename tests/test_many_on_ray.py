"""Jobs on a local cluster of Ray with two CPU workers: at once, each in a process; one is killed, one interrupted."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("ray") is None:  # not imported yet: what `open_cluster` sets has to come before
    pytest.skip("needs the extra ray", allow_module_level=True)
for _name in ("torch", "diffusers", "transformers", "peft"):
    pytest.importorskip(_name, reason="the trainer needs its extra")

from dreammix_trt import many_cli, ray_cluster  # noqa: E402
from dreammix_trt.core.errors import InputError  # noqa: E402
from dreammix_trt.core.lora import FILE_NAME  # noqa: E402
from dreammix_trt.many import Begun, Events, Job, Outcome, run_on_ray  # noqa: E402
from dreammix_trt.ray_cluster import describe_need, open_cluster  # noqa: E402
from tests.support.jobs import is_alive, job  # noqa: E402
from tests.support.tiny_model import write_tiny_model  # noqa: E402
from tests.support.training import write_photographs  # noqa: E402

NEED = describe_need("cpu", 1)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Two workers, and Ray's files in a folder of their own: its sockets want a short path."""
    folder = tempfile.mkdtemp(prefix="dmx-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        with open_cluster(cpus=2):
            yield
    shutil.rmtree(folder, ignore_errors=True)


def process_of(begun: Begun) -> int:
    return int(begun.process.split()[-1])


def test_two_subjects_are_trained_at_once_and_a_killed_one_once_more(tmp_path: Path) -> None:
    """The same bytes as in this process."""
    base = write_tiny_model(tmp_path / "base").folder
    given: dict[str, Any] = {"class_name": "mug", "steps": 2, "threads": 1, "beta": 0.0, "base": base, "force": False}
    names = ("cup", "mug")
    for name in names:
        write_photographs(tmp_path / "photos" / name)
    orders = {name: {**given, "photos": tmp_path / "photos" / name} for name in names}
    jobs = []
    for name, order in orders.items():
        out = tmp_path / "loras" / name
        out.parent.mkdir(exist_ok=True)
        jobs.append(Job(name, many_cli.train_subject, {**order, "out": out}, out, "subject.json"))
        jobs[-1].log.touch()
    events = run_on_ray(jobs, NEED)
    first, second = next(events), next(events)
    assert isinstance(first, Begun) and isinstance(second, Begun), "both have begun before one has ended"
    assert {first.name, second.name} == set(names) and process_of(first) != process_of(second) != os.getpid()
    os.kill(process_of(first), signal.SIGKILL)
    rest = list(events)
    assert [(each.name, each.deaths) for each in rest if isinstance(each, Begun)] == [(first.name, 1)]
    ends = {each.name: (each.state, each.deaths) for each in rest if isinstance(each, Outcome)}
    assert ends == {first.name: ("made", 1), second.name: ("made", 0)}
    for name, order in orders.items():
        many_cli.train_subject(out=tmp_path / "here" / name, **order)
        made, here = (tmp_path / place / name / FILE_NAME for place in ("loras", "here"))
        assert made.read_bytes() == here.read_bytes()


def test_jobs_end_as_they_do_without_ray(tmp_path: Path) -> None:
    asked: dict[str, dict[str, Any]] = {"wrong": {"error": "no picture"}, "dies": {"deaths": 9}, "made": {}}
    jobs = [job(tmp_path, name, **given) for name, given in asked.items()]
    found = {each.name: each for each in run_on_ray(jobs, NEED) if isinstance(each, Outcome)}
    assert {name: (each.state, each.deaths) for name, each in found.items()} == {
        "wrong": ("failed", 0), "dies": ("failed", 2), "made": ("made", 0),
    }  # fmt: skip
    assert found["wrong"].error == "no picture" and "died 2 times" in found["dies"].error
    assert found["made"].warnings == (f"{tmp_path / 'made'} is odd",)
    with pytest.raises(InputError, match="a task asks for 3 CPU, which no node of the Ray cluster has"):
        next(run_on_ray(jobs, describe_need("cpu", 3)))


def test_tasks_that_run_are_interrupted_where_their_events_are_left(tmp_path: Path) -> None:
    events = run_on_ray([job(tmp_path, name, wait=True) for name in "abc"], NEED)
    begun = [next(events), next(events)]
    until = time.monotonic() + 20
    while not all((tmp_path / each.name / "try-0").exists() for each in begun) and time.monotonic() < until:
        time.sleep(0.02)
    events.close()
    cleaned = {file.parent.name for file in tmp_path.glob("*/cleaned")}
    assert cleaned <= {each.name for each in begun}
    until = time.monotonic() + 20
    for each in begun:  # Ray now and then loses an interruption; then the process is killed
        while each.name not in cleaned and is_alive(process_of(each)) and time.monotonic() < until:
            time.sleep(0.05)
        assert each.name in cleaned or not is_alive(process_of(each))


def test_the_command_runs_its_jobs_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    from typer.testing import CliRunner

    from dreammix_trt.cli import app

    asked: list[Any] = []

    def note(jobs: list[Job], need: Any) -> Events:
        asked.append(({each.name: each.arguments["threads"] for each in jobs}, dict(need)))
        yield from ()

    monkeypatch.setattr(ray_cluster, "open_cluster", lambda address: asked.append(address) or nullcontext())
    monkeypatch.setattr(many_cli, "run_on_ray", note)
    write_photographs(tmp_path / "photos" / "mug")
    words = ["train-many", tmp_path / "photos", "-o", tmp_path / "out", "--class-name", "mug"]
    more = ["--ray", "--ray-address", "auto", "--cpus-per-task", "2"]
    done = CliRunner().invoke(app, [str(word) for word in (*words, *more)])
    assert done.exit_code == 0, done.output
    assert asked == ["auto", ({"mug": 2}, {"num_cpus": 2})], "a task's threads are the cores that it asks for"
