"""Files that are written whole or not at all, and answers about large files that are remembered."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dreammix_trt.core.errors import BuildError, DreamMixError, FileFormatError, InputError

_REMEMBERED_FROM = 1 << 20  # reading a smaller file is faster than looking up what is known of it
_SHA256: Final = "sha256"


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`. It replaces `path` when the block ends well, else it is removed.

    Raises InputError when the place cannot be written.
    """
    target = Path(path)
    with explain_write_errors(target):
        _make_parent(target)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
    temporary = Path(name)
    try:
        with explain_write_errors(target):
            yield temporary
            _sync(temporary)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], marker: str | None = None) -> Iterator[Path]:
    """Give a temporary directory beside `path`. It replaces `path` when the block ends well, else it is removed.

    An existing directory is exchanged for the new one and then deleted, so a reader sees the old or the new one. Also
    removes what a killed program left behind here.

    marker: a file that marks our own directories; a directory that has other files but not this one is never replaced.

    Raises InputError when the place cannot be written, is a file, or is a directory that is not ours.
    """
    target = Path(path).resolve()
    check_place(target, marker)
    with explain_write_errors(target):
        _make_parent(target)
        _remove_leftovers(target)
        prefix = f".{target.name}.{os.getpid()}."
        temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=target.parent))
        temporary.chmod(0o777 & ~_umask())
    try:
        with explain_write_errors(target):
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
                    file.chmod(0o666 & ~_umask())  # libraries that write by temporary files leave 0600
            with _hold_lock(target):
                _swap(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_place(path: str | os.PathLike[str], marker: str | None = None) -> None:
    """Raise InputError when `atomic_directory(path, marker)` would, so that the caller knows before the work."""
    target = Path(path).resolve()
    with explain_write_errors(target):
        taken = target.exists()
    if taken and not target.is_dir():
        raise InputError(f"{target} is a file; name a directory that is new or was made by this program")
    if marker and target.is_dir() and not (target / marker).exists() and any(target.iterdir()):
        raise InputError(
            f"{target} holds other files (no {marker} among them) and would be replaced; name a new directory"
        )
    _check_parent(target)


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise InputError when `atomic_file(path)` would, so that the caller knows before the work."""
    target = Path(path).resolve()
    if target.is_dir():
        raise InputError(f"{target} is a directory; name a file")
    _check_parent(target)


def _check_parent(target: Path) -> None:
    nearest = next((folder for folder in target.parents if folder.exists()), None)
    if nearest is None:  # a drive that is not there
        raise InputError(f"{target} cannot be made: there is no {target.anchor}; choose another place")
    if not nearest.is_dir():
        raise InputError(f"{target} cannot be made: {nearest} is a file, not a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{target} cannot be written: {nearest} is not writable for you; choose another place")


def write_json(path: str | os.PathLike[str], record: Any) -> None:
    """Write a record as indented JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object from a file. Raises FileFormatError when the file is missing or is not a JSON object."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileFormatError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(record, dict):
        raise FileFormatError(f"{path} holds a JSON {type(record).__name__}, not an object")
    return record


def share_file(source: Path, target: Path) -> None:
    """Put a file that is never written again at a second place too: as a hard link where that is possible, else a copy.

    Whole or not at all; `target` is replaced.
    """
    with atomic_file(target) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def sha256_of(path: str | os.PathLike[str], *, verify: bool = False) -> str:
    """SHA-256 of a file in hex. Hashes of large files are remembered (`ask_file`).

    verify: read the file even if its hash is remembered.

    Raises `FileFormatError` when the file is missing or cannot be read.
    """
    return ask_file(path, _SHA256, digest_of, verify=verify)


def ask_file(path: str | os.PathLike[str], question: str, find: Callable[[Path], str], *, verify: bool = False) -> str:
    """What `find` says of a file. Answers are remembered for large files: by path, size, modification time and inode.

    A file that was found to have another hash has lost its other answers.

    question: the name of the answer; when `find` changes what it says, the name must change as well.
    find: reads the file and gives the answer.
    verify: ask `find` even if the answer is remembered.

    Raises `FileFormatError` when the file is missing, and what `find` raises.
    """
    file = Path(path).resolve()
    with explain_read_errors(file):
        status = file.stat()
    if status.st_size < _REMEMBERED_FROM:
        return find(file)
    mark = _mark(file, status)
    answer = None if verify else _recall(mark).get(question)
    if answer is None:
        answer = find(file)
        _remember(mark, {question: answer})
    return answer


def digest_of(path: Path) -> str:
    """SHA-256 of a file in hex, read now and not remembered: for a file that will be moved to its final place.

    Raises `FileFormatError` when the file is missing or cannot be read.
    """
    with explain_read_errors(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def join_digests(digests: Sequence[str]) -> str:
    """One SHA-256 in hex for several files in their order; that of a single file is its own."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def carry_remembered(old: Path, new: Path) -> None:
    """Remember what was known of a file under its new path as well. Does not read the file.

    old, new: resolved paths before and after a rename.
    """
    with contextlib.suppress(DreamMixError, OSError):
        status = new.stat()
        _remember(_mark(new, status), _recall(_mark(old, status)))


def remember_sha256(path: Path, digest: str) -> None:
    """Remember for `sha256_of` a hash that was computed before the file was moved to `path`. Does not read the file."""
    file = path.resolve()
    status = file.stat()
    if status.st_size >= _REMEMBERED_FROM:
        _remember(_mark(file, status), {_SHA256: digest})


def given_home() -> Path | None:
    """The folder that DREAMMIX_HOME names for everything we keep; None: it names none."""
    given = os.environ.get("DREAMMIX_HOME")
    return Path(given).expanduser().absolute() if given else None


def cache_home() -> Path:
    """The folder of remembered hashes and locks, which costs nothing to lose: in DREAMMIX_HOME, else the user's cache.

    What took minutes to make is in the store (`store_place.find_store`).
    """
    from platformdirs import user_cache_path

    return given_home() or user_cache_path("dreammix-trt", appauthor=False)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder. Files that are removed meanwhile are not counted."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def disk_free(place: Path) -> int | None:
    """Bytes free on the disk of a folder that may not exist yet; None: unknown."""
    place = place.absolute()
    for folder in (place, *place.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free
    return None


def size_text(count: int) -> str:
    """A number of bytes as a person reads it: "812 bytes", "3.4 MiB"."""
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one it was raised from, says that a disk or a quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):  # libraries in other languages report it as text
            return True
        error = error.__cause__ or error.__context__
    return False


def _mark(file: Path, status: os.stat_result) -> str:
    return f"{file}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"


def _memory(mark: str) -> Path:
    return cache_home() / "hashes" / f"{hashlib.sha256(mark.encode()).hexdigest()}.json"


def _recall(mark: str) -> dict[str, str]:
    """The remembered answers about a file, by question."""
    try:
        record = read_json(_memory(mark))
    except FileFormatError:
        return {}
    if record.pop("mark", None) != mark:
        return {}
    return {question: answer for question, answer in record.items() if isinstance(answer, str)}


def _remember(mark: str, answers: Mapping[str, str]) -> None:
    """Add answers to those that are remembered of a file. Without a writable home we only lose time."""
    if not answers:
        return
    known = _recall(mark)
    if _SHA256 in known and _SHA256 in answers and known[_SHA256] != answers[_SHA256]:
        known = {}  # another file in the old one's clothes
    with contextlib.suppress(DreamMixError, OSError):
        write_json(_memory(mark), {"mark": mark, **known, **answers})


def _swap(temporary: Path, target: Path) -> None:
    """Move `temporary` to `target`. The old directory may end up under `temporary`'s name."""
    if not target.exists():
        temporary.rename(target)
        return
    if _exchange(temporary, target):
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.{os.getpid()}.", suffix=".tmp", dir=target.parent))
    target.rename(aside / "old")
    try:
        temporary.rename(target)
    except OSError:
        (aside / "old").rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step (Linux' renameat2), so that a kill cannot lose both.

    Returns False where the system cannot do this.
    """
    import ctypes

    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


@contextlib.contextmanager
def hold_alone(place: str | os.PathLike[str], busy: str) -> Iterator[None]:
    """Keep other programs that ask for it out of a place for as long as the block takes; the place need not exist.

    busy: who does what there, for the message: "another training is at work".

    Raises InputError where another program holds it.
    """
    from filelock import FileLock, Timeout

    target = Path(place).resolve()
    lock = FileLock(_find_lock(target, "alone"), timeout=0)
    try:
        lock.acquire()
    except Timeout:  # an OSError itself
        raise InputError(f"{target}: {busy} there; wait for it, or name another folder") from None
    except OSError:  # no writable home: go on without a lock
        pass
    try:
        yield
    finally:
        lock.release()


def _find_lock(target: Path, suffix: str = "") -> Path:
    """The lock of a place, in the home. Its folder is made if that can be."""
    locks = cache_home() / "locks"
    with contextlib.suppress(OSError):
        locks.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(os.fsencode(target)).hexdigest()[:32]
    return locks / f"{digest}{f'-{suffix}' if suffix else ''}.lock"


@contextlib.contextmanager
def _hold_lock(target: Path) -> Iterator[None]:
    """Hold the lock of a place, so that two programs do not replace it at the same time."""
    from filelock import FileLock

    lock = FileLock(_find_lock(target))
    with contextlib.suppress(OSError):  # no writable home: go on without a lock
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(target: Path) -> None:
    """Remove the temporary directories that killed builds of this place left behind."""
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        owner = leftover.name.removeprefix(f".{target.name}.").split(".")[0]
        if leftover.is_dir() and owner.isdigit() and not _is_alive(int(owner)):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # there os.kill would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(file: Path) -> None:
    # Windows flushes only files that are open for writing; other systems flush read-only files as well.
    writable = os.access(file, os.W_OK)
    if writable or os.name != "nt":
        with file.open("r+b" if writable else "rb") as stream:
            os.fsync(stream.fileno())


def _make_parent(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # a drive that is not there, or a file system that makes none
        raise InputError(f"{target} cannot be made: {target.parent} cannot; choose another place") from error


def _umask() -> int:
    """The process' umask; where the system tells it, without setting it for a moment, which other threads would see."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def explain_read_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError from reading into a `FileFormatError` that names the file."""
    try:
        yield
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else os.fspath(path)
        remedy = (
            "give yourself the right to read it" if isinstance(error, PermissionError) else "check that it is there"
        )
        raise FileFormatError(f"{name}: cannot be read ({error.strerror or error}); {remedy}") from error


@contextlib.contextmanager
def explain_write_errors(target: Path) -> Iterator[None]:
    """Turn an OSError from writing into one of our errors: InputError, or BuildError when the disk is full."""
    try:
        yield
    except PermissionError as error:
        raise InputError(f"{target} cannot be written ({error.strerror}); choose a place you may write to") from error
    except IsADirectoryError as error:
        raise InputError(f"{target} is a directory; name a file") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{target} cannot be made: {error.filename} is a file, not a directory") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BuildError(f"{target}: no space left there; free some or choose another place") from error
        if error.errno == errno.EFBIG:
            raise BuildError(f"{target}: too large a file for that file system or its limit; choose another") from error
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{target} cannot be written: its name is too long; choose a shorter one") from error
        if error.errno == errno.EROFS:
            raise InputError(f"{target} is on a read-only file system; choose another place") from error
        raise
