"""`dreammix-trt serve --ray` on a local cluster of two replicas, each a process of its own, on the embedded model."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from dreammix_trt.core.extras import CLUSTER, list_missing
from dreammix_trt.engine import DreamMix
from tests.conftest import write_lora
from tests.engine.conftest import make_scene
from tests.support.fake_service import U8, make_png, read_pixels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(list_missing(CLUSTER)), reason="Ray is not installed (the extra `ray`)"),
    pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="finds replicas in /proc"),
]
PICTURE, MASK = make_scene()
FIELDS = {"prompt": "a scarlet sks mug", "seed": 7, "num_inference_steps": 3}
LONG = 100
BUSY = 20  # hundredths of a second of work, after which a replica has painted


class Cluster:
    """The service in a process of its own, and what belongs to it."""

    def __init__(self, engine: Path, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "dreammix_trt", "serve", str(engine), "--port", "0", "--ray", "--threads", "1"]
        env = {**os.environ, "RAY_TMPDIR": str(folder), "HOME": str(folder)}  # where Ray writes its token
        self.errors = folder / "stderr"
        command += ["--ray-replicas", "2", "--timeout", str(LONG)]
        with (folder / "stdout").open("wb") as out, self.errors.open("wb") as errors:
            self.process = subprocess.Popen(command, stdout=out, stderr=errors, env=env)
        self.wait_until(lambda: "serving at " in self.errors.read_text() or self.process.poll() is not None)
        address = self.errors.read_text().partition("serving at ")[2].split()[0]
        self.client = httpx.Client(base_url=address, timeout=LONG)

    def wait_until(self, there: Callable[[], object]) -> None:
        end = time.monotonic() + LONG
        while not there():
            assert time.monotonic() < end, self.errors.read_text()
            time.sleep(0.05)

    def post(self, **fields: Any) -> str:
        files = {"image": make_png(PICTURE), "mask": make_png(MASK)}
        answer = self.client.post("/v1/jobs", files=files, data={"request": json.dumps({**FIELDS, **fields})})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def ask(self, job: str) -> dict[str, Any]:
        facts: dict[str, Any] = self.client.get(f"/v1/jobs/{job}").json()
        return facts

    def finish(self, job: str) -> dict[str, Any]:
        self.wait_until(lambda: self.ask(job)["state"] not in ("queued", "running"))
        return self.ask(job)

    def paint(self, **fields: Any) -> U8:
        return self.fetch(self.finish(self.post(**fields)))

    def fetch(self, done: dict[str, Any]) -> U8:
        assert done["state"] == "done", done
        return read_pixels(self.client.get(done["images"][0]).content)

    def find_painters(self) -> dict[int, int]:
        """The replicas' processes, and for how many hundredths of a second each has worked."""
        found = {}
        for pid in self.find_processes():
            try:
                named = "ServeReplica" in Path(f"/proc/{pid}/cmdline").read_text()  # but not while it paints
                loaded = named or "onnxruntime_pybind" in Path(f"/proc/{pid}/maps").read_text()
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            if loaded:
                found[pid] = int(fields[11]) + int(fields[12])
        return found

    def find_processes(self) -> set[int]:
        """All processes that descend from the service."""
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if fields[0] != "Z":
                    parents[int(entry.name)] = int(fields[1])
        found, size = {self.process.pid}, 0
        while len(found) > size:
            size = len(found)
            found |= {pid for pid, parent in parents.items() if parent in found}
        return found - {self.process.pid}

    def find_who_works(self, work: Callable[[], object]) -> set[int]:
        """The replicas that work while something happens."""
        before = self.find_painters()
        work()
        return {pid for pid, spent in self.find_painters().items() if spent - before.get(pid, spent) > BUSY}

    def paint_two(self) -> None:
        for job in [self.post(num_inference_steps=40) for _ in range(2)]:
            self.finish(job)

    def kill_replicas(self) -> None:
        for pid in self.find_painters():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster(mug_engine: Path) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="dr", dir="/tmp"))  # short: Ray has sockets in it
    cluster = None
    try:
        cluster = Cluster(mug_engine, folder)
        yield cluster
    finally:
        if cluster is not None:
            cluster.client.close()
            cluster.process.terminate()
            cluster.process.wait(LONG)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def painter(mug_engine: Path) -> Iterator[DreamMix]:
    with DreamMix.load(mug_engine, threads=1) as painter:
        yield painter


def test_what_is_painted_there_is_what_is_painted_here(cluster: Cluster, painter: DreamMix) -> None:
    done = cluster.finish(cluster.post(prompt="a scarlet sks mug (", num_images_per_prompt=2))
    here = painter.inpaint(PICTURE, MASK, **{**FIELDS, "prompt": "a scarlet sks mug (", "num_images_per_prompt": 2})  # type: ignore[arg-type]
    for k, place in enumerate(done["images"]):
        file = cluster.client.get(place).content
        assert np.array_equal(read_pixels(file), np.asarray(here.images[k]))
        assert Image.open(io.BytesIO(file)).info == Image.open(io.BytesIO(here.to_bytes(index=k))).info
    assert done["warnings"] == list(here.warnings)
    phases = set(re.findall(r'phase="([^"]+)"', cluster.client.get("/metrics").text))
    assert phases == here.timings.keys()
    refused = cluster.finish(cluster.post(decoder="asuka"))
    assert refused["error"]["type"] == "invalid_request" and refused["error"]["field"] == "decoder"


def test_two_requests_at_once_are_painted_by_two_replicas(cluster: Cluster) -> None:
    assert len(cluster.find_painters()) == 2
    assert len(cluster.find_who_works(cluster.paint_two)) == 2


