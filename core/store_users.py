"""Which engine directories use which parts of a store: one small record per directory, and their passports."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dreammix_trt.core.errors import DreamMixError
from dreammix_trt.core.files import atomic_file, read_json

_PASSPORT = "passport.json"


@dataclass(frozen=True)
class User:
    """An engine directory that uses the store.

    engine: its absolute path.
    keys: of the parts that it needs.
    present: whether it has a readable passport. If not, it may be on a disk that is not mounted now, or is being built
        for the first time; then the keys are those of the record.
    """

    engine: Path
    keys: frozenset[str]
    present: bool


def record_user(folder: Path, engine: Path, keys: Collection[str]) -> None:
    """Remember that an engine directory needs these parts. Never raises.

    folder: of the records.
    engine: an absolute path.
    keys: of the parts; empty: forget the directory.
    """
    with contextlib.suppress(DreamMixError, OSError):
        file = folder / f"{hashlib.sha256(os.fsencode(engine)).hexdigest()[:32]}.json"
        if not keys:
            file.unlink(missing_ok=True)
        elif _read(file) != (engine, frozenset(keys)):
            with atomic_file(file) as temporary:
                temporary.write_text(json.dumps({"engine": str(engine), "keys": sorted(keys)}), encoding="utf-8")


def read_users(folder: Path) -> list[User]:
    """Every directory that is recorded in `folder` and needs the store, sorted by path."""
    users = []
    for file in folder.glob("*.json"):
        record = _read(file)
        user = _judge(file, *record) if record else None
        if user:
            users.append(user)
    return sorted(users, key=lambda user: user.engine)


def _judge(file: Path, engine: Path, recorded: frozenset[str]) -> User | None:
    """Combine a record with the directory's passport; None when the directory is self-contained."""
    passport = engine / _PASSPORT
    try:
        facts = read_json(passport)
        parts = facts.get("parts")
        if not isinstance(parts, dict):
            return User(engine, recorded, False)
        # A record newer than the passport comes from a build that will replace the passport.
        building = file.stat().st_mtime_ns >= passport.stat().st_mtime_ns
    except (DreamMixError, OSError):
        return User(engine, recorded, False)
    own = frozenset(str(key) for key in parts.values()) if facts.get("networks_at", "store") == "store" else frozenset()
    keys = own | recorded if building else own
    return User(engine, keys, True) if keys else None


def _read(file: Path) -> tuple[Path, frozenset[str]] | None:
    with contextlib.suppress(DreamMixError, OSError):
        record = read_json(file)
        engine, keys = record.get("engine"), record.get("keys")
        if isinstance(engine, str) and isinstance(keys, list):
            return Path(engine), frozenset(str(key) for key in keys)
    return None
