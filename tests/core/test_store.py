"""The store holds complete engine sets only, whoever builds and however it ends."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dreammix_trt.core.errors import EngineError, InputError
from dreammix_trt.core.store import Store, check_files


def test_the_key_is_that_of_the_content(tmp_path: Path) -> None:
    assert Store.key({"a": 1, "b": [2]}) == Store.key({"b": [2], "a": 1})
    assert Store.key({"a": 1}) != Store.key({"a": 2})


def test_put_then_get(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.get("k") is None
    with store.put("k", {"a": 1}) as folder:
        assert folder is not None
        (folder / "x").write_text("hello")
        assert store.get("k") is None
    found = store.get("k")
    assert found is not None and (found / "x").read_text() == "hello"
    assert list(store.files("k")) == ["x"]
    with store.put("k", {"a": 1}) as again:
        assert again is None


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.put("k", {}):
        raise KeyboardInterrupt
    assert store.get("k") is None
    assert {file.name for file in tmp_path.iterdir()} <= {"k.lock"}


BUILDER = """
    import os, sys, time
    from pathlib import Path
    from dreammix_trt.core.store import Store
    with Store(Path(sys.argv[1])).put("k", {}) as folder:
        print("found" if folder is None else "building", flush=True)
        if folder:
            (folder / "x").write_text("half")
            if sys.argv[2] == "die":
                os.kill(os.getpid(), 9)
            time.sleep(1)
            (folder / "x").write_text("whole")
"""


def start(tmp_path: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(BUILDER), str(tmp_path), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_build_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    start(tmp_path, "die").communicate(timeout=60)
    assert any(file.name.endswith(".tmp") for file in tmp_path.iterdir())
    assert Store(tmp_path).get("k") is None
    out, _ = start(tmp_path, "live").communicate(timeout=60)
    assert out == "building\n"
    assert (tmp_path / "k" / "x").read_text() == "whole"
    assert not any(file.name.endswith(".tmp") for file in tmp_path.iterdir())


def test_two_builders_at_once_build_once(tmp_path: Path) -> None:
    both = [start(tmp_path, "live") for _ in range(2)]
    told = sorted(process.communicate(timeout=60)[0].strip() for process in both)
    assert told == ["building", "found"]
    assert (tmp_path / "k" / "x").read_text() == "whole"


def test_a_changed_or_missing_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.put("k", {}) as folder:
        assert folder is not None
        (folder / "x").write_text("hello")
    files, home = store.files("k"), tmp_path / "k"
    check_files(home, files, verify=False, remedy="build it")
    (home / "x").write_text("other")
    with pytest.raises(EngineError, match=r"x is not what was built .* build it"):
        check_files(home, files, verify=False, remedy="build it")
    (home / "x").unlink()
    with pytest.raises(EngineError, match=r"x is missing; build it"):
        check_files(home, files, verify=False, remedy="build it")


def test_a_damaged_entry_is_not_sound_and_is_built_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    for content in ("first", "second"):
        with store.put("k", {}) as folder:
            assert folder is not None, "a damaged entry must be built again"
            (folder / "x").write_text(content)
        assert store.sound("k") == tmp_path / "k"
        (tmp_path / "k" / "x").write_text("altered")
        assert store.sound("k") is None
    assert "damaged" in caplog.text
    (tmp_path / "k" / "manifest.json").write_text("{}")
    assert store.sound("k") is None


def test_a_store_in_the_way_of_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--store"), Store(tmp_path / "file").put("k", {}):
        pytest.fail("not reached")
