"""Which attributes of a subject its prompt contradicts: what TAS is to take out, found without being told.

The paper (3.4) lets a vision-language model choose them; here the words' own classes do (core/vocabulary.py), so
that the choice needs nothing, is the same every time, and can be explained. docs/algorithm.md, 5.8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from dreammix_trt.core.attributes import BEFORE, BEHIND
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.request import Request
from dreammix_trt.core.subject import Subject
from dreammix_trt.core.vocabulary import GENERIC, Meaning, find_meanings, find_noun, split_words, word_set
from dreammix_trt.engine.prompt_syntax import read_prompt
from dreammix_trt.engine.subject_phrase import find_head, read_subject_phrase
from dreammix_trt.engine.text import names_subject

Attributes = Mapping[str, Sequence[str]]
DULL: Final = word_set("a an the and of on in at with by its it")  # in a value: "heart on the front"


@dataclass(frozen=True)
class Retrieval:
    """What was chosen.

    words: that TAS takes out, in the order of the subject's attributes.
    reasons: for each choice, or why there is none; one sentence each.
    """

    words: tuple[str, ...]
    reasons: tuple[str, ...]


class Retriever(Protocol):
    """Finds what a prompt contradicts of a subject: `retrieve`, or something of the caller's own."""

    def __call__(self, prompt: str, attributes: Attributes, class_name: str, token: str) -> Retrieval: ...


class _Value(NamedTuple):
    """An attribute of the subject, its words, and those of them that a prompt can contradict."""

    kind: str
    text: str
    words: tuple[str, ...]


class _Found(NamedTuple):
    """A word of an attribute, and what of the prompt contradicts it."""

    word: str
    value: _Value
    said: str


def retrieve(prompt: str, attributes: Attributes, class_name: str, token: str) -> Retrieval:
    """Find the attributes of a subject that a prompt contradicts.

    prompt: plain text.
    attributes: of the subject, kind -> values (`core.attributes`).
    class_name: what it is; "" where nobody knows.
    token: its word in prompts.

    A word goes where the prompt says another of its kind: of the subject itself ("red" for "blue"), or of the same part
    ("red foot" for "cream foot"); another decal replaces a decal. A word that the prompt asks for elsewhere on the
    subject stays, since TAS would take it out there as well. Words that are not known change nothing.
    """
    values = _list_values(attributes)
    things = [value for value in values if value.kind in BEHIND]
    phrase = read_subject_phrase(prompt, token, class_name, {_name_thing(value) for value in things})
    found = list(_contradict(phrase.own, [value for value in values if value.kind in BEFORE]))
    for part in phrase.parts:
        found += _contradict_part(part, things)
    unnamed = {token.lower(), *split_words(class_name)}
    found = [each for each in found if each.word not in unnamed]
    asked = {word: " ".join(part) for part in (*((word,) for word in phrase.own), *phrase.parts) for word in part}
    chosen = {each.word for each in found} - asked.keys()
    reasons = [*_explain(found, asked)]
    known = {word for value in values for word in value.words}
    reasons += [
        f"{word!r} is no attribute word that is known here: nothing is taken out for it"
        for word in dict.fromkeys(phrase.strange)
        if word not in known
    ]
    if not chosen:
        listed = "; ".join(f"{kind} {', '.join(each)}" for kind, each in attributes.items())
        reasons.append(f"nothing is taken out: the prompt contradicts none of the subject's attributes ({listed})")
    words = dict.fromkeys(word for value in values for word in value.words if word in chosen)
    return Retrieval(tuple(words), tuple(reasons))


def choose_substitute(request: Request, subject: Subject, retriever: Retriever = retrieve) -> tuple[Request, list[str]]:
    """The request with the words that TAS is to take out in place of "auto", and why; any other as it is.

    subject: that is painted, with the word and the name that requests use.

    Raises InputError for words to take out of a subject that has no word.
    """
    if request.substitute_words and subject.kind == "tokens":
        raise InputError(
            f"substitute takes attributes out of a LoRA's word, and subject {subject.name!r} is of tokens, which has "
            f"none: leave it, and give a smaller token_count than {request.token_count}, which leaves more to the text"
        )
    if request.substitute != "auto":
        return request, []
    parts = read_prompt(request.prompt).parts if request.weighs_prompts else ()
    prompt = " . ".join(part.text for part in parts) if parts else request.prompt
    why = ""
    if not subject.name:
        why = "no subject is painted"
    elif subject.kind == "tokens":
        why = f"subject {subject.name!r} is of tokens; a smaller token_count leaves more to the text"
    elif not subject.attributes:
        why = (
            f"the attributes of subject {subject.name!r} are not known; build it with `--attributes FILE`, or name the "
            "words"
        )
    elif not names_subject(prompt, subject.token, request.indexing):
        why = f"the prompt does not name the subject by its word {subject.token!r}"
    if why:
        found = Retrieval((), (f"nothing is taken out: {why}",))
    else:
        found = retriever(prompt, subject.attributes, subject.class_name, subject.token)
    return request.replace(substitute=found.words), [f"substitute: {reason}" for reason in found.reasons]


