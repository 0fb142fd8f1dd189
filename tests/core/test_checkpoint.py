from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.fooocus import read_patch
from dreammix_trt.core.keymap import sgm_to_diffusers

pytest.importorskip("torch")
pytest.importorskip("diffusers")
from tests.support.tiny_model import TinyModel, write_tiny_model


@pytest.fixture
def tiny(tmp_path: Path) -> TinyModel:
    return write_tiny_model(tmp_path / "tiny")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_brings_its_own_patch_and_head(tiny: TinyModel) -> None:
    base = BaseFiles.open(tiny.folder)
    assert (base.patch, base.head_file) == (tiny.patch, tiny.head)
    assert (base.native_side, base.latent_channels, base.feature_channels, base.divisor) == (64, 4, 32, 32)
    assert base.scaling_factor == 0.13025
    assert base.head().shape == (32, 5, 3, 3)


def test_weights_are_float32_and_patched_by_name(tiny: TinyModel) -> None:
    base = BaseFiles.open(tiny.folder)
    raw, patched = base.state("unet"), base.unet_patched_state()
    assert all(value.dtype == np.float32 for value in [*raw.values(), *patched.values()])
    names = sgm_to_diffusers(base.configs["unet"])
    changed = {name for name in raw if not np.array_equal(raw[name], patched[name])}
    assert changed == {names[key] for key in read_patch(tiny.patch) if key.endswith(".weight")}
    with_biases = BaseFiles.open(tiny.folder, patch_biases=True).unet_patched_state()
    assert any(not np.array_equal(raw[name], with_biases[name]) for name in raw if name.endswith(".bias"))


def test_golden_patch_and_head_are_found_by_argument(golden: Path) -> None:
    base = BaseFiles.open(golden / "model", golden / "tiny.fooocus.patch", golden / "inpaint_head.pth")
    assert base.feature_channels == 320 and base.native_side == 1024
    assert len(base.unet_patched_state()) == 408


def test_hashes_follow_the_content(tiny: TinyModel, tmp_path: Path) -> None:
    hashes = BaseFiles.open(tiny.folder).content_hashes()
    assert {
        "unet/diffusion_pytorch_model.safetensors",
        "patch",
        "inpaint_head",
        "tokenizer/vocab.json",
    } <= hashes.keys()
    again = BaseFiles.open(write_tiny_model(tmp_path / "again").folder).content_hashes()
    other = BaseFiles.open(write_tiny_model(tmp_path / "other", seed=1).folder).content_hashes()
    assert hashes["unet/diffusion_pytorch_model.safetensors"] == again["unet/diffusion_pytorch_model.safetensors"]
    assert hashes["unet/diffusion_pytorch_model.safetensors"] != other["unet/diffusion_pytorch_model.safetensors"]


def test_both_spellings_of_text_encoder_names_are_read(tiny: TinyModel) -> None:
    from safetensors.numpy import load_file, save_file

    path = tiny.folder / "text_encoder/model.safetensors"
    before = BaseFiles.open(tiny.folder).state("text_encoder")
    save_file({name.removeprefix("text_model."): value for name, value in load_file(path).items()}, path)
    assert BaseFiles.open(tiny.folder).state("text_encoder").keys() == before.keys()


def test_shards_are_joined(tiny: TinyModel) -> None:
    from safetensors.numpy import load_file, save_file

    whole = tiny.folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    place = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(names)}
    for part in set(place.values()):
        save_file({name: tensors[name] for name in names if place[name] == part}, whole.parent / part)
    whole.unlink()
    (whole.parent / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    assert BaseFiles.open(tiny.folder).state("vae").keys() == tensors.keys()
    (whole.parent / "part-1.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"part-1\.safetensors are missing"):
        BaseFiles.open(tiny.folder)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"in_channels": 9}, "9 input channels, expected 4"),
        ("unet/config.json", {"addition_embed_type": None}, "not an SDXL UNet"),
        ("unet/config.json", {"cross_attention_dim": 768}, "cross_attention_dim is 768"),
        ("unet/config.json", {"mid_block_type": None}, "block types None"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "v_prediction"),
    ],
)
def test_other_models_are_refused(tiny: TinyModel, file: str, changes: dict[str, Any], message: str) -> None:
    edit(tiny.folder / file, **changes)
    with pytest.raises(FileFormatError, match=message):
        BaseFiles.open(tiny.folder)


def test_missing_parts_are_named(tiny: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"no model_index\.json"):
        BaseFiles.open(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(FileFormatError, match="is a single file"):
        BaseFiles.open(tmp_path / "model.safetensors")
    with pytest.raises(FileFormatError, match=r"none\.patch: no such file"):
        BaseFiles.open(tiny.folder, patch=tmp_path / "none.patch")
    (tiny.folder / "text_encoder_2/model.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"text_encoder_2/model\.safetensors is missing"):
        BaseFiles.open(tiny.folder)


def test_a_patch_without_head_is_refused(tiny: TinyModel) -> None:
    tiny.head.unlink()
    with pytest.raises(FileFormatError, match="patch without its head"):
        BaseFiles.open(tiny.folder)


def test_truncated_weights_say_so(tiny: TinyModel) -> None:
    path = tiny.folder / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FileFormatError, match="truncated"):
        BaseFiles.open(tiny.folder).state("unet")


def test_a_patch_of_another_width_lists_shapes(tiny: TinyModel, golden: Path) -> None:
    base = BaseFiles.open(tiny.folder, patch=golden / "tiny.fooocus.patch")
    with pytest.raises(FileFormatError, match=r"shapes differ \(diffusion_model\..*against"):
        base.unet_patched_state()
    with pytest.raises(FileFormatError, match="320 channels does not fit the base's 32"):
        BaseFiles.open(tiny.folder, head=golden / "inpaint_head.pth").head()
