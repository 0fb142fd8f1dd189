"""From a request's words to the condition: weights, chunks, and the warnings about words that do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.networks import names_of_group
from dreammix_trt.core.subject import Role
from dreammix_trt.engine import DreamMix
from dreammix_trt.engine.host.texts import HostTexts, Text
from dreammix_trt.engine.prompts import PromptPlan, plan_prompts
from dreammix_trt.engine.text import find_near_miss
from tests.engine.conftest import make_scene

LONG = "a red sks mug on a wooden table, " * 12  # more than 75 tokens


@pytest.fixture(scope="module")
def dm(mug_engine: Path) -> Iterator[DreamMix]:
    with DreamMix.load(mug_engine, threads=1) as loaded:
        yield loaded


def plan(dm: DreamMix, prompt: str, contexts: Any = None, subject: str = "", **fields: Any) -> PromptPlan:
    return plan_prompts(dm.tokenizers, dm.request(prompt, **fields), Role(subject), "sks", contexts=contexts)


def compose(dm: DreamMix, prompt: str, **fields: Any) -> Text:
    """The local stage's condition."""
    return HostTexts().compose(plan(dm, prompt, **fields), dm.networks, lambda network: {}, False)["lcg"]


def encode(dm: DreamMix, prompt: str) -> tuple[np.ndarray, np.ndarray]:
    """Token rows and pooled vector of a short prompt, by the networks alone."""
    outputs = [
        dm.networks.run(name, input_ids=tokenizer.encode(prompt)[None])
        for name, tokenizer in zip(names_of_group("text"), dm.tokenizers, strict=True)
    ]
    return np.concatenate([each["hidden"][0] for each in outputs], axis=-1), outputs[1]["pooled"][0]


def paint(dm: DreamMix, prompt: str, **fields: Any) -> Any:
    image, mask = make_scene()
    return dm.inpaint(image, mask, prompt, **{"num_inference_steps": 2, "seed": 3, **fields})


# -- weights


def test_weights_are_those_of_an_oracle_in_plain_numbers(dm: DreamMix) -> None:
    got = compose(dm, "a (red:1.5) sks mug, [wooden] table", negative_prompt="(blurry:0.3)")
    for row, text, weights in (
        (0, "blurry", {"blurry": 0.3}),
        (1, "a red sks mug, wooden table", {"red": 1.5, "wooden": 1 / 1.1}),
    ):
        plain, pooled = encode(dm, text)
        empty, _ = encode(dm, "")
        wanted = plain.astype(np.float64)
        spans = dm.tokenizers[0].find_spans(text)
        touched = 0
        for word, weight in weights.items():
            begin = text.index(word)
            for position, start, _ in spans:
                if begin <= start < begin + len(word):
                    wanted[position] = empty[position] + weight * (plain[position].astype(np.float64) - empty[position])
                    touched += 1
        assert touched >= len(weights)
        np.testing.assert_allclose(got.tokens[row], wanted, rtol=0, atol=1e-5 * np.abs(plain).max())
        np.testing.assert_array_equal(got.pooled[row], pooled)
        same = [position for position in range(77) if np.array_equal(wanted[position], plain[position])]
        np.testing.assert_array_equal(got.tokens[row][same], plain[same])
        assert len(same) == 77 - touched


@pytest.mark.parametrize(
    "prompt", ["a (red:1) sks mug", "(a red:1.0) sks mug", r"a red sks mug", "(a ([red]) sks mug:1.0)"]
)
def test_a_weight_of_one_is_the_plain_prompt(dm: DreamMix, prompt: str) -> None:
    wanted, got = compose(dm, "a red sks mug"), compose(dm, prompt)
    if "[" in prompt:
        np.testing.assert_allclose(got.tokens, wanted.tokens, rtol=0, atol=1e-5)
    else:
        np.testing.assert_array_equal(got.tokens, wanted.tokens)
    np.testing.assert_array_equal(got.pooled, wanted.pooled)


def test_each_encoder_has_weights_of_its_own_tokens(dm: DreamMix) -> None:
    """The second one reads each of "!!!" as a token, the first one all of them as one."""
    first, second = plan(dm, "wow !!! (red:1.5) mug").prompt[0].weights  # type: ignore[misc]
    for tokenizer, weights in zip(dm.tokenizers, (first, second), strict=True):
        ids = tokenizer.encode("wow !!! red mug")
        red = [position for position, start, _ in tokenizer.find_spans("wow !!! red mug") if 8 <= start < 11]
        assert np.flatnonzero(weights != 1).tolist() == red and len(ids) == len(weights) == 77


