"""A CLIP-style byte BPE in CLIP's own files, trained on the world's words so that each of them is one token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from dreammix_trt.trainer.micro.captions import WORDS

MAX_LENGTH = 77
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# CLIP's own splitting rule, without its special tokens.
_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def byte_letters() -> dict[int, str]:
    """GPT-2's reversible map from bytes to printable letters, in CLIP's id order ("!" first)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    moved = [byte for byte in range(256) if byte not in set(kept)]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + n) for n, byte in enumerate(moved)}


def _train_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True)
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False, special_tokens=[]
    )
    # Longer words weigh a little less, so that ties between pairs never depend on hash order.
    text = [" ".join([word] * (3 + (len(words) - index))) for index, word in enumerate(words)]
    tokenizer.train_from_iterator(text, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in merges]


def save_tokenizers(out: Path) -> int:
    """Write ``tokenizer/`` and ``tokenizer_2/`` under `out`; returns the size of the vocabulary."""
    letters = list(byte_letters().values())
    merges = _train_merges(WORDS)
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    vocabulary += [token for token in dict.fromkeys(a + b for a, b in merges) if token not in set(vocabulary)]
    vocabulary += [BOS, EOS]
    ids = {token: index for index, token in enumerate(vocabulary)}
    for folder, pad in (("tokenizer", EOS), ("tokenizer_2", "!")):
        _save_folder(out / folder, ids, merges, pad)
    return len(ids)


def _save_folder(folder: Path, ids: dict[str, int], merges: list[tuple[str, str]], pad: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)

    def entry(content: str, normalized: bool = True) -> dict[str, Any]:
        return {"content": content, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}

    special = {"bos_token": entry(BOS), "eos_token": entry(EOS), "pad_token": pad, "unk_token": entry(EOS)}
    added = {str(ids[token]): entry(token) | {"special": True} for token in (BOS, EOS)}
    if pad == "!":
        added = {"0": entry("!", normalized=False) | {"special": True}} | added
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "do_lower_case": True,
        "eos_token": EOS,
        "errors": "replace",
        "model_max_length": MAX_LENGTH,
        "pad_token": pad,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": EOS,
    }
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class PromptTokenizer:
    """Prompts to padded ids for both encoders, read from a model folder."""

    def __init__(self, model_dir: Path) -> None:
        vocabulary = json.loads((model_dir / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
        lines = (model_dir / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
        merges = [(a, b) for a, b in (line.split(" ") for line in lines)]
        self.size = len(vocabulary)
        self.bos, self.eos = vocabulary[BOS], vocabulary[EOS]
        self._bpe = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=EOS))
        self._bpe.normalizer = normalizers.Lowercase()
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(False, True, False),
            ]
        )
        self._known: dict[str, list[int]] = {}

    def ids(self, prompt: str) -> list[int]:
        """The prompt's token ids without BOS, EOS and padding."""
        if prompt not in self._known:
            self._known[prompt] = list(self._bpe.encode(prompt, add_special_tokens=False).ids)
        return self._known[prompt]

    def __call__(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 (N, 77) for encoder 1 (padded with EOS) and encoder 2 (padded with id 0)."""
        first = torch.full((len(prompts), MAX_LENGTH), self.eos, dtype=torch.long)
        second = torch.zeros((len(prompts), MAX_LENGTH), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids = [self.bos, *self.ids(prompt)[: MAX_LENGTH - 2], self.eos]
            first[row, : len(ids)] = torch.tensor(ids)
            second[row, : len(ids)] = torch.tensor(ids)
        return first, second
