"""The store has complete parts only, whoever builds and however a build ends, and loses none that an engine needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dreammix_trt.core.errors import BuildError, EngineError, InputError
from dreammix_trt.core.files import write_json
from dreammix_trt.core.store import Entry, Store, check_files
from dreammix_trt.core.store_prune import Pruning, plan_pruning, prune

MIB = 1 << 20


def add(store: Store, kind: str, name: str, size: int = 100, **facts: Any) -> str:
    """Put a part of one file of `size` bytes into a store; returns its key."""
    parts = {"kind": kind, "part": name, **facts}
    key = Store.key(parts)
    with store.put(key, parts) as folder:
        assert folder is not None
        (folder / "data").write_bytes(bytes(size))
    return key


def write_engine(folder: Path, keys: Mapping[str, str], **more: Any) -> Path:
    """Write the part of an engine directory that the store reads."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"parts": dict(keys), "networks_at": "store", "command": f"dreammix-trt build --out {folder}", **more}
    write_json(folder / "passport.json", record)
    return folder


def set_time(path: Path, seconds: int) -> None:
    os.utime(path, ns=(seconds * 10**9, seconds * 10**9))


def record_of(store: Store) -> Path:
    """The one record of a user."""
    (record,) = (store.root / "users").glob("*.json")
    return record


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
    with Store(Path(sys.argv[1])).put(sys.argv[3], {}) as folder:
        print("found" if folder is None else "building", flush=True)
        if folder:
            (folder / "x").write_text("half")
            if sys.argv[2] == "die":
                os.kill(os.getpid(), 9)
            time.sleep(0.5)
            (folder / "x").write_text("whole")
"""


def start(tmp_path: Path, how: str, key: str = "k") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(BUILDER), str(tmp_path), how, key]
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
        assert store.get_sound("k") == tmp_path / "k"
        (tmp_path / "k" / "x").write_text("altered")
        assert store.get_sound("k") is None
    assert "damaged" in caplog.text
    (tmp_path / "k" / "manifest.json").write_text("{}")
    assert store.get_sound("k") is None


def test_a_store_in_the_way_of_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--store"), Store(tmp_path / "file").put("k", {}):
        pytest.fail("not reached")


# The build is killed at every event that Python reports: a file is opened, renamed or removed, a directory is made.
KILLED_AT_EVERY_STEP = """
    import os, shutil, sys
    from pathlib import Path
    import filelock
    from dreammix_trt.core.store import Store

    store, key, before = Store(Path(sys.argv[1])), "a" * 64, sys.argv[2]
    folder = store.root / key

    def act():
        if before == "complete":
            assert store.remove(key)
            return
        with store.put(key, {}) as made:
            (made / "x").write_text("new")

    def content():
        return (folder / "x").read_text() if store.get(key) else None

    def killed(moment):
        child = os.fork()
        if child:
            return os.WIFSIGNALED(os.waitpid(child, 0)[1])
        count = 0
        def step(event, arguments):
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), 9)
        sys.addaudithook(step)
        act()
        os._exit(0)

    old = {"absent": None, "damaged": "changed", "complete": "old"}[before]
    new = None if before == "complete" else "new"
    moment, seen = 0, set()
    while True:
        shutil.rmtree(store.root, ignore_errors=True)
        if old:
            with store.put(key, {}) as made:
                (made / "x").write_text("old")
            (folder / "x").write_text(old)
        moment += 1
        died = killed(moment)
        seen.add(content())
        assert content() in (old, new), content()
        if content() == "new":
            assert store.get_sound(key)
        assert not died or len(store.leftovers()) <= 2
        store.tidy()
        if store.get(key):
            assert store.remove(key)
        store.tidy()
        left = list(store.root.glob("*"))
        assert not left, left
        if not died:
            break
    assert seen == {old, new}
    print(moment)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork and the exchange of directories")
@pytest.mark.parametrize("before", ["absent", "damaged", "complete"])
def test_killed_at_any_moment_leaves_old_or_new(tmp_path: Path, before: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED_AT_EVERY_STEP), str(tmp_path / "store"), before]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


def test_what_is_being_built_is_left_alone(tmp_path: Path) -> None:
    store, key = Store(tmp_path), "b" * 64
    with store.put(key, {}) as folder:
        assert folder is not None
        (folder / "x").write_text("old")
    (tmp_path / key / "x").write_text("changed")
    builder = start(tmp_path, "live", key)
    assert builder.stdout and builder.stdout.readline() == "building\n"
    assert store.remove(key) is None
    assert store.leftovers() == []
    assert store.tidy() == 0
    builder.communicate(timeout=60)
    assert (tmp_path / key / "x").read_text() == "whole"


