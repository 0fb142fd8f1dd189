"""Training on a tiny random base: what is written, that it is what was learnt, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

for _name in ("torch", "diffusers", "transformers", "peft"):
    pytest.importorskip(_name, reason="the trainer needs its extra")

from dreammix_trt.core.checkpoint import BaseFiles  # noqa: E402
from dreammix_trt.core.errors import FileFormatError, InputError, MissingExtraError  # noqa: E402
from dreammix_trt.core.files import sha256_of  # noqa: E402
from dreammix_trt.core.lora import read_lora  # noqa: E402
from dreammix_trt.core.lora_names import SDXL, kohya_names  # noqa: E402
from dreammix_trt.core.lora_words import read_words  # noqa: E402
from dreammix_trt.trainer.kohya import kohya_file_name  # noqa: E402
from dreammix_trt.trainer.lora import Recipe, train_lora  # noqa: E402
from dreammix_trt.trainer.recipes import recipe_for  # noqa: E402
from tests.support.kohya import kohya_module  # noqa: E402
from tests.support.tiny_model import unet_attention_modules, write_tiny_model  # noqa: E402
from tests.support.training import TINY, train  # noqa: E402


def test_it_writes_a_lora_of_every_key_value_and_output(base: BaseFiles, photos: Path, tmp_path: Path) -> None:
    told: list[tuple[str, float, str]] = []
    record = train(photos, tmp_path / "lora", base, rank=2, progress=lambda *event: told.append(event))
    lora = read_lora(tmp_path / "lora")
    expected = unet_attention_modules(dict(base.configs["unet"]))
    found = {name: (a.shape[0], b.shape[1]) for name, (a, b) in lora.factors["unet"].items()}
    assert found == expected
    assert set(lora.factors) == {"unet"}
    assert lora.rank == 2
    assert all(np.abs(b).max() > 0 for _, b in lora.factors["unet"].values())
    assert lora.metadata["token"] == "sks"
    assert lora.metadata["class_name"] == "mug"
    assert json.loads(lora.metadata["captions"]) == []
    assert json.loads(lora.metadata["base_hashes"]) == base.hash_contents()
    card = json.loads((tmp_path / "lora" / "subject.json").read_text())
    assert card["settings"]["steps"] == record.steps == 3
    assert (card["class_name"], card["token"], card["prompt"]) == ("mug", "sks", "a photo of a sks mug")
    assert list(card["settings"]["photographs"]) == list(record.photographs) == ["00.png", "01.png"]
    assert card["base"]["hashes"] == base.hash_contents()
    assert card["losses"]["last"] == record.loss and len(card["losses"]["every_100_steps"]) == 1
    assert record.parameters == sum(2 * (rows + columns) for rows, columns in expected.values())
    assert [fraction for _, fraction, _ in told] == sorted(fraction for _, fraction, _ in told)
    assert told[-1][1] == 1
    assert "loss" in told[-1][2]
    assert "left" in told[-1][2]
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_what_is_written_loads_in_other_programs(base: BaseFiles, photos: Path, tmp_path: Path) -> None:
    """The twin under kohya's names holds the same numbers: by diffusers' converter, by sgm's names counted, by us."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    train(photos, tmp_path / "lora", base, rank=2, token="ohwx")
    file, twin = tmp_path / "lora" / "pytorch_lora_weights.safetensors", tmp_path / "lora" / "ohwx_mug.safetensors"
    ours, theirs = load_file(file), load_file(twin)
    layers = base.configs["unet"]["layers_per_block"]
    modules = {name.rsplit(".lora.", 1)[0].removeprefix("unet.") for name in ours}
    attentions = {module.split(".attentions")[0] for module in modules}
    for module in modules:
        flat = kohya_module("unet", module, layers, attentions)
        for side in ("down", "up"):
            assert theirs[f"{flat}.lora_{side}.weight"].equal(ours[f"unet.{module}.lora.{side}.weight"]), flat
        assert theirs[f"{flat}.alpha"].item() == 2 and theirs[f"{flat}.alpha"].shape == ()
    assert len(theirs) == 3 * len(modules) == len(ours) * 3 // 2
    plain, alphas = convert_by_diffusers(theirs, layers)
    assert plain.keys() == ours.keys() and all(value.equal(ours[name]) for name, value in plain.items())
    assert set(alphas.values()) == {2.0} and len(alphas) == len(modules)
    one, two = read_lora(file), read_lora(twin, base.configs["unet"])
    for module, pair in one.factors["unet"].items():
        assert all(map(np.array_equal, pair, two.factors["unet"][module]))
    with safe_open(twin, "pt") as held:
        check_kohya_metadata(dict(held.metadata()), twin, base)
    card = json.loads((tmp_path / "lora" / "subject.json").read_text())
    assert card["files"] == {each.name: sha256_of(each) for each in (file, twin)}


