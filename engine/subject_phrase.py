"""What a prompt says of its subject: the words of the noun phrase that the subject's word stands in, and no others.

Read are adjectives before the subject's word and between it and its class, and what follows the class: "with a yellow
star and a red foot", "made of glass", "painted red", "that is red", "in red", ", red and shiny". What is not understood
ends the phrase, as a place does: "on a red table", "beside a blue cup", "in the style of", "standing". So nothing is
read of verbs, comparisons and negations, nor of what stands behind a place.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from dreammix_trt.core.vocabulary import GENERIC, find_meanings, find_noun, split_words, word_set

_TOKEN, _COMMA, _STOP = "<token>", ",", "."
_ARTICLES = word_set("a an the my your his her its our their one two three some")
_PLACES = word_set(
    "of on in at by to from for near beside besides next behind under over above below between among against inside "
    "into onto within without through across around along amid beneath before after during towards like as than or but "
    "not no nor while where who this these those"
)
_PICTURES = word_set("photo photograph picture image painting drawing render rendering sketch shot view")
#: what stands before a noun, is no attribute and nothing to speak of
_FILLERS = word_set(
    "very really completely entirely fully all now so more just mostly purely solid hand high quality beautiful nice "
    "good cute pretty simple lovely elegant detailed realistic new old clean single same fancy modern vintage antique "
    "classic traditional ordinary typical handmade sky royal forest brick rose blood baby hot off"
)
_WITH = word_set("with wearing featuring having has")
_THAT, _IS = word_set("that which"), word_set("is are being")
_MADE = word_set("made crafted built carved sculpted formed constructed cast moulded molded woven")
_PAINTED = word_set("painted dyed coloured colored tinted")
_BOUNDARIES = _ARTICLES | _PLACES | _WITH | _THAT | _IS | {_TOKEN, _STOP}
#: nouns whose adjectives are the subject's own: "with a matte finish"
_SURFACES = word_set("finish surface texture colour color body look paint coat coating exterior material")


@dataclass
class SubjectPhrase:
    """What a prompt says of its subject, in its own words, lower case.

    own: of the subject itself: "red", "glass".
    parts: of something on it, a noun phrase without article each: ("yellow", "star").
    strange: words in adjectives' places that are not known.
    """

    own: list[str] = field(default_factory=list)
    parts: list[tuple[str, ...]] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)


def read_subject_phrase(prompt: str, token: str, class_name: str, nouns: Collection[str] = ()) -> SubjectPhrase:
    """Read what a prompt says of its subject, wherever it names it.

    prompt: plain text.
    token: the subject's word.
    class_name: what it is; "" where nobody knows.
    nouns: for things on the subject, beside those known (`find_noun`).
    """
    items = _list_items(prompt, token)
    reader = _Reader(items, split_words(class_name), nouns)
    for place, item in enumerate(items):
        if item == _TOKEN:
            reader.read_around(place)
    return reader.found


def find_head(words: Sequence[str]) -> str:
    """The word that a noun phrase is about: its last, but "star" of "star sticker"."""
    decals = [word for word in words[:-1] if find_noun(word)[0] == "decal"]
    return decals[-1] if decals and find_noun(words[-1])[1] in GENERIC else words[-1]


def _is_pattern(word: str) -> bool:
    return any(each.kind == "pattern" for each in find_meanings(word))


def _list_items(prompt: str, token: str) -> list[str]:
    """The prompt as words, commas, stops and places of the subject's word; ends with a stop."""
    items: list[str] = []
    for number, piece in enumerate(re.split(rf"(?<!\w){re.escape(token)}(?!\w)", prompt, flags=re.IGNORECASE)):
        items += [_TOKEN] if number else []
        for part in re.findall(r"[^\W_]+(?:['’-][^\W_]+)*|[,;:()]|[.!?|\n]", piece):
            items += [_COMMA] if part in ",;:()" else [_STOP] if part in ".!?|\n" else split_words(part)
    return [*items, _STOP]


