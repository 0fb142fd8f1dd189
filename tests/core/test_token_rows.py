"""Tokens in a subject's file: kept, alone or beside factors, and refused where damaged or of another adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dreammix_trt.core import subject_tokens
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.subject import Subject, name_after_class, open_subject, read_subject, stack_pairs, write_subject
from dreammix_trt.core.token_factors import check_tokens
from dreammix_trt.core.token_rows import Tokens
from tests.support.tiny_model import random_factors
from tests.support.tokens import write_small_adapter

MODULES = {"a.to_k": (6, 5), "a.to_v": (7, 5)}
MARK = "dreammix_subject"


def draw_rows(count: int = 48, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, width)).astype(np.float16).astype(np.float32)


def change(file: Path, facts: dict[str, Any], **tensors: Any) -> Path:
    """Write the file again with other facts and tensors; None: without it."""
    with safe_open(file, framework="numpy") as held:
        told = json.loads(held.metadata()[MARK]) | facts
    told = {name: value for name, value in told.items() if value is not None}
    kept = {name: value for name, value in {**load_file(file), **tensors}.items() if value is not None}
    save_file(kept, file, {MARK: json.dumps(told)})
    return file


@pytest.mark.parametrize(("has_factors", "kind"), [(False, "tokens"), (True, "lora+tokens")])
def test_the_file_keeps_them_beside_factors(has_factors: bool, kind: str, tmp_path: Path) -> None:
    factors = {"unet": random_factors(MODULES)} if has_factors else {}
    file = tmp_path / "mug.safetensors"
    write_subject(file, Subject("mug", "", "mug", factors, tokens=Tokens(draw_rows(), "ab" * 32)))
    for found in (read_subject(file), open_subject(file)):
        assert (found.name, found.token, found.class_name, found.kind) == ("mug", "", "mug", kind)
        assert found.tokens is not None and found.tokens.adapter == "ab" * 32
        np.testing.assert_array_equal(found.tokens.rows, draw_rows())
        assert found.factors.keys() == factors.keys() and found.has_factors == has_factors
    with safe_open(file, framework="numpy") as held:
        told = json.loads(held.metadata()[MARK])
    assert told["parts"] == (["factors"] if has_factors else []) + ["tokens"]
    assert load_file(file)["tokens.rows"].dtype == np.float16


def test_a_file_without_tokens_is_what_it_was(tmp_path: Path) -> None:
    write_subject(tmp_path / "x.safetensors", Subject("x", "sks", "mug", {"unet": random_factors(MODULES)}))
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as held:
        told = json.loads(held.metadata()[MARK])
    assert told["schema"] == 3 and told["parts"] == ["factors"] and "tokens_adapter" not in told
    found = read_subject(tmp_path / "x.safetensors")
    assert found.tokens is None and found.kind == "lora"


@pytest.mark.parametrize(
    ("facts", "tensors", "told"),
    [
        ({}, {"tokens.rows": None}, "its tokens are none, expected finite tokens.rows"),
        ({}, {"tokens.rows": np.zeros(48, np.float16)}, r"its tokens are tokens.rows \(48,\)"),
        ({}, {"tokens.rows": np.full((4, 4), np.inf, np.float16)}, "expected finite tokens.rows"),
        ({}, {"tokens.more": np.zeros((4, 4), np.float16)}, "tokens.more"),
        ({"tokens_adapter": None}, {}, "does not say of which adapter its tokens are"),
        ({"parts": ["tokens", "pose"]}, {}, r"parts that this version does not know \(pose\); update"),
    ],
    ids=str,
)
def test_damaged_tokens_are_refused(facts: Any, tensors: Any, told: str, tmp_path: Path) -> None:
    file = tmp_path / "mug.safetensors"
    write_subject(file, Subject("mug", "", "mug", tokens=Tokens(draw_rows(), "ab" * 32)))
    with pytest.raises(FileFormatError, match=told):
        read_subject(change(file, facts, **tensors))


@pytest.mark.parametrize("value", [1e5, np.nan])
def test_rows_beyond_float16_are_not_written(value: float, tmp_path: Path) -> None:
    rows = draw_rows()
    rows[3, 3] = value
    with pytest.raises(FileFormatError, match="tokens hold values that are not finite or beyond float16"):
        write_subject(tmp_path / "x.safetensors", Subject("x", "", "mug", tokens=Tokens(rows, "ab")))
    assert not [*tmp_path.iterdir()]


def test_tokens_belong_to_one_adapter(tmp_path: Path) -> None:
    own, other = (write_small_adapter(tmp_path / f"{n}.safetensors", BaseFiles.open(), seed=n) for n in (1, 2))
    assert own.sha256 != other.sha256 and own.sha256 == own.hash_files()["token_adapter.safetensors"]
    rows = draw_rows(width=own.config.context_width)
    check_tokens(Tokens(rows, own.sha256), own)
    with pytest.raises(FileFormatError, match=rf"adapter {own.sha256[:12]}, and this engine has {other.sha256[:12]}"):
        check_tokens(Tokens(rows, own.sha256), other)
    with pytest.raises(FileFormatError, match="this engine has none: build it again with `dreammix-trt build --tokens"):
        check_tokens(Tokens(rows, own.sha256), None)
    with pytest.raises(FileFormatError, match="its tokens are 16 wide"):
        check_tokens(Tokens(draw_rows(), own.sha256), own)


def test_factors_that_act_together_add_up() -> None:
    first, second = random_factors(MODULES, seed=1), random_factors({"a.to_k": (6, 5)}, rank=3, seed=2)
    found = stack_pairs([(first, 0.5), (second, -2.0)])
    assert found.keys() == MODULES.keys()
    for module, (a, b) in found.items():
        parts = [(0.5, first), (-2.0, second)]
        wanted = sum(s * pairs[module][0].astype(float) @ pairs[module][1] for s, pairs in parts if module in pairs)
        np.testing.assert_allclose(a.astype(float) @ b, wanted, atol=1e-5)


def test_cells_of_many_photographs_are_scored_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    features = np.random.default_rng(3).standard_normal((50, 8)).astype(np.float32)
    whole = subject_tokens.score_cells(features)
    monkeypatch.setattr(subject_tokens, "_BLOCK", 16)
    np.testing.assert_allclose(subject_tokens.score_cells(features), whole, rtol=1e-6)


def test_a_class_gives_a_name() -> None:
    assert [name_after_class(text) for text in ("mug", "alarm clock", " red/mug ")] == ["mug", "alarm-clock", "red-mug"]
