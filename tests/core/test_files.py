"""Files come whole or not at all; hashes are remembered but can be checked."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dreammix_trt.core.errors import BuildError, FileFormatError, InputError
from dreammix_trt.core.files import (
    ask_file,
    atomic_directory,
    atomic_file,
    check_place,
    digest_of,
    explain_write_errors,
    folder_bytes,
    is_full,
    read_json,
    remember_sha256,
    sha256_of,
    size_text,
    write_json,
)


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with atomic_file(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(tmp_path) == {"a.txt"}


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_file_leaves_the_old_one(tmp_path: Path, stop: type[BaseException]) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(stop), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise stop
    assert target.read_text() == "old"
    assert names(tmp_path) == {"a.txt"}


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "engine"
    for content in ("one", "two"):
        with atomic_directory(target, marker="mark") as temporary:
            (temporary / "mark").write_text(content)
            (temporary / content).write_text("")
    assert names(target) == {"mark", "two"}
    assert names(tmp_path) == {"engine"}


def test_an_interrupted_directory_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "engine"
    with atomic_directory(target) as temporary:
        (temporary / "mark").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_directory(target, marker="mark") as temporary:
        (temporary / "mark").write_text("half")
        raise KeyboardInterrupt
    assert (target / "mark").read_text() == "old"
    assert names(tmp_path) == {"engine"}


def test_a_directory_of_somebody_elses_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds other files"), atomic_directory(tmp_path, marker="passport.json"):
        pytest.fail("not reached")
    assert names(tmp_path) == {"thesis.txt"}


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"), atomic_directory(tmp_path / "file"):
        pytest.fail("not reached")
    with pytest.raises(InputError, match="cannot be made"), atomic_file(tmp_path / "file" / "inside"):
        pytest.fail("not reached")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not stop this user")
def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written"), atomic_file(tmp_path / "a.txt"):
        pytest.fail("not reached")


def test_a_full_disk_is_an_error_of_ours() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with (
        pytest.raises(BuildError, match="no space left") as caught,
        explain_write_errors(full),
        full.open("wb", buffering=0) as stream,
    ):
        stream.write(b"x")
    assert is_full(caught.value) and not is_full(ValueError("no"))


def test_hashes_of_large_files_are_remembered_until_verified(tmp_path: Path) -> None:
    file = tmp_path / "large.bin"
    file.write_bytes(b"a" * (1 << 20))
    first, status = sha256_of(file), file.stat()
    with file.open("r+b") as stream:
        stream.write(b"b")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert sha256_of(file) == first  # same size, time and inode: remembered
    assert sha256_of(file, verify=True) != first
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert sha256_of(file) != first


def test_an_answer_about_a_large_file_is_found_once(tmp_path: Path) -> None:
    """Until the file changes in size, time or inode, until it is asked to verify, or another hash is found."""
    file, asked = tmp_path / "large.bin", []
    file.write_bytes(b"a" * (1 << 20))

    def find(path: Path) -> str:
        asked.append(path)
        return f"answer {len(asked)}"

    assert [ask_file(file, "q", find) for _ in range(3)] == ["answer 1"] * 3 and asked == [file.resolve()]
    assert ask_file(file, "another question", find) == "answer 2" and ask_file(file, "q", find) == "answer 1"
    first = sha256_of(file)
    assert ask_file(file, "q", find) == "answer 1", "beside the hash"
    assert ask_file(file, "q", find, verify=True) == ask_file(file, "q", find) == "answer 3"

    status = file.stat()
    with file.open("r+b") as stream:
        stream.write(b"b")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert sha256_of(file, verify=True) != first
    assert ask_file(file, "q", find) == "answer 4", "the file behind the mark is another one"

    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert ask_file(file, "q", find) == "answer 5"
    with file.open("ab") as stream:
        stream.write(b"c")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert ask_file(file, "q", find) == "answer 6"
    shutil.copy2(file, tmp_path / "copy")
    (tmp_path / "copy").replace(file)
    assert ask_file(file, "q", find) == "answer 7", "same size and time, another inode"

    small = tmp_path / "small.bin"
    small.write_bytes(b"s")
    assert [ask_file(small, "q", find) for _ in range(2)] == ["answer 8", "answer 9"]


def test_a_hash_is_remembered_across_a_move(tmp_path: Path) -> None:
    made, moved = tmp_path / "made", tmp_path / "moved"
    made.write_bytes(b"a" * (1 << 20))
    assert digest_of(made) == hashlib.sha256(b"a" * (1 << 20)).hexdigest()
    made.rename(moved)
    remember_sha256(moved, "as if it were read")
    assert sha256_of(moved) == "as if it were read"
    assert sha256_of(moved, verify=True) == sha256_of(moved) == digest_of(moved)
    moved.write_bytes(b"small")
    remember_sha256(moved, "not looked up")
    assert sha256_of(moved) == hashlib.sha256(b"small").hexdigest()


def test_a_home_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("")
    monkeypatch.setenv("DREAMMIX_HOME", str(tmp_path / "home"))
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    assert sha256_of(tmp_path / "large") == hashlib.sha256(bytes(1 << 20)).hexdigest()
    with atomic_directory(tmp_path / "engine") as folder:
        (folder / "mark").write_text("")
    assert names(tmp_path / "engine") == {"mark"}


def test_sizes_are_counted_and_said(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("x", "a/y", "a/b/z"):
        (tmp_path / name).write_bytes(bytes(1000))
    assert folder_bytes(tmp_path) == 3000
    said = [size_text(count) for count in (0, 1023, 1024, 3 << 19, 5 << 30, 1 << 60)]
    assert said == ["0 bytes", "1023 bytes", "1.0 KiB", "1.5 MiB", "5.0 GiB", "1048576.0 TiB"]


def test_json_that_is_none_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    assert read_json(tmp_path / "a.json") == {"a": 1}
    for content in ("{", "[]"):
        (tmp_path / "b.json").write_text(content)
        with pytest.raises(FileFormatError, match=r"b\.json"):
            read_json(tmp_path / "b.json")
    with pytest.raises(FileFormatError, match="missing"):
        read_json(tmp_path / "c.json")


def test_what_killed_programs_left_behind_is_removed_and_the_livings_is_not(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = [tmp_path / f".engine.{process}.abc.tmp" for process in (gone.pid, os.getpid())]
    for folder in (*left, tmp_path / ".engine.notes.tmp", tmp_path / f".other.{gone.pid}.abc.tmp"):
        (folder / "inside").mkdir(parents=True)
    with atomic_directory(tmp_path / "engine"):
        pass
    assert names(tmp_path) == {"engine", left[1].name, ".engine.notes.tmp", f".other.{gone.pid}.abc.tmp"}


def test_directories_are_replaced_whole_where_the_system_cannot_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dreammix_trt.core.files._exchange", lambda *_: False)
    test_a_directory_is_replaced_whole(tmp_path)


def test_a_place_is_judged_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_place(tmp_path / "new" / "deep", "mark")
    for place, told in (("file", "is a file"), ("file/below", "is a file"), (".", "holds other files")):
        with pytest.raises(InputError, match=told):
            check_place(tmp_path / place, "mark")
    assert names(tmp_path) == {"file"}


def test_files_are_flushed_where_only_writers_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    flushed = []

    def fsync(handle: int) -> None:  # Windows': EBADF for a file that is open for reading
        if not fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_RDWR:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flushed.append(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "a.json", {"a": 1})
    with atomic_directory(tmp_path / "folder") as temporary:
        (temporary / "b").write_text("kept")
    assert len(flushed) == 2
    assert read_json(tmp_path / "a.json") == {"a": 1} and (tmp_path / "folder" / "b").read_text() == "kept"


def test_hashes_of_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileFormatError, match=r"none: cannot be read \(No such file or directory\); check that"):
        sha256_of(tmp_path / "none")
    (tmp_path / "a").write_text("x")

    def refused(self: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refused)
    for hashed in (sha256_of, digest_of):
        with pytest.raises(FileFormatError, match=r"a: cannot be read \(Permission denied\); give yourself"):
            hashed(tmp_path / "a")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_everything_written_follows_the_umask(umask: int, tmp_path: Path) -> None:
    usual = os.umask(umask)
    try:
        with atomic_file(tmp_path / "file") as path:
            path.write_text("x")
        with atomic_directory(tmp_path / "folder") as folder:
            (folder / "private").touch(0o600)  # as libraries leave it that write by temporary files
            (folder / "below").mkdir()
            (folder / "below" / "script").touch(0o700)
    finally:
        os.umask(usual)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    whole = 0o777 & ~umask
    assert modes == {
        "file": 0o666 & ~umask, "folder": whole, "private": 0o666 & ~umask, "below": whole, "script": 0o666 & ~umask,
    }  # fmt: skip