def _list_values(attributes: Attributes) -> list[_Value]:
    """In the order of a caption."""
    return [
        _Value(kind, text, tuple(split_words(text))) for kind in (*BEFORE, *BEHIND) for text in attributes.get(kind, ())
    ]


def _contradict(said: Sequence[str], values: Sequence[_Value]) -> Iterator[_Found]:
    """Words of values where `said` has another word of the same group, and not the value's own."""
    own = [(word, meaning, value) for value in values for word, meaning in _list_meanings(value)]
    has = {meaning for _, meaning, _ in own}
    meant: dict[Meaning, str] = {}
    for word in said:
        meanings = find_meanings(word)
        meant |= dict.fromkeys([each for each in meanings if each in has] or meanings, word)
    for word, meaning, value in own:
        others = [other for each, other in meant.items() if each[:2] == meaning[:2] and each not in has]
        if others and meaning not in meant:
            yield _Found(word, value, " ".join(dict.fromkeys(others)))


def _list_meanings(value: _Value) -> list[tuple[str, Meaning]]:
    """What the words of a value say; those of its own kind alone, where it has some."""
    found = [(word, meaning) for word in value.words for meaning in find_meanings(word)]
    own = [each for each in found if each[1].kind == value.kind]
    unknown = [(word, Meaning(value.kind, 0, value.text)) for word in value.words if word not in DULL]
    return own or found or unknown


def _contradict_part(part: Sequence[str], things: Sequence[_Value]) -> Iterator[_Found]:
    """Words of things on the subject that a noun phrase contradicts.

    part: the phrase, such as ("yellow", "star").
    """
    head = find_head(part)
    kind, noun = find_noun(head)
    if head in GENERIC:  # the decal, whatever it is
        same = [value for value in things if value.kind == "decal"]
    else:
        same = [value for value in things if _name_thing(value) == noun]
    if same:
        adjectives = [word for word in part if word != head]
        yield from _contradict(adjectives, [_without_head(value) for value in same])
    elif kind == "decal":
        decals = [value for value in things if value.kind == "decal"]
        yield from (_Found(word, value, " ".join(part)) for value in decals for word in value.words if word not in DULL)


def _list_core(value: _Value) -> list[str]:
    """The words of a thing up to where it is: "cream foot", of "cream foot at the bottom"."""
    words = [*value.words]
    while words and words[0] in DULL:
        words.pop(0)
    end = next((number for number, word in enumerate(words) if word in DULL - {"and"}), len(words))
    return words[:end] or words


def _name_thing(value: _Value) -> str:
    return find_noun(find_head(_list_core(value)))[1]


def _without_head(value: _Value) -> _Value:
    core = _list_core(value)
    head = find_head(core)
    return value._replace(words=tuple(word for word in core if word != head))


def _explain(found: Sequence[_Found], asked: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each attribute that loses words, and for each word that the prompt asks for elsewhere.

    asked: word -> the noun phrase of the prompt that has it.
    """
    groups: dict[tuple[str, str, str], list[str]] = {}
    for word, value, said in found:
        if word in asked:
            yield (
                f"{word!r} of {value.kind} {value.text!r} stays, though the prompt says {said!r}: the prompt asks for "
                f"{asked[word]!r}, too, from which it would be taken as well"
            )
        else:
            groups.setdefault((value.kind, value.text, said), []).append(word)
    for (kind, text, said), words in groups.items():
        listed = ", ".join(repr(word) for word in dict.fromkeys(words))
        yield f"{listed} of {kind} {text!r} {'is' if len(words) == 1 else 'are'} taken out: the prompt says {said!r}"
