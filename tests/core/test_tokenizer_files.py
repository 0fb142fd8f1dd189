"""The tokenizer a base brings, or CLIP's own, against transformers' CLIPTokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dreammix_trt.core.base_tokenizers import TOKENIZERS
from dreammix_trt.core.checkpoint import EMBEDDED, BaseFiles
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.tokenizer_files import read_clip_vocabulary, write_tokenizer_files
from dreammix_trt.engine.text import Tokenizer

PROMPTS = (
    "a photo of a cat",
    "",
    "A red SKS mug, on the table!! it's 42 years old...",
    "Crème brûlée à la façon de grand-mère — 日本語のテキスト 🦊🎉 naïve co-operation",
    "supercalifragilisticexpialidocious don't we'll I'm they've 1234567890 (((masterpiece:1.2)))",
    "tab\tand\nnewline   and <|weird|> marks & entities &amp;",
    "! ! !",
)


def test_clips_own_vocabulary() -> None:
    vocabulary, merges = read_clip_vocabulary()
    assert (len(vocabulary), len(merges)) == (49408, 48894)
    assert sorted(vocabulary.values()) == list(range(49408))
    # well-known ids of CLIP
    known = {"!": 0, "a</w>": 320, "photo</w>": 1125, "of</w>": 539, "cat</w>": 2368, "dog</w>": 1929}
    known |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407, "!</w>": 256, "i": 72, "in": 512}
    assert {token: vocabulary[token] for token in known} == known
    assert merges[0] == "i n"


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_prompts_are_encoded_as_by_transformers(tmp_path: Path, pad: str) -> None:
    transformers = pytest.importorskip("transformers")
    write_tokenizer_files(None, tmp_path, pad)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path, pad_token=pad, local_files_only=True)
    ours = Tokenizer.load(tmp_path)
    assert len(theirs) == 49408
    for prompt in PROMPTS:
        wanted = theirs(prompt, padding="max_length", max_length=77, truncation=True)["input_ids"]
        assert ours.encode(prompt, truncate=True).tolist() == wanted, prompt


def test_a_folder_gives_its_own(tmp_path: Path) -> None:
    base = BaseFiles.open()
    for name, pad in zip(TOKENIZERS, ("<|endoftext|>", "!"), strict=True):
        base.tokenizers.write(name, tmp_path / name)
        for file in ("vocab.json", "merges.txt"):
            assert (tmp_path / name / file).read_bytes() == (EMBEDDED / name / file).read_bytes()
        assert base.tokenizers.pad_token(name) == pad
        assert json.loads((tmp_path / name / "special_tokens_map.json").read_text()) == {"pad_token": pad}


def test_tokenizer_json_alone_is_split(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    whole = tmp_path / "base"
    shutil.copytree(EMBEDDED, whole)
    for name in TOKENIZERS:
        saved = transformers.CLIPTokenizer.from_pretrained(EMBEDDED / name, local_files_only=True)
        shutil.rmtree(whole / name)
        saved.save_pretrained(whole / name)
        assert not (whole / name / "vocab.json").exists()
    base = BaseFiles.open(whole)
    for name in TOKENIZERS:
        base.tokenizers.write(name, tmp_path / name)
        ours, truth = Tokenizer.load(tmp_path / name), Tokenizer.load(EMBEDDED / name)
        for prompt in PROMPTS:
            assert ours.encode(prompt, truncate=True).tolist() == truth.encode(prompt, truncate=True).tolist()
        assert base.tokenizers.pad_token(name) == BaseFiles.open().tokenizers.pad_token(name)


def test_a_tokenizer_given_beside_counts(tmp_path: Path) -> None:
    one = tmp_path / "one"
    shutil.copytree(EMBEDDED / "tokenizer", one)
    base = BaseFiles.open(tokenizer=one)
    base.tokenizers.write("tokenizer_2", tmp_path / "out")
    assert (tmp_path / "out" / "vocab.json").read_bytes() == (one / "vocab.json").read_bytes()
    assert (base.tokenizers.pad_token("tokenizer"), base.tokenizers.pad_token("tokenizer_2")) == ("<|endoftext|>", "!")
    assert {key.split("/")[0] for key in base.hash_contents("tokenizer")} == set(TOKENIZERS)
    (one / "merges.txt").unlink()
    with pytest.raises(FileFormatError, match=r"one: neither vocab\.json with merges\.txt nor tokenizer\.json"):
        BaseFiles.open(tokenizer=one)
    with pytest.raises(FileFormatError, match="none"):
        BaseFiles.open(tokenizer=tmp_path / "none")


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(FileFormatError, match="not the tokenizer of a CLIP text encoder"):
        write_tokenizer_files(tmp_path, tmp_path / "out", "!")


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    write_tokenizer_files(None, tmp_path / "clip", "!")
    message = r"clip: its largest token id is 49407, text_encoder knows 992 tokens .*give the tokenizer that belongs"
    with pytest.raises(FileFormatError, match=message):
        BaseFiles.open(tokenizer=tmp_path / "clip")
    whole = Path(shutil.copytree(EMBEDDED, tmp_path / "base"))
    shutil.copy(tmp_path / "clip" / "vocab.json", whole / "tokenizer_2" / "vocab.json")
    with pytest.raises(FileFormatError, match="tokenizer_2: its largest token id is 49407, text_encoder_2 knows 992"):
        BaseFiles.open(whole)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({}, "it is empty"),
        ({"a": "1"}, "the id of 'a' is '1'"),
        ({"a": -1}, "the id of 'a' is -1"),
        ({"a": 1}, r"lacks '<\|startoftext\|>'"),
        ([], "a JSON list, not an object"),
    ],
)
def test_damaged_vocabularies_are_named(tmp_path: Path, vocabulary: object, message: str) -> None:
    one = Path(shutil.copytree(EMBEDDED / "tokenizer", tmp_path / "one"))
    (one / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(FileFormatError, match=message):
        BaseFiles.open(tokenizer=one)
