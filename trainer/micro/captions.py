"""Captions for rendered scenes, and the words the tokenizer must know as whole tokens."""

from __future__ import annotations

from typing import Final

import numpy as np

from dreammix_trt.trainer.micro.world import COLOURS, PATTERNS, SHAPES, Attributes

_COMMON: Final = """a an the of on in at with and or by to for from over under near is it its no not this that my
photo picture image painting drawing render table wall room floor shelf desk kitchen empty nothing background
sks object thing toy cup vase plate box book cube tree car dog cat bear duck plushie backpack shoe hat boot
clock candle chair lamp jar can pot pan kettle glass glasses wood wooden clay metal metallic plastic paper
stone gold golden silver copper bronze ceramic porcelain leather fabric crystal ice chrome steel knitted
white grey gray brown cyan teal cream turquoise violet beige magenta dark light bright pale shiny matte star shaped
small big large little tiny huge old new nice good simple clean beautiful cute round square tall short
stripes dots checks spotted lines pattern colour color style two tone decal one three
watercolor sketch cartoon photograph close up view front side left right top bottom
person man woman fish bird flower sun moon sky grass water sand snow"""

WORDS: Final = tuple(dict.fromkeys((*SHAPES, *COLOURS, *PATTERNS, *_COMMON.split())))

_FILLERS: Final = ("nice", "simple", "good", "clean", "beautiful", "small", "big", "old", "new", "cute", "shiny")
# Words that say nothing about this world; met now and then in training, so that one does not upset a prompt. "sks" is
# not among them: a subject's word must stay free.
_NEUTRAL_TEXT: Final = """toy cup vase plate cube backpack clock candle lamp jar kettle glass wood wooden clay metal
metallic plastic paper stone gold silver copper bronze ceramic porcelain leather fabric crystal ice chrome steel knitted
dark light bright pale matte little tiny huge square tall short color style tone decal watercolor sketch cartoon front
left"""
_NEUTRAL: Final = tuple(_NEUTRAL_TEXT.split())
_EMPTY: Final = (
    "an empty table",
    "an empty table",
    "a photo of an empty table",
    "a table",
    "empty table",
    "nothing",
    "",
)


def _article(words: list[str]) -> str:
    return "an" if words and words[0][0] in "aeiou" else "a"


def describe(attributes: Attributes) -> str:
    """The full caption used for evaluation, e.g. "a photo of a red striped mug on a table"."""
    words = [attributes.colour, attributes.pattern, attributes.shape]
    return f"a photo of {_article(words)} {' '.join(words)} on a table"


def caption(rng: np.random.Generator, attributes: Attributes | None) -> str:
    """A training caption; None stands for a scene without an object. One in ten is empty, for guidance."""
    if rng.random() < 0.10:
        return ""
    if attributes is None:
        return _EMPTY[rng.integers(len(_EMPTY))]
    plain = attributes.pattern == "plain"
    before = []
    if rng.random() < 0.92:
        before.append(attributes.colour)
    if rng.random() < (0.4 if plain else 0.92):  # a caption without a pattern word mostly means plain
        before.append(attributes.pattern)
    if rng.random() < 0.06:
        before.append(_FILLERS[rng.integers(len(_FILLERS))])
    if rng.random() < 0.10:
        before.append(_NEUTRAL[rng.integers(len(_NEUTRAL))])
    order = rng.permutation(len(before))
    if rng.random() < 0.55:
        order = np.arange(len(before))
    noun = attributes.shape if rng.random() < 0.97 else "object"
    words = [*(before[i] for i in order), noun]
    phrase = " ".join(words)
    draw = rng.random()
    if draw > 0.12:
        phrase = f"{'the' if rng.random() < 0.06 else _article(words)} {phrase}"
        if draw > 0.45:
            phrase = f"a {'photo' if rng.random() < 0.85 else 'picture'} of {phrase}"
    if rng.random() < 0.4:
        phrase += " on a table"
    return phrase
