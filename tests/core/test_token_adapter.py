"""Token adapters: written, read, and refused with what does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.subject_tokens import TokenConfig
from dreammix_trt.core.token_adapter import FILE_NAME, MARK, Card, TokenAdapter
from dreammix_trt.core.token_factors import read_factors, write_adapter
from tests.support.mini_sdxl import mini_configs
from tests.support.tokens import make_factors, make_projection, write_small_adapter


@pytest.fixture(scope="module")
def base() -> BaseFiles:
    return BaseFiles.open()


@pytest.fixture
def file(base: BaseFiles, tmp_path: Path) -> Path:
    return write_small_adapter(tmp_path / FILE_NAME, base).file


def change(file: Path, card: dict[str, Any] | None = None, **tensors: Any) -> Path:
    """Write the file again; card: fields of its card that differ; tensors: None: without it."""
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as held:
        told = json.loads(held.metadata()[MARK]) | (card or {})
    kept = {name: value for name, value in {**load_file(file), **tensors}.items() if value is not None}
    save_file(kept, file, {MARK: json.dumps(told)})
    return file


def test_what_is_written_is_read(base: BaseFiles, tmp_path: Path) -> None:
    config = TokenConfig.of_base(base.configs)
    card = Card(config, {"unet/config.json": "ab" * 32}, "4000 drawn things", 99, {"steps": 2, "mix": 0.5})
    projection, factors = make_projection(config), make_factors(base, rank=3)
    write_adapter(tmp_path / FILE_NAME, card, projection, factors)
    for place in (tmp_path, tmp_path / FILE_NAME):
        found = TokenAdapter.open(place)
        assert found.card == replace(card, rank=3) and found.config == config
    weights = found.projection()
    assert {*weights} == {*projection} and weights.dtype("linear.weight") == "float16"
    for name, value in projection.items():
        np.testing.assert_array_equal(weights[name], value.astype(np.float16))
    read = read_factors(found)
    assert read.keys() == factors.keys() == {"unet", "unet_raw"}
    for module, (a, b) in factors["unet"].items():
        np.testing.assert_allclose(read["unet"][module][0] @ read["unet"][module][1], a @ b, atol=2e-3)
    names = load_file(tmp_path / FILE_NAME)
    assert "factors.unets.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k.A" in names
    assert not any(name.startswith("factors.unet.") for name in names), "what both UNets share is written once"
    found.check_fit(base.configs)


def test_an_adapter_may_have_no_factors(base: BaseFiles, tmp_path: Path) -> None:
    config = TokenConfig.of_base(base.configs)
    write_adapter(tmp_path / FILE_NAME, Card(config), make_projection(config), {})
    found = TokenAdapter.open(tmp_path)
    assert found.card.rank == 0 and read_factors(found) == {}
    found.check_fit(base.configs)


def test_the_same_is_the_same_file(base: BaseFiles, tmp_path: Path) -> None:
    one, two = (write_small_adapter(tmp_path / name, base).file.read_bytes() for name in ("a", "b"))
    assert one == two


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"schema": 9}, "its schema is 9, this version reads 1; update dreammix-trt"),
        ({"schema": None}, "its card is damaged: it says no schema"),
        ({"rank": "3"}, "its card is damaged: rank is '3'"),
        ({"base": {"unet": 3}}, "its card is damaged: base is .*expected file -> sha256"),
        ({"config": {"side": 250}}, "side is 250, no multiple of 16"),
    ],
)
def test_a_card_that_cannot_be_is_named(file: Path, card: dict[str, Any], message: str) -> None:
    with pytest.raises(FileFormatError, match=f"{FILE_NAME}: a token adapter that cannot be used: .*{message}"):
        TokenAdapter.open(change(file, card))


def test_damaged_files_are_named(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    with pytest.raises(FileFormatError, match="no such file"):
        TokenAdapter.open(tmp_path / "none.safetensors")
    file.write_bytes(whole[:-100])
    with pytest.raises(FileFormatError, match=FILE_NAME):
        TokenAdapter.open(file)
    (tmp_path / "x.safetensors").write_bytes(b"<html>")
    with pytest.raises(FileFormatError, match=r"x\.safetensors"):
        TokenAdapter.open(tmp_path / "x.safetensors")
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "plain.safetensors")
    with pytest.raises(FileFormatError, match=r"plain\.safetensors: no token adapter: it has no card"):
        TokenAdapter.open(tmp_path / "plain.safetensors")


def test_no_code_in_a_file_runs(tmp_path: Path) -> None:
    import pickle

    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "x.bin").write_bytes(pickle.dumps({"token_proj.norm.weight": Trap()}))
    with pytest.raises(FileFormatError):
        TokenAdapter.open(tmp_path / "x.bin")
    assert not (tmp_path / "ran").exists()


KEY = "factors.unets.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"token_proj.norm.bias": None}, r"token_proj\.norm\.bias is missing, expected \(96,\)"),
        ({"token_proj.norm.bias": np.zeros(95)}, r"token_proj\.norm\.bias is \(95,\), expected \(96,\)"),
        ({f"{KEY}.B": None}, r"to_k\.A \(96, 2\) is no pair with nothing"),
        ({f"{KEY}.B": np.zeros((3, 96))}, r"to_k\.A \(96, 2\) is no pair with \(3, 96\)"),
        ({"other": np.zeros(3)}, r"other \(3,\) is nothing that an adapter has"),
    ],
)
def test_tensors_that_the_card_does_not_describe_are_named(file: Path, tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(FileFormatError, match=f"damaged, or not what its card says: .*{message}"):
        TokenAdapter.open(change(file, **tensors))


def test_values_that_are_not_finite_are_refused(base: BaseFiles, file: Path, tmp_path: Path) -> None:
    changed = TokenAdapter.open(change(file, **{f"{KEY}.A": np.full((96, 2), np.nan, np.float16)}))
    with pytest.raises(FileFormatError, match=r"to_k\.A' holds NaN or infinite values"):
        read_factors(changed)
    config = TokenConfig.of_base(base.configs)
    projection = make_projection(config) | {"norm.bias": np.full(96, 1e5, np.float32)}
    with pytest.raises(FileFormatError, match=r"token_proj\.norm\.bias holds values .* beyond float16"):
        write_adapter(tmp_path / "new", Card(config), projection, {})
    assert not (tmp_path / "new").exists()
    write_adapter(tmp_path / "new", Card(config), projection, {}, "float32")


def test_another_base_s_is_refused_with_what_does_not_fit(base: BaseFiles, file: Path, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"tokens: width is 96, but this base has 64: it was made for another"):
        TokenAdapter.open(file).check_fit(mini_configs())
    config, factors = TokenConfig.of_base(base.configs), make_factors(base)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"
    odd = {**factors["unet"], name: (np.ones((96, 2), np.float32), np.ones((2, 40), np.float32))}
    odd |= {"down_blocks.7.attentions.0.to_q": (np.ones((8, 2), np.float32), np.ones((2, 8), np.float32))}
    write_adapter(tmp_path / "odd", Card(config), make_projection(config), {"unet": odd, "unet_raw": odd})
    found = TokenAdapter.open(tmp_path / "odd")
    with pytest.raises(FileFormatError, match="2 of its layers do not fit") as caught:
        found.check_fit(base.configs)
    assert f"{name} (96 -> 40, here 96 -> 96)" in str(caught.value)
    assert "down_blocks.7.attentions.0.to_q (8 -> 8, which this base lacks)" in str(caught.value)


def test_other_files_of_a_base_are_a_doubt_that_names_both(base: BaseFiles, tmp_path: Path) -> None:
    own = base.hash_contents()
    write_small_adapter(tmp_path / "own", base, told={"base": own})
    assert TokenAdapter.open(tmp_path / "own").find_doubts(base.hash_contents) == []
    write_small_adapter(tmp_path / "other", base, told={"base": own | {"vae/config.json": "12" * 32}})
    (doubt,) = TokenAdapter.open(tmp_path / "other").find_doubts(base.hash_contents)
    assert "here vae/config.json" in doubt and "vae/config.json 121212121212" in doubt
    assert write_small_adapter(tmp_path / "silent", base).find_doubts(base.hash_contents) == []