def test_a_killed_build_is_a_leftover_until_it_is_tidied(tmp_path: Path) -> None:
    store, key = Store(tmp_path), "c" * 64
    start(tmp_path, "die", key).communicate(timeout=60)
    assert [path.name.split(".")[1] for path in store.leftovers()] == [key]
    assert store.tidy() == len("half")
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_parts_is_ever_listed_or_removed(tmp_path: Path) -> None:
    for name in ("thesis", ".engine.999999999.abc.tmp", "z" * 64):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    (tmp_path / "uv.lock").write_text("")
    store = Store(tmp_path)
    assert (store.entries(), store.leftovers(), store.tidy(), store.remove("thesis")) == ([], [], 0, None)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_new_part_is_not_read_again_unless_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    key = add(store, "engine", "unet", size=2 * MIB)

    def read(path: Path) -> str:
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr("dreammix_trt.core.files.digest_of", read)
    assert store.get_sound(key)
    with pytest.raises(AssertionError, match="read again"):
        check_files(tmp_path / key, store.files(key), verify=True, remedy="")


@pytest.mark.parametrize("how", ["written", "told by a library"])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, how: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    store = Store(tmp_path)
    with pytest.raises(BuildError, match="store prune") as caught, store.put("k", {}) as folder:
        assert folder is not None
        (folder / "x").write_text("half")
        if how == "written":
            Path("/dev/full").write_text("x")
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert str(tmp_path) in str(caught.value) and "left)" in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"k.lock"}


def test_other_failures_of_a_build_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Store(tmp_path).put("k", {}):
        raise ZeroDivisionError


