"""What becomes of a request's text: which prompts are encoded, what TAS removes from them, and the rows of each stage.

The plan is made once for a picture. The host (engine/host/texts.py) or a device (engine/device/texts.py) carries it
out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.config_fields import TOKENS
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.lengths import write_lengths
from dreammix_trt.core.request import Request
from dreammix_trt.core.schedule import STAGES, Stage
from dreammix_trt.core.subject import Role
from dreammix_trt.engine.prompt_syntax import Parsed, read_plainly, read_prompt
from dreammix_trt.engine.prompt_warnings import list_warnings
from dreammix_trt.engine.text import Chunk, TasPlan, Tokenizer, plan_tas, shorten

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
RowSource = Literal["prompt", "decomposed", "negative", "zeros"]
Key = tuple[Role, bytes, bytes]  # subject, ids, weights
_MOST_CONTEXT = 4096  # rows of a condition, where networks take any number


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the encoders read at once, with a subject's factors: a text, or a chunk of a longer one.

    subject: whose factors.
    ids: int64 (encoders, 77).
    weights: how much each token counts, float32 (encoders, 77), see `weigh_text`; None: all are 1.
    """

    subject: Role
    ids: I64
    weights: F32 | None = None

    @property
    def key(self) -> Key:
        """Equal for prompts whose encodings are equal. Its first entry is the subject."""
        return self.subject, self.ids.tobytes(), b"" if self.weights is None else self.weights.tobytes()


@dataclass(frozen=True)
class ConditionRow:
    """One row of a stage's condition.

    tokens: where its token rows come from.
    pooled: where its pooled vector comes from.
    """

    tokens: RowSource
    pooled: RowSource


@dataclass(frozen=True, eq=False)
class PromptPlan:
    """The condition of one picture.

    prompt: the request's own, in chunks.
    eliminated: the text whose attributes TAS removes, or None.
    negative: of the negative row, in as many chunks; (): the row is zeros, or there is none.
    tas: how TAS removes them, or None. The prompt's rows are counted through all chunks.
    stages: stage -> its rows, [negative, positive], or positive alone where guidance is off.
    appended: rows that follow the text's in every row of the condition, float32 (rows, n, D), or None.
    empty: the text "", where a prompt has weights.
    warnings: words of the request that do nothing.
    """

    prompt: tuple[Prompt, ...]
    eliminated: Prompt | None
    negative: tuple[Prompt, ...]
    tas: TasPlan | None
    stages: Mapping[Stage, tuple[ConditionRow, ...]]
    appended: F32 | None = None
    empty: Prompt | None = None
    warnings: tuple[str, ...] = ()

    @property
    def prompts(self) -> list[Prompt]:
        """All prompts that must be encoded, each once, those first that others are weighed against."""
        others = [each for each in (self.empty, self.eliminated) if each is not None]
        return list({each.key: each for each in (*others, *self.prompt, *self.negative)}.values())

    @property
    def text_rows(self) -> int:
        """How many rows of the condition come from the text."""
        return TOKENS * len(self.prompt)

    @property
    def extra(self) -> int:
        """How many rows are appended to the text's."""
        return 0 if self.appended is None else self.appended.shape[1]

    @property
    def context(self) -> int:
        """How many rows the condition has."""
        return self.text_rows + self.extra


