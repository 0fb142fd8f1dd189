"""Precision, batches, memory: what a training on a full-size base needs, tried on a tiny one."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for _name in ("torch", "diffusers", "transformers", "peft"):
    pytest.importorskip(_name, reason="the trainer needs its extra")

from dreammix_trt.core.checkpoint import BaseFiles  # noqa: E402
from dreammix_trt.core.errors import DeviceError, InputError, MissingExtraError  # noqa: E402
from dreammix_trt.core.lora import FILE_NAME, read_lora  # noqa: E402
from dreammix_trt.trainer import networks  # noqa: E402
from dreammix_trt.trainer.lora import FULL, Hardware  # noqa: E402
from tests.support.training import TINY, train  # noqa: E402


def factors_of(folder: Path) -> np.ndarray:
    """Every number of a LoRA, in order."""
    lora = read_lora(folder)
    return np.concatenate([each.ravel() for pair in lora.factors["unet"].values() for each in pair])


@pytest.fixture
def unets(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The UNets that are loaded."""
    loaded: list[Any] = []

    class Noted(networks.TrainingUNet):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            loaded.append(self)

    monkeypatch.setattr(networks, "TrainingUNet", Noted)
    return loaded


@pytest.mark.parametrize(("precision", "close"), [("bfloat16", 0.03), ("float16", 0.01)])
def test_a_base_in_half_precision_trains_factors_in_float32(
    base: BaseFiles, photos: Path, tmp_path: Path, unets: list[Any], precision: str, close: float
) -> None:
    import torch
    from safetensors.torch import load_file

    full = train(photos, tmp_path / "full", base)
    half = train(photos, tmp_path / "half", base, hardware=Hardware(precision=precision))  # type: ignore[arg-type]
    kinds = {value.dtype for name, value in unets[-1].unet.named_parameters() if "lora_" not in name}
    assert kinds == {getattr(torch, precision)}
    assert {value.dtype for value in unets[-1].unet.parameters() if value.requires_grad} == {torch.float32}
    assert {each.dtype for each in load_file(tmp_path / "half" / FILE_NAME).values()} == {torch.float32}
    assert half.loss == pytest.approx(full.loss, rel=close) and half.loss != full.loss


def test_accumulated_batches_make_the_step_of_a_large_one(base: BaseFiles, photos: Path, tmp_path: Path) -> None:
    exact = Hardware(precision="float32")  # products in bfloat16, where a CPU has them, round rows of a batch otherwise
    for batch, accumulate in ((4, 1), (2, 2), (1, 4)):
        recipe = replace(TINY, batch=batch, accumulate=accumulate)
        train(photos, tmp_path / f"{batch}", base, recipe=recipe, steps=2, hardware=exact)
    whole = factors_of(tmp_path / "4")
    for batch in "21":
        np.testing.assert_allclose(factors_of(tmp_path / batch), whole, atol=2e-4)
    train(photos, tmp_path / "other", base, recipe=replace(TINY, batch=2, accumulate=1), steps=2, hardware=exact)
    assert np.abs(factors_of(tmp_path / "other") - whole).max() > 1e-2


def test_values_computed_twice_are_the_same(
    base: BaseFiles, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.utils.checkpoint

    calls: list[int] = []
    honest = torch.utils.checkpoint.checkpoint

    def counted(*given: Any, **fields: Any) -> Any:
        calls.append(1)
        return honest(*given, **fields)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    for name, often in (("kept", False), ("again", True)):
        train(photos, tmp_path / name, base, recipe=replace(TINY, gradient_checkpointing=often), steps=2)
        assert bool(calls) == often
    assert (tmp_path / "kept" / FILE_NAME).read_bytes() == (tmp_path / "again" / FILE_NAME).read_bytes()
    assert FULL.gradient_checkpointing and FULL.batch * FULL.accumulate == 4


def test_encoders_are_let_go_before_the_unet_is_read(
    base: BaseFiles, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 SDXL's text encoders and VAE take 3.6 GB, which the UNet needs."""
    from diffusers import AutoencoderKL
    from transformers import PreTrainedModel

    found: list[str] = []
    honest = networks.TrainingUNet
    read: list[str] = []
    for name in ("TextEncoders", "Vae"):
        kind = getattr(networks, name)
        monkeypatch.setattr(networks, name, lambda *given, kind=kind: read.append(kind.__name__) or kind(*given))

    def look(*given: Any) -> Any:
        gc.collect()
        found.extend(
            type(each).__name__ for each in gc.get_objects() if isinstance(each, AutoencoderKL | PreTrainedModel)
        )
        return honest(*given)

    monkeypatch.setattr(networks, "TrainingUNet", look)
    train(photos, tmp_path / "lora", base, steps=1)
    assert read == ["TextEncoders", "Vae"] and found == []


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"device": "gpu"}, InputError, "device is 'gpu'; give cpu, cuda or cuda:NUMBER"),
        ({"device": "cpu:1"}, InputError, "device is 'cpu:1'"),
        ({"precision": "fp8"}, InputError, "precision is 'fp8'; choose one of float32, bfloat16, float16"),
        ({"optimizer": "sgd"}, InputError, "optimizer is 'sgd'"),
        ({"optimizer": "adamw8bit"}, InputError, "adamw8bit runs on a GPU alone"),
    ],
)
def test_hardware_that_cannot_be_is_refused(fields: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Hardware(**fields).check()


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"device is 'cuda', but torch finds no GPU.*--device cpu"):
        Hardware("cuda").check()
    monkeypatch.setattr("dreammix_trt.trainer.hardware.list_missing", list)
    with pytest.raises(MissingExtraError, match=r"dreammix-trt\[train,train8bit\]"):
        Hardware("cuda", optimizer="adamw8bit").check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match=r"device is 'cuda:2', but there are 2 GPUs, from cuda:0"):
        Hardware("cuda:2").check()
    Hardware("cuda:1").check()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert Hardware("cuda").weights == Hardware("cuda").products == torch.float16


def test_the_cpu_computes_in_float32_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """With matrix tiles (AMX) products are in bfloat16; the weights stay."""
    import torch

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert (Hardware().weights, Hardware().products) == (torch.float32, torch.bfloat16)
    assert Hardware(precision="float32").products == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert Hardware().products == torch.float32


def test_one_photograph_and_one_that_is_filled_are_trained_on(
    base: BaseFiles, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from PIL import Image

    (tmp_path / "photos" / "image").mkdir(parents=True)
    (tmp_path / "photos" / "mask").mkdir()
    Image.open(photos / "image" / "00.png").save(tmp_path / "photos" / "image" / "00.png")
    Image.new("L", (80, 60), 255).save(tmp_path / "photos" / "mask" / "00.png")
    with pytest.raises(InputError, match=r"mark 100 %.*--large-masks"):
        train(tmp_path / "photos", tmp_path / "lora", base)
    with caplog.at_level(logging.WARNING):
        record = train(tmp_path / "photos", tmp_path / "lora", base, large_masks=True, steps=2)
    assert np.isfinite(record.loss) and "one photograph (00.png)" in caplog.text
