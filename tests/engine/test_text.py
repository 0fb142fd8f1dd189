"""Prompts to tokens, and the rows that attribute removal touches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.engine.text import Tokenizer, apply_tas, plan_tas

STRINGS = [
    "",
    "a photo of a sks teapot",
    "A  sks Plushie,  on\tthe red\nsofa!",
    "unglazed, hand-knitted",
    "naïve café Ünïcödé",
    "日本語のテキスト 你好",
    "😀 emoji 👨‍👩‍👧 🇩🇪 🤦🏽‍♂️sks🤦",
    "it's they're I'd WE'LL don''t 'S",
    "12345 3.14 1,000 Ⅷ ½ ²",
    "<|endoftext|> x <|startoftext|>",
    "e\u0301 vs é ﬁ İstanbul ẞ ΑΣ",
    "tabs\u00a0nbsp\u2003em\u200bzw \x00ctrl\x07",
    "&amp; <b>x</b> snake_case __a !!! ??? ...",
    "مرحبا बालم " + "x" * 50,
    "word " * 200,
]
_RANGES = ((32, 127), (0xA0, 0x250), (0x370, 0x400), (0x4E00, 0x4E20), (0x1F600, 0x1F620))
ALPHABET = [code for first, end in _RANGES for code in range(first, end)]


def write_tokenizer(folder: Path, pad: str | None = None) -> Tokenizer:
    """A CLIP tokenizer of bytes and a few words, in which every other word falls apart into bytes."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = ["!", *(letter for letter in letters if letter != "!"), *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in ("a", "photo", "of", "red", "blue", "sks", "mug"):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append(f"{pieces[0]} {pieces[1]}")
            pieces[:2] = ["".join(pieces[:2])]
            vocab.append(pieces[0])
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    names = {name: n for n, name in enumerate(dict.fromkeys(vocab))}
    (folder / "vocab.json").write_text(json.dumps(names), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n", encoding="utf-8")
    return Tokenizer.load(folder, pad)


@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_2"])
def test_equal_to_the_clip_tokenizer(golden: Path, folder: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer.from_pretrained(golden / "model" / folder)
    ours = Tokenizer.load(golden / "model" / folder)
    rng = np.random.default_rng(0)
    random = ["".join(map(chr, rng.choice(ALPHABET, 12))) for _ in range(100)]
    for prompt in STRINGS + random:
        wanted = theirs(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        np.testing.assert_array_equal(ours.encode(prompt, truncate=True), wanted, err_msg=repr(prompt))


def test_padding(golden: Path) -> None:
    first, second = (Tokenizer.load(golden / "model" / name) for name in ("tokenizer", "tokenizer_2"))
    ids, ids_2 = (np.stack([each.encode(prompt) for prompt in ("a sks mug", "")]) for each in (first, second))
    assert ids.shape == ids_2.shape == (2, 77) and ids.dtype == np.int64
    assert ids[1].tolist() == [49406] + [49407] * 76
    assert ids_2[1].tolist() == [49406, 49407] + [0] * 75
    assert ids[0, 4] == ids_2[0, 4] == 49407


def test_a_long_prompt_is_refused_unless_truncation_is_allowed(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    assert len(tokenizer.encode("red " * 75)) == 77
    with pytest.raises(InputError, match=r"78 tokens long.*77 fit.*by 1 tokens"):
        tokenizer.encode("red " * 76)
    cut = tokenizer.encode("red " * 76, truncate=True)
    np.testing.assert_array_equal(cut, tokenizer.encode("red " * 75))


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"vocab\.json"):
        Tokenizer.load(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(FileFormatError, match="<pad>"):
        Tokenizer.load(tmp_path, "<pad>")
    (tmp_path / "vocab.json").write_text("{broken")
    with pytest.raises(FileFormatError, match=r"vocab\.json"):
        Tokenizer.load(tmp_path)


def test_pad_comes_from_the_folder(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "!"}}')
    assert Tokenizer.load(tmp_path).encode("")[-1] == 0


def test_both_indexings_agree_where_words_are_tokens(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    for words in (["blue"], ["blue", "red"]):
        plans = [plan_tas(tokenizer, "A  red sks mug", words, indexing=way) for way in ("bpe", "words")]
        assert plans[0] == plans[1]
        assert plans[0].text == "a photo of a sks " + " ".join(words)
        assert plans[0].removed == tuple(range(6, 6 + len(words))) and plans[0].projected == (1, 2, 3, 4)


def test_bpe_follows_words_of_several_tokens(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    plan = plan_tas(tokenizer, "red, sks mug", ["blue", "ox"])
    assert plan.removed == (6, 7, 8)  # blue, o, x
    assert plan.projected == (1, 2, 3, 4)  # red , sks mug
    assert plan_tas(tokenizer, "sks", ["blue"], prefix="").removed == (1,)


def test_the_subject_must_be_named(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    for way, prompt in (("bpe", "a red mug"), ("bpe", "a skstronaut"), ("words", "a sks, red")):
        with pytest.raises(InputError, match=r"needs 'sks' as a word of its own"):
            plan_tas(tokenizer, prompt, ["blue"], indexing=way)  # type: ignore[arg-type]
    assert plan_tas(tokenizer, "a SKS, red", ["blue"]).projected == (1, 2, 3, 4)
    assert plan_tas(tokenizer, "a red mug", ["blue"], token="mug").projected == (1, 2, 3)


def test_no_word_to_eliminate(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no word to eliminate"):
        plan_tas(write_tokenizer(tmp_path), "a sks", [" "])


def test_only_the_planned_rows_change(tmp_path: Path) -> None:
    plan = plan_tas(write_tokenizer(tmp_path), "a red sks mug", ["blue"])
    rng = np.random.default_rng(2)
    tokens, removed = (rng.standard_normal((77, 24)).astype(np.float32) for _ in range(2))
    pooled, removed_pooled = (rng.standard_normal(10).astype(np.float32) for _ in range(2))
    before = tokens.copy()
    out, out_pooled = apply_tas(plan, tokens, pooled, removed, removed_pooled)
    np.testing.assert_array_equal(tokens, before)
    np.testing.assert_array_equal(out[[0, *range(5, 77)]], tokens[[0, *range(5, 77)]])
    assert np.abs(out[1:5] @ removed[6]).max() < 1e-5 and abs(out_pooled @ removed_pooled) < 1e-5
    assert np.abs(tokens[1:5] @ removed[6]).max() > 1
