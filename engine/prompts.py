"""What becomes of a request's text: which prompts are encoded, what TAS removes from them, and the rows of each stage.

The plan is made once for a picture. The host (engine/host/texts.py) or a device (engine/device/texts.py) carries it
out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.request import Request
from dreammix_trt.core.schedule import STAGES, Stage
from dreammix_trt.core.subject import Role
from dreammix_trt.engine.text import TasPlan, Tokenizer, plan_tas

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
RowSource = Literal["prompt", "decomposed", "negative", "zeros"]
MOST_PROMPTS = 3  # of one picture: its own, the one with the attributes that TAS removes, the negative one


@dataclass(frozen=True, eq=False)
class Prompt:
    """A text that is encoded with a subject's factors.

    subject: whose factors.
    ids: int64 (encoders, 77).
    """

    text: str
    subject: Role
    ids: I64

    @property
    def key(self) -> tuple[str, Role, bytes]:
        """Equal for prompts whose encodings are equal."""
        return self.text, self.subject, self.ids.tobytes()


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

    prompt: the request's own.
    eliminated: the text whose attributes TAS removes, or None.
    negative: of the negative row; None: the row is zeros, or there is none.
    tas: how TAS removes them, or None.
    stages: stage -> its rows, [negative, positive], or positive alone where guidance is off.
    appended: rows that follow the text's in every row of the condition, float32 (rows, n, D), or None.
    """

    prompt: Prompt
    eliminated: Prompt | None
    negative: Prompt | None
    tas: TasPlan | None
    stages: Mapping[Stage, tuple[ConditionRow, ...]]
    appended: F32 | None = None

    @property
    def prompts(self) -> list[Prompt]:
        """All prompts that must be encoded."""
        return [each for each in (self.prompt, self.eliminated, self.negative) if each is not None]

    @property
    def extra(self) -> int:
        """How many rows are appended to the text's."""
        return 0 if self.appended is None else self.appended.shape[1]


def plan_prompts(
    tokenizers: Sequence[Tokenizer], request: Request, subject: Role, token: str, appended: F32 | None = None
) -> PromptPlan:
    """Decide the texts of one picture.

    subject: whose factors the encoders use.
    token: the subject's word in prompts.
    appended: rows to append, float32 (rows, n, D).

    Raises InputError for a prompt that is too long, for TAS without the subject's word, and when there are more or
    fewer appended rows than rows of the condition.
    """

    def tokenize(text: str) -> Prompt:
        ids = np.stack([tokenizer.encode(text, request.truncate_prompt) for tokenizer in tokenizers])
        return Prompt(text, subject, ids)

    prompt, tas, eliminated, negative = tokenize(request.prompt), None, None, None
    if request.substitute:
        prefix = f"a photo of a {token}" if request.substitute_prefix is None else request.substitute_prefix
        tas = plan_tas(tokenizers[0], request.prompt, request.substitute, prefix, request.indexing, token)
        eliminated = tokenize(tas.text)
    if request.guided and request.negative_prompt is not None:
        negative = tokenize(request.negative_prompt)
    against: RowSource = "zeros" if negative is None else "negative"
    stages: dict[Stage, tuple[ConditionRow, ...]] = {}
    for stage in STAGES:
        tokens, pooled = (_choose_source(request, tas, f"{part}_{stage}") for part in ("tokens", "pooled"))
        towards = ConditionRow(tokens, pooled)
        stages[stage] = (ConditionRow(against, against), towards) if request.guided else (towards,)
    if appended is not None and len(appended) != len(stages["lcg"]):
        raise InputError(f"{len(appended)} rows of appended tokens for a condition of {len(stages['lcg'])} rows")
    return PromptPlan(prompt, eliminated, negative, tas, stages, appended)


def _choose_source(request: Request, tas: TasPlan | None, part: str) -> RowSource:
    """Where a part of the positive row comes from.

    part: as `Request.tas_stages` names it.
    """
    return "decomposed" if tas is not None and part in request.tas_stages else "prompt"
