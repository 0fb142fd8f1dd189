"""The recorded runs of the authors' code, through both back ends; the long ones are marked slow."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import _common
from benchmarks._golden_case import Case, Run, find_cases, networks_for, replay
from benchmarks.golden import check_whole_case, main
from benchmarks.golden_units import Check
from dreammix_trt.core.noise import SeededNoise
from dreammix_trt.core.seam import Networks
from dreammix_trt.engine.backends.onnxruntime.engine_set import EngineSet
from tests.support.tiny_model import random_factors, unet_attention_modules, write_tiny_lora, write_tiny_model


@pytest.fixture(scope="module")
def torch_networks(golden: Path) -> Networks:
    """The tiny model of the golden data in torch."""
    pytest.importorskip("torch")
    return networks_for(find_cases(golden, ["case1"])[0], "torch")


@pytest.fixture(scope="module")
def engine_set(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Networks]:
    """The same, exported and on ONNX Runtime."""
    pytest.importorskip("torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DREAMMIX_HOME", str(tmp_path_factory.mktemp("golden-engines")))
        networks = networks_for(find_cases(golden, ["case1"])[0], "onnxruntime")
    assert isinstance(networks, EngineSet)
    with networks:
        yield networks


def missed(rows: list[Check]) -> list[Check]:
    assert len(rows) > 30
    return [row for row in rows if not row.passed]


@pytest.mark.slow
def test_a_whole_run_is_reproduced(golden: Path, engine_set: EngineSet) -> None:
    assert missed(check_whole_case(Case(golden / "case3"), engine_set)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["case1", "case2"])
def test_every_recorded_array_follows_from_recorded_inputs(golden: Path, torch_networks: Networks, name: str) -> None:
    assert missed(check_whole_case(Case(golden / name), torch_networks, whole=False)) == []


CHANGED = ("lcg_crop_box", "feather", "time_ids", "lcg_unet_text", "vae_mean_lcg_masked", "x_in_step02", "x_out_step03",
           "unet_cond_step00", "initial_latent", "lcg_head_feature_ch", "x0_cond_postblur_step05")  # fmt: skip


@pytest.mark.slow
def test_wrong_numbers_are_found(golden: Path, torch_networks: Networks, tmp_path: Path) -> None:
    for beside in ("model", "inpaint_head.pth", "tiny.fooocus.patch", "lora"):
        (tmp_path / beside).symlink_to(golden / beside)
    folder = tmp_path / "case3"
    shutil.copytree(golden / "case3", folder)
    with np.load(folder / "golden.npz") as file:
        arrays = {name: file[name] for name in file.files}
    for name in CHANGED:
        flat = arrays[name].reshape(-1)
        flat[0] += max(1, 0.01 * np.abs(flat).max()) if arrays[name].dtype.kind == "f" else 1
    np.savez(folder / "golden.npz", **arrays)
    failed = " ".join(row.array for row in missed(check_whole_case(Case(folder), torch_networks, whole=False)))
    for name in CHANGED:
        assert name.partition("_step")[0] in failed


CONFIG: dict[str, Any] = {
    "model": "../model", "inpaint_head": "../model/inpaint_head.pth", "inpaint_patch": "../model/tiny.fooocus.patch",
    "patch_alpha": 1.0, "patch_apply_biases": False, "image": "input.png", "mask": "mask.png",
    "reference_resize": [64, 64], "prompt": "a photo of sks red mug", "negative_prompt": None, "seed": 1,
    "num_inference_steps": 6, "strength": 1.0, "guidance_scale": 4.0, "guidance_rescale": 0.0, "isf_global_time": 4,
    "isf_global_ia": 1, "inpaint_respective_field": 0.5, "fooocus_time": 0.8, "sharpness": 1,
    "adm_scaler_positive": 1.5, "adm_scaler_negative": 0.8, "adm_scaler_end": 0.3, "soft_blending": False,
    "tas_enabled": False,
    "decompose_prefix_prompt": "", "sks_decompose_words": [], "loras": [], "vae_sample": True, "upscaler": None,
    "clip_skip": None,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "never global": {"isf_global_time": -1},
    "shortened": {"strength": 0.7, "isf_global_time": 2, "negative_prompt": "a table"},
    "unguided": {"guidance_scale": 1.0},
    "rescaled": {"guidance_rescale": 0.6, "soft_blending": True, "isf_global_ia": 0.9, "sharpness": 0},
    "two words removed": {"tas_enabled": True, "decompose_prefix_prompt": "", "sks_decompose_words": ["red", "clay"]},
    "another token": {"prompt": "a blue mug", "tas_enabled": True, "sks_decompose_words": ["clay"]},
    "wide": {"reference_resize": [64, 96]},
    "as it is": {"reference_resize": None},
    "mean, weak patch": {"vae_sample": False, "patch_alpha": 0.5, "patch_apply_biases": True},
    "two LoRAs": {"loras": [
        {"files": ["lora/a.safetensors"], "scale": 0.7, "target": "both"},
        {"files": ["lora/a.safetensors", "lora/a.safetensors"], "scale": -0.4, "target": "raw"},
    ]},
}  # fmt: skip


POOLED = {"prompt_embeds_raw": "pooled_raw", "peli_embeds": "peli_pooled", "negative_prompt_embeds": "negative_pooled"}


class _Noted:
    """Seeded noise that keeps what it gave."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def draw(self, label: str, shape: Sequence[int], step: int = 0) -> Any:
        self.given[label] = SeededNoise(4).draw(label, shape, step)
        return self.given[label]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_any_folder_of_the_format_can_be_checked(name: str, tiny: Path) -> None:
    """A run of our own, recorded in the format with settings the recorded runs do not have, checks against itself."""
    folder = tiny / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, **SETTINGS[name]}))
    rng = np.random.default_rng(3)
    mask = np.zeros((64, 80), np.uint8)
    mask[20:40, 30:52] = 255
    Image.fromarray(rng.integers(0, 256, (64, 80, 3), np.uint8)).save(folder / "input.png")
    Image.fromarray(mask).save(folder / "mask.png")
    np.savez(folder / "golden.npz", unet_output_steps=np.zeros(0, np.int32))
    case, noise = Case(folder), _Noted()
    case.noise = noise  # type: ignore[assignment]
    networks = networks_for(case, "torch")
    run = replay(case, networks)
    np.savez(folder / "golden.npz", **_recorded(run, noise, bool(case.request.substitute)))
    for file, shown in (
        ("switch_decoded_rgb", "local result"),
        ("switch_repasted_rgb", "handed over"),
        ("final_decoded_rgb", "last result"),
    ):
        if shown in run.shown:
            Image.fromarray(run.shown[shown]).save(folder / f"{file}.png")
    Image.fromarray(run.final).save(folder / "final_image.png")
    rows = check_whole_case(Case(folder), networks)
    assert missed(rows) == []
    assert any(row.array == "end to end: x_out (all steps)" for row in rows)


