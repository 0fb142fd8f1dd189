"""The content-addressed store of built bases: a directory per key, either complete or absent.

A key is one part: the ONNX of one network, its plan, results of making these, or the base's tokenizers and facts.
Engine directories name the parts they need by key. The store remembers these directories (`store_users`), so that
`store_prune` knows which parts nobody needs.

store/
  KEY/            the files of a part and manifest.json: {key, parts (what it is made of), files (hashes)}
  KEY.lock        held while KEY is built or removed
  .KEY.PID.*.tmp  a part that is being built, or the rest of a killed build
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
    explain_write_errors,
    folder_bytes,
    is_full,
    read_json,
    remember_sha256,
    sha256_of,
    size_text,
    write_json,
)
from dreammix_trt.core.store_place import find_store
from dreammix_trt.core.store_users import User, read_users, record_user

log = logging.getLogger(__name__)
KINDS: Final = ("base", "graph", "range", "onnx", "engine", "session")
UNKNOWN: Final = "unknown"
_MANIFEST = "manifest.json"
# Only entries with such names are ever listed or removed: the folder that a user names may have other files in it.
_KEY = re.compile(r"[0-9a-f]{64}")
_LEFTOVER = re.compile(r"\.([0-9a-f]{64})\.\d+\..*\.tmp")


@dataclass(frozen=True)
class Entry:
    """One part in the store.

    key: of the part.
    kind: one of KINDS, or "unknown" when the manifest names none of them.
    name: such as "unet".
    bytes: of all its files.
    modified: when it was built, in seconds since 1970.
    users: engine directories that need it.
    complete: whether every file of its manifest exists; says nothing about changed files.
    parts: what it is made of.
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
    """Parts by key. Safe for several processes: one builds a key, the others wait and then find it.

    A build first registers its engine directory with all the keys that it will need, then calls `put` for each. So
    nothing can be pruned between finding a part and writing the passport that names it.
    """

    def __init__(self, root: Path | None = None) -> None:
        """root: the store's folder; None: where `store_place.find_store` says."""
        self.root = (root or find_store()).absolute()

    @staticmethod
    def key(parts: Mapping[str, Any]) -> str:
        """The key of a part: SHA-256 of canonical JSON.

        parts: everything that changes the part.
        """
        return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def get(self, key: str) -> Path | None:
        """The directory of a key; None when it is absent or was not completed."""
        folder = self.root / key
        return folder if (folder / _MANIFEST).is_file() else None

    def get_sound(self, key: str) -> Path | None:
        """Like `get`, but also None when a file is missing or changed (remembered hashes are trusted)."""
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
        """Give a directory to build a part in, or None when another process has just built it.

        The directory becomes visible when the block ends well, with a manifest of the hashes of its files. The hashes
        are remembered, so the first load need not read the files again. Also removes what a killed build left behind,
        and replaces a damaged directory.

        key: of the part.
        parts: what it is made of, for the manifest.

        Raises InputError when the store cannot be written and BuildError when its disk is full; then nothing of the
        build remains.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the store {self.root} cannot be made ({error.strerror}); set DREAMMIX_HOME or --store"
            ) from error
        with self._lock(key):
            if self.get_sound(key):
                yield None
                return
            for leftover in self.root.glob(f".{key}.*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
            with self._explain_full_disk(), atomic_directory(self.root / key) as folder:
                yield folder
                files = hash_files(folder)
                write_json(folder / _MANIFEST, {"key": key, "parts": dict(parts), "files": files})
            for name, digest in files.items():
                remember_sha256(self.root / key / name, digest)

    def files(self, key: str) -> dict[str, str]:
        """The files of a key: relative path -> SHA-256. Raises EngineError when the key is absent or damaged."""
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
        """Raise InputError when the store cannot be written. Leaves no trace."""
        with explain_write_errors(self.root):
            nearest = next(folder for folder in (self.root, *self.root.parents) if folder.exists())
            tempfile.TemporaryFile(dir=nearest).close()

    def register(self, engine: Path, keys: Collection[str]) -> None:
        """Remember that an engine directory needs these parts.

        Cheap, and never raises: a store that cannot be written only loses its protection from pruning.

        engine: the directory.
        keys: of the parts; empty: it needs none any more.
        """
        with suppress(OSError, RuntimeError):  # the path cannot be resolved
            record_user(self.root / "users", engine.resolve(), keys)

    def forget(self, engine: Path) -> None:
        """Forget an engine directory that is gone.

        engine: the path as `list_users` gives it.
        """
        record_user(self.root / "users", engine, ())

    def list_users(self) -> list[User]:
        """Every engine directory that is known to need this store, present or not."""
        return read_users(self.root / "users")

    def users(self) -> dict[Path, frozenset[str]]:
        """The engine directories that are present -> the keys of the parts they need."""
        return {user.engine: user.keys for user in self.list_users() if user.present}

    def entries(self) -> list[Entry]:
        """Every part in the store, complete or not, sorted by kind, name and age."""
        if not self.root.is_dir():
            return []
        users = self.users()
        found = [self._read_entry(folder, users) for folder in self.root.iterdir() if _is_part(folder)]
        order = (*KINDS, UNKNOWN)
        return sorted(found, key=lambda entry: (order.index(entry.kind), entry.name, entry.modified, entry.key))

    def remove(self, key: str) -> int | None:
        """Remove a part at once.

        Returns its bytes; None when it stays because it is needed or being built, and when it does not exist.
        """
        folder = self.root / key
        if not _is_part(folder):
            return None
        with self._lock(key, wait=False) as held:
            if not held or not folder.is_dir() or any(key in user.keys for user in self.list_users()):
                return None
            size = folder_bytes(folder)
            with explain_write_errors(folder):
                aside = Path(tempfile.mkdtemp(prefix=f".{key}.{os.getpid()}.", suffix=".tmp", dir=self.root))
                try:
                    folder.rename(aside / "old")
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
        return size

    def leftovers(self) -> list[Path]:
        """The directories that killed builds left behind: no process has their locks."""
        return [path for path in self._list_temporaries() if self._is_idle(_key_of(path))]

    def tidy(self) -> int:
        """Remove what killed builds left behind, and the lock files of keys that are gone. Returns the bytes."""
        size = 0
        for path in self._list_temporaries():
            with self._lock(_key_of(path), wait=False) as held:
                if held:
                    size += folder_bytes(path)
                    shutil.rmtree(path, ignore_errors=True)
        for lock in self.root.glob("*.lock"):
            if not _KEY.fullmatch(lock.stem) or (self.root / lock.stem).exists():
                continue
            # A waiting process reopens the lock file at every try, so none waits forever for a removed file.
            with self._lock(lock.stem, wait=False) as held, suppress(OSError):
                if held and not (self.root / lock.stem).exists():
                    lock.unlink()
        return size

    def _read_entry(self, folder: Path, users: Mapping[Path, frozenset[str]]) -> Entry:
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

    def _list_temporaries(self) -> list[Path]:
        """List the directories of parts that a process is building or removing, or was when it was killed."""
        return sorted(path for path in self.root.glob(".*.tmp") if _LEFTOVER.fullmatch(path.name) and path.is_dir())

    def _is_idle(self, key: str) -> bool:
        if not (self.root / f"{key}.lock").exists():
            return True
        try:
            with self._lock(key, wait=False) as held:
                return held
        except DreamMixError:  # a read-only store
            return False

    @contextmanager
    def _lock(self, key: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of a key. Gives False when another process has it and `wait` is false."""
        from filelock import FileLock, Timeout

        lock, held = FileLock(self.root / f"{key}.lock"), True
        with explain_write_errors(self.root):
            try:
                lock.acquire(timeout=-1 if wait else 0)
            except Timeout:
                held = False
        try:
            yield held
        finally:
            lock.release()

    @contextmanager
    def _explain_full_disk(self) -> Iterator[None]:
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


def hash_files(folder: Path) -> dict[str, str]:
    """Hash every file below a folder except its manifest.

    Returns relative posix path -> SHA-256.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / _MANIFEST)
    return {file.relative_to(folder).as_posix(): digest_of(file) for file in files}


def check_files(folder: Path, files: Mapping[str, str], *, verify: bool, remedy: str) -> None:
    """Raise EngineError for the first file that is missing or whose hash differs.

    folder: of the files.
    files: relative path -> SHA-256.
    verify: read every file; otherwise trust the remembered hashes of unchanged files.
    remedy: what the message says to do.
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
