from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dreammix_trt.core.clip_names import classic_text_name, from_open_clip, text_encoder_names
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.keymap import sgm_to_diffusers, vae_to_diffusers
from tests.support.tiny_model import unet_config, vae_config

SDXL = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
}


def test_sdxl_has_its_1680_tensors() -> None:
    names = sgm_to_diffusers(SDXL)
    assert len(names) == len(set(names.values())) == 1680


@pytest.mark.parametrize("model", ["tiny", "sdxl"])
def test_every_recorded_weight_row(golden: Path, model: str) -> None:
    config = json.loads((golden / "model/unet/config.json").read_text()) if model == "tiny" else SDXL
    units = np.load(golden / "units.npz")
    recorded = dict(
        zip(units[f"keymap_{model}_sgm"].tolist(), units[f"keymap_{model}_diffusers"].tolist(), strict=True)
    )
    found = {key: name for key, name in sgm_to_diffusers(config).items() if key.endswith(".weight")}
    assert found == recorded


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"layers_per_block": 3},
        {"block_out_channels": (16, 32, 48), "norm_num_groups": 8},
        {"transformer_layers_per_block": (1, 2, 1)},
        {"down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3},
    ],
)
def test_names_are_those_of_diffusers(change: dict[str, object]) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    config = {**unet_config(64), **change}
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**config)
    assert sorted(sgm_to_diffusers(config).values()) == sorted(unet.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"layers_per_block": 3, "block_out_channels": (8, 16, 16, 8)},
        {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
    ],
)
def test_vae_names_are_those_of_diffusers(change: dict[str, object]) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    config = {**vae_config(64), **change}
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(**config)
    names = vae_to_diffusers(config)
    assert sorted(names.values()) == sorted(vae.state_dict())
    assert names["decoder.mid.attn_1.proj_out.bias"] == "decoder.mid_block.attentions.0.to_out.0.bias"
    assert len(names) == 248 or config["layers_per_block"] != 2  # SDXL's


@pytest.mark.parametrize("layers", [12, 32])
def test_text_encoder_names_are_those_of_transformers(layers: int) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(num_hidden_layers=layers, hidden_size=64, num_attention_heads=1)
    with torch.device("meta"):
        encoder = transformers.CLIPTextModelWithProjection(config)
    truth = {classic_text_name(name) for name in encoder.state_dict()} - {None}
    assert {*text_encoder_names(layers), "text_projection.weight"} == truth == set(from_open_clip(layers))


def test_a_foreign_block_is_named() -> None:
    with pytest.raises(FileFormatError, match="AttnDownBlock2D"):
        sgm_to_diffusers({**SDXL, "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D"]})
