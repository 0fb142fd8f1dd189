"""ASUKA folders: written, read, and refused with what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.asuka import AsukaConfig
from dreammix_trt.core.asuka_folder import AsukaFolder, Part, write_asuka
from dreammix_trt.core.errors import FileFormatError, InputError

CONFIGS: dict[str, dict[str, Any]] = {
    "unet": {"cross_attention_dim": 2048},
    "text_encoder_2": {"projection_dim": 1280},
    "vae": {"latent_channels": 4},
}


def write(folder: Path, *parts: Part) -> AsukaFolder:
    write_asuka(folder, AsukaConfig(), {part: {"a": np.array([1.5, 2.5]), "alpha": np.array(0.5)} for part in parts})
    return AsukaFolder.open(folder)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    found = write(tmp_path / "asuka", "prior", "decoder")
    assert found.config == AsukaConfig() and found.parts == ("prior", "decoder")
    weights = found.weights("prior")
    assert weights.dtype("a") == "float16" and weights.shape("alpha") == ()
    np.testing.assert_array_equal(weights["a"], np.array([1.5, 2.5], np.float32))
    assert list(found.list_files("decoder")) == ["asuka/config.json", "asuka/decoder.safetensors"]
    found.check_fit(CONFIGS)


def test_one_network_is_enough(tmp_path: Path) -> None:
    found = write(tmp_path / "asuka", "decoder")
    assert found.parts == ("decoder",) and found.list_files("prior") == {}
    found.check_fit(CONFIGS | {"unet": {"cross_attention_dim": 768}})


@pytest.mark.parametrize(
    ("component", "change", "message"),
    [
        ("unet", {"cross_attention_dim": 768}, "context_width is 2048, but this base's UNet's condition has 768"),
        ("text_encoder_2", {"projection_dim": 768}, "pooled_width is 1280, but this base's pooled text has 768"),
        ("vae", {"latent_channels": 16}, "latent_channels is 4, but this base's latent has 16"),
    ],
)
def test_another_bases_are_refused(tmp_path: Path, component: str, change: dict[str, int], message: str) -> None:
    found = write(tmp_path / "asuka", "prior", "decoder")
    with pytest.raises(FileFormatError, match=message):
        found.check_fit(CONFIGS | {component: change})


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="not an ASUKA folder"):
        AsukaFolder.open(tmp_path)
    folder = tmp_path / "asuka"
    write_asuka(folder, AsukaConfig(), {})
    with pytest.raises(FileFormatError, match=r"has neither prior\.safetensors nor decoder\.safetensors"):
        AsukaFolder.open(folder)
    (folder / "prior.safetensors").write_bytes(b"<html>")
    with pytest.raises(FileFormatError, match=r"prior\.safetensors"):
        AsukaFolder.open(folder)


def test_a_prior_that_is_not_aligned_is_named_with_the_remedy(tmp_path: Path) -> None:
    """A folder as `train-asuka prior` leaves it; the alignment itself opens it."""
    found = write(tmp_path / "asuka", "prior")
    with pytest.raises(FileFormatError, match="the prior is not aligned; align it: dreammix-trt train-asuka align"):
        found.check_aligned()
    weights = {"mae.alpha": np.array(0.5), "alignment.embed.bias": np.array([1.0])}
    write_asuka(tmp_path / "asuka", AsukaConfig(), {"prior": weights})
    AsukaFolder.open(tmp_path / "asuka").check_aligned()
    write(tmp_path / "decoder", "decoder").check_aligned()


def test_what_was_trained_with_other_files_is_told(tmp_path: Path) -> None:
    files = {
        "unet": {"unet/a.safetensors": "1", "patch": "2"},
        "inpaint_head": {"inpaint_head": "3"},
        "vae": {"vae/a.safetensors": "4"},
    }
    known = {"base": {"unet/b.safetensors": "1", "patch": "2", "inpaint_head": "3", "vae/a.safetensors": "9"}}
    states: dict[Part, dict[str, Any]] = {"prior": {"a": np.zeros(1)}, "decoder": {"a": np.zeros(1)}}
    write_asuka(tmp_path / "asuka", AsukaConfig(), states, record={"decoder": {"settings": known}, "prior": {}})
    found = AsukaFolder.open(tmp_path / "asuka")
    (told,) = found.find_doubts(files.__getitem__)
    assert "decoder was trained with other files than this base's (vae/a.safetensors)" in told
    assert found.find_doubts((files | {"vae": {"vae.safetensors": "9"}}).__getitem__) == [], "names do not matter"
    write_asuka(tmp_path / "asuka", AsukaConfig(), states, record={"align": {"settings": known}})
    assert "align was trained" in AsukaFolder.open(tmp_path / "asuka").find_doubts(files.__getitem__)[0]
    assert write(tmp_path / "untold", "prior", "decoder").find_doubts(files.__getitem__) == []


def test_a_folder_of_somebody_else_is_left(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="holds other files"):
        write_asuka(tmp_path, AsukaConfig(), {})


def test_a_folder_with_another_kind_of_configuration_is_left(tmp_path: Path) -> None:
    """A diffusers folder has a config.json, too."""
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    with pytest.raises(InputError, match=r"its config\.json is not ASUKA's \(schema is None"):
        write_asuka(tmp_path, AsukaConfig(), {})
    assert (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes() == b"weights"
