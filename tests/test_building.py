"""Builds of the embedded base: by reference, self-contained and merged; second subjects; what does not fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreammix_trt.building import build
from dreammix_trt.core.errors import EngineError, FileFormatError, InputError
from dreammix_trt.core.files import folder_bytes
from dreammix_trt.core.passport import Passport
from dreammix_trt.engine import DreamMix
from dreammix_trt.engine.build import check_engine
from tests.conftest import write_lora

IMAGE = Image.fromarray(np.random.default_rng(3).integers(0, 255, (96, 96, 3), np.uint8))
MASK = Image.fromarray(np.pad(np.full((40, 40), 255, np.uint8), 28))


def picture(engine: Path, **fields: object) -> np.ndarray:  # type: ignore[type-arg]
    with DreamMix.load(engine, threads=1) as dm:
        return np.asarray(dm.inpaint(IMAGE, MASK, "a sks mug", num_inference_steps=4, seed=3, **fields).images[0])


def test_the_passport_says_what_the_engine_was_made_from(mug_engine: Path, mug_lora: Path) -> None:
    passport = Passport.read(mug_engine)
    assert [subject.name for subject in passport.subjects] == ["mug"]
    assert passport.subjects[0].source == str(mug_lora)
    assert "unet/diffusion_pytorch_model.safetensors" in passport.base["files"]
    assert {"unet", "unet_raw", "vae_decoder", "text_encoder_2"} <= {entry.name for entry in passport.networks}
    for entry in passport.networks:
        assert entry.parity["max_rel"] < 1e-4
    graphs = {entry.name: entry.graph for entry in passport.networks}
    assert graphs["unet"] == graphs["unet_raw"]


SECOND = """
import sys, time
start = time.perf_counter()
from dreammix_trt.building import build
build(sys.argv[1], out=sys.argv[2], name="second")
heavy = [name for name in ("torch", "diffusers", "transformers", "onnx") if name in sys.modules]
print(time.perf_counter() - start, heavy)
"""


def test_a_second_subject_needs_no_torch_and_little_room(mug_engine: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "second", seed=2)
    out = tmp_path / "engine"
    done = subprocess.run([sys.executable, "-c", SECOND, lora, out], capture_output=True, text=True, check=True)
    assert done.stdout.split(" ", 1)[1].strip() == "[]"
    assert folder_bytes(out) <= 1_000_000


def test_subjects_swap_and_swap_back_to_the_bit(mug_engine: Path, tmp_path: Path) -> None:
    other = write_lora(tmp_path / "other", seed=5, scale=0.3)
    build(other, out=tmp_path / "other-engine", name="other")
    fields = {"num_inference_steps": 4, "seed": 3}
    with DreamMix.load(mug_engine, threads=1) as dm:
        assert dm.add_subject(tmp_path / "other-engine") == "other"
        assert dm.subjects == ("mug", "other")
        first, swapped, back = (
            np.asarray(dm.inpaint(IMAGE, MASK, "a sks mug", subject=name, **fields).images[0])
            for name in ("mug", "other", "mug")
        )
    assert np.array_equal(first, back)
    assert not np.array_equal(first, swapped)
    assert np.array_equal(swapped, picture(tmp_path / "other-engine"))


def test_a_self_contained_engine_moves_and_needs_no_store(
    mug_lora: Path, mug_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(mug_lora, out=tmp_path / "here", name="mug", self_contained=True)
    shutil.move(tmp_path / "here", tmp_path / "there")
    monkeypatch.setenv("DREAMMIX_HOME", str(tmp_path / "empty"))
    moved = picture(tmp_path / "there")
    monkeypatch.undo()
    assert np.array_equal(moved, picture(mug_engine))


def test_a_merged_subject_paints_as_the_slotted_one_does(tmp_path: Path, mug_engine: Path) -> None:
    lora = write_lora(tmp_path / "strong", seed=8, scale=0.2)
    build(lora, out=tmp_path / "slots", name="strong")
    build(lora, out=tmp_path / "merged", name="strong", merge=True)
    merged, slotted = picture(tmp_path / "merged"), picture(tmp_path / "slots")
    assert not np.array_equal(slotted, picture(tmp_path / "slots", subject=""))
    assert np.abs(merged.astype(int) - slotted.astype(int)).max() <= 8  # fp16 factors against exact ones
    assert Passport.read(tmp_path / "merged").base["merged"] == "strong"


def test_a_lora_for_another_base_is_refused_with_names_and_shapes(tmp_path: Path, mug_engine: Path) -> None:
    from safetensors.numpy import save_file

    module = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"
    tensors = {
        f"{module}.lora.down.weight": np.ones((4, 640), np.float32),
        f"{module}.lora.up.weight": np.ones((640, 4), np.float32),
    }
    save_file(tensors, tmp_path / "sdxl.safetensors")
    with pytest.raises(FileFormatError, match=r"another base.*attn1\.to_k.*640"):
        build(tmp_path / "sdxl.safetensors", out=tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_a_rank_above_the_slots_is_refused_with_the_remedy(tmp_path: Path, mug_engine: Path) -> None:
    lora = write_lora(tmp_path / "wide", seed=1, rank=16)
    with pytest.raises(FileFormatError, match="--slot-rank 16"):
        build(lora, out=tmp_path / "engine")


def test_truncated_or_missing_loras_are_named(tmp_path: Path, mug_lora: Path) -> None:
    whole = (mug_lora / "pytorch_lora_weights.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    for name in ("cut.safetensors", "none.safetensors"):
        with pytest.raises((FileFormatError, InputError), match=name):
            build(tmp_path / name, out=tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_another_directory_is_not_replaced(tmp_path: Path, mug_lora: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="holds other files"):
        build(mug_lora, out=tmp_path)
    assert (tmp_path / "holiday.jpg").exists()


@pytest.fixture
def spoiled(mug_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mug_engine, tmp_path / "copy"))


def test_a_tampered_subject_is_found(spoiled: Path) -> None:
    file = spoiled / "subjects" / "mug.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(EngineError, match=r"mug\.safetensors is not what was built.*dreammix-trt build"):
        check_engine(spoiled)


def test_a_missing_subject_is_found(spoiled: Path) -> None:
    (spoiled / "subjects" / "mug.safetensors").unlink()
    with pytest.raises(EngineError, match=r"mug\.safetensors is missing"):
        DreamMix.load(spoiled)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema": 2}, "schema 2"),
        ({"schema": 0}, "schema 0"),
        ({"networks": 3}, "damaged"),
        ({"base_key": "0" * 64}, "lacks"),
    ],
)
def test_passports_that_do_not_fit(spoiled: Path, change: dict[str, object], told: str) -> None:
    record = json.loads((spoiled / "passport.json").read_text())
    (spoiled / "passport.json").write_text(json.dumps(record | change))
    with pytest.raises(EngineError, match=told) as caught:
        DreamMix.load(spoiled)
    assert "dreammix-trt build" in str(caught.value)


def test_building_again_gives_the_same_passport(mug_engine: Path, mug_lora: Path) -> None:
    before = Passport.read(mug_engine)
    assert build(mug_lora, out=mug_engine, name="mug") == before
