"""Where the default store is: in the user's data, as engines took minutes to make, and caches are emptied lightly.

Earlier versions kept it in the user's cache. It is moved when it is first asked for, and a link stays in its old place.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from contextlib import suppress
from pathlib import Path

from dreammix_trt.core.files import cache_home, carry_remembered, given_home

log = logging.getLogger(__name__)
# What a store holds: parts, and the records of the engine directories that use them.
_PART = re.compile(r"[0-9a-f]{64}")
_USERS = "users"


def find_store() -> Path:
    """The folder of the default store, which may not exist yet.

    That is `store` in DREAMMIX_HOME, else in the user's data directory. A store in the user's cache directory is moved
    there. Where that cannot be done (another disk, no right to write), it stays, is used, and a warning says so.
    """
    given = given_home()
    if given:
        return given / "store"
    from platformdirs import user_data_path

    return _settle(cache_home() / "store", user_data_path("dreammix-trt", appauthor=False) / "store")


def _settle(old: Path, new: Path) -> Path:
    """The place of the store: `new`, with what was in `old` moved there, or `old` where it must stay."""
    if old.is_symlink() or not old.is_dir() or old.resolve() == new.resolve():
        return new
    from filelock import FileLock

    try:
        new.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(new.parent / "store-move.lock"):
            if old.is_dir() and not old.is_symlink():  # else another process has just moved it
                _move(old, new)
                log.info("the store was moved from %s to %s", old, new)
    except OSError as error:
        if new.is_dir():  # both hold something: the new one counts
            _warn_once(f"parts of the store are still in {old} ({error.strerror}); move them to {new}, or remove them")
            return new
        _warn_once(
            f"the store stays in {old}, as it cannot be moved to {new} ({error.strerror}); move it yourself, or name "
            "its place in DREAMMIX_HOME or --store"
        )
        return old
    return new


def _move(old: Path, new: Path) -> None:
    """Move a store at once; into one that exists, part by part. Leaves a link, so that recorded paths keep working."""
    before = old.resolve()
    if new.is_dir():
        moved = _merge(old, new)
    else:
        old.rename(new)
        moved = [path for path in new.iterdir() if _PART.fullmatch(path.name)]
    with suppress(OSError):  # something is there still, or the system has no links
        old.symlink_to(new, target_is_directory=True)
    after = new.resolve()
    for part in moved:
        for file in part.rglob("*"):
            if file.is_file():
                name = file.relative_to(new)
                carry_remembered(before / name, after / name)


def _merge(old: Path, new: Path) -> list[Path]:
    """Move the parts and records that `new` lacks, then remove `old` unless something is being built there.

    Returns the parts that came.
    """
    import shutil

    (new / _USERS).mkdir(exist_ok=True)
    came = []
    for path in [*old.iterdir(), *old.glob(f"{_USERS}/*.json")]:
        target = new / path.relative_to(old)
        if (_PART.fullmatch(path.name) or path.parent.name == _USERS) and not os.path.lexists(target):
            path.rename(target)
            came.append(target)
    if not any(old.glob(".*.tmp")):
        shutil.rmtree(old)  # parts that are in both, and locks
    return [path for path in came if path.is_dir()]


@functools.cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)
