"""What a user should know of a picture or a request, where nothing is wrong enough for an error."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

log = logging.getLogger(__name__)
_kept: ContextVar[list[str] | None] = ContextVar("kept", default=None)


def remark(text: str) -> None:
    """Log a warning, and keep it where somebody collects remarks."""
    log.warning("%s", text)
    kept = _kept.get()
    if kept is not None and text not in kept:
        kept.append(text)


@contextmanager
def keep_remarks() -> Iterator[list[str]]:
    """Collect this thread's remarks in the block; each is logged all the same."""
    kept: list[str] = []
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)