def convert_by_diffusers(tensors: dict[str, Any], layers: int) -> tuple[dict[str, Any], dict[str, float]]:
    """A kohya file's tensors under the names of `save_lora_weights`, and its alphas, by diffusers' own converter."""
    from diffusers.loaders import lora_conversion_utils as theirs

    mapped = theirs._maybe_map_sgm_blocks_to_diffusers(dict(tensors), SimpleNamespace(layers_per_block=layers))
    converted, alphas = theirs._convert_non_diffusers_lora_to_diffusers(mapped)
    plain = {
        re.sub(r"\.processor\.(to_\w+?)_lora\.", lambda to: f".{to[1]}{'.0' * (to[1] == 'to_out')}.lora.", name): value
        for name, value in converted.items()
    }
    return plain, alphas


def check_kohya_metadata(told: dict[str, str], file: Path, base: BaseFiles) -> None:
    content = file.read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    wanted = {
        "ss_network_dim": "2",
        "ss_network_alpha": "2.0",
        "ss_network_module": "networks.lora",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_output_name": "ohwx_mug",
        "ss_new_sd_model_hash": base.hash_contents("unet_raw")["unet/diffusion_pytorch_model.safetensors"],
        "sshs_model_hash": digest,
        "modelspec.hash_sha256": f"0x{digest}",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.trigger_phrase": "ohwx mug",
        "token": "ohwx",
        "class_name": "mug",
    }
    assert told.items() >= wanted.items()
    assert read_words({key: value for key, value in told.items() if key.startswith("ss_")})[:2] == ("ohwx", "mug")


def test_the_names_are_kohyas_for_sdxl() -> None:
    names = kohya_names(SDXL)
    down = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert names[down] == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    mid = "mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0"
    assert names[mid] == "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_out_0"
    up = "up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_v"
    assert names[up] == "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_v"
    assert sum(".attn" in name for name in names) == 560
    attentions = {name.split(".attentions")[0] for name in names if ".attentions" in name}
    for module, flat in names.items():
        assert flat == kohya_module("unet", module, 2, attentions), module
    tensors = {
        f"{flat}.lora_{side}.weight": module
        for module, flat in names.items()
        for side in ("down", "up")
        if ".attn" in module
    }
    found, _ = convert_by_diffusers(tensors, 2)
    assert len(found) == 2 * 560
    assert all(name.split(".lora.")[0] == f"unet.{module}" for name, module in found.items())


@pytest.mark.parametrize(
    ("token", "class_name", "name"),
    [("sks", "coffee mug", "sks_coffee_mug"), ("<sks>", "mug/../x", "sks_mug_x"), ("sks", "Krüge", "sks_Krüge")],
)
def test_the_twin_is_called_as_the_subject(token: str, class_name: str, name: str) -> None:
    assert kohya_file_name(token, class_name) == f"{name}.safetensors"


