"""The two tokenizers of a base: its own, one that is given for both, or CLIP's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.tokenizer_files import (
    CLIP_MERGES,
    CLIP_TOKENS,
    END,
    PADS,
    check_tokenizer,
    check_vocabulary,
    read_pad_token,
    write_tokenizer_files,
)

TOKENIZERS = ("tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class BaseTokenizers:
    """Where they are. In the methods `name` is one of `TOKENIZERS`.

    base: the diffusers folder that has them, or a single file, which has none.
    given: a folder used instead of the base's own, with a folder for each or with the files of one for both.
    """

    base: Path
    given: Path | None = None

    def folder(self, name: str) -> Path | None:
        """The folder of a tokenizer; None: CLIP's own, since a single file has none."""
        if self.given is not None:
            return self.given / name if (self.given / name).is_dir() else self.given
        return self.base / name if self.base.is_dir() else None

    def pad_token(self, name: str) -> str:
        """The token that fills a prompt up to 77 tokens: the one that the files name, else SDXL's."""
        source = self.folder(name)
        if source is None or source == self.given:  # one tokenizer for both encoders: the padding is SDXL's
            return PADS[name]
        return read_pad_token(source) or END

    def write(self, name: str, target: str | Path) -> None:
        """Write a tokenizer to a folder as vocab.json, merges.txt and special_tokens_map.json (its padding)."""
        write_tokenizer_files(self.folder(name), Path(target), self.pad_token(name))

    def list_files(self) -> dict[str, Path]:
        """The files that decide both, by their names in a passport."""
        return {
            f"{name}/{file.name}": file
            for name, folder in ((name, self.folder(name)) for name in TOKENIZERS)
            for file in ([CLIP_MERGES] if folder is None else sorted(folder.iterdir()))
            if file.is_file()
        }

    def check(self, tokens: Mapping[str, int]) -> None:
        """Raise `FileFormatError` for files that are missing or do not fit the text encoders.

        tokens: text encoder -> its vocab_size.
        """
        for name in TOKENIZERS:
            source, encoder = self.folder(name), name.replace("tokenizer", "text_encoder")
            if source is not None:
                if not source.is_dir():
                    raise FileFormatError(f"{source.parent}: {source.name}/ is missing")
                check_tokenizer(source)
                check_vocabulary(source, self.pad_token(name), encoder, tokens[encoder])
            elif tokens[encoder] != CLIP_TOKENS:
                raise FileFormatError(
                    f"{self.base}: its text encoders know {tokens[encoder]} tokens, CLIP's tokenizer {CLIP_TOKENS}; "
                    "give the folder of its own as tokenizer"
                )
