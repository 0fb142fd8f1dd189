"""The content-addressed store of what bases are built into: a directory per key, either complete or absent.

A key is one part: the ONNX of one network, its plan, what making those found out, or the base's tokenizers and facts.
Engine directories name the parts they need by key; the store remembers which directories those are (`store_users`), so
that `store_prune` can tell what nobody needs.

store/
  KEY/            the files of a part and manifest.json: {key, parts (what it is made of), files (hashes)}
  KEY.lock        held while KEY is built or removed
  .KEY.PID.*.tmp  a part that is being built, or what a killed build left
  users/          a record of every engine directory that uses the store
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dreammix_trt.core.errors import BuildError, DreamMixError, EngineError, InputError
from dreammix_trt.core.files import (
    atomic_directory,
    digest_of,
    disk_free,
    folder_bytes,
    home,
    is_full,
    read_json,
    refusing,
    remember_sha256,
    sha256_of,
    size_text,
    write_json,
)
from dreammix_trt.core.store_users import User, read_users, record_user

log = logging.getLogger(__name__)
KINDS: Final = ("base", "graph", "range", "onnx", "engine")
UNKNOWN: Final = "unknown"
_MANIFEST = "manifest.json"
# Only what has such a name is ever listed or removed: somebody may name a folder with other things in it as the store.
_KEY = re.compile(r"[0-9a-f]{64}")
_LEFTOVER = re.compile(r"\.([0-9a-f]{64})\.\d+\..*\.tmp")


@dataclass(frozen=True)
class Entry:
    """One part in the store.

    kind: one of KINDS, or "unknown" where the manifest says none of them; name: such as "unet". bytes: of all its
    files. modified: when it was built, in seconds since 1970. users: engine directories that need it. complete: every
    file of its manifest is there (not: unchanged). parts: what it is made of.
    """

    key: str
    kind: str
    name: str
    bytes: int
    modified: float
    users: tuple[Path, ...]
    complete: bool
    parts: Mapping[str, Any]


class Store:
    """Parts by key. Safe for several processes: one builds a key, the others wait and find it.

    A build first registers the directory it makes, with all the keys that it will need, then asks `put` for each: so
    nothing can be pruned between finding a part and writing the passport that names it.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or home() / "store").absolute()

    @staticmethod
    def key(parts: Mapping[str, Any]) -> str:
        """The key of a part: SHA-256 over everything that changes it, as canonical JSON."""
        return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def get(self, key: str) -> Path | None:
        """The directory of a key, or None when nothing complete is there."""
        folder = self.root / key
        return folder if (folder / _MANIFEST).is_file() else None

    def sound(self, key: str) -> Path | None:
        """Like `get`, but None when a file is missing or is not what was built (remembered hashes count)."""
        folder = self.get(key)
        if folder is None:
            return None
        try:
            check_files(folder, self.files(key), verify=False, remedy="it is built again")
        except DreamMixError as error:
            log.warning("part %s in the store is damaged: %s", key[:12], error)
            return None
        return folder

    @contextmanager
    def put(self, key: str, parts: Mapping[str, Any]) -> Iterator[Path | None]:
        """Give a directory to build `key` in, or None when another process has just built it.

        The directory becomes visible when the block ends well, with a manifest of its files' hashes, which are
        remembered: the first load need not read the files again. What a killed build left behind is removed, and a
        damaged directory is replaced. Raises InputError when the store cannot be written, BuildError when its disk is
        full; nothing is left of the build then.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the store {self.root} cannot be made ({error.strerror}); set DREAMMIX_HOME or --store"
            ) from error
        with self._lock(key):
            if self.sound(key):
                yield None
                return
            for leftover in self.root.glob(f".{key}.*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
            with self._telling_when_full(), atomic_directory(self.root / key) as folder:
                yield folder
                files = hashes_of(folder)
                write_json(folder / _MANIFEST, {"key": key, "parts": dict(parts), "files": files})
            for name, digest in files.items():
                remember_sha256(self.root / key / name, digest)

    def files(self, key: str) -> dict[str, str]:
        """Relative path -> SHA-256 of every file of a key."""
        folder = self.get(key)
        if folder is None:
            raise EngineError(f"the store {self.root} lacks the part {key[:12]}; build it again")
        files = read_json(folder / _MANIFEST).get("files")
        if not isinstance(files, dict):
            raise EngineError(f"{folder / _MANIFEST} is damaged; build it again")
        return dict(files)

    def free(self) -> int | None:
        """Bytes free on the store's disk; None: unknown."""
        return disk_free(self.root)

    def check_writable(self) -> None:
        """Raise InputError when nothing could be put here; leaves no trace."""
        with refusing(self.root):
            nearest = next(folder for folder in (self.root, *self.root.parents) if folder.exists())
            tempfile.TemporaryFile(dir=nearest).close()

    def register(self, engine: Path, keys: Collection[str]) -> None:
        """Remember that the engine directory `engine` needs these parts; no keys: it needs none any more.

        Cheap, and never raises: a store that cannot be written is only not kept from pruning.
        """
        with suppress(OSError, RuntimeError):  # a path that cannot be resolved
            record_user(self.root / "users", engine.resolve(), keys)

    def forget(self, engine: Path) -> None:
        """Drop what is remembered of an engine directory that is gone; `engine` as `recorded` gives it."""
        record_user(self.root / "users", engine, ())

    def list_users(self) -> list[User]:
        """Every engine directory that is known to need this store, whether it is present now or not."""
        return read_users(self.root / "users")

    def users(self) -> dict[Path, frozenset[str]]:
        """The engine directories that are present, each with the keys of the parts it needs."""
        return {user.engine: user.keys for user in self.list_users() if user.present}

    def entries(self) -> list[Entry]:
        """Every part in the store, by kind, name and age; complete or not."""
        if not self.root.is_dir():
            return []
        users = self.users()
        found = [self._entry(folder, users) for folder in self.root.iterdir() if _is_part(folder)]
        order = (*KINDS, UNKNOWN)
        return sorted(found, key=lambda entry: (order.index(entry.kind), entry.name, entry.modified, entry.key))

    def remove(self, key: str) -> int | None:
        """Remove a part at once and return its bytes; None when it is left: needed, being built, or not there."""
        folder = self.root / key
        if not _is_part(folder):
            return None
        with self._lock(key, wait=False) as held:
            if not held or not folder.is_dir() or any(key in user.keys for user in self.list_users()):
                return None
            size = folder_bytes(folder)
            with refusing(folder):
                aside = Path(tempfile.mkdtemp(prefix=f".{key}.{os.getpid()}.", suffix=".tmp", dir=self.root))
                try:
                    folder.rename(aside / "old")
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
        return size

    def leftovers(self) -> list[Path]:
        """The directories that killed builds left behind: nobody holds their keys."""
        return [path for path in self._temporaries() if self._is_idle(_key_of(path))]

    def tidy(self) -> int:
        """Remove what killed builds left behind, and the locks of keys that are gone; returns the bytes."""
        size = 0
        for path in self._temporaries():
            with self._lock(_key_of(path), wait=False) as held:
                if held:
                    size += folder_bytes(path)
                    shutil.rmtree(path, ignore_errors=True)
        for lock in self.root.glob("*.lock"):
            if not _KEY.fullmatch(lock.stem) or (self.root / lock.stem).exists():
                continue
            # Who waits for a lock opens its file anew at every try, so nobody is left waiting for a file that is gone.
            with self._lock(lock.stem, wait=False) as held, suppress(OSError):
                if held and not (self.root / lock.stem).exists():
                    lock.unlink()
        return size

    def _entry(self, folder: Path, users: Mapping[Path, frozenset[str]]) -> Entry:
        try:
            record = read_json(folder / _MANIFEST)
        except DreamMixError:
            record = {}
        parts, files = record.get("parts"), record.get("files")
        parts = parts if isinstance(parts, dict) else {}
        own = record.get("key") == folder.name and isinstance(files, dict)
        complete = own and all((folder / str(name)).is_file() for name in files or ())
        modified = 0.0
        with suppress(OSError):
            modified = (folder / _MANIFEST if record else folder).stat().st_mtime
        return Entry(
            key=folder.name,
            kind=parts["kind"] if parts.get("kind") in KINDS else UNKNOWN,
            name=str(parts.get("part", "?")),
            bytes=folder_bytes(folder),
            modified=modified,
            users=tuple(engine for engine, keys in users.items() if folder.name in keys),
            complete=complete,
            parts=parts,
        )

    def _temporaries(self) -> list[Path]:
        """Directories of parts that are being built or removed, or were when the process that did so was killed."""
        return sorted(path for path in self.root.glob(".*.tmp") if _LEFTOVER.fullmatch(path.name) and path.is_dir())

    def _is_idle(self, key: str) -> bool:
        if not (self.root / f"{key}.lock").exists():
            return True
        try:
            with self._lock(key, wait=False) as held:
                return held
        except DreamMixError:  # a store that may only be read
            return False

    @contextmanager
    def _lock(self, key: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of a key; False when it is held by another and `wait` is false."""
        from filelock import FileLock, Timeout

        lock, held = FileLock(self.root / f"{key}.lock"), True
        with refusing(self.root):
            try:
                lock.acquire(timeout=-1 if wait else 0)
            except Timeout:
                held = False
        try:
            yield held
        finally:
            lock.release()

    @contextmanager
    def _telling_when_full(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not is_full(error):
                raise
            free = self.free()
            left = "" if free is None else f" ({size_text(free)} are left)"
            raise BuildError(
                f"no space left on the disk of the store {self.root}{left}; free some, for example with "
                "`dreammix-trt store prune`, or name another place with --store; the next build goes on from here"
            ) from error


def hashes_of(folder: Path) -> dict[str, str]:
    """Relative posix path -> SHA-256 of every file below a folder, but its manifest."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / _MANIFEST)
    return {file.relative_to(folder).as_posix(): digest_of(file) for file in files}


def check_files(folder: Path, files: Mapping[str, str], *, verify: bool, remedy: str) -> None:
    """Raise EngineError for the first file that is missing or whose hash differs.

    verify: read every file again, else remembered hashes of unchanged files count.
    """
    for name, digest in files.items():
        file = folder / name
        if not file.is_file():
            raise EngineError(f"{file} is missing; {remedy}")
        if sha256_of(file, verify=verify) != digest:
            raise EngineError(f"{file} is not what was built (its hash differs); {remedy}")


def _is_part(folder: Path) -> bool:
    return bool(_KEY.fullmatch(folder.name)) and folder.is_dir() and not folder.is_symlink()


def _key_of(temporary: Path) -> str:
    match = _LEFTOVER.fullmatch(temporary.name)
    assert match is not None
    return match[1]