def count_prompts(context: int) -> int:
    """The most prompts of one picture whose condition has that many rows: "", what TAS removes, and two of chunks."""
    return 2 + 2 * (context // TOKENS)


def plan_prompts(
    tokenizers: Sequence[Tokenizer],
    request: Request,
    subject: Role,
    token: str,
    appended: F32 | None = None,
    contexts: Sequence[int] | None = None,
    caption_words: Sequence[str] = (),
) -> PromptPlan:
    """Decide the texts of one picture.

    subject: whose factors the encoders use.
    token: the subject's word in prompts.
    appended: rows to append, float32 (rows, n, D).
    contexts: the lengths of a condition that can be painted with; None: any.
    caption_words: that the subject was trained with, see `Subject`.

    Raises InputError for a prompt that is too long, for TAS without the subject's word, and when there are more or
    fewer appended rows than rows of the condition.
    """
    texts = [_Text.of("prompt", request.prompt, tokenizers, request)]
    if request.guided and request.negative_prompt is not None:
        texts.append(_Text.of("negative_prompt", request.negative_prompt, tokenizers, request))
    extra = 0 if appended is None else appended.shape[1]
    count = max(_fit_chunks(text, request, contexts, extra) for text in texts)
    prompts = [text.make_prompts(count, tokenizers, subject) for text in texts]
    tas, eliminated = _plan_removal(tokenizers, request, texts[0], token), None
    if tas is not None:
        ids = [tokenizer.encode(tas.text, request.truncate_prompt) for tokenizer in tokenizers]
        eliminated = Prompt(subject, np.stack(ids))
    weighed = any(prompt.weights is not None for chunks in prompts for prompt in chunks)
    empty = Prompt(subject, np.stack([tokenizer.encode("") for tokenizer in tokenizers])) if weighed else None
    stages = _list_rows(request, tas, len(texts) > 1)
    if appended is not None and len(appended) != len(stages["lcg"]):
        raise InputError(f"{len(appended)} rows of appended tokens for a condition of {len(stages['lcg'])} rows")
    said = [(text.field, text.parsed) for text in texts] + ([("substitute", Parsed.of(tas.text))] if tas else [])
    warnings = list_warnings(request, said, subject.name, token, tokenizers[0], caption_words, appended is not None)
    negative = prompts[1] if len(texts) > 1 else ()
    return PromptPlan(prompts[0], eliminated, negative, tas, stages, appended, empty, warnings)


def weigh_text(tokens: F32, empty: F32, weights: F32, widths: Sequence[int]) -> F32:
    """Make some tokens of a prompt count more or less: a row t becomes e + w (t - e), e the same row of the text "".

    tokens, empty: (77, D) over the width of both encoders.
    weights: (encoders, 77).
    widths: of the encoders' rows.

    A weight of 1 leaves the row as it is. Returns float32 (77, D).
    """
    each = np.repeat(weights, widths, axis=0).T
    return np.where(each == 1, tokens, empty + each * (tokens - empty))


@dataclass(frozen=True, eq=False)
class _Text:
    """A prompt of a request.

    field: of the request.
    chunks: of each encoder.
    """

    field: str
    parsed: Parsed
    chunks: Sequence[Sequence[Chunk]]

    @classmethod
    def of(cls, field: str, prompt: str, tokenizers: Sequence[Tokenizer], request: Request) -> _Text:
        parsed = read_prompt(prompt) if request.weighs_prompts else read_plainly(prompt)
        if request.truncate_prompt:
            parsed = parsed.join()
        chunks = [
            [
                chunk
                for part in parsed.parts
                for chunk in tokenizer.encode_chunks(part.text, part.weights, request.truncate_prompt)
            ]
            for tokenizer in tokenizers
        ]
        return cls(field, parsed, chunks)

    @property
    def count(self) -> int:
        """How many chunks it takes."""
        return max(map(len, self.chunks))

    @property
    def tokens(self) -> int:
        """How many tokens it has, without marks."""
        return max(sum(chunk.count for chunk in chunks) for chunks in self.chunks)

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows of its tokens in the condition, as the first encoder counts them."""
        return tuple(TOKENS * n + 1 + k for n, chunk in enumerate(self.chunks[0]) for k in range(chunk.count))

    def make_prompts(self, count: int, tokenizers: Sequence[Tokenizer], subject: Role) -> tuple[Prompt, ...]:
        """Its chunks, filled up to `count` with empty ones."""
        filled = [
            [*own, *(tokenizer.encode_chunks("", ())[0] for _ in range(count - len(own)))]
            for own, tokenizer in zip(self.chunks, tokenizers, strict=True)
        ]
        return tuple(_make_prompt(subject, both) for both in zip(*filled, strict=True))


def _make_prompt(subject: Role, chunks: Iterable[Chunk]) -> Prompt:
    ids, weights = (np.stack(each) for each in zip(*((chunk.ids, chunk.weights) for chunk in chunks), strict=True))
    return Prompt(subject, ids, weights if (weights != 1).any() else None)


def _fit_chunks(text: _Text, request: Request, contexts: Sequence[int] | None, extra: int) -> int:
    """How many chunks the condition has for a text. Raises InputError where so many do not fit."""
    if request.mode == "reference" or request.indexing == "words":  # words are counted within one chunk
        contexts = (TOKENS + extra,)
    elif contexts is None:
        contexts = range(TOKENS, _MOST_CONTEXT + 1)
    able = [(length - extra) // TOKENS for length in contexts if (length - extra) % TOKENS == 0]
    fitting = [count for count in able if count >= text.count]
    if fitting or text.count == 1:
        return min(fitting, default=1)
    most, name = max(able, default=1), text.field.replace("_", " ")
    length, fit = text.tokens + 2 * most, TOKENS * most
    prompt = shorten(text.parsed.text)
    if length > fit:
        fault = (
            f"the {name} {prompt!r} is {length} tokens long with its start and end marks and {fit} fit: "
            f"shorten it by {length - fit} tokens"
        )
    else:
        fault = f"the {name} {prompt!r} takes {text.count} chunks (BREAK begins one) and {most} fit: shorten it"
    return _refuse(fault, request, contexts, TOKENS * text.count + extra)


def _refuse(fault: str, request: Request, contexts: Sequence[int], needed: int) -> int:
    """Raise InputError for a text that takes `needed` rows."""
    if request.mode == "reference":
        remedy = "use native mode, which reads more in chunks"
    elif request.indexing == "words":
        remedy = "leave tas_indexing at 'bpe', which reads more in chunks"
    elif needed > _MOST_CONTEXT:
        remedy = "ask for less"
    elif isinstance(contexts, range):
        remedy = f"load the engine with context={needed}"
    else:
        remedy = f"build the engine with `--context {write_lengths({*contexts, needed}, ',')}`"
    raise InputError(f"{fault}, allow truncation (truncate_prompt), or {remedy}")


def _plan_removal(tokenizers: Sequence[Tokenizer], request: Request, text: _Text, token: str) -> TasPlan | None:
    if not request.substitute_words:
        return None
    prefix = f"a photo of a {token}" if request.substitute_prefix is None else request.substitute_prefix
    plan = plan_tas(tokenizers[0], text.parsed.text, request.substitute_words, prefix, request.indexing, token)
    return plan if request.indexing == "words" else replace(plan, projected=text.rows)


def _list_rows(request: Request, tas: TasPlan | None, negative: bool) -> dict[Stage, tuple[ConditionRow, ...]]:
    """The rows of each stage.

    negative: whether there is a negative prompt.
    """
    against: RowSource = "negative" if negative else "zeros"
    stages: dict[Stage, tuple[ConditionRow, ...]] = {}
    for stage in STAGES:
        tokens, pooled = (_choose_source(request, tas, f"{part}_{stage}") for part in ("tokens", "pooled"))
        towards = ConditionRow(tokens, pooled)
        stages[stage] = (ConditionRow(against, against), towards) if request.guided else (towards,)
    return stages


def _choose_source(request: Request, tas: TasPlan | None, part: str) -> RowSource:
    """Where a part of the positive row comes from.

    part: as `Request.tas_stages` names it.
    """
    return "decomposed" if tas is not None and part in request.tas_stages else "prompt"
