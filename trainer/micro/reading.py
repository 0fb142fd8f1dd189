"""Teaching the text encoders to read: at the word for a part, its colour.

SDXL's text encoders come trained on captions. The embedded model's start from nothing, and the denoising loss alone is
slow to teach them which colour belongs to which part: after 5,000 steps of it a linear map read a foot's colour off the
state of "foot" in .98 of captions, a top's in .62, a decal's in .41, and painted parts swapped their colours. So they
learn to read first, on captions alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from torch.nn import functional

from dreammix_trt.trainer.micro import world
from dreammix_trt.trainer.micro.captions import caption, name_parts
from dreammix_trt.trainer.micro.loop import take_step
from dreammix_trt.trainer.micro.networks import POOLED, TEXT_WIDTHS, TextEncoders
from dreammix_trt.trainer.micro.objects import COLOURS, FINISHES, PATTERNS, SHAPES, Attributes
from dreammix_trt.trainer.micro.rooms import SURFACES
from dreammix_trt.trainer.micro.tokenizer import PromptTokenizer

log = logging.getLogger(__name__)

_LONGEST: Final = 40  # tokens of a caption, at most
UNASKED: Final = -100  # cross_entropy's mark for rows without an answer
QUESTIONS: Final[dict[str, tuple[str, ...]]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "pattern": PATTERNS,
    "finish": FINISHES,
    "foot": COLOURS,
    "band": COLOURS,
    "top": COLOURS,
    "decal": COLOURS,
}


class _Readers(torch.nn.Module):  # type: ignore[misc]
    """A linear map for each question: on each encoder's state at the asked word, and on the pooled vector."""

    def __init__(self) -> None:
        super().__init__()
        answers = [len(words) for words in QUESTIONS.values()]
        self.states = torch.nn.ModuleList(
            torch.nn.ModuleList(torch.nn.Linear(width, count) for count in answers) for width in TEXT_WIDTHS
        )
        self.pooled = torch.nn.ModuleList(torch.nn.Linear(POOLED, count) for count in answers)

    def forward(self, states: torch.Tensor, pooled: torch.Tensor, places: torch.Tensor) -> list[list[torch.Tensor]]:
        """Logits (N, answers) of every reader, question by question. places int64 (N, questions): token positions."""
        rows = torch.arange(len(states))
        parts = states.split(TEXT_WIDTHS, -1)
        return [
            [readers[n](part[rows, places[:, n]]) for readers, part in zip(self.states, parts, strict=True)]
            + [self.pooled[n](pooled)]
            for n in range(len(QUESTIONS))
        ]


def list_answers(what: Attributes, text: str) -> dict[str, tuple[str, str]]:
    """question: (word at which it is asked, answer), for what a caption says of a thing."""
    said = set(text.replace(",", "").split())
    noun = what.shape if what.shape in said else "object"
    found = {"shape": (noun, what.shape)} if what.shape in said else {}
    for name in ("colour", "pattern", "finish"):
        if f"{getattr(what, name)} " in text.split(" with ")[0]:
            found[name] = (noun, getattr(what, name))
    named = {part: (word, colour) for part, (colour, word) in name_parts(what).items() if f" {colour} {word}" in text}
    return found | named


def number_answers(found: Mapping[str, tuple[str, str]]) -> list[int]:
    """For each question the index of the answer that `list_answers` found, or UNASKED."""
    return [options.index(found[name][1]) if name in found else UNASKED for name, options in QUESTIONS.items()]


def draw_reading(
    rng: np.random.Generator, words: PromptTokenizer, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids of the first encoder, of the second, places, answers): int64 (N, 40) twice, (N, questions) twice."""
    texts, asked = list[str](), list[dict[str, tuple[str, str]]]()
    while len(texts) < count:
        what = world.random_attributes(rng)
        text = caption(rng, what, SURFACES[rng.integers(len(SURFACES))])
        if text:
            texts.append(text)
            asked.append(list_answers(what, text))
    ids_one, ids_two = (ids[:, :_LONGEST] for ids in words(texts))  # causal: later tokens change nothing before them
    places = torch.zeros(count, len(QUESTIONS), dtype=torch.long)
    answers = torch.full_like(places, UNASKED)
    for row, found in enumerate(asked):
        answers[row] = torch.tensor(number_answers(found))
        for n, name in enumerate(QUESTIONS):
            if name in found:
                places[row, n] = int((ids_one[row] == words.ids(found[name][0])[0]).nonzero()[0, 0])
    return ids_one, ids_two, places, answers


def teach_reading(text: TextEncoders, words: PromptTokenizer, steps: int, seed: int, batch: int = 96) -> float:
    """Train the encoders in place until states and pooled vector say what captions say.

    Returns the share of right answers over the last tenth of the steps, of the reader that is worst.
    """
    readers = _Readers()
    optimiser = torch.optim.AdamW([*text.parameters(), *readers.parameters()], lr=1.5e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.5e-3, total_steps=max(steps, 4), pct_start=0.1)
    shares = []
    for step in range(steps):
        ids_one, ids_two, places, answers = draw_reading(np.random.default_rng([seed, 60, step]), words, batch)
        logits = readers(*text(ids_one, ids_two), places)
        losses = [
            functional.cross_entropy(given, answers[:, n], ignore_index=UNASKED)
            for n, of_question in enumerate(logits)
            for given in of_question
        ]
        loss = torch.stack(losses).nansum() / len(losses)
        take_step(loss, optimiser, schedule)
        if step >= int(0.9 * steps):
            shares.append(_share_right(logits, answers))
        if step % 200 == 199:
            log.info("reading: step %d, loss %.4f, right %s", step + 1, loss.item(), _share_right(logits, answers))
    return float(np.nanmean(shares, 0).min())


def _share_right(logits: list[list[torch.Tensor]], answers: torch.Tensor) -> list[float]:
    """Of each state reader, question by question, the share of right answers; nan where nothing was asked."""
    return [
        float((given.argmax(1) == answers[:, n])[answers[:, n] != UNASKED].float().mean())
        for n, of_question in enumerate(logits)
        for given in of_question[:-1]
    ]
