"""Validation pictures: the present factors, through the real runtime on the embedded model."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreammix_trt import train_validation
from dreammix_trt.building import build
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import EngineError, InputError
from dreammix_trt.core.files import sha256_of
from dreammix_trt.core.lora import read_lora
from dreammix_trt.core.network_weights import BaseLora
from dreammix_trt.core.networks import describe_networks
from dreammix_trt.core.passport import Passport
from dreammix_trt.engine import DreamMix, read_request
from dreammix_trt.train_validation import Validator

WORDS: dict[str, Any] = {"token": "sks", "class_name": "mug"}
PROMPT = "a photo of a sks mug"


@pytest.fixture(scope="module")
def base(small_base: Path) -> BaseFiles:
    return BaseFiles.open(small_base)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("place")
    mask = Image.new("L", (96, 96))
    mask.paste(255, (24, 24, 72, 72))
    mask.save(folder / "mask.png")
    Image.new("RGB", (96, 96), (90, 120, 90)).save(folder / "image.png")
    return {"image": folder / "image.png", "mask": folder / "mask.png"}


@pytest.fixture(scope="module")
def validator(
    mug_engine: Path, base: BaseFiles, place: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Validator]:
    work, given = tmp_path_factory.mktemp("work"), {"seed": 3, "num_inference_steps": 2, "threads": 1}
    with Validator(work, base, [PROMPT], **WORDS, engine=mug_engine, **place, **given) as made:
        yield made


def random_factors(base: BaseFiles, size: float, seed: int = 0) -> dict[str, tuple[Any, Any]]:
    """A LoRA of rank 2 on the patched UNet's output projections, in the trainer's form."""
    import torch

    unet = next(each for each in describe_networks(base) if each.name == "unet")
    dice = torch.Generator().manual_seed(seed)
    return {
        slot.module: (
            torch.randn(2, slot.inputs, generator=dice) * size,
            torch.randn(slot.outputs, 2, generator=dice) * size,
        )
        for slot in unet.slots
        if slot.module.endswith("to_out.0")
    }


def pixels(file: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def test_pictures_show_the_present_factors(validator: Validator, base: BaseFiles) -> None:
    before = validator.paint(0, {})
    assert [(each.step, each.prompt, each.place) for each in before] == [(0, PROMPT, "place")]
    assert all(each.file.is_file() for each in before)
    changed = validator.paint(10, random_factors(base, 0.3))
    again = validator.paint(20, random_factors(base, 0.3))
    back = validator.paint(30, {})
    first, other, same, last = (pixels(each[0].file) for each in (before, changed, again, back))
    assert np.abs(first.astype(int) - other).mean() > 0.5
    assert np.array_equal(other, same), "same factors, same seed: the same picture"
    assert np.array_equal(first, last), "and the base's own weights come back whole"


def test_a_picture_is_what_the_finished_subject_paints(
    validator: Validator, base: BaseFiles, mug_engine: Path, place: dict[str, Path], tmp_path: Path
) -> None:
    """The LoRA written as a training writes it, put into the engine as people do it."""
    from safetensors.torch import save_file

    factors = random_factors(base, 0.3, seed=4)
    shown = validator.paint(40, factors)[0]
    tensors = {}
    for name, (down, up) in factors.items():
        tensors[f"unet.{name}.lora.down.weight"], tensors[f"unet.{name}.lora.up.weight"] = down, up
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / "pytorch_lora_weights.safetensors", {"token": "sks", "class_name": "mug"})
    request = read_request(shown.file)
    with DreamMix.load(mug_engine, threads=1) as dm:
        name = dm.add_subject(tmp_path / "lora")
        result = dm.inpaint(place["image"], place["mask"], request.replace(subject=name))
    difference = np.abs(np.asarray(result.images[0].convert("RGB"), int) - pixels(shown.file))
    assert difference.max() <= 4, "the validator's subject is rounded to float16, as a built one is"
    base_alone = pixels(validator.paint(41, {})[0].file)
    assert np.abs(base_alone.astype(int) - pixels(shown.file)).max() > 20


def test_the_embedded_base_needs_nothing_more(
    base: BaseFiles, small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine is built on the spot, and the places are rooms of its own world."""
    monkeypatch.setattr(train_validation, "EMBEDDED", small_base)
    monkeypatch.setattr("dreammix_trt.building.build", functools.partial(build, base=small_base))
    prompts = [PROMPT, "a red sks mug"]
    validator = Validator(tmp_path, base, prompts, **WORDS, num_inference_steps=1, threads=1)
    painted = validator.paint(1, {})
    scratch = validator._scratch
    validator.close()
    assert [(each.place, each.prompt) for each in painted] == [(f"room{n}", text) for n in (1, 2) for text in prompts]
    assert [pixels(each.file).shape for each in painted] == [(128, 128, 3)] * 4
    assert not scratch.exists()