def test_attributes_are_removed_from_weighed_rows(dm: DreamMix) -> None:
    weighed = plan(dm, "a (red:1.5) (sks:0.8) mug", substitute=["blue"])
    assert weighed.tas == plan(dm, "a red sks mug", substitute=["blue"]).tas
    got = compose(dm, "a (red:1.5) (sks:0.8) mug", substitute=["blue"]).tokens[1].astype(np.float64)
    removed, _ = encode(dm, weighed.tas.text)  # type: ignore[union-attr]
    direction = removed[weighed.tas.removed[-1]].astype(np.float64)  # type: ignore[union-attr]
    rows = got[list(weighed.tas.projected)]  # type: ignore[union-attr]
    assert np.abs(rows @ direction).max() < 1e-4 * (direction @ direction)
    assert np.abs(got - compose(dm, "a red sks mug", substitute=["blue"]).tokens[1]).max() > 1e-3


def test_weights_change_the_picture_and_a_heavier_word_more(dm: DreamMix) -> None:
    plain, heavy, off = (
        np.asarray(paint(dm, prompt, **fields).images[0]).astype(int)
        for prompt, fields in (
            ("a red sks mug", {}),
            ("a (red:2) sks mug", {}),
            ("a (red:2) sks mug", {"prompt_weights": False}),
        )
    )
    assert np.abs(plain - heavy).max() > 2 and np.abs(heavy - off).max() > 2


def test_reference_mode_takes_prompts_literally(dm: DreamMix) -> None:
    literal = plan(dm, "a (red:1.3) sks mug", mode="reference")
    np.testing.assert_array_equal(literal.prompt[0].ids[0], dm.tokenizers[0].encode("a (red:1.3) sks mug"))
    assert literal.prompt[0].weights is None
    assert [warning for warning in literal.warnings if "plain text" in warning]
    assert plan(dm, "a red sks mug", mode="reference").warnings == ()


# -- chunks


def test_a_long_prompt_is_chunks_side_by_side(dm: DreamMix) -> None:
    words = LONG.split()
    tokenizer, fits = dm.tokenizers[0], 0
    while len(tokenizer.find_spans(" ".join(words[: fits + 1]))) < 75:
        fits += 1
    fits += len(tokenizer.find_spans(" ".join(words[: fits + 1]))) == 75
    first, rest = " ".join(words[:fits]), " ".join(words[fits:])
    got = compose(dm, LONG, negative_prompt="blurry")
    assert got.tokens.shape[:2] == (2, 154)
    (tokens, pooled), (tokens_2, _) = encode(dm, first), encode(dm, rest)
    np.testing.assert_array_equal(got.tokens[1], np.concatenate([tokens, tokens_2]))
    np.testing.assert_array_equal(got.pooled[1], pooled)
    negative, empty = encode(dm, "blurry"), encode(dm, "")
    np.testing.assert_array_equal(got.tokens[0], np.concatenate([negative[0], empty[0]]))
    np.testing.assert_array_equal(got.pooled[0], negative[1])


def test_break_begins_a_chunk(dm: DreamMix) -> None:
    got = compose(dm, "a red sks mug BREAK a table").tokens[1]
    np.testing.assert_array_equal(got, np.concatenate([encode(dm, "a red sks mug")[0], encode(dm, "a table")[0]]))


def test_attributes_are_removed_from_the_rows_of_all_chunks(dm: DreamMix) -> None:
    made = plan(dm, "a red sks mug BREAK a table", substitute=["blue"])
    spans = [
        [position for position, _, _ in dm.tokenizers[0].find_spans(text)] for text in ("a red sks mug", "a table")
    ]
    assert made.tas is not None and made.tas.projected == (*spans[0], *(77 + position for position in spans[1]))


def test_words_are_not_torn_between_chunks(dm: DreamMix) -> None:
    tokenizer = dm.tokenizers[0]
    for prompt in ("mug " * 74 + "qzxqzx mug", "q" * 400, "mug " * 75, "mug " * 76, ""):
        chunks = tokenizer.encode_chunks(prompt, [1.0] * len(prompt))
        ids = [int(each) for chunk in chunks for each in chunk.ids[1 : 1 + chunk.count]]
        assert ids == list(tokenizer._split(prompt).ids)
        assert all(chunk.count <= 75 for chunk in chunks)
    torn = tokenizer.encode_chunks("mug " * 74 + "qzxqzx mug", [1.0] * 400)
    assert torn[0].count == 74 and torn[1].count > 2
    counts = [chunk.count for chunk in tokenizer.encode_chunks("mug " * 76, [1.0] * 304)]
    assert counts == [75, 1]


