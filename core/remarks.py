"""What a user should know of a picture or a request, where nothing is wrong enough for an error."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

log = logging.getLogger(__name__)
_kept: ContextVar[list[str] | None] = ContextVar("kept", default=None)


def remark(text: str) -> None:
    """Log a warning, or leave it to whoever collects remarks."""
    kept = _kept.get()
    if kept is None:
        log.warning("%s", text)
    elif text not in kept:
        kept.append(text)


@contextmanager
def keep_remarks(*, tell: bool = True) -> Iterator[list[str]]:
    """Collect what this thread remarks in the block, each sentence once. When the block ends they are logged.

    tell: False: they are not, as they have been before.
    """
    kept: list[str] = []
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)
        for text in kept if tell else ():
            remark(text)
