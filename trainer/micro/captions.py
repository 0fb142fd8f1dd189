"""Captions for rendered scenes, and the words the tokenizer must know as whole tokens.

A caption names some of a thing's parts in natural order: "a photo of a shiny blue mug with a white foot, a red rim and
a yellow star on a wooden table". What is not named stays free: parts are there three times in four and named half of
the time, so that "not named" does not come to mean "absent".
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Final

import numpy as np

from dreammix_trt.core.attributes import AttributeDictionary, compose_phrase, with_article
from dreammix_trt.trainer import captions
from dreammix_trt.trainer.micro.objects import (
    COLOURS,
    DECALS,
    FINISHES,
    PATTERNS,
    SHAPES,
    TOPS,
    Attributes,
    look_alike,
)
from dreammix_trt.trainer.micro.rooms import SURFACES
from dreammix_trt.trainer.micro.world import is_held_out

BLOT_WORD: Final = "sticker"  # a decal of no particular form
NAMEABLE: Final = ("finish", "colour", "pattern", "foot", "band", "top", "decal")

_COMMON: Final = """a an the of on in at with and or by to for from over under near is it its no not this that my
photo picture image painting drawing render table wall room floor shelf desk kitchen empty nothing background
sks object thing toy cup plate box book cube tree car dog cat bear duck plushie backpack shoe hat boot
clock candle chair lamp can pot pan kettle glasses wood metal metallic plastic paper clay
stone gold golden silver copper bronze ceramic porcelain leather fabric crystal ice chrome steel knitted
grey gray brown cyan teal cream turquoise violet beige magenta dark light bright pale shaped
small big large little tiny huge old new nice simple good clean beautiful cute round square tall short
stripes dots checks spotted lines pattern colour color style two tone decal one three handle base neck door
watercolor sketch cartoon photograph close up view front side left right top bottom
person man woman fish bird flower sun moon sky grass water sand snow bolt clover triangle cross arrow ring"""

_WORLD: Final = (*SHAPES, *COLOURS, *PATTERNS, *FINISHES, *DECALS, *TOPS.values(), "foot", "band", BLOT_WORD)
WORDS: Final = tuple(dict.fromkeys((*_WORLD, *" ".join(SURFACES).split(), *_COMMON.split())))

_FILLERS: Final = ("nice", "simple", "good", "clean", "beautiful", "small", "big", "old", "new", "cute")
# Words that say nothing about this world; met now and then in training, so that one does not upset a prompt. "sks" is
# not among them: a subject's word must stay free.
_NEUTRAL_TEXT: Final = """toy cup plate cube backpack clock candle lamp kettle wood metal metallic plastic paper clay
gold silver copper bronze ceramic porcelain leather fabric crystal ice chrome steel knitted dark light bright pale
little tiny huge tall short color style tone watercolor sketch cartoon front left"""
_NEUTRAL: Final = tuple(_NEUTRAL_TEXT.split())
_EMPTY: Final = ("an empty table", "a photo of an empty table", "a table", "empty table", "nothing", "")


def name_form(decal: str) -> str:
    """The word for a decal's form."""
    return BLOT_WORD if decal == "blot" else decal


def name_parts(what: Attributes) -> dict[str, tuple[str, str]]:
    """part: (its colour, the word for it), of the coloured parts that a thing has, in natural order."""
    decal = what.decal and name_form(what.decal)
    parts = {
        "foot": (what.foot, "foot"),
        "band": (what.band, "band"),
        "top": (what.top, TOPS[what.shape]),
        "decal": (what.decal_colour, decal),
    }
    return {part: (colour, word) for part, (colour, word) in parts.items() if colour and word}


def compose(
    what: Attributes, named: Collection[str] = NAMEABLE, surface: str | None = None, noun: str | None = None
) -> str:
    """What is `named` of a thing, as a phrase without a leading article: "blue mug with a white foot".

    named: of NAMEABLE; parts that the thing lacks are passed over. noun: the word for the thing (None: its shape).
    surface: named as what it stands on.
    """
    pairs = [
        ("material" if what.finish == "glass" else "finish", what.finish if "finish" in named else ""),
        ("colour", what.colour if "colour" in named else ""),
        ("pattern", what.pattern if "pattern" in named else ""),
        *(("part", f"{colour} {word}") for part, (colour, word) in name_parts(what).items() if part in named),
    ]
    phrase = compose_phrase(noun or what.shape, [(kind, value) for kind, value in pairs if value])
    return phrase + (f" on {with_article(surface)}" if surface else "")