class _Reader:
    """Reads the phrases of one prompt. A place is an index into its items."""

    def __init__(self, items: Sequence[str], class_words: Sequence[str], nouns: Collection[str]) -> None:
        self._items, self._class, self._nouns = items, tuple(class_words), nouns
        self._in_part = False  # what follows a part without a comma is said of the part
        self.found = SubjectPhrase()

    def read_around(self, place: int) -> None:
        """Read the phrase around the subject's word."""
        run, end = self._read_noun_phrase(place + 1)
        start = self._find_class(run)
        before = self._list_before(place, start is None)
        if start is None:  # another noun, the last word, or none
            between, strange = run[:-1], before
        else:
            between = run[:start]
            strange = [*before, *between]
            end -= len(run) - start - len(self._class)
        self.found.own += [word for word in (*before, *between) if find_meanings(word)]
        known = _FILLERS | _MADE | _PAINTED | {"and"}
        self.found.strange += [word for word in strange if not (find_meanings(word) or word in known or word.isdigit())]
        self._in_part = False
        while (behind := self._read_behind(end)) > end:
            end = behind

    def _list_before(self, place: int, alone: bool) -> list[str]:
        """The words of the phrase before the subject's word, in order.

        alone: whether no class follows it; then it may stand before: "a red mug sks".
        """
        count, words = len(self._class), list[str]()
        alone = alone and count > 0 and tuple(self._items[max(place - count, 0) : place]) == self._class
        at = place - 1 - (count if alone else 0)
        while at >= 0 and self._items[at] not in _BOUNDARIES | _PICTURES:
            if self._items[at] in (_COMMA, "and"):
                if not self._joins(at):
                    break
            else:
                words.insert(0, self._items[at])
            at -= 1
        return words

    def _read_noun_phrase(self, at: int) -> tuple[list[str], int]:
        """(words of the phrase that begins here, without article, commas and "and"; where it ends)."""
        at, words = at + (self._items[at] in _ARTICLES), list[str]()
        while self._items[at] not in _BOUNDARIES | (_MADE | _PAINTED if words else frozenset()):
            if self._items[at] in (_COMMA, "and"):
                if not self._joins(at):
                    break
            else:
                words.append(self._items[at])
            at += 1
        return words, at

    def _joins(self, at: int) -> bool:
        """Whether a comma or an "and" stands between adjectives."""
        after = at + 2 if self._items[at : at + 2] == [_COMMA, "and"] else at + 1
        return bool(at and find_meanings(self._items[at - 1]) and find_meanings(self._items[after]))

    def _find_class(self, run: Sequence[str]) -> int | None:
        """Where the class stands in a run of words; one and several alike."""
        count = len(self._class)
        for start in range(len(run) - count + 1 if count else 0):
            *first, last = run[start : start + count]
            if tuple(first) == self._class[:-1] and last in {f"{self._class[-1]}{end}" for end in ("", "s", "es")}:
                return start
        return None

    def _read_behind(self, at: int) -> int:
        """Read one clause behind the noun; returns where it ends, or `at` where nothing is understood."""
        if self._items[at] not in (_COMMA, "and"):
            return at if self._in_part else self._read_clause(at)
        end = self._read_clause(at + 1)
        if end > at + 1:
            return end
        words, end = self._read_noun_phrase(at + 1)
        if self._items[at] == _COMMA and self._are_adjectives(words) and self._items[end] in (_COMMA, _STOP):
            self.found.own += words  # "a sks mug, red and shiny"
            return end
        return at

    def _read_clause(self, at: int) -> int:
        """The same for one that begins here."""
        if self._items[at] in _WITH:
            end = self._read_parts(at + 1)
            self._in_part = end > at + 1
            return end if self._in_part else at
        start = at + (self._items[at] in _THAT)
        linked = self._items[start] in _IS
        start += linked
        while self._items[start] in _FILLERS:
            start += 1
        word = self._items[start]
        if word in _MADE | _PAINTED:
            start += 1 + (self._items[start + 1] == "out")
            start += self._items[start] in ("of", "from", "in")
        elif not linked and word in ("in", "of"):
            start += 1
        elif not linked:
            return at
        words, end = self._read_noun_phrase(start)
        if words and words[-1] in _SURFACES:
            words.pop()
        elif word in ("in", "of") and (self._items[start] in _ARTICLES or not self._are_adjectives(words)):
            return at  # "in red wine", "in a glass"
        said = self._list_leading(words)
        self.found.own += said
        self._in_part = False
        return end if said else at

    def _are_adjectives(self, words: Sequence[str]) -> bool:
        return bool(words) and len(self._list_leading(words)) == len(words)

    def _list_leading(self, words: Sequence[str]) -> list[str]:
        """The adjectives that words begin with."""
        count = next((number for number, word in enumerate(words) if not find_meanings(word)), len(words))
        return list(words[:count])

    def _read_parts(self, at: int) -> int:
        """Read a list of things on the subject; returns where it ends."""
        first = True
        while True:
            negated = self._items[at] == "no"
            words, end = self._read_noun_phrase(at + negated)
            if not words or not (first or self._is_of_subject(words)):
                return at if first else at - 1
            first = False
            if not negated:
                self._take_part(words)
            end = self._skip_place(end)
            if self._items[end] not in (_COMMA, "and"):
                return end
            at = end + 1 + (self._items[end : end + 2] == [_COMMA, "and"])

    def _is_of_subject(self, words: Sequence[str]) -> bool:
        """Whether a noun phrase further on in a list is about something that a subject has."""
        head = words[-1]
        kind, noun = find_noun(head)
        return bool(kind) or noun in self._nouns or head in _SURFACES or _is_pattern(head)

    def _take_part(self, words: list[str]) -> None:
        if words[-1] in _SURFACES:
            self.found.own += words[:-1]
        elif _is_pattern(words[-1]):  # "with blue stripes"
            self.found.own.append(words[-1])
        else:
            self.found.parts.append(tuple(words))

    def _skip_place(self, at: int) -> int:
        """Pass over "on it", "on the front"."""
        for words in (("on", "it"), *(("on", "the", side) for side in ("front", "back", "side"))):
            if tuple(self._items[at : at + len(words)]) == words:
                return at + len(words)
        return at
