"""Kill -9 at any moment, two builders at once, a full disk: the store is old or new, and the next build goes on.

Real processes on the embedded base, whose graphs are shipped: a build takes a second.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreammix_trt.building import build
from dreammix_trt.core.errors import BuildError
from dreammix_trt.core.passport import Passport
from dreammix_trt.core.store import Store, check_files
from dreammix_trt.engine.directory import check_engine

ROOT = Path(__file__).resolve().parent.parent
PARTS = [
    *("text_encoder", "text_encoder_2", "vae_encoder", "inpaint_head", "asuka_prior"),
    *("unet_kv", "unet", "unet_raw_kv", "unet_raw", "vae_decoder", "asuka_decoder"),
    *("subject_features", "token_select", "token_proj", "base"),
]

# Writes the name of each part that it makes into a log. Kills itself as `when` says: "before N" parts are done, right
# "after N" are, or "inside N", with the weights of the next one half-written.
BUILDER = """
    import os, sys
    from pathlib import Path
    from dreammix_trt.building import build, one_build, parts
    from dreammix_trt.core import tensors
    from dreammix_trt.core.store import Store
    from dreammix_trt.export import onnx_export

    out, store, log, when = sys.argv[1:]
    how, _, number = when.partition(" ")
    done = []

    def die():
        os.kill(os.getpid(), 9)

    def noted(step, name):
        if how == "before" and len(done) == int(number):
            die()
        with open(log, "a") as file:
            file.write(name + "\\n")
        step()
        done.append(name)

    def exported(base, network, *rest, **more):
        noted(lambda: export_network(base, network, *rest, **more), network.name)

    def written(*rest):
        noted(lambda: export_facts(*rest), "base")

    def encoded(values, *rest):
        written_tensors.append(1)
        if how == "inside" and len(done) == int(number) and len(written_tensors) > 5:
            die()
        return encode(values, *rest)

    class Watched(Store):
        def put(self, key, what):
            return watched(super().put(key, what))

    from contextlib import contextmanager

    @contextmanager
    def watched(putting):
        with putting as folder:
            yield folder
            written_tensors.clear()
        if how == "after" and len(done) == int(number):
            die()

    written_tensors = []
    export_network, export_facts, encode = parts.export_network, parts.export_facts, tensors._encode
    parts.export_network, parts.export_facts, tensors._encode = exported, written, encoded
    one_build.Store = Watched
    build(out=out, store=store, verify=False)