def test_bad_engines_are_refused_before_a_training(
    mug_engine: Path, base: BaseFiles, place: dict[str, Path], tmp_path: Path
) -> None:
    def change(**facts: Any) -> Path:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(mug_engine, copy)
        passport = json.loads((copy / "passport.json").read_text())
        passport["base"] |= facts
        (copy / "passport.json").write_text(json.dumps(passport))
        return copy

    with pytest.raises(InputError, match=r"has no slots.*--no-slots"):
        Validator(tmp_path, base, [PROMPT], **WORDS, engine=change(slots=False), **place)
    files = {**base.hash_contents(), "unet/other.safetensors": "0" * 64}
    with pytest.raises(InputError, match=r"of another base, 'other': unet/other.safetensors differ.*build one for it"):
        Validator(tmp_path, base, [PROMPT], **WORDS, engine=change(name="other", files=files), **place)
    with pytest.raises(EngineError, match="not an engine directory"):
        Validator(tmp_path, base, [PROMPT], **WORDS, engine=tmp_path / "nothing", **place)
    assert not (tmp_path / "validation").exists()


@pytest.fixture
def style(mug_lora: Path, base: BaseFiles) -> tuple[BaseLora, str]:
    """A LoRA for the base's own weights, and its hash."""
    lora = read_lora(mug_lora, base.configs["unet"])
    return BaseLora(lora, 0.5), sha256_of(lora.source_path)


def test_an_engine_of_other_weights_is_named(
    mug_engine: Path,
    base: BaseFiles,
    place: dict[str, Path],
    style: tuple[BaseLora, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The base's files are the same; a LoRA was merged into one of them."""
    given: dict[str, Any] = {**WORDS, "engine": mug_engine, "threads": 1, **place}
    Validator(tmp_path, base, [PROMPT], **given).close()
    assert not caplog.records
    Validator(tmp_path, base, [PROMPT], **given, base_loras=[style]).close()
    assert re.search(rf"other weights.*--base-lora none, the training .*{style[0].lora.source_path}:0.5", caplog.text)


def test_the_engine_of_the_embedded_base_gets_the_same_loras(
    base: BaseFiles, small_base: Path, style: tuple[BaseLora, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_validation, "EMBEDDED", small_base)
    monkeypatch.setattr("dreammix_trt.building.build", functools.partial(build, base=small_base))
    with Validator(tmp_path, base, [PROMPT], **WORDS, num_inference_steps=1, threads=1, base_loras=[style]) as made:
        found = Passport.read(made._scratch / "engine")
    assert found.base["loras"] == [f"{style[0].lora.source_path}:0.5"]


def test_a_prompt_that_cannot_be_painted_is_refused_before_a_training(
    mug_engine: Path, base: BaseFiles, place: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="prompt"):
        Validator(tmp_path, base, [PROMPT, "a sks mug " * 9000], **WORDS, engine=mug_engine, **place, threads=1)


def test_bad_places_are_refused(mug_engine: Path, base: BaseFiles, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match="no prompt"):
        Validator(tmp_path, base, [], **WORDS, engine=mug_engine)
    with pytest.raises(InputError, match="32"):
        Validator(
            tmp_path,
            base,
            [PROMPT],
            **WORDS,
            engine=mug_engine,
            image=tmp_path / "image.png",
            mask=tmp_path / "mask.png",
        )
    with pytest.raises(InputError, match="give --validation-image"):
        Validator(tmp_path, base, [PROMPT], **WORDS, engine=mug_engine, mask=tmp_path / "mask.png")


def test_another_base_needs_an_engine_and_a_place(tmp_path: Path) -> None:
    from dreammix_trt.trainer.photographs import PhotographFile
    from tests.support.mini_sdxl import files, small_configs

    configs = small_configs()
    other = BaseFiles.open(files.write_folder(tmp_path / "base", configs))
    mask = Image.new("L", (100, 60))
    mask.paste(255, (40, 20, 60, 50))
    mask.save(tmp_path / "mask.png")
    Image.new("RGB", (100, 60), (9, 9, 9)).save(tmp_path / "photo.png")
    photographs = [PhotographFile(tmp_path / "photo.png", tmp_path / "mask.png")]
    with pytest.raises(InputError, match=r"by an engine of the same base.*--validate-engine"):
        Validator(tmp_path, other, [PROMPT], **WORDS, photographs=photographs)
    with pytest.raises(InputError, match="no place"):
        Validator(tmp_path, other, [PROMPT], **WORDS)
    [place] = train_validation._choose_places(other, photographs, None, None)
    assert place.mask.getbbox() == (38, 17, 62, 53), "the subject's box and a tenth of it on each side"
