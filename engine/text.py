"""Prompts as token ids, and TAS: removing attributes of the subject from the text embedding.

The tokenizer is CLIP's byte-level BPE; the `tokenizers` package runs it from vocab.json and merges.txt. TAS is section
3.4 of the DreamMix paper. docs/algorithm.md, 5.2 to 5.5, gives the authors' arithmetic.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.config_fields import TOKENS
from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.engine import kernels

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Indexing = Literal["bpe", "words"]

START, END = "<|startoftext|>", "<|endoftext|>"

#: English contractions, runs of letters, single digits, runs of anything else: CLIP's split before BPE.
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True, eq=False)
class Chunk:
    """What an encoder reads at once: start mark, up to 75 tokens, end mark, padding.

    ids: int64 (77,).
    weights: float32 (77,); 1 at marks and padding.
    count: how many tokens it has between the marks.
    """

    ids: I64
    weights: F32
    count: int


class Tokenizer:
    """CLIP's tokenizer for one text encoder. Equal to transformers' CLIPTokenizer on every prompt."""

    def __init__(self, backend: Any, pad: str, length: int = TOKENS) -> None:
        self._backend = backend
        self._length = length
        self._pad_id = self._find_id(pad)

    @classmethod
    def load(cls, folder: str | Path, pad: str | None = None, length: int = TOKENS) -> Tokenizer:
        """Load `vocab.json` and `merges.txt` from `folder`.

        pad: the token that fills up to `length`; None: what the folder's tokenizer_config.json or
            special_tokens_map.json names, else the end mark.
        length: token ids of an encoded prompt.

        Raises FileFormatError for missing or unusable files.
        """
        folder = Path(folder)
        try:
            pad = pad if pad is not None else _read_pad(folder)
            return cls(_make_backend(folder / "vocab.json", folder / "merges.txt", pad), pad, length)
        except FileFormatError:
            raise
        except Exception as error:  # the Rust side raises plain Exception
            raise FileFormatError(f"tokenizer in {folder}: vocab.json or merges.txt cannot be used: {error}") from error

    def encode(self, prompt: str, truncate: bool = False) -> I64:
        """Encode a prompt: start mark, prompt, end mark, padding.

        truncate: drop the last tokens of a prompt that is too long.

        Returns token ids int64 (length,). Raises InputError for a prompt that does not fit, unless `truncate`.
        """
        ids = self._split(prompt).ids
        room = self._length - 2
        if len(ids) > room and not truncate:
            raise InputError(
                f"the prompt {shorten(prompt)!r} is {len(ids) + 2} tokens long with its start and end marks and "
                f"{self._length} fit: shorten it by {len(ids) - room} tokens, or allow truncation (truncate)"
            )
        return self._mark(ids[:room], [1.0] * len(ids[:room])).ids

    def encode_chunks(self, prompt: str, weights: Sequence[float], truncate: bool = False) -> list[Chunk]:
        """Encode a prompt of any length.

        weights: one for each character; a token has that of its first.
        truncate: drop what does not fit into one chunk.

        Returns chunks of up to 75 tokens, at least one. A word that fits into one chunk stays in one.
        """
        split, room = self._split(prompt), self._length - 2
        count = min(len(split.ids), room) if truncate else len(split.ids)
        own = [weights[begin] for begin, _ in split.offsets]
        chunks: list[Chunk] = []
        start = 0
        while start < count or not chunks:
            end = _end_at_word(split.word_ids[:count], start, min(start + room, count))
            chunks.append(self._mark(split.ids[start:end], own[start:end]))
            start = end
        return chunks

    def find_rest(self, prompt: str) -> tuple[int, str]:
        """(tokens of a prompt, its end that does not fit into one chunk)."""
        spans, room = self._split(prompt).offsets, self._length - 2
        return len(spans), prompt[spans[room][0] :] if len(spans) > room else ""

    def find_spans(self, prompt: str) -> list[tuple[int, int, int]]:
        """(position, start, end) of each token that fits: its row of the embedding and its characters in `prompt`."""
        offsets = self._split(prompt).offsets[: self._length - 2]
        return [(position, start, end) for position, (start, end) in enumerate(offsets, start=1)]

    def spells_out(self, word: str) -> bool:
        """Whether an English word falls into three or more pieces of less than two letters on average: hardly one."""
        pieces = self._split(word).ids
        return word.isascii() and len(pieces) >= 3 and len(word) < 2 * len(pieces)

    def _mark(self, ids: Sequence[int], weights: Sequence[float]) -> Chunk:
        marked = [self._find_id(START), *ids, self._find_id(END)]
        padding = self._length - len(marked)
        return Chunk(
            np.array(marked + [self._pad_id] * padding, np.int64),
            np.array([1.0, *weights, *[1.0] * (padding + 1)], np.float32),
            len(ids),
        )

    def _split(self, prompt: str) -> Any:
        return self._backend.encode(prompt, add_special_tokens=False)

    def _find_id(self, token: str) -> int:
        return int(self._backend.token_to_id(token))


@dataclass(frozen=True)
class TasPlan:
    """Which directions TAS removes, and from which rows.

    text: E, encoded like a prompt.
    removed: rows of E's embedding, in the order in which they are removed.
    projected: rows of the prompt's embedding from which they are removed.
    """

    text: str
    removed: tuple[int, ...]
    projected: tuple[int, ...]


def elimination_text(prefix: str, words: Sequence[str]) -> str:
    """E = prefix + " " + words: encoding it gives the directions of `words`."""
    return prefix + " " + " ".join(words)


def plan_tas(
    tokenizer: Tokenizer | None,
    prompt: str,
    words: Sequence[str],
    prefix: str = "a photo of a sks",
    indexing: Indexing = "bpe",
    token: str = "sks",
) -> TasPlan:
    """Find the rows for removing `words` from `prompt`.

    prefix: stands before the words in the text E.
    indexing: "bpe": every token of the eliminated words is removed from every token of the prompt. "words": the
        authors' arithmetic (docs/algorithm.md, 5.3), where the k-th blank-separated word is at row k whatever its
        tokens are. It needs no tokenizer. Both agree when every word is one token.
    token: the subject's word. Punctuation may touch it with "bpe", not with "words".

    Raises InputError when the prompt lacks `token`, or no word is left to eliminate ("bpe").
    """
    if not names_subject(prompt, token, indexing):
        near = find_near_miss(prompt, token)
        raise InputError(
            f"the prompt {shorten(prompt)!r} does not name the subject: attribute removal (substitute) needs "
            f"{token!r} as a word of its own, e.g. 'a red {token} mug'; "
            f"{f'write it for {near!r}' if near else 'add it'}, or leave substitute empty"
        )
    text = elimination_text(prefix, words)
    if indexing == "words":
        first = 1 + len(prefix.lower().split())
        removed = tuple(range(first, first + len(words)))
        projected = tuple(range(1, 1 + len(prompt.lower().split())))
        return TasPlan(text, _drop_beyond(removed), _drop_beyond(projected))
    if tokenizer is None:
        raise ValueError("indexing 'bpe' needs a tokenizer")
    removed = tuple(position for position, start, _ in tokenizer.find_spans(text) if start >= len(prefix))
    if not removed:
        raise InputError(f"substitute is {list(words)!r}: it holds no word to eliminate; name one, or leave it empty")
    return TasPlan(text, removed, tuple(position for position, _, _ in tokenizer.find_spans(prompt)))


def apply_tas(
    plan: TasPlan, tokens: F32, pooled: F32, eliminated_tokens: F32, eliminated_pooled: F32
) -> tuple[F32, F32]:
    """Decompose the prompt's embedding.

    tokens, eliminated_tokens: (77, D) over the width of both encoders.
    pooled, eliminated_pooled: (Dp,).

    Each removed direction e in turn is projected out of each row t: t -= (t . e)/|e|^2 e. The pooled vector loses the
    direction of E's pooled vector once. Zero directions remove nothing. The loop decides which stage uses which part.

    Returns (tokens (77, D), pooled (Dp,)), float32, new arrays.
    """
    decomposed = kernels.tas_project(tokens, eliminated_tokens[list(plan.removed)], np.array(plan.projected, np.int64))
    rest = kernels.tas_project(pooled[None], eliminated_pooled[None], np.zeros(1, np.int64))
    return decomposed, rest[0]


def _end_at_word(words: Sequence[int | None], start: int, end: int) -> int:
    """Where a chunk of tokens start .. end must end to tear no word; `end` where a word fills all of it.

    words: the number of each token's word.
    """
    whole = end
    while start < whole < len(words) and words[whole] is not None and words[whole] == words[whole - 1]:
        whole -= 1
    return end if whole == start else whole


def _drop_beyond(positions: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(position for position in positions if position < TOKENS)


def names_subject(prompt: str, token: str, indexing: Indexing) -> bool:
    """Whether a prompt has the subject's word as TAS needs it: blank-separated with "words"."""
    if indexing == "words":
        return token.lower() in prompt.lower().split()
    return has_word(prompt, token)