def _recorded(run: Run, noise: _Noted, removes: bool) -> dict[str, Any]:
    arrays = {f"draw_{n:03d}_{label}": array for n, (label, array) in enumerate(noise.given.items())}
    arrays |= {"sigmas": run.schedule.sigmas, "timesteps": run.schedule.timesteps, "final_latent": run.taken[-1].x0}
    heads, unets = run.calls.of("inpaint_head"), run.calls.of("unet", "unet_raw")
    negative = len(run.stages[0].conditioning.text) == 2
    for s, stage, head in zip(("lcg", "gch"), run.stages, heads, strict=False):
        arrays[f"{s}_z_bg"], arrays[f"{s}_latent_mask"] = stage.background, stage.mask.astype(np.uint8)
        arrays[f"vae_latent_{s}_masked"] = head[1]["masked_latent"]
        arrays[f"{s}_unet_text"], arrays[f"{s}_unet_pooled"] = stage.conditioning.text, stage.conditioning.pooled
        arrays["initial_latent" if s == "lcg" else "gch_initial_latent"] = stage.latent
    if run.schedule.hand_over_index is not None:
        sigma = np.float32(run.schedule[run.schedule.hand_over_index].sigma)
        arrays["switch_zG"] = run.stages[1].latent - sigma * noise.given["renoise_switch"]
    hidden, pooled = ([call[2] for call in run.calls.of(name)] for name in ("text_encoder", "text_encoder_2"))
    texts = [np.concatenate([one["hidden"], two["hidden"]], -1) for one, two in zip(hidden, pooled, strict=True)]
    names = ["prompt_embeds_raw", "peli_embeds", "negative_prompt_embeds"]
    if not removes:
        names.remove("peli_embeds")
    for name, tokens, two in zip(names, texts, pooled, strict=False):
        arrays[name] = tokens
        arrays[POOLED[name]] = two["pooled"]
    if negative:
        arrays.setdefault("negative_prompt_embeds", np.zeros_like(texts[0]))
        arrays.setdefault("negative_pooled", np.zeros_like(pooled[0]["pooled"]))
    arrays["time_ids"] = np.stack([call[1]["time_ids"] for call in unets])
    arrays["unet_output_steps"] = np.array([0, len(unets) - 1], np.int32)
    for i, (taken, call) in enumerate(zip(run.taken, unets, strict=True)):
        arrays |= {f"x_in_step{i:02d}": taken.x_in, f"x0_step{i:02d}": taken.x0, f"x_out_step{i:02d}": taken.x}
        if i in (0, len(unets) - 1):
            arrays[f"unet_cond_step{i:02d}"] = call[2]["eps"][-1:]
            arrays |= {f"unet_uncond_step{i:02d}": call[2]["eps"][:1]} if negative else {}
    return arrays


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the miniature SDXL and a LoRA for it."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("recorded")
    write_tiny_model(folder / "model")
    modules = unet_attention_modules(json.loads((folder / "model" / "unet" / "config.json").read_text()))
    (folder / "lora").mkdir()
    write_tiny_lora(folder / "lora" / "a.safetensors", random_factors(modules))
    return folder


def test_the_benchmark_prints_one_object(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for beside in ("model", "inpaint_head.pth", "units.npz"):
        (tmp_path / beside).symlink_to(golden / beside)
    monkeypatch.setattr(_common, "RESULTS", tmp_path / "results")
    assert main([str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["name"] == "golden"
    assert len(told["rows"]) > 30
    assert all(row["pass"] for row in told["rows"])


def test_a_folder_without_cases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no case at all"):
        main([str(tmp_path)])
