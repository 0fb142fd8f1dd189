"""The default store is in the user's data; an older one in the user's cache is moved there, whole, once."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dreammix_trt.core import files, store_place
from dreammix_trt.core.store import Store
from dreammix_trt.core.store_place import find_store

KEY, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The store's old and new place for a user of the test's own."""
    monkeypatch.delenv("DREAMMIX_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    store_place._warn_once.cache_clear()
    return tmp_path / "cache/dreammix-trt/store", tmp_path / "data/dreammix-trt/store"


def put(root: Path, key: str, content: bytes = b"weights") -> None:
    with Store(root).put(key, {"kind": "onnx", "part": "unet"}) as folder:
        assert folder is not None
        (folder / "unet.onnx").write_bytes(content)


def test_a_new_store_is_in_the_data_and_hashes_in_the_cache(homes: tuple[Path, Path]) -> None:
    assert Store().root == homes[1]
    assert files.cache_home() == homes[0].parent
    assert not homes[0].exists()
    assert not homes[1].exists()


def test_the_environment_names_one_place_for_all(
    homes: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(homes[0], KEY)
    monkeypatch.setenv("DREAMMIX_HOME", str(tmp_path / "mine"))
    assert Store().root == tmp_path / "mine/store"
    assert files.cache_home() == tmp_path / "mine"
    assert Store(homes[0]).get(KEY)


def test_an_older_store_moves_whole_and_its_old_path_still_leads_to_it(homes: tuple[Path, Path]) -> None:
    old, new = homes
    put(old, KEY)
    Store(old).register(old.parent / "engine", {KEY})
    assert Store().root == new
    assert (new / KEY / "unet.onnx").read_bytes() == b"weights"
    assert [user.keys for user in Store().list_users()] == [frozenset({KEY})]
    assert old.is_symlink()
    assert Store(old).get_sound(KEY) == old / KEY
    assert Store().root == new


def test_moved_files_need_not_be_hashed_again(homes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    put(homes[0], KEY, os.urandom(1 << 20))
    store = Store()
    read: list[Path] = []
    monkeypatch.setattr(files, "digest_of", lambda path: read.append(path) or "read")
    assert store.get_sound(KEY)
    assert not read


def test_a_store_that_an_older_version_made_again_is_merged(homes: tuple[Path, Path]) -> None:
    old, new = homes
    put(new, KEY, b"ours")
    put(old, KEY, b"theirs")
    put(old, OTHER)
    assert Store().root == new
    assert (new / KEY / "unet.onnx").read_bytes() == b"ours"
    assert {entry.key for entry in Store().entries()} == {KEY, OTHER}
    assert old.is_symlink()


def test_what_is_being_built_in_the_old_place_is_left_alone(homes: tuple[Path, Path]) -> None:
    old, new = homes
    put(new, KEY)
    put(old, OTHER)
    (old / f".{KEY}.1.x.tmp").mkdir()
    assert Store().root == new
    assert Store().get(OTHER)
    assert (old / f".{KEY}.1.x.tmp").is_dir()


def test_a_store_that_cannot_be_moved_stays_and_is_used(
    homes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(homes[0], KEY)

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "rename", refuse)
    with caplog.at_level(logging.WARNING):
        assert find_store() == homes[0]
        assert find_store() == homes[0]
    assert [record.message for record in caplog.records if "the store stays in" in record.message] == [
        f"the store stays in {homes[0]}, as it cannot be moved to {homes[1]} (Invalid cross-device link); move it "
        "yourself, or name its place in DREAMMIX_HOME or --store"
    ]
    assert Store().get(KEY) == homes[0] / KEY


def test_two_processes_at_once_move_it_once(homes: tuple[Path, Path]) -> None:
    put(homes[0], KEY)
    code = (
        "import json; from dreammix_trt.core.store import Store; s = Store();"
        f"print(json.dumps([str(s.root), str(s.get({KEY!r}))]))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    answers = [process.communicate(timeout=60) for process in running]
    assert [json.loads(out) for out, _ in answers] == [[str(homes[1]), str(homes[1] / KEY)]] * 4
    assert [complaint for _, complaint in answers] == [""] * 4