def test_previews_come_for_those_who_watch(cluster: Cluster) -> None:
    job = cluster.post(num_inference_steps=60)
    shown, event = [], ""
    with cluster.client.stream("GET", f"/v1/jobs/{job}/events?previews=10") as stream:
        for line in stream.iter_lines():
            event = line[7:] if line.startswith("event: ") else event
            if event == "preview" and line.startswith("data: "):
                shown.append(json.loads(line[6:]))
    assert len(shown) >= 3 and all(each["step"] % 10 == 0 for each in shown)
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(each["image"].partition(",")[2])))) for each in shown]
    assert all(each.shape == PICTURE.shape for each in pictures) and (pictures[0] != pictures[-1]).any()


def test_a_cancelled_job_frees_its_replica(cluster: Cluster) -> None:
    jobs = [cluster.post(num_inference_steps=1000) for _ in range(2)]
    cluster.wait_until(lambda: all(cluster.ask(job)["step"] for job in jobs))
    for job in jobs:
        cluster.client.delete(f"/v1/jobs/{job}")
        assert cluster.finish(job)["state"] == "cancelled"
    assert cluster.finish(cluster.post())["state"] == "done"


def test_a_job_outlives_the_death_of_its_replica(cluster: Cluster) -> None:
    expected = cluster.paint(num_inference_steps=60)
    job = cluster.post(num_inference_steps=60)
    (place,) = cluster.find_who_works(lambda: cluster.wait_until(lambda: cluster.ask(job)["step"] > 15))
    os.kill(place, signal.SIGKILL)
    with cluster.client.stream("GET", f"/v1/jobs/{job}/events?previews=0") as stream:
        seen = [json.loads(line[6:]).get("step", 60) for line in stream.iter_lines() if line.startswith("data: ")]
    done = cluster.ask(job)
    assert [each["event"] for each in done["history"]] == ["accepted", "started", "retried", "done"]
    assert done["history"][2]["why"] == "the worker that painted it died"
    assert np.array_equal(cluster.fetch(done), expected)
    assert seen == sorted(seen) and done["step"] == 60


def test_subjects_are_painted_where_they_are_resident_and_reach_new_replicas(
    cluster: Cluster, painter: DreamMix, tmp_path: Path
) -> None:
    cluster.wait_until(lambda: len(cluster.find_who_works(cluster.paint_two)) == 2)  # the one that died is replaced
    lora = write_lora(tmp_path / "lora", seed=5) / "pytorch_lora_weights.safetensors"
    form = {"name": "cup", "token": "ohwx", "class_name": "cup"}
    answer = cluster.client.post("/v1/subjects", files={"file": lora.read_bytes()}, data=form)
    assert answer.status_code == 201, answer.text

    def find_place(subject: str) -> set[int]:
        return cluster.find_who_works(lambda: cluster.paint(subject=subject, num_inference_steps=20))

    for subject in ("mug", "cup"):
        find_place(subject)
        time.sleep(1)  # replicas tell the routers what they have every 0.1 s
    mugs, cups = find_place("mug"), find_place("cup")
    assert len(mugs) == len(cups) == 1 and mugs != cups
    assert [find_place(subject) for subject in ("cup", "mug", "cup")] == [cups, mugs, cups]

    cluster.kill_replicas()  # while nothing is painted
    name = painter.add_subject(lora, "cup", token="ohwx")
    here = np.asarray(painter.inpaint(PICTURE, MASK, **FIELDS, subject=name).images[0])  # type: ignore[arg-type]
    assert np.array_equal(cluster.paint(subject="cup"), here)
    assert cluster.client.delete("/v1/subjects/cup").status_code == 204
    without = painter.inpaint(PICTURE, MASK, **FIELDS, subject="mug")  # type: ignore[arg-type]
    assert np.array_equal(cluster.paint(subject="mug"), np.asarray(without.images[0]))
    painter.remove_subject("cup")


def test_a_second_death_is_the_jobs_end_and_not_the_services(cluster: Cluster) -> None:
    job = cluster.post(num_inference_steps=1000)
    for _ in range(2):
        step = cluster.ask(job)["step"]
        cluster.wait_until(lambda step=step: cluster.ask(job)["step"] > step)  # type: ignore[misc]
        cluster.kill_replicas()
        cluster.wait_until(lambda: len(cluster.ask(job)["history"]) > 2)
    failed = cluster.finish(job)
    assert failed["state"] == "failed" and "is not tried a third time" in failed["error"]["message"]
    assert [each["event"] for each in failed["history"]] == ["accepted", "started", "retried", "failed"]
    assert cluster.client.get("/readyz").status_code == 200
    assert cluster.paint().shape == PICTURE.shape


def test_at_its_end_it_drains_and_leaves_nothing(cluster: Cluster) -> None:
    processes = cluster.find_processes()
    last = cluster.post(num_inference_steps=40)
    cluster.process.send_signal(signal.SIGTERM)
    done = cluster.finish(last)
    assert done["state"] == "done" and cluster.client.get(done["images"][0]).status_code == 200
    assert cluster.process.wait(LONG) == 0
    cluster.wait_until(lambda: not any(Path(f"/proc/{pid}/fd").exists() for pid in processes))
    lines = [line for line in cluster.errors.read_text().splitlines() if not line.startswith("loading")]
    assert [line for line in lines if not line.startswith("warning: the worker that painted it died")] == lines[:2]
    assert not (cluster.folder / "stdout").read_bytes()
    files = [path for path in cluster.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any("serve" in path.parts for path in files)
    assert (cluster.folder / ".ray" / "auth_token").is_file()
    assert not [path for path in files if b"scarlet" in path.read_bytes()]
