"""Prompts as users of A1111, ComfyUI and compel write them: weights, escapes, breaks; what else they write is named.

docs/algorithm.md, 5.6, lists what is read. A note says of one piece of a prompt why it does not do what it looks like.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

STEP = 1.1  # what one pair of round brackets multiplies by, and one pair of square brackets divides by
_FAINT = 0.9  # what one minus after a word multiplies by
_USUAL, _MOST = 3.0, 10.0  # weights beyond the first are noted, beyond the second are not taken
_DEEPEST = 8  # braces in braces; deeper ones are text

_END = r"(?=[\s,.;:!?)\]]|$)"
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_PIECE = re.compile(
    rf"""(?P<escaped>\\[][(){{}}<>|+\\-])
    |(?P<open>[(\[])
    |(?::\s*(?P<number>{_NUMBER})\s*)?(?P<close>\))(?:(?P<factor>\d*\.\d+){_END}|(?P<after>\++|-+){_END})?
    |(?P<shut>\])
    |(?P<word>\w(?:[\w']|-(?=\w))*)(?:(?P<signs>\++|-+){_END}(?!(?<=-)\s+(?:and|or|to)\b))?
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_TAG = re.compile(r"(?<!\\)<(lora|lyco|lycoris|hypernet|hypernetwork|ti|embedding):[^<>]*>\s*,?", re.IGNORECASE)
_EMBEDDING = re.compile(r"\(\s*embedding:[^()]*\)|\bembedding:[\w./-]*[\w/]", re.IGNORECASE)
_CHOICE = re.compile(r"(?<!\\)\{([^{}]*)\}|(?<!\\)\[([^][|]*\|[^][]*)\]")
_EDITING = re.compile(rf"(?<!\\)\[([^][:|]*(?::[^][:|]*)?):\s*(?:{_NUMBER})\s*\]")
_METHOD = re.compile(r"\)\s*\.(blend|and|swap)\(")
_FOREIGN = re.compile(r"(?<!\S)--[a-z]{1,12}\b(?: [\d:.]+)?|::-?[\d.]+")  # Midjourney's
_WILDCARD = re.compile(r"(?<!\w)__[\w./*-]+?__(?!\w)")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


@dataclass(frozen=True)
class Part:
    """A piece of a prompt that begins a chunk of its own.

    text: without brackets, weights and escapes.
    weights: one for each character.
    """

    text: str
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Parsed:
    """A prompt that was read.

    parts: at least one.
    notes: what in it does nothing, or something else than elsewhere; one sentence each.
    """

    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str) -> Parsed:
        """A text whose words all count 1."""
        return cls((Part(text, (1.0,) * len(text)),))

    @property
    def text(self) -> str:
        """All of it, plain."""
        return " ".join(part.text for part in self.parts)

    def join(self) -> Parsed:
        """The same prompt in one part."""
        weights = [weight for part in self.parts for weight in (1.0, *part.weights)]
        return Parsed((Part(self.text, tuple(weights[1:])),), self.notes)


def read_plainly(prompt: str) -> Parsed:
    """A prompt as it stands, brackets included. A note says where `read_prompt` would read another one."""
    plain, read = Parsed.of(prompt), read_prompt(prompt)
    if read == plain:
        return plain
    return Parsed(plain.parts, ("brackets, weights and tags are read as plain text here (mode, prompt_weights)",))


def read_prompt(prompt: str) -> Parsed:
    """Read weights, escapes and breaks; never fails, as every text is a prompt."""
    text, notes = _take_out_tags(prompt)
    text, more = _choose_words(text)
    whole, unread = _Reader().read(text)
    notes += more + _note_words(text) + unread
    return Parsed(_split_at_breaks(whole), tuple(dict.fromkeys(notes)))


def _take_out_tags(text: str) -> tuple[str, list[str]]:
    """The text without tags that load files."""
    notes = []
    for pattern in (_TAG, _EMBEDDING):
        for found in pattern.finditer(text):
            kind = (found[1] if pattern is _TAG else "embedding").lower()
            remedy = (
                "textual inversions are not loaded: write what it stands for in words"
                if kind in ("ti", "embedding")
                else "a subject is chosen with `subject`; other LoRAs are merged by `build --base-lora`"
            )
            notes.append(f"{_quote(found[0].rstrip(', '))} does nothing and is left out: {remedy}")
        text = pattern.sub("", text)
    return (text.rstrip() if notes else text), notes


def _choose_words(text: str) -> tuple[str, list[str]]:
    """The text with one of the words that change from step to step or from picture to picture."""
    notes: list[str] = []

    def choose(found: re.Match[str]) -> str:
        inner = found[1] if found[1] is not None else found[2]
        if "|" not in inner:  # braces of other tools' emphasis
            notes.append(f"{_quote(found[0])} is read as {inner!r}: weights are written (word:1.2)")
            return inner
        first = inner.split("|")[0].rpartition("$$")[2].strip()
        notes.append(f"{_quote(found[0])} is read as {first!r}: the other words are not tried; ask once for each")
        return first

    def keep_last(found: re.Match[str]) -> str:
        before, _, after = found[1].rpartition(":")
        kept = after.strip() or before.strip()
        notes.append(f"{_quote(found[0])} is read as {kept!r}: words do not change from step to step")
        return kept

    text = _EDITING.sub(keep_last, text)
    for _ in range(_DEEPEST):
        text = _CHOICE.sub(choose, text)
    return text, notes


def _note_words(text: str) -> list[str]:
    """What stays in the prompt as words, and means more elsewhere."""
    notes = [f"{found[0]!r} is read as these words: there are no wildcard files" for found in _WILDCARD.finditer(text)]
    if re.search(r"(?<!\S)AND(?!\S)", text):
        notes.append("'AND' is read as the word 'and': prompts are not composed")
    for found in _FOREIGN.finditer(text):
        notes.append(f"{found[0]!r} is read as these words: options and weights of other programs do nothing here")
    for found in _METHOD.finditer(text):
        notes.append(f"'.{found[1]}(...)' is read as words: prompts are not blended")
    return notes


def _split_at_breaks(whole: Part) -> tuple[Part, ...]:
    ends = [*(found.span() for found in _BREAK.finditer(whole.text)), (len(whole.text),) * 2]
    parts, start = [], 0
    for end, following in ends:
        if whole.text[start:end].strip():
            parts.append(Part(whole.text[start:end], whole.weights[start:end]))
        start = following
    if len(ends) == 1:
        return (whole,)
    return tuple(parts) or (Part("", ()),)


def _quote(piece: str, most: int = 40) -> str:
    return repr(piece if len(piece) <= most else piece[: most - 1] + "…")


@dataclass
class _Open:
    """A bracket that was opened: which one, where in the text read so far, and where in the prompt."""

    bracket: str
    at: int
    source: int


@dataclass
class _Reader:
    """Reads brackets from left to right. Brackets without a partner are text."""

    letters: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    stack: list[_Open] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def read(self, text: str) -> tuple[Part, list[str]]:
        for found in _PIECE.finditer(text):
            if found["escaped"]:
                self._add(found["escaped"][1])
            elif found["open"]:
                self.stack.append(_Open(found["open"], len(self.letters), found.start()))
            elif found["close"]:
                self._close(text, found, "(")
            elif found["shut"]:
                self._close(text, found, "[")
            else:
                self._add(found["word"] or found["other"])
                self._weigh_word(found)
        self._keep_open(len(self.stack))
        return Part("".join(self.letters), tuple(self.weights)), self.notes

    def _add(self, text: str) -> None:
        self.letters += text
        self.weights += [1.0] * len(text)

    def _weigh_word(self, found: re.Match[str]) -> None:
        """`word++` and `word--`."""
        signs, word = found["signs"], found["word"]
        if signs and any(letter.isalpha() for letter in word):
            self._weigh(len(self.letters) - len(word), _read_signs(signs), found[0])
        elif signs:
            self._add(signs)

    def _close(self, text: str, found: re.Match[str], bracket: str) -> None:
        places = [place for place, opened in enumerate(self.stack) if opened.bracket == bracket]
        if not places:
            self.notes.append(f"{_quote(found[0])} closes nothing and is read as text: write {_escape(bracket)}")
            self._add(found[0])
            return
        self._keep_open(len(self.stack) - places[-1] - 1)
        opened = self.stack.pop()
        written = text[opened.source : found.end()]
        if not "".join(self.letters[opened.at :]).strip():
            self.notes.append(f"{_quote(written)} weighs no word")
            return
        self._weigh(opened.at, self._find_weight(opened, found, bracket, written), written)

    def _find_weight(self, opened: _Open, found: re.Match[str], bracket: str, written: str) -> float:
        if bracket == "[":
            return self._weigh_square(opened, written)
        if found["number"] or found["factor"]:
            return float(found["number"] or found["factor"])
        if found["after"]:
            return _read_signs(found["after"])
        tail = re.search(r":\S*$", "".join(self.letters[opened.at :]))
        if tail is None:
            return STEP
        self.notes.append(f"{_quote(written)} has no weight that can be read, and counts as 1: write (word:1.2)")
        self._cut(opened.at + tail.start())
        return 1.0

    def _weigh_square(self, opened: _Open, written: str) -> float:
        tail = re.search(rf":\s*{_NUMBER}\s*$", "".join(self.letters[opened.at :]))
        if tail is None:
            return 1 / STEP
        self.notes.append(f"{_quote(written)} is read as all of its words: words do not change from step to step")
        self._cut(opened.at + tail.start())
        return 1.0

    def _cut(self, start: int) -> None:
        del self.letters[start:], self.weights[start:]

    def _weigh(self, start: int, factor: float, written: str) -> None:
        if abs(factor) > _MOST:
            self.notes.append(f"{_quote(written)} has the weight {factor:g}, and counts as 1: usual are 0 to 2")
            return
        if abs(factor) > _USUAL:
            self.notes.append(f"{_quote(written)} has the weight {factor:g}; usual are 0 to 2")
        self.weights[start:] = [weight * factor for weight in self.weights[start:]]

    def _keep_open(self, count: int) -> None:
        """Take the last `count` opened brackets as text."""
        for _ in range(count):
            opened = self.stack.pop()
            self.letters.insert(opened.at, opened.bracket)
            self.weights.insert(opened.at, self.weights[opened.at] if opened.at < len(self.weights) else 1.0)
            self.notes.append(
                f"'{opened.bracket}' is never closed and is read as text: close it, or write {_escape(opened.bracket)}"
            )


def _read_signs(signs: str) -> float:
    return float(STEP if signs[0] == "+" else _FAINT) ** len(signs)


def _escape(bracket: str) -> str:
    return r"\(" + r" or \)" if bracket == "(" else r"\[" + r" or \]"
