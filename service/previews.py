"""Who follows a job: what they want to see of its steps, and what is kept for them until they look."""

from __future__ import annotations

import asyncio
import io
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image

_SIDE = 1024  # pixels; a preview of more takes longer to send than to look at
_KEPT = 4  # previews that wait for a client; the oldest one goes

#: (steps before, steps now, total) -> whether to show the picture now
Wish = Callable[[int, int, int], bool]


class Preview(NamedTuple):
    """A picture as it was after a step. step: from 1. picture: its number. data: of a WebP or PNG file."""

    step: int
    picture: int
    data: bytes


def every(steps: int) -> Wish:
    """A preview every so many steps, but of the last one, whose picture is the result. 0: none."""
    if not steps:
        return lambda before, now, total: False
    return lambda before, now, total: now < total and now // steps > before // steps


def evenly(count: int) -> Wish:
    """So many previews, evenly spread over all steps."""

    def wants(before: int, now: int, total: int) -> bool:
        marks = [max(1, total * k // (count + 1)) for k in range(1, count + 1)]
        return now < total and any(before < mark <= now for mark in marks)

    return wants


def encode_preview(image: Image.Image, kind: str) -> bytes:
    """The whole picture as a file for the eye, of at most 1024 pixels a side. kind: "webp", "png" or "jpeg"."""
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE))
    to = io.BytesIO()
    if kind == "jpeg":
        small.convert("RGB").save(to, "JPEG", quality=85)
    elif kind == "png":
        small.save(to, "PNG", compress_level=1)
    else:
        small.save(to, "WEBP", quality=80, method=0)
    return to.getvalue()


class Watcher:
    """One client that follows a job, in the event loop in which it is made.

    wish: which steps it wants to see.
    kind: as what file.
    """

    def __init__(self, wish: Wish, kind: str = "webp") -> None:
        self.wish, self.kind = wish, kind
        self.previews: deque[Preview] = deque(maxlen=_KEPT)
        self._news = asyncio.Event()

    def wake(self) -> None:
        """There is news. Called in the loop."""
        self._news.set()

    async def wait(self, seconds: float) -> bool:
        """Wait for news. Returns False when there was none for so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            return False
        self._news.clear()
        return True