def test_the_same_seed_gives_the_same_file_and_another_does_not(base: BaseFiles, photos: Path, tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(photos, tmp_path / name, base, seed=seed)
        written = ("pytorch_lora_weights.safetensors", "sks_mug.safetensors")
        files.append([(tmp_path / name / file).read_bytes() for file in written])
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_training_lowers_the_loss(base: BaseFiles, photos: Path, tmp_path: Path) -> None:
    recipe = replace(TINY, beta=0.0, views=2, batch=8)
    record = train(photos, tmp_path / "lora", base, steps=40, recipe=recipe, rank=8, learning_rate=0.02)
    assert record.loss < 0.95 * record.first_loss  # a random UNet leaves eight factors a module little to win


def test_merged_weights_are_the_patched_unet_plus_the_factors(base: BaseFiles, photos: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    train(photos, tmp_path / "lora", base, merged=True, loss="paper")
    merged = load_file(tmp_path / "lora" / "unet" / "diffusion_pytorch_model.safetensors")
    assert json.loads((tmp_path / "lora" / "unet" / "config.json").read_text())["addition_embed_type"] == "text_time"
    factors = read_lora(tmp_path / "lora").factors["unet"]
    patched = base.unet_patched_state()
    assert merged.keys() == patched.keys()
    for name, value in patched.items():
        module = name.removesuffix(".weight")
        added = (factors[module][0] @ factors[module][1]).T if module in factors else 0
        np.testing.assert_allclose(merged[name], value + added, rtol=1e-5, atol=1e-6)


def test_training_again_replaces_its_own_folder_but_no_other(base: BaseFiles, photos: Path, tmp_path: Path) -> None:
    train(photos, tmp_path / "lora", base, steps=1)
    train(photos, tmp_path / "lora", base, steps=2)
    assert json.loads((tmp_path / "lora" / "subject.json").read_text())["settings"]["steps"] == 2
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("keep me")
    with pytest.raises(InputError, match="home"):
        train(photos, tmp_path / "home", base)
    assert (tmp_path / "home" / "letter.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": float("nan")}, "learning rate is nan"),
        ({"learning_rate": 0.0}, "learning rate is 0"),
        ({"loss": "l1"}, "loss is 'l1'"),
        ({"token": "two words"}, "one word"),
        ({"token": ""}, "one word"),
        ({"prompt": "a photo of a mug"}, "lacks the token 'sks'"),
        ({"prompt": "a sks mug " + "on the table " * 40}, "tokens; at most 77"),
        ({"seed": -1}, "seed is -1"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_parameters_out_of_range_are_refused_and_nothing_is_written(
    base: BaseFiles, photos: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(photos, tmp_path / "lora", base, **fields)
    assert not any(tmp_path.iterdir())


def test_the_rank_comes_with_the_recipe(base: BaseFiles, photos: Path, tmp_path: Path) -> None:
    assert train(photos, tmp_path / "lora", base, recipe=replace(TINY, rank=3)).rank == 3
    assert read_lora(tmp_path / "lora").rank == 3
    assert (recipe_for(256).rank, recipe_for(1024).rank) == (16, 4)


def test_other_bad_input(base: BaseFiles, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="class name is empty"):
        train_lora(photos, "  ", tmp_path / "lora", base=base)
    with pytest.raises(InputError, match="no such folder"):
        train(tmp_path / "nowhere", tmp_path / "lora", base)
    with pytest.raises(FileFormatError, match="not a diffusers folder"):
        train_lora(photos, "mug", tmp_path / "lora", base=photos)
    assert not any(tmp_path.iterdir())


def test_a_training_that_diverges_writes_nothing(
    base: BaseFiles, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dreammix_trt.trainer.training.reweighted_loss", lambda eps, *_: eps.sum() * float("nan"))
    with pytest.raises(InputError, match=r"nan at step 1.*diverged.*smaller learning rate than 0.01"):
        train(photos, tmp_path / "lora", base)
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_place_is_refused_before_training(base: BaseFiles, photos: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written"):
        train(photos, tmp_path / "lora", base)


@pytest.mark.parametrize("package", ["peft", "torch"])
def test_a_missing_extra_is_named(
    base: BaseFiles, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'dreammix-trt\[train\]'"):
        train(photos, tmp_path / "lora", base)
    assert not any(tmp_path.iterdir())


def test_a_base_without_patch_and_head_trains_too(photos: Path, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "base")
    model.patch.unlink()
    model.head.unlink()
    recipe = Recipe(steps=2, learning_rate=1e-3, batch=2, views=2, beta=0.0, regular_pictures=0)
    record = train_lora(photos, "mug", tmp_path / "lora", base=model.folder, recipe=recipe, threads=1)
    assert record.steps == 2


def test_the_learning_rate_falls_after_its_constant_share() -> None:
    falling = replace(TINY, constant=0.5)
    assert [falling.rate_at(step, 4) for step in range(4)] == [1.0, 1.0, 1.0, 0.5]
    assert replace(TINY, constant=1.0).rate_at(3, 4) == 1.0


def test_a_base_of_parts_with_a_lora_of_its_own_trains(photos: Path, tmp_path: Path) -> None:
    """As `build` takes them; the merged UNet has the base's LoRA and the subject's."""
    from safetensors.numpy import load_file

    from tests.support.tiny_model import write_tiny_lora

    model = write_tiny_model(tmp_path / "base")
    bare = shutil.copytree(model.folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.patch", "*.pth", "vae"))
    shutil.copytree(model.folder / "vae", tmp_path / "vae")
    shutil.copytree(model.folder / "vae", bare / "vae")
    files = BaseFiles.open(bare, model.patch, model.head, vae=tmp_path / "vae", tokenizer=model.folder)
    rng = np.random.default_rng(5)
    shapes = dict(list(unet_attention_modules(dict(files.configs["unet"])).items())[:4])
    pairs = {
        name: tuple(rng.normal(0, 0.3, shape).astype(np.float32) for shape in ((inputs, 2), (2, outputs)))
        for name, (inputs, outputs) in shapes.items()
    }
    style = write_tiny_lora(tmp_path / "style.safetensors", pairs)  # type: ignore[arg-type]
    train(photos, tmp_path / "plain", files)
    record = train(photos, tmp_path / "lora", files, base_loras=[f"{style}:0.5"], merged=True)
    assert record.settings["base_loras"] == [[sha256_of(style), 0.5, "both"]]
    merged = load_file(tmp_path / "lora" / "unet" / "diffusion_pytorch_model.safetensors")
    own, added, patched = read_lora(tmp_path / "lora"), read_lora(style), files.unet_patched_state()
    for module, (a, b) in added.factors["unet"].items():
        expected = patched[f"{module}.weight"] + 0.5 * (a @ b).T
        if module in own.factors["unet"]:
            expected = expected + np.matmul(*own.factors["unet"][module]).T
        np.testing.assert_allclose(merged[f"{module}.weight"], expected, rtol=1e-5, atol=1e-6)
    plain = read_lora(tmp_path / "plain").factors["unet"]
    assert any(not np.array_equal(plain[name][1], pair[1]) for name, pair in own.factors["unet"].items())
