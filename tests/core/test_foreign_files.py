"""Files that are not what their names say, as base, LoRA, patch and head."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.fooocus import read_head, read_patch
from dreammix_trt.core.lora import read_lora

FILES: dict[str, tuple[bytes, str]] = {
    "a page": (
        b"<!DOCTYPE html>\n<html><head><title>Log in</title>",
        r"a web page, not the file itself \('<!DOCTYPE html>",
    ),
    "a page after blanks": (b"\xef\xbb\xbf\r\n  <html>" + b"x" * 9000, "a web page"),
    "an answer of a storage": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "AccessDenied"),
    "an answer in JSON": (b'{"error": "Unauthorized"}', r"a JSON text, not weights .*Unauthorized"),
    "a long JSON": (json.dumps({"weight_map": ["x"] * 5000}).encode(), "a JSON text, not weights"),
    "words": (b"Entry not found", r"a text, not weights \('Entry not found'\)"),
    "words of others": ("Ungültiger Benutzer – bitte anmelden ".encode() * 400, "a text, not weights"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "git lfs pull"),
    "a pointer of git-annex": (b"/annex/objects/SHA256E-s1--1.safetensors\n", "git annex get"),
    "zeros": (bytes(9000), "an unfinished download"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG picture, not weights"),
    "gzip": (gzip.compress(b"x" * 99), "a gzip archive; unpack it"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(99), "a GGUF file"),
    "an old file of torch": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "torch's old format"),
    "a file of Draw Things": (b"SQLite format 3\x00" + bytes(99), "Draw Things.*export it"),
    "nothing": (b"", "truncated.*0 bytes"),
    "noise": (bytes(range(256)) * 8, "truncated, or neither"),
}
READERS: dict[str, Callable[[Path], Any]] = {
    "base": BaseFiles.open,
    "LoRA": read_lora,
    "patch": read_patch,
    "head": read_head,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_is_named(name: str, reader: str, tmp_path: Path) -> None:
    content, told = FILES[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=told) as caught:
        READERS[reader](path)
    assert str(path) in str(caught.value)


def test_a_zip_of_something_else_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.safetensors", "w") as archive:
        archive.writestr("mug/mug.safetensors", b"x")
    for read in READERS.values():
        with pytest.raises(FileFormatError, match=r"a zip archive of mug/mug\.safetensors.*unpack it first"):
            read(tmp_path / "x.safetensors")
