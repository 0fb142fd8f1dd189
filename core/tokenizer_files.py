"""The files of CLIP's tokenizer: from a folder, or CLIP's own vocabulary, which a single-file checkpoint lacks.

The merges come from OpenAI's CLIP as OpenCLIP distributes them (MIT; `models/clip/LICENSE`). The vocabulary follows
from them: the bytes, the bytes at the end of a word, the merges in order, two marks.
"""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.files import read_json

CLIP_MERGES = Path(__file__).parents[1] / "models" / "clip" / "merges.txt.gz"
CLIP_TOKENS = 49408
START, END = "<|startoftext|>", "<|endoftext|>"
#: the tokens with which SDXL fills a prompt up to 77 tokens by default
PADS = {"tokenizer": END, "tokenizer_2": "!"}


def check_tokenizer(folder: Path) -> None:
    """Raise `FileFormatError` when a folder has neither vocab.json with merges.txt nor tokenizer.json."""
    if not (_has_both(folder) or (folder / "tokenizer.json").is_file()):
        raise FileFormatError(f"{folder}: neither vocab.json with merges.txt nor tokenizer.json")


def check_vocabulary(folder: Path, pad: str, encoder: str, tokens: int) -> None:
    """Raise `FileFormatError` when a tokenizer gives ids that its text encoder does not know, or lacks marks.

    folder: of the tokenizer.
    pad: the token that fills a prompt.
    encoder: the text encoder's name.
    tokens: its vocab_size.
    """
    vocabulary = _vocabulary_of(folder)
    largest = max(vocabulary.values())
    if largest >= tokens:
        raise FileFormatError(
            f"{folder}: its largest token id is {largest}, {encoder} knows {tokens} tokens (its vocab_size); "
            "give the tokenizer that belongs to this base"
        )
    absent = [token for token in (START, END, pad) if token not in vocabulary]
    if absent:
        raise FileFormatError(f"{folder}: its vocabulary lacks {absent[0]!r}; it is not a CLIP text encoder's")


def _vocabulary_of(folder: Path) -> dict[str, int]:
    """Read token -> id from vocab.json or tokenizer.json."""
    whole = not _has_both(folder)
    path = folder / ("tokenizer.json" if whole else "vocab.json")
    vocabulary = _from_tokenizer_json(path)[0] if whole else read_json(path)
    odd = [token for token, number in vocabulary.items() if type(number) is not int or number < 0]
    if odd or not vocabulary:
        what = f"the id of {odd[0]!r} is {vocabulary[odd[0]]!r}" if odd else "it is empty"
        raise FileFormatError(f"{path}: not a vocabulary ({what}); expected an object of tokens with their ids")
    return vocabulary


def read_pad_token(folder: Path) -> str | None:
    """Read the padding token from tokenizer_config.json, else special_tokens_map.json; None when neither names one."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            token = read_json(folder / name).get("pad_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                return str(token)
    return None


def write_tokenizer_files(source: Path | None, target: Path, pad: str) -> None:
    """Write vocab.json, merges.txt and the padding of a tokenizer.

    source: the tokenizer's folder; None: CLIP's own tokenizer.
    target: the folder to write to.
    pad: the token that fills a prompt.
    """
    target.mkdir(parents=True, exist_ok=True)
    if source is None:
        _write(target, *read_clip_vocabulary())
    elif _has_both(source):
        for file in ("vocab.json", "merges.txt"):
            shutil.copyfile(source / file, target / file)
    else:
        _write(target, *_from_tokenizer_json(source / "tokenizer.json"))
    text = json.dumps({"pad_token": pad}, indent=1, ensure_ascii=False)
    (target / "special_tokens_map.json").write_text(f"{text}\n", encoding="utf-8")


def read_clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """Read CLIP's vocabulary: 49,408 tokens with their ids, and 48,894 merges ("left right")."""
    merges = gzip.decompress(CLIP_MERGES.read_bytes()).decode("utf-8").splitlines()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in [*printable, *range(256, 512 - len(printable))]]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [merge.replace(" ", "") for merge in merges] + [START, END]
    return {token: number for number, token in enumerate(tokens)}, merges


def _from_tokenizer_json(path: Path) -> tuple[dict[str, int], list[str]]:
    check_tokenizer(path.parent)
    model: Any = read_json(path).get("model")
    try:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        return dict(model["vocab"]), merges
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path}: not the tokenizer of a CLIP text encoder (no BPE vocab and merges)") from error


def _write(target: Path, vocabulary: dict[str, int], merges: list[str]) -> None:
    (target / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (target / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def _has_both(folder: Path) -> bool:
    return (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
