"""Prompts "a [sks] [attributes] [class] [attributes]", combined at random of a subject's attributes and others'.

Regular pictures have two things to show: what the class looks like with the subject's own words, and that these words,
and the others of their kinds, mean what they meant before. So some prompts hold words that contrast with the subject.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dreammix_trt.core.attributes import BEFORE, BEHIND, AttributeDictionary, compose_phrase, with_article
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.vocabulary import USUAL, Meaning, find_meanings, split_words

CONTRAST = 0.5
MOST_ATTRIBUTES = 3
_TRIES = 200  # of drawing a prompt that is not there yet

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class _Slot:
    """A place in a phrase: the subject's own words for it, and contrasting ones."""

    kind: str
    own: tuple[str, ...]
    others: tuple[str, ...]


def combine_prompts(
    dictionary: AttributeDictionary,
    count: int,
    seed: int,
    token: str = "",
    *,
    contrast: float | None = None,
    most: int = MOST_ATTRIBUTES,
) -> tuple[str, ...]:
    """`count` different prompts; the first names the class alone. Fewer where the words do not give so many.

    Prompt k depends on the seed and on those before it, not on `count`.

    token: the subject's word, for captions of its own pictures; "" for other things of the class.
    contrast: 0..1, the share of prompts with at least one contrasting word; None: 0.5 without a token, 0 with one, as a
        subject has its own attributes. In such a prompt each further word contrasts as often as not.
    most: attributes in a prompt.

    Raises InputError for numbers out of range.
    """
    contrast = (0.0 if token else CONTRAST) if contrast is None else contrast
    if count < 1 or most < 1 or not 0 <= contrast <= 1 or seed < 0:
        raise InputError(
            f"count {count} and most {most} must be at least 1, contrast {contrast} 0 to 1, seed {seed} not below 0"
        )
    slots = tuple(_list_slots(dictionary))
    rng = np.random.default_rng([seed, 33])
    found = [_make_prompt(dictionary.class_name, [], token)]
    for number in range(1, count):
        wanted = int(number * contrast) > int((number - 1) * contrast)
        allowed = [kind for kind in (wanted, not wanted) if contrast != (0 if kind else 1)]
        drawn = (_draw_pairs(rng, slots, kind, most) for kind in allowed for _ in range(_TRIES))
        prompts = (_make_prompt(dictionary.class_name, pairs, token) for pairs in drawn)
        new = next((prompt for prompt in prompts if prompt not in found), None)
        if new is None:
            break
        found.append(new)
    return tuple(found)


def _make_prompt(class_name: str, pairs: Pairs, token: str) -> str:
    return f"a photo of {with_article(compose_phrase(class_name, pairs, token))}"


def _list_slots(dictionary: AttributeDictionary) -> Iterator[_Slot]:
    """One slot for each kind before the class, one for each part behind it."""
    words = {**USUAL, **dictionary.contrasts}
    contrasting = {*dictionary.attributes, *dictionary.contrasts, "colour"}
    for kind in BEFORE:
        own = dictionary.attributes.get(kind, ())
        meant = {*own, *(meaning for value in own for meaning in _list_meanings(value))}
        others = [word for word in words[kind] if not meant & {word, *find_meanings(word)}]
        if own or (others and kind in contrasting):
            yield _Slot(kind, own, tuple(others) if kind in contrasting else ())
    for kind in BEHIND:
        for value in dictionary.attributes.get(kind, ()):
            others = [*dictionary.contrasts.get(kind, ()), *_exchange_word(value, words)]
            yield _Slot(kind, (value,), tuple(other for other in others if other != value))


def _list_meanings(value: str) -> list[Meaning]:
    return [meaning for word in split_words(value) for meaning in find_meanings(word)]


def _exchange_word(phrase: str, words: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The phrase with the first of its words that has contrasts exchanged: "cream foot" -> "red foot", and so on.

    words: kind -> those to exchange it with; of them the ones that exclude it are taken.
    """
    parts = phrase.split()
    for place, word in enumerate(parts):
        others = _list_contrasts(word, words)
        if others:
            yield from (" ".join((*parts[:place], other, *parts[place + 1 :])) for other in others)
            return


def _list_contrasts(word: str, words: Mapping[str, Sequence[str]]) -> list[str]:
    """Words of the same kind and group with another meaning; those that nobody knows count as the kind's main group."""
    for said in find_meanings(word)[:1]:
        known = [(other, find_meanings(other)) for other in words[said.kind] if other != word]
        return [
            other
            for other, means in known
            if said not in means and said[:2] in ({each[:2] for each in means} or {(said.kind, 0)})
        ]
    return []


def _draw_pairs(rng: np.random.Generator, slots: Sequence[_Slot], contrasting: bool, most: int) -> Pairs:
    """The words of one prompt; contrasting: at least one of them contrasts. Empty where there are none."""
    usable = [slot for slot in slots if slot.own or contrasting]
    if not usable:
        return []
    size = int(rng.integers(1, min(most, len(usable)) + 1))
    chosen = [usable[n] for n in sorted(rng.choice(len(usable), size, replace=False))]
    changeable = [n for n, slot in enumerate(chosen) if slot.others]
    if contrasting and not changeable:
        return []
    sure = changeable[rng.integers(len(changeable))] if contrasting else -1
    pairs = []
    for number, slot in enumerate(chosen):
        changed = number == sure or (contrasting and slot.others and (not slot.own or rng.random() < 0.5))
        words = slot.others if changed else slot.own
        pairs.append((slot.kind, words[rng.integers(len(words))]))
    return pairs
