"""The embedded base in torch behind the device runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import DreamMixError
from dreammix_trt.core.subject import read_subject
from dreammix_trt.engine import DreamMix
from dreammix_trt.engine.build import open_engine
from dreammix_trt.engine.gpu.plan import Options
from dreammix_trt.engine.gpu.simulated import SimulatedDevice
from dreammix_trt.on_torch import load_torch
from tests.engine.gpu.conftest import scene


def test_torch_paints_what_the_engine_paints(mug_engine: Path) -> None:
    image, mask = scene()
    subjects = [read_subject(file) for file in open_engine(mug_engine).subjects]
    options = Options(largest_picture=128 * 128, subjects=1)
    with (
        SimulatedDevice() as device,
        load_torch(
            BaseFiles.open(), subjects, dtype="float32", device=device, torch_device="cpu", options=options
        ) as torch_dm,
        DreamMix.load(mug_engine, threads=1) as host,
    ):
        got, expected = (
            np.asarray(dm.inpaint(image, mask, "a red sks mug", num_inference_steps=4, seed=3).images[0]).astype(int)
            for dm in (torch_dm, host)
        )
    assert np.abs(got - expected).max() <= 1
    assert np.mean(got != expected) < 1e-2


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from dreammix_trt.engine.hardware import ask_driver

    if ask_driver().gpus:
        pytest.skip("there is a GPU here")
    with pytest.raises(DreamMixError, match=r"driver|cuda-python"):
        load_torch(BaseFiles.open())