"""


class Place:
    """An output, a store and a log of what builds made."""

    def __init__(self, folder: Path) -> None:
        self.out, self.store, self.log = folder / "out", folder / "store", folder / "log"
        self.log.touch()

    def start(self, when: str = "never") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(BUILDER), self.out, self.store, self.log, when]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)

    def run(self, when: str = "never") -> tuple[int, list[str]]:
        """Exit status, and the parts that this build began to make."""
        before = len(self.made())
        process = self.start(when)
        _, told = process.communicate(timeout=120)
        assert process.returncode in (0, -signal.SIGKILL), told
        return process.returncode, self.made()[before:]

    def made(self) -> list[str]:
        return self.log.read_text().split()

    def check_store(self) -> set[str]:
        """Every part in the store is whole, to the byte; their names."""
        shelf = Store(self.store)
        for entry in shelf.entries():
            assert entry.complete and entry.kind != "unknown"
            check_files(self.store / entry.key, shelf.files(entry.key), verify=True, remedy="")
        return {entry.name for entry in shelf.entries()}

    def check_done(self) -> Passport:
        passport = check_engine(self.out, verify=True, store=self.store)
        assert self.check_store() == set(PARTS) == passport.parts.keys()
        assert list(self.store.glob(".*.tmp")) == [] and list(self.out.parent.glob(".*.tmp")) == []
        return passport


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("number", [0, 1, 6, 11])
@pytest.mark.parametrize("moment", ["before", "inside", "after"])
def test_a_killed_build_leaves_whole_parts_and_the_next_goes_on(place: Place, moment: str, number: int) -> None:
    if (moment, number) == ("inside", 11):
        number = 9  # the base has no tensors: kill in a larger part
    if moment == "after":
        number += 1
    status, begun = place.run(f"{moment} {number}")
    assert status == -signal.SIGKILL
    assert begun == PARTS[: number + (moment == "inside")]
    assert place.check_store() == set(PARTS[:number])
    assert not place.out.exists()
    if moment == "inside":
        (leftover,) = place.store.glob(".*.tmp")
        assert any(leftover.iterdir())
    assert place.run() == (0, PARTS[number:]), "what is done is not made again"
    place.check_done()


def test_a_kill_leaves_the_old_engine_in_its_place(place: Place, mug_engine: Path) -> None:
    import shutil

    shutil.copytree(mug_engine, place.out)
    old = Passport.read(place.out)
    assert place.run(f"after {len(PARTS)}")[0] == -signal.SIGKILL
    assert Passport.read(place.out) == old
    assert place.run() == (0, [])
    assert place.check_done() != old


def test_kills_at_arbitrary_moments(place: Place) -> None:
    """From outside, at moments that nobody chose; each build starts from what the last one left."""
    killed = 0
    for attempt in range(8):
        process = place.start()
        time.sleep(0.3 + 0.12 * attempt)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        killed += process.returncode != 0
        done = place.check_store()
        if place.out.exists():
            assert done == set(PARTS)
            check_engine(place.out, verify=True, store=place.store)
    assert killed > 0
    assert place.run()[0] == 0
    place.check_done()


def test_two_builders_at_once_make_every_part_once(tmp_path: Path) -> None:
    one, other = Place(tmp_path), Place(tmp_path)
    other.out = tmp_path / "other"
    running = [place.start() for place in (one, other)]
    told = [process.communicate(timeout=180) for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    assert Counter(one.made()) == dict.fromkeys(PARTS, 1)
    assert one.check_done().parts == other.check_done().parts


def test_a_builder_takes_over_from_one_that_is_killed_beside_it(tmp_path: Path) -> None:
    """The lock of a part dies with its holder: the one who waits makes the part."""
    dying, living = Place(tmp_path), Place(tmp_path)
    living.out = tmp_path / "other"
    running = [dying.start("inside 2"), living.start()]
    for process in running:
        process.communicate(timeout=180)
    assert running[1].returncode == 0
    if running[0].returncode:  # else the other was ahead and made that part
        assert running[0].returncode == -signal.SIGKILL and not dying.out.exists()
    living.check_done()


# A full disk


class Full:
    """The disk takes `room` more bytes of weights."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, values: np.ndarray[Any, Any], *rest: Any) -> np.ndarray[Any, Any]:
        from dreammix_trt.core import tensors

        stored: np.ndarray[Any, Any] = self.encode(values, *rest)
        self.room -= stored.nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert tensors._encode is self
        return stored

    def encode(self, *given: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("room", [0, 3_000_000])
def test_a_disk_that_fills_up_is_named_and_the_next_build_goes_on(
    place: Place, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dreammix_trt.core import tensors

    full = Full(room)
    monkeypatch.setattr(full, "encode", tensors._encode)
    with monkeypatch.context() as patch:
        patch.setattr(tensors, "_encode", full)
        with pytest.raises(BuildError, match=r"no space left.*store prune.*--store") as caught:
            build(out=place.out, store=place.store, verify=False)
    assert str(place.store) in str(caught.value)
    assert not place.out.exists() and list(place.store.glob(".*.tmp")) == []
    kept = place.check_store()
    assert (kept == set()) == (room == 0)
    status, begun = place.run()
    assert status == 0 and set(begun) == set(PARTS) - kept
    place.check_done()


def test_a_disk_that_is_full_for_the_engine_directory_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreammix_trt.core.passport import Passport as Written

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    build(out=place.out, store=place.store, verify=False)
    before = {file.name: file.read_bytes() for file in place.out.iterdir() if file.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(Written, "write", full)
        with pytest.raises(BuildError, match=r"out: no space left there"):
            build(out=place.out, store=place.store, verify=False)
    assert {file.name: file.read_bytes() for file in place.out.iterdir() if file.is_file()} == before
    assert list(place.out.parent.glob(".*.tmp")) == []


LIMITED = """
    import resource, sys
    from dreammix_trt.building import build
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    build(out=sys.argv[1], store=sys.argv[2], verify=False)
"""


def test_a_limit_on_file_sizes_leaves_nothing_half_written(place: Place) -> None:
    """The system's own refusal, wherever it comes: nothing that is cut is ever taken for a part."""
    pytest.importorskip("resource")
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(place.out), str(place.store)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)
    assert done.returncode == 1 and "Error" in done.stderr
    assert not place.out.exists() and list(place.store.glob(".*.tmp")) == []
    kept = place.check_store()
    assert "unet" not in kept
    assert place.run()[0] == 0
    place.check_done()
