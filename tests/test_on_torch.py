"""The embedded base in torch behind the device runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from dreammix_trt.building import build
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import DreamMixError, EngineError, FileFormatError, InputError, OutOfMemoryError
from dreammix_trt.core.subject import read_subject
from dreammix_trt.engine import DreamMix
from dreammix_trt.engine.device.memory_plan import Options
from dreammix_trt.engine.device.studio import Studio
from dreammix_trt.engine.directory import open_engine
from dreammix_trt.engine.drivers.simulated import SimulatedDevice
from dreammix_trt.engine.text import Tokenizer
from dreammix_trt.export.torch_backend.on_device import TorchNetworks
from dreammix_trt.on_torch import load_torch
from tests.engine.conftest import make_scene
from tests.engine.test_tokens import draw_object
from tests.support.asuka import write_small_asuka
from tests.support.tokens import write_small_adapter

RAW = ("unet_raw_kv", "unet_raw")
BASE = ("text_encoder", "text_encoder_2", "unet_kv", "unet", *RAW, "inpaint_head", "vae_encoder", "vae_decoder")


def test_torch_paints_what_the_engine_paints(small_base: Path, mug_engine: Path) -> None:
    image, mask = make_scene()
    subjects = [read_subject(file) for file in open_engine(mug_engine).subjects]
    options = Options(largest_picture=128 * 128, subjects=1)
    with (
        SimulatedDevice() as device,
        load_torch(
            BaseFiles.open(small_base), subjects, dtype="float32", device=device, torch_device="cpu", options=options
        ) as torch_dm,
        DreamMix.load(mug_engine, threads=1) as host,
    ):
        got, expected = (
            np.asarray(dm.inpaint(image, mask, "a red sks mug", num_inference_steps=4, seed=3).images[0]).astype(int)
            for dm in (torch_dm, host)
        )
    assert np.abs(got - expected).max() <= 1
    assert np.mean(got != expected) < 1e-2


def test_asuka_in_torch_paints_what_the_engine_paints(test_home: Path, small_base: Path, tmp_path: Path) -> None:
    write_small_asuka(tmp_path / "asuka", BaseFiles.open(small_base))
    build(out=tmp_path / "engine", base=small_base, asuka=tmp_path / "asuka")
    base, options = BaseFiles.open(small_base, asuka=tmp_path / "asuka"), Options(largest_picture=128 * 128, subjects=1)
    kinds: tuple[dict[str, Any], ...] = ({"prior": "negative", "decoder": "asuka"}, {"prior": "concat"})
    with (
        SimulatedDevice() as device,
        load_torch(base, dtype="float32", device=device, torch_device="cpu", options=options) as torch_dm,
        DreamMix.load(tmp_path / "engine", threads=1) as host,
    ):
        for fields in kinds:
            got, expected = (
                dm.inpaint(*make_scene(), "a red mug", num_inference_steps=4, seed=3, **fields).images[0]
                for dm in (torch_dm, host)
            )
            assert np.abs(np.asarray(got).astype(int) - np.asarray(expected)).max() <= 2


def test_tokens_in_torch_are_enrolled_and_painted_as_the_engine_does(
    test_home: Path, small_base: Path, tmp_path: Path
) -> None:
    adapter = write_small_adapter(tmp_path / "adapter.safetensors", BaseFiles.open(small_base))
    build(out=tmp_path / "engine", base=small_base, tokens=adapter.file)
    base, options = BaseFiles.open(small_base, tokens=adapter.file), Options(largest_picture=128 * 128, subjects=1)
    with (
        SimulatedDevice() as device,
        load_torch(base, dtype="float32", device=device, torch_device="cpu", options=options) as torch_dm,
        DreamMix.load(tmp_path / "engine", threads=1) as host,
    ):
        pictures, rows = [], []
        for dm in (torch_dm, host):
            tokens = dm.enroll(*draw_object(0), class_name="mug").tokens
            assert tokens is not None
            rows.append(tokens.rows)
            result = dm.inpaint(*make_scene(), "a red mug", num_inference_steps=4, seed=3, token_count=9)
            pictures.append(np.asarray(result.images[0]).astype(int))
    np.testing.assert_allclose(*rows, atol=2e-3 * np.abs(rows[1]).max())
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


@pytest.mark.parametrize("residency", ["swap", "one-unet"])
def test_weights_come_as_the_memory_plan_says(residency: str, monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[str] = []
    load = TorchNetworks.load

    def told(networks: TorchNetworks, name: str) -> None:
        came.append(name)
        load(networks, name)

    monkeypatch.setattr(TorchNetworks, "load", told)
    image, mask = make_scene()
    options = Options(largest_picture=128 * 128, subjects=1, residency=residency)
    with SimulatedDevice() as device, opened(device, options=options) as dm:
        assert dm.studio is not None and dm.studio.plan.strategy == residency
        expected = {*BASE} - {*RAW} if residency == "one-unet" else set()
        assert set(came) == set(dm.studio.shared.loaded) == expected
        assert dm.inpaint(image, mask, "a red mug", num_inference_steps=4, seed=3).images
        assert len(dm.studio.shared.loaded) < len(BASE)


def test_lack_of_memory_is_told_in_the_engines_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError("unet: tried to allocate 20 GiB")

    monkeypatch.setattr(TorchNetworks, "load", full)
    closed = counted(monkeypatch, TorchNetworks, "close")
    with SimulatedDevice() as device, pytest.raises(OutOfMemoryError, match="unet: tried to allocate 20 GiB"):
        opened(device)
    assert closed


def test_nothing_stays_open_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu(SimulatedDevice):
        pass

    made, closed = counted(monkeypatch, Gpu, "__init__"), counted(monkeypatch, Gpu, "close")
    monkeypatch.setattr("dreammix_trt.engine.drivers.cuda.CudaDevice", Gpu)
    with pytest.raises(InputError, match="dtype is 'int8'"):
        load_torch(BaseFiles.open(), dtype="int8", torch_device="cpu")
    assert len(made) == 1 and len(closed) == 1
    monkeypatch.setattr(Studio, "__init__", raiser(EngineError("no room")))
    with pytest.raises(EngineError, match="no room"):
        load_torch(BaseFiles.open(), dtype="float32", torch_device="cpu")
    assert len(made) == 2 and len(closed) == 2
    monkeypatch.setattr(Tokenizer, "load", raiser(FileFormatError("no merges")))
    with pytest.raises(FileFormatError, match="no merges"):
        load_torch(BaseFiles.open(), dtype="float32", torch_device="cpu")
    assert len(made) == 2, "tokenizers come first"


def opened(device: SimulatedDevice, **named: Any) -> DreamMix:
    return load_torch(BaseFiles.open(), dtype="float32", device=device, torch_device="cpu", **named)


def counted(monkeypatch: pytest.MonkeyPatch, kind: type, name: str) -> list[None]:
    """An entry for every call of a method."""
    calls: list[None] = []
    method = getattr(kind, name)

    def noted(*given: Any) -> Any:
        calls.append(None)
        return method(*given)

    monkeypatch.setattr(kind, name, noted)
    return calls


def raiser(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from dreammix_trt.engine.hardware import ask_driver

    if ask_driver().gpus:
        pytest.skip("there is a GPU here")
    with pytest.raises(DreamMixError, match=r"driver|cuda-python"):
        load_torch(BaseFiles.open())