def test_a_place_that_cannot_be_written_is_told_without_a_trace(tmp_path: Path) -> None:
    Store(tmp_path / "new").check_writable()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        Store(tmp_path / "file" / "store").check_writable()
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_the_passport_says_what_an_engine_needs(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    engine = write_engine(tmp_path / "mug", {"unet": "1", "base": "2"})
    store.register(engine, ["9"])
    set_time(record_of(store), 1000)
    assert store.users() == {engine: frozenset("12")}
    write_engine(engine, {"unet": "3"})
    assert store.users() == {engine: frozenset("3")}
    set_time(engine / "passport.json", 999)  # older than the record: a build is about to replace it
    assert store.users() == {engine: frozenset("39")}
    write_engine(engine, {"unet": "3"}, networks_at="networks")
    assert store.users() == {}


def test_an_engine_that_is_not_there_is_no_user_but_remembered(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    gone, broken = tmp_path / "gone", write_engine(tmp_path / "broken", {})
    (broken / "passport.json").write_text("{")
    for engine in (gone, broken):
        store.register(engine, {"1", "2"})
    assert store.users() == {}
    assert [(user.engine, user.keys, user.present) for user in store.list_users()] == [
        (broken, frozenset("12"), False),
        (gone, frozenset("12"), False),
    ]
    store.forget(gone)
    store.register(broken, ())
    assert store.list_users() == []


def test_registering_again_writes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.register(tmp_path / "mug", ["1", "2"])
    set_time(record_of(store), 1000)
    store.register(tmp_path / "mug", ["2", "1"])
    assert record_of(store).stat().st_mtime == 1000
    store.register(tmp_path / "mug", ["2"])
    assert record_of(store).stat().st_mtime > 1000


def test_registering_never_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    Store(tmp_path / "file").register(tmp_path / "mug", ["1"])
    store = Store(tmp_path / "store")
    strange = Path(os.fsdecode(bytes(tmp_path) + b"/\xff\xfe"))
    store.register(strange, ["1"])
    assert [user.engine for user in store.list_users()] == [strange]
    record_of(store).write_text("[")
    assert store.list_users() == []


def test_entries_tell_what_is_there(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert store.entries() == []
    onnx = add(store, "onnx", "unet", 1000)
    plan = add(store, "engine", "unet", 2000, onnx=onnx)
    engine = write_engine(tmp_path / "mug", {"unet": plan})
    store.register(engine, [plan])
    first, second = store.entries()
    assert (first.key, first.kind, first.name, first.users, first.complete) == (onnx, "onnx", "unet", (), True)
    assert (second.key, second.users, second.parts["onnx"]) == (plan, (engine,), onnx)
    assert 2000 < second.bytes < 3000 and second.modified > 1e9
    (store.root / plan / "data").unlink()
    (store.root / onnx / "manifest.json").write_text("{")
    damaged = store.entries()
    assert [(entry.kind, entry.complete) for entry in damaged] == [("engine", False), ("unknown", False)]


class Shelf:
    """A store with an engine directory `mug` that needs `base` and `plan`; nobody needs the other parts."""

    def __init__(self, place: Path) -> None:
        self.store = store = Store(place / "store")
        self.base, self.graph = add(store, "base", "base"), add(store, "graph", "unet")
        self.onnx, self.stale = add(store, "onnx", "unet", v=1), add(store, "onnx", "unet", v=0)
        self.plan = add(store, "engine", "unet", onnx=self.onnx, targets=["sm_89"])
        self.unused = add(store, "engine", "unet", onnx=self.onnx, targets=["sm_120"])
        self.engine = write_engine(place / "mug", {"base": self.base, "unet": self.plan})
        store.register(self.engine, [self.base, self.plan])

    def present(self) -> set[str]:
        return {entry.key for entry in self.store.entries()}


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def keys_of(entries: Iterable[Entry]) -> set[str]:
    return {entry.key for entry in entries}


def test_what_an_engine_needs_stays_and_says_so(shelf: Shelf) -> None:
    plan = plan_pruning(shelf.store)
    assert keys_of(plan.goes) == {shelf.onnx, shelf.stale, shelf.unused}
    reasons = {entry.key: why for entry, why in plan.stays}
    assert reasons.keys() == {shelf.base, shelf.graph, shelf.plan}
    assert str(shelf.engine) in reasons[shelf.plan] and "--all" in reasons[shelf.graph]
    assert plan.exported_again == ("unet",)
    assert plan.bytes == sum(entry.bytes for entry in plan.goes)
    freed, left = prune(shelf.store, plan)
    assert (freed, left) == (plan.bytes, [])
    assert shelf.present() == reasons.keys()
    assert not any(path.name.startswith((shelf.onnx, f".{shelf.onnx}")) for path in shelf.store.root.iterdir())


@pytest.mark.parametrize(
    "options, goes",
    [
        ({"everything": True}, {"graph", "onnx", "stale", "unused"}),
        ({"keep_onnx": True}, {"stale", "unused"}),
        ({"keep_onnx": True, "everything": True}, {"graph", "stale", "unused"}),
    ],
)
def test_options_of_pruning(shelf: Shelf, options: dict[str, bool], goes: set[str]) -> None:
    plan = plan_pruning(shelf.store, **options)
    assert keys_of(plan.goes) == {getattr(shelf, name) for name in goes}
    assert bool(plan.exported_again) == ("onnx" in goes)


def test_an_engine_on_a_disk_that_is_not_mounted_keeps_its_parts(shelf: Shelf) -> None:
    away = shelf.engine.rename(shelf.engine.with_name("away"))
    plan = plan_pruning(shelf.store)
    assert plan.lost == (shelf.engine,) and shelf.plan not in keys_of(plan.goes)
    assert any("--forget-missing" in why for entry, why in plan.stays if entry.key == shelf.plan)
    assert shelf.store.remove(shelf.plan) is None
    forgetting = plan_pruning(shelf.store, forget_missing=True)
    assert forgetting.forgotten == (shelf.engine,) and {shelf.base, shelf.plan} < keys_of(forgetting.goes)
    away.rename(shelf.engine)  # mounted again before it is done
    assert keys_of(prune(shelf.store, forgetting)[1]) == {shelf.base, shelf.plan}
    shelf.engine.rename(away)
    prune(shelf.store, forgetting)
    assert shelf.present() == {shelf.graph} and shelf.store.list_users() == []


def test_what_comes_to_be_needed_after_the_plan_stays(shelf: Shelf, tmp_path: Path) -> None:
    plan = plan_pruning(shelf.store)
    shelf.store.register(tmp_path / "new", [shelf.unused])  # a build that has begun
    _, left = prune(shelf.store, plan)
    assert keys_of(left) == {shelf.unused}


def test_damaged_parts_go_unless_needed(shelf: Shelf) -> None:
    for key in (shelf.graph, shelf.plan):
        (shelf.store.root / key / "data").unlink()
    plan: Pruning = plan_pruning(shelf.store)
    assert shelf.graph in keys_of(plan.goes) and shelf.plan not in keys_of(plan.goes)


def test_manifests_say_what_a_part_is_made_of(shelf: Shelf) -> None:
    manifest = json.loads((shelf.store.root / shelf.plan / "manifest.json").read_text())
    assert manifest["key"] == shelf.plan == Store.key(manifest["parts"])
    assert list(manifest["files"]) == ["data"]
