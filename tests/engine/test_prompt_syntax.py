"""How prompts of other programs are read: weights, escapes, breaks, and a note for each piece that does nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreammix_trt.engine.prompt_syntax import Part, read_plainly, read_prompt

Runs = list[tuple[str, float]]


def list_runs(part: Part) -> Runs:
    """The text in pieces of one weight."""
    runs: Runs = []
    for letter, weight in zip(part.text, part.weights, strict=True):
        if runs and runs[-1][1] == weight:
            runs[-1] = (runs[-1][0] + letter, weight)
        else:
            runs.append((letter, weight))
    return [(text, pytest.approx(weight)) for text, weight in runs]


#: a prompt and its text by weight; none of them has a note
READ: dict[str, Runs] = {
    "a red sks mug": [("a red sks mug", 1)],
    "a (red:1.3) mug": [("a ", 1), ("red", 1.3), (" mug", 1)],
    "(red: 1.3 ) mug": [("red", 1.3), (" mug", 1)],
    "(x:.5)(y:-1)": [("x", 0.5), ("y", -1)],
    "((x)) (y) [z] [[z]]": [
        *[("x", 1.21), (" ", 1), ("y", 1.1), (" ", 1), ("z", 1 / 1.1), (" ", 1), ("z", 1 / 1.21)],
    ],
    "(a (b:1.5) c:0.5)": [("a ", 0.5), ("b", 0.75), (" c", 0.5)],
    "([x]:1.2)": [("x", 1.2 / 1.1)],
    r"a \(red\) \[mug\] \\ \+": [(r"a (red) [mug] \ +", 1)],
    r"(a \) b:1.2)": [("a ) b", 1.2)],
    "mug++ t-shirt-, (a b)+ (c)1.5 (d)--": [
        *[("mug", 1.21), (" ", 1), ("t-shirt", 0.9), (", ", 1), ("a b", 1.1), (" ", 1), ("c", 1.5), (" ", 1)],
        ("d", 0.81),
    ],
    "two- and three-legged, 18+, (red)-coloured": [("two- and three-legged, 18+, ", 1), ("red", 1.1), ("-coloured", 1)],
    "a mug: red, 3:2": [("a mug: red, 3:2", 1)],
    "(note: a mug)": [("note: a mug", 1.1)],
    "": [],
}

#: a prompt, the text that is read, and a word of each of its notes
NOTED: dict[str, tuple[str, list[str]]] = {
    "a (red mug": ("a (red mug", ["'(' is never closed"]),
    "a red) mug": ("a red) mug", ["closes nothing"]),
    "a (red:1.3": ("a (red:1.3", ["'(' is never closed"]),
    "a [b mug": ("a [b mug", ["'[' is never closed"]),
    "(a [b) c]": ("a [b c]", ["'[' is never closed", "']' closes nothing"]),
    "(red:strong) mug": ("red mug", ["'(red:strong)' has no weight that can be read"]),
    "(red:1,3) mug": ("red mug", ["'(red:1,3)' has no weight that can be read"]),
    "(:1.2) mug": (" mug", ["weighs no word"]),
    "() mug": (" mug", ["weighs no word"]),
    "(red:16) mug": ("red mug", ["weight 16, and counts as 1"]),
    "(red:4) mug": ("red mug", ["weight 4; usual are 0 to 2"]),
    "<lora:cup:0.8>, a mug": (" a mug", ["<lora:cup:0.8>' does nothing and is left out: a subject is chosen with"]),
    "a mug <hypernet:x:1>": ("a mug", ["hypernet"]),
    "a mug, embedding:easyneg": ("a mug,", ["textual inversions are not loaded"]),
    "a mug (embedding:bad-hands:1.2)": ("a mug", ["textual inversions"]),
    "a {red|blue} mug": ("a red mug", ["'{red|blue}' is read as 'red'"]),
    "a {2$$red|blue} mug": ("a red mug", ["is read as 'red'"]),
    "a {red} mug": ("a red mug", ["weights are written (word:1.2)"]),
    "a [red|blue] mug": ("a red mug", ["'[red|blue]' is read as 'red'"]),
    "a [cat:dog:0.3]": ("a dog", ["'[cat:dog:0.3]' is read as 'dog'"]),
    "a [dog:10]": ("a dog", ["'[dog:10]' is read as 'dog'"]),
    "a [dog::10]": ("a dog", ["'[dog::10]' is read as 'dog'"]),
    "a [cat:(dog:1.2):0.3]": ("a cat:dog", ["words do not change from step to step"]),
    "a mug --ar 16:9": ("a mug --ar 16:9", ["'--ar 16:9' is read as these words"]),
    "a mug::2 red": ("a mug::2 red", ["'::2' is read as these words"]),
    "a __colour__ mug": ("a __colour__ mug", ["no wildcard files"]),
    "a mug AND a table": ("a mug AND a table", ["prompts are not composed"]),
    '("a mug", "a table").blend(1, 0.5)': ('"a mug", "a table".blend1, 0.5', ["prompts are not blended"]),
}


@pytest.mark.parametrize("prompt", READ)
def test_weights_are_read(prompt: str) -> None:
    parsed = read_prompt(prompt)
    assert [list_runs(part) for part in parsed.parts] == [READ[prompt]] and parsed.notes == ()


@pytest.mark.parametrize("prompt", NOTED)
def test_what_does_nothing_is_noted_once(prompt: str) -> None:
    text, notes = NOTED[prompt]
    parsed = read_prompt(f"{prompt}")
    assert parsed.text == text
    assert len(parsed.notes) == len(notes)
    for said, wanted in zip(parsed.notes, notes, strict=True):
        assert wanted in said
    twice = read_prompt(f"{prompt} {prompt}")
    if "never closed" not in str(notes):  # the second piece would close it
        assert len(twice.notes) == len(notes)


def test_breaks_begin_parts() -> None:
    def parts(prompt: str) -> list[str]:
        return [part.text for part in read_prompt(prompt).parts]

    assert parts("sks mug BREAK a table") == ["sks mug", "a table"]
    assert parts("BREAK a mug BREAK BREAK\n a table BREAK") == ["a mug", "a table"]
    assert parts("BREAK") == [""] and parts("a BREAKFAST, a break") == ["a BREAKFAST, a break"]
    whole = read_prompt("(a BREAK b:1.2)")
    assert [list_runs(part) for part in whole.parts] == [[("a", 1.2)], [("b", 1.2)]]
    assert list_runs(whole.join().parts[0]) == [("a", 1.2), (" ", 1), ("b", 1.2)]


@pytest.mark.parametrize("prompt", ["(red:1.3) mug", "a (red mug", "<lora:x:1> mug", "mug++", "a BREAK b", r"\(a\)"])
def test_read_plainly_keeps_all_and_says_so(prompt: str) -> None:
    parsed = read_plainly(prompt)
    assert (parsed.text, set(parsed.parts[0].weights)) == (prompt, {1.0})
    assert len(parsed.notes) == 1 and "plain text" in parsed.notes[0]


def test_read_plainly_is_silent_about_words() -> None:
    assert read_plainly("a red sks mug: new, 3:2").notes == ()


@given(st.text(st.sampled_from("ab ()[]:1.2+-\\{}|<>lora_$,BREAKND"), max_size=40))
def test_every_text_is_a_prompt(prompt: str) -> None:
    for parsed in (read_prompt(prompt), read_plainly(prompt)):
        assert parsed.parts and all(len(part.text) == len(part.weights) for part in parsed.parts)
        assert len(set(parsed.notes)) == len(parsed.notes)


def test_long_nonsense_is_read_quickly() -> None:
    for prompt in ("(" * 5000 + "a", "[a:" * 3000, "{" * 3000 + "}" * 3000, "<lora:" * 3000, "a" + "+" * 9000 + "b"):
        read_prompt(prompt)