@pytest.mark.parametrize(
    ("prompt", "contexts", "rows"),
    [
        ("a mug", (77, 154), 77),
        (LONG, (77, 154), 154),
        (LONG, (77, 231), 231),
        (LONG, range(77, 309), 154),
        (LONG, None, 154),
        ("a mug", (154,), 154),
    ],
    ids=lambda value: str(value)[:20],
)
def test_the_shortest_condition_that_fits_is_taken(dm: DreamMix, prompt: str, contexts: Any, rows: int) -> None:
    made = plan(dm, prompt, contexts)
    assert made.context == rows and len(made.negative) == len(made.prompt) == rows // 77


@pytest.mark.parametrize(
    ("prompt", "contexts", "fields", "said"),
    [
        ("mug " * 150, (77,), {}, r"152 tokens long .* 77 fit: shorten it by 75 .*truncate_prompt.*--context 77,154`"),
        ("mug " * 151, (77, 154), {}, r"155 tokens long .* 154 fit: shorten it by 1 .*--context 77,154,231`"),
        ("mug " * 150, range(77, 78), {}, "load the engine with context=154"),
        ("a BREAK b", (77,), {}, r"takes 2 chunks \(BREAK begins one\) and 1 fit.*--context 77,154`"),
        ("mug " * 150, None, {"mode": "reference"}, "152 tokens long .* use native mode"),
        ("sks " * 150, None, {"tas_indexing": "words", "substitute": ["x"]}, "leave tas_indexing at 'bpe'"),
        ("mug " * 9000, None, {}, "ask for less"),
        ("a mug", (77,), {"negative_prompt": "mug " * 150}, "the negative prompt 'mug mug"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_does_not_fit_is_refused_with_the_remedy(
    dm: DreamMix, prompt: str, contexts: Any, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        plan(dm, prompt, contexts, **fields)


def test_a_long_prompt_is_painted_and_cut_only_when_told(dm: DreamMix) -> None:
    whole, cut = paint(dm, LONG), paint(dm, LONG, truncate_prompt=True)
    assert whole.warnings == ()
    assert np.abs(np.asarray(whole.images[0]).astype(int) - np.asarray(cut.images[0])).max() > 2
    (warning,) = cut.warnings
    assert warning.startswith("prompt: ") and "are cut off (truncate_prompt)" in warning and "table" in warning
    kept = plan(dm, LONG, truncate_prompt=True).prompt
    assert len(kept) == 1
    np.testing.assert_array_equal(kept[0].ids[0], dm.tokenizers[0].encode(LONG, truncate=True))


# -- warnings

#: what is asked for, and words of each warning
WARNED: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    ({"prompt": "a red SKS, mug"}, []),
    ({"prompt": "a (red:1.3) (sks:1.1) mug"}, []),
    ({"prompt": "a red mug"}, ["prompt: it does not name the subject 'mug', whose word is 'sks'"]),
    ({"prompt": "a red mug", "subject": ""}, []),
    ({"prompt": "a red skz mug"}, ["whose word is 'sks'; is 'skz' meant to be it?"]),
    ({"prompt": "a red sks mug <lora:cup:1>"}, ["prompt: '<lora:cup:1>' does nothing and is left out"]),
    ({"prompt": "a (red sks mug"}, ["prompt: '(' is never closed"]),
    ({"negative_prompt": "(bad"}, ["negative_prompt: '(' is never closed"]),
    (
        {"prompt": "a (red:1.3) sks mug", "prompt_weights": False},
        ["prompt: brackets, weights and tags are read as plain"],
    ),
    ({"negative_prompt": "blurry", "guidance_scale": 1.0}, ["negative_prompt does nothing: guidance_scale is 1"]),
    ({"negative_prompt": "sks, blurry"}, ["negative_prompt: it names the subject's word 'sks'"]),
    ({"substitute": ["blue"]}, []),
    ({"substitute": ["blue"] * 90, "truncate_prompt": True}, ["substitute: 20 of 95 tokens are cut off"]),
    ({"substitute": ["blue", "sks"]}, ["substitute: 'sks' is the subject's own word"]),
    ({"substitute": ["blue", "!"]}, ["substitute: '!' is no word"]),
    ({"substitute": ["red"]}, ["substitute: 'red' stands in the prompt too"]),
    ({"substitute": ["blue", "qqxzjw"]}, ["substitute: 'qqxzjw' is no word that the text encoder knows"]),
    ({"substitute": ["blue"], "tas_stages": []}, ["substitute does nothing: tas_stages names no stage"]),
    ({"substitute_prefix": "a photo"}, ["substitute_prefix does nothing"]),
    ({"prompt": "a skz mug, <lora:x:1>"}, ["<lora:x:1>", "is 'skz' meant to be it?"]),
]


@pytest.mark.parametrize(("fields", "said"), WARNED, ids=lambda value: str(value)[:60])
def test_words_that_do_nothing_are_said_once(dm: DreamMix, fields: dict[str, Any], said: list[str]) -> None:
    fields = {"prompt": "a red sks mug", **fields}
    warnings = plan(dm, fields.pop("prompt"), subject=fields.pop("subject", "mug"), **fields).warnings
    assert len(warnings) == len(said), warnings
    for warning, wanted in zip(warnings, said, strict=True):
        assert wanted in warning


def test_a_result_has_the_warnings(dm: DreamMix) -> None:
    result = paint(dm, "a red skz mug", num_images_per_prompt=2)
    assert len(result.images) == 2 and len(result.warnings) == 1 and "'skz'" in result.warnings[0]
    assert paint(dm, "a red sks mug").warnings == ()


def test_a_substitute_without_the_subject_names_the_near_miss(dm: DreamMix) -> None:
    with pytest.raises(InputError, match=r"needs 'sks' as a word of its own.*write it for 'skz'"):
        plan(dm, "a red skz mug", substitute=["blue"])


@pytest.mark.parametrize(
    ("text", "word", "found"),
    [
        ("a skz mug", "sks", "skz"),
        ("a kss mug", "sks", "kss"),
        ("a sk mug", "sks", "sk"),
        ("a SKSS mug", "sks", "SKSS"),
        ("a red mug", "sks", None),
        ("a sks mug", "sks", None),
        ("an owhx teapot", "ohwx", "owhx"),
        ("a myteepto here", "myteapot", "myteepto"),
        ("a b mug", "x", None),
    ],
)
def test_near_misses(text: str, word: str, found: str | None) -> None:
    assert find_near_miss(text, word) == found


def test_a_substitute_that_no_caption_has(dm: DreamMix) -> None:
    def warn(
        *substitute: str, words: tuple[str, ...] = ("blue", "mug", "shiny", "sks"), name: str = "mug"
    ) -> list[str]:
        request = dm.request("a red sks mug", substitute=list(substitute))
        return list(plan_prompts(dm.tokenizers, request, Role(name), "sks", caption_words=words).warnings)

    assert warn("blue") == warn("shiny blue") == warn("Blue") == []
    assert warn("green", "blue") == [
        "substitute: 'green' is in no caption that 'mug' was trained with (blue, mug, shiny)"
    ]
    assert warn("green", words=("mug", "sks")) == warn("green", words=()) == warn("green", name="") == []


# -- the feather


@pytest.mark.parametrize(("feather", "reach"), [(None, 4), (0, 1), (1, 1), (2, 2), (20, 20)])
def test_the_feather_ends_where_the_request_says(dm: DreamMix, feather: int | None, reach: int) -> None:
    image, mask = make_scene()
    mask[:40] = np.where(mask[40:80], mask[40:80], 0)  # it touches the upper border, too
    out = np.asarray(paint_scene(dm, image, mask, feather))
    rows, cols = np.nonzero(mask)
    down, right = np.ogrid[:128, :128]
    distance = np.full(mask.shape, 255)
    for row, col in zip(rows, cols, strict=True):
        distance = np.minimum(distance, np.maximum(abs(down - row), abs(right - col)))
    np.testing.assert_array_equal(out[distance >= reach], image[distance >= reach])
    if reach > 1:
        ring = distance == 1
        assert (out[ring] != image[ring]).any()
    assert (out[mask > 0] != image[mask > 0]).mean() > 0.5


def paint_scene(dm: DreamMix, image: np.ndarray, mask: np.ndarray, feather: int | None) -> Image.Image:
    result = dm.inpaint(image, mask, "a red sks mug", num_inference_steps=2, feather=feather)
    return result.images[0]
