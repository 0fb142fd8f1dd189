"""The content-addressed store of base engines: a directory per key, either complete or absent."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dreammix_trt.core.errors import DreamMixError, EngineError, InputError
from dreammix_trt.core.files import atomic_directory, home, read_json, sha256_of, write_json

log = logging.getLogger(__name__)
_MANIFEST = "manifest.json"


class Store:
    """Base engines by key. Safe for several processes: one builds a key, the others wait and find it."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or home() / "store").absolute()

    @staticmethod
    def key(parts: Mapping[str, Any]) -> str:
        """The key of an engine: SHA-256 over everything that changes the answer, as canonical JSON."""
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
            log.warning("base engine %s in the store is damaged: %s", key[:12], error)
            return None
        return folder

    @contextmanager
    def put(self, key: str, parts: Mapping[str, Any]) -> Iterator[Path | None]:
        """Give a directory to build `key` in, or None when another process has just built it.

        The directory becomes visible when the block ends well, with a manifest of its files' hashes. What a killed
        build left behind is removed, and a damaged directory is replaced. Raises InputError when the store cannot be
        written.
        """
        from filelock import FileLock

        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the store {self.root} cannot be made ({error.strerror}); set DREAMMIX_HOME or --store"
            ) from error
        with FileLock(self.root / f"{key}.lock"):
            if self.sound(key):
                yield None
                return
            for leftover in self.root.glob(f".{key}.*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
            with atomic_directory(self.root / key) as folder:
                yield folder
                write_json(folder / _MANIFEST, {"key": key, "parts": dict(parts), "files": hashes_of(folder)})

    def files(self, key: str) -> dict[str, str]:
        """Relative path -> SHA-256 of every file of a key."""
        folder = self.get(key)
        if folder is None:
            raise EngineError(f"the store {self.root} lacks the base engine {key[:12]}; build it again")
        files = read_json(folder / _MANIFEST).get("files")
        if not isinstance(files, dict):
            raise EngineError(f"{folder / _MANIFEST} is damaged; build the base engine again")
        return dict(files)


def hashes_of(folder: Path) -> dict[str, str]:
    """Relative posix path -> SHA-256 of every file below a folder, but the manifest itself."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != _MANIFEST)
    return {file.relative_to(folder).as_posix(): sha256_of(file, verify=True) for file in files}


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