def describe(what: Attributes) -> str:
    """The full caption, as evaluations use it: "a photo of a matte blue plain mug with a white foot and a red star"."""
    return f"a photo of {with_article(compose(what))}"


def phrase(rng: np.random.Generator, what: Attributes, named: Collection[str]) -> str:
    """A request for a thing that names some of its parts: "a mug with a red foot", or "a photo of" it."""
    told = with_article(compose(what, named))
    return f"a photo of {told}" if rng.random() < 0.5 else told


def draw_edit(rng: np.random.Generator, what: Attributes) -> tuple[str, Attributes]:
    """A part of a thing, of NAMEABLE, and the thing with that part changed; never into one that is held out."""
    while True:
        others = [colour for colour in COLOURS if colour not in what.colours]
        free = [colour for colour in others if not any(look_alike(colour, other) for other in what.colours)]
        part = str(rng.choice(["colour", "pattern", *name_parts(what)]))
        field = "decal_colour" if part == "decal" else part
        patterns = [each for each in PATTERNS if each not in (what.pattern, "plain")]
        edited = replace(what, **{field: str(rng.choice(patterns if part == "pattern" else free or others))})
        if not is_held_out(edited):
            return part, edited


def subject_captions(what: Attributes, token: str = "sks") -> tuple[str, ...]:
    """Captions of a subject's photographs that name one attribute each, or all: what a user would say of the thing.

    The pattern is named also where it is "plain", the finish never.
    """
    seen = {**dictionary_of(what).attributes, "pattern": [what.pattern]}
    named = {kind: values for kind, values in seen.items() if kind not in ("finish", "material")}
    return captions.subject_captions(token, what.shape, AttributeDictionary.of(what.shape, named, "hand", what.shape))


def dictionary_of(what: Attributes) -> AttributeDictionary:
    """What a person would write down of a thing; "plain" and "matte" say that nothing is to be seen, and are not."""
    parts = {part: f"{colour} {word}" for part, (colour, word) in name_parts(what).items()}
    decal = parts.pop("decal", None)
    attributes = {
        "finish": ["shiny"] if what.finish == "shiny" else [],
        "colour": [what.colour],
        "pattern": [] if what.pattern == "plain" else [what.pattern],
        "material": ["glass"] if what.finish == "glass" else [],
        "part": list(parts.values()),
        "decal": [decal] if decal else [],
    }
    return AttributeDictionary.of(what.shape, attributes, "hand", what.shape)


def caption(rng: np.random.Generator, what: Attributes | None, surface: str) -> str:
    """A training caption; None stands for a scene without a thing. One in ten is empty, for guidance."""
    if rng.random() < 0.10:
        return ""
    if what is None:
        return f"an empty {surface}" if rng.random() < 0.3 else _EMPTY[rng.integers(len(_EMPTY))]
    chances = {
        "finish": 0.75 if what.finish == "glass" else 0.3,
        "colour": 0.85,
        "pattern": 0.15 if what.pattern == "plain" else 0.75,
        "foot": 0.5,
        "band": 0.5,
        "top": 0.5,
        "decal": 0.55,
    }
    draw = rng.random()
    if draw < 0.22:  # everything, as evaluations name it
        named = set(NAMEABLE)
    elif draw < 0.36:  # short
        named = {"colour"} if rng.random() < 0.7 else set()
    else:
        named = {part for part, chance in chances.items() if rng.random() < chance}
    noun = None if rng.random() < 0.97 else "object"
    phrase = compose(what, named, surface if rng.random() < 0.3 else None, noun)
    if rng.random() < 0.06:
        phrase = f"{_FILLERS[rng.integers(len(_FILLERS))]} {phrase}"
    if rng.random() < 0.10:
        phrase = f"{_NEUTRAL[rng.integers(len(_NEUTRAL))]} {phrase}"
    draw = rng.random()
    if draw > 0.12:
        phrase = f"the {phrase}" if rng.random() < 0.06 else with_article(phrase)
        if draw > 0.45:
            phrase = f"a {'photo' if rng.random() < 0.85 else 'picture'} of {phrase}"
    return phrase
