"""PNG files whose profile or text inflates to more than Pillow reads."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MOST_TEXT = 1 << 20  # Pillow's limit for one chunk
_MOST_TEXTS = 64 << 20  # and for all text of a file
_MOST_PROFILE = 8 << 20  # a printer's tables are some MiB; a JPEG holds 16


@dataclass(frozen=True)
class Shortened:
    """A PNG without the chunks that are too large.

    data: the file.
    profile: its colour profile, where that was among them and is not absurdly large.
    dropped: what is lost, in words; empty where only the profile was too large for Pillow.
    """

    data: bytes
    profile: bytes | None
    dropped: str


def shorten_chunks(file: Path | bytes) -> Shortened | None:
    """Leave out of a PNG the text and profile chunks that inflate beyond Pillow's limits. None: there are none.

    file: where it is, or its bytes.

    Raises OSError when the file cannot be read.
    """
    data = file if isinstance(file, bytes) else file.read_bytes()
    if not data.startswith(_SIGNATURE):
        return None
    kept, lost, texts, at = [_SIGNATURE], set(), 0, len(_SIGNATURE)
    profile: bytes | None = None
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunk, body = data[at : at + 12 + length], data[at + 8 : at + 8 + length]
        at += 12 + length
        inflated = _inflate(kind, body)
        if kind == b"iCCP" and len(inflated) > _MOST_TEXT:
            profile = inflated if len(inflated) <= _MOST_PROFILE else None
            lost |= {"profile"} if profile is None else set()
            continue
        texts += len(inflated) if kind in (b"tEXt", b"zTXt", b"iTXt") else 0
        if len(inflated) > _MOST_TEXT or texts > _MOST_TEXTS:
            lost.add("text")
            continue
        kept.append(chunk)
    if not lost and profile is None:
        return None
    return Shortened(b"".join(kept) + data[at:], profile, " and ".join(sorted(lost)))


def _inflate(kind: bytes, body: bytes) -> bytes:
    """The text or profile of a chunk (PNG, 11.3), at most one byte more than is allowed; empty for other chunks."""
    if kind == b"tEXt":
        return body
    if kind == b"iTXt":
        _, _, rest = body.partition(b"\0")
        compressed, rest = rest[:1] == b"\1", rest[2:]
        text = rest.split(b"\0", 2)[-1]
        return _bounded(text) if compressed else text
    if kind in (b"zTXt", b"iCCP"):
        _, _, rest = body.partition(b"\0")
        return _bounded(rest[1:])
    return b""


def _bounded(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, _MOST_PROFILE + 1)
    except zlib.error:
        return b""