def has_word(text: str, word: str) -> bool:
    """Whether a text has a word (or several in a row) as it stands; punctuation may touch it, case does not matter."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def find_near_miss(text: str, word: str) -> str | None:
    """The first word of a text that is one typing error away from `word`, or two where that has six letters or more."""
    most = (len(word) > 2) + (len(word) > 5)
    for other in re.findall(r"\w+", text):
        if 0 < _count_edits(other.lower(), word.lower()) <= most:
            return str(other)
    return None


def _count_edits(one: str, other: str) -> int:
    """Letters added, left out, replaced, or swapped with their neighbours between two words."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        before, last, row = row, before, [i]
        for j, wanted in enumerate(other, start=1):
            least = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and (letter, one[i - 2]) == (other[j - 2], wanted):
                least = min(least, last[j - 2] + 1)
            row.append(least)
    return row[-1]


def shorten(prompt: str, most: int = 60) -> str:
    """The beginning of a prompt, to show."""
    return prompt if len(prompt) <= most else prompt[: most - 1] + "…"


def _make_backend(vocab: Path, merges: Path, pad: str) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    backend = Tokenizer(models.BPE.from_file(str(vocab), str(merges), end_of_word_suffix="</w>", unk_token=END))
    # The pad token is special too, as in transformers: encoder 2 reads every "!" of a prompt as its padding.
    marks = list(dict.fromkeys((START, END, pad)))
    for mark in marks:
        if backend.token_to_id(mark) is None:
            raise FileFormatError(f"{vocab} lacks the token {mark!r}")
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    clean = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    backend.normalizer = normalizers.Sequence(clean)
    pieces = pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True)
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pieces, bytes_of])
    return backend


def _read_pad(folder: Path) -> str:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        if file.is_file():
            pad = json.loads(file.read_text(encoding="utf-8")).get("pad_token")
            pad = pad.get("content") if isinstance(pad, dict) else pad
            if isinstance(pad, str):
                return pad
    return END
