"""What a file is that holds no tensors: a failed download, a pointer, another format. Its content decides."""

from __future__ import annotations

import json
from pathlib import Path

_READ = 4096  # bytes from the start that tell a file's kind
_KINDS: dict[bytes, str] = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; fetch it with git lfs pull",
    b"/annex/objects/": "a git-annex pointer, not the file itself; fetch it with git annex get",
    b"GGUF": "a GGUF file; quantised weights cannot be used, take the fp16 .safetensors",
    b"\x80": "in torch's old format (before 1.6), which cannot be read safely; save it as .safetensors",
    b"\x89PNG": "a PNG picture, not weights",
    b"\xff\xd8\xff": "a JPEG picture, not weights",
    b"SQLite format 3": "an SQLite file (Draw Things); export it there as .safetensors",
    b"\x89HDF": "an HDF5 file (Keras); only safetensors and torch files can be read",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"Rar!": "a RAR archive; unpack it first",
}
_AGAIN = "download it again"


def describe_foreign(path: Path) -> str:
    """Say in a few words what a file is that is neither safetensors nor torch's zip, and what to do."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(_READ)
    for mark, kind in _KINDS.items():
        if start.startswith(mark):
            return kind
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:1] == b"<":
        return f"a web page, not the file itself ({_quote(text)}): the link needs a login or has expired; {_AGAIN}"
    if text[:1] in (b"{", b"[") and _is_json(path, size, text):
        return f"a JSON text, not weights ({_quote(text)}); if it is an answer of a server, {_AGAIN}"
    if start and _is_text(start):
        return f"a text, not weights ({_quote(text)}); if it is an answer of a server, {_AGAIN}"
    if size and not any(start):
        return f"an unfinished download (its start is all zeros); {_AGAIN}"
    return f"truncated, or neither a safetensors file nor one written by torch.save ({size} bytes)"


def _is_json(path: Path, size: int, start: bytes) -> bool:
    if size > _READ:
        return _is_text(start)
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return _is_text(start)
    return True


def _is_text(start: bytes) -> bool:
    """Whether bytes are UTF-8 without control characters; the last character may be cut."""
    text = start.decode("utf-8", "ignore")
    return (
        len(text.encode()) > len(start) - 4
        and len(text) > 8
        and all(char.isprintable() or char.isspace() for char in text)
    )


def _quote(text: bytes) -> str:
    """The beginning of a text, on one line."""
    words = " ".join(text[:200].decode("utf-8", "replace").split())
    return repr(words if len(words) <= 60 else f"{words[:60]}...")
