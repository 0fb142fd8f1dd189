from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.lora import read_lora
from tests.support.tiny_model import random_factors, write_tiny_lora

MODULES = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k": (32, 32),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v": (40, 32),
    "mid_block.attentions.0.transformer_blocks.1.attn1.to_out.0": (32, 32),
}


@pytest.mark.parametrize(("dialect", "alpha"), [("diffusers", None), ("peft", None), ("kohya", None), ("kohya", 2.0)])
def test_every_dialect_gives_the_same_factors(tmp_path: Path, dialect: str, alpha: float | None) -> None:
    factors = random_factors(MODULES)
    lora = read_lora(write_tiny_lora(tmp_path / "x.safetensors", factors, dialect=dialect, alpha=alpha))
    assert lora.rank == 4 and lora.factors.keys() == {"unet"} and lora.factors["unet"].keys() == factors.keys()
    for module, (a, b) in factors.items():
        found_a, found_b = lora.factors["unet"][module]
        assert np.array_equal(found_a, a)
        np.testing.assert_allclose(found_b, b, rtol=1e-6)


def test_the_three_recorded_files_agree(golden: Path) -> None:
    names = ("pytorch_lora_weights", "lora_peft", "lora_kohya")
    one, two, three = (read_lora(golden / f"lora/{name}.safetensors").factors["unet"] for name in names)
    raw = load_file(golden / "lora/pytorch_lora_weights.safetensors")
    assert len(one) == 66 and one.keys() == two.keys() == three.keys()
    for module, (a, b) in one.items():
        up, down = (raw[f"unet.{module}.lora.{side}.weight"] for side in ("up", "down"))
        np.testing.assert_allclose((a @ b).T, up @ down, atol=1e-7)
        for x, y in zip((a, b), two[module], strict=True):
            assert np.array_equal(x, y)
        np.testing.assert_allclose(a @ b, three[module][0] @ three[module][1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("prefix", "network", "module"),
    [
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora", "text_encoder", "q_proj"),
        (
            "text_encoder_2.text_model.encoder.layers.0.self_attn.out_proj.lora_linear_layer",
            "text_encoder_2",
            "out_proj",
        ),
        ("lora_te1_text_model_encoder_layers_0_self_attn_k_proj.lora_", "text_encoder", "k_proj"),
        ("lora_te2_text_model_encoder_layers_0_self_attn_out_proj.lora_", "text_encoder_2", "out_proj"),
    ],
)
def test_text_encoder_parts(tmp_path: Path, prefix: str, network: str, module: str) -> None:
    joint = "" if prefix.endswith("_") else "."
    tensors = {
        f"{prefix}{joint}down.weight": np.ones((2, 8), np.float32),
        f"{prefix}{joint}up.weight": np.ones((8, 2), np.float16),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    (pair,) = read_lora(tmp_path / "x.safetensors").factors[network].items()
    assert pair[0] == f"text_model.encoder.layers.0.self_attn.{module}"
    assert pair[1][0].shape == (8, 2) and pair[1][1].dtype == np.float32


def test_old_processor_names_and_a_directory(tmp_path: Path) -> None:
    place = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora"
    save_file(
        {f"{place}.down.weight": np.ones((2, 8), np.float32), f"{place}.up.weight": np.ones((8, 2), np.float32)},
        tmp_path / "pytorch_lora_weights.safetensors",
    )
    lora = read_lora(tmp_path)
    assert list(lora.factors["unet"]) == ["up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"]
    assert lora.source_path == tmp_path / "pytorch_lora_weights.safetensors"


def test_adapter_metadata_gives_the_scale(tmp_path: Path) -> None:
    (module,) = list(MODULES)[:1]
    factors = random_factors({module: MODULES[module]})
    tensors = load_file(write_tiny_lora(tmp_path / "x.safetensors", factors, dialect="peft"))
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})}
    save_file(tensors, tmp_path / "y.safetensors", metadata)
    np.testing.assert_allclose(read_lora(tmp_path / "y.safetensors").factors["unet"][module][1], 2 * factors[module][1])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("lora_unet_mid.hada_w1_a", (4, 4), "LoHa"),
        ("lora_unet_mid.lokr_w1", (4, 4), "LoKr"),
        ("lora_unet_mid.dora_scale", (4, 4), "DoRA"),
        ("unet.mid.to_k.lora_magnitude_vector", (4,), "DoRA"),
        ("unet.conv_in.lora.down.weight", (4, 4, 3, 3), "convolutions"),
        ("something.weight", (4,), "not understood.*something.weight"),
        ("unet.mid.to_k.lora.down.weight", (4, 8), "no 'up' factor"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    save_file({name: np.ones(shape, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(FileFormatError, match=message):
        read_lora(tmp_path / "x.safetensors")


def test_damaged_files_say_so(tmp_path: Path) -> None:
    path = write_tiny_lora(tmp_path / "x.safetensors", random_factors(MODULES))
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(FileFormatError, match="truncated"):
        read_lora(path)
    with pytest.raises(FileFormatError, match="no such LoRA"):
        read_lora(tmp_path / "none.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileFormatError, match="holds no pytorch_lora_weights"):
        read_lora(tmp_path / "empty")
    broken = random_factors(MODULES)
    broken[next(iter(MODULES))][1][0, 0] = np.nan
    with pytest.raises(FileFormatError, match="not finite"):
        read_lora(write_tiny_lora(tmp_path / "nan.safetensors", broken))
