"""Engines for OpenVINO: the same parts, a look at pictures before bfloat16 is let in, and what they run on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dreammix_trt.building import EngineOptions, bfloat16, build
from dreammix_trt.building.bfloat16 import Looked, choose_count, look_at_pictures, measure_psnr
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import EngineError, InputError, MissingExtraError
from dreammix_trt.core.passport import Passport
from dreammix_trt.engine import DreamMix
from dreammix_trt.engine.backends.openvino import compiling
from dreammix_trt.engine.directory import open_engine

pytest.importorskip("openvino")
PICTURE = np.random.default_rng(0).integers(0, 255, (96, 96, 3)).astype(np.uint8)
MASK = np.zeros((96, 96), np.uint8)
MASK[30:70, 20:60] = 255


@pytest.fixture(scope="module")
def engine(mug_engine: Path, mug_lora: Path, small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mug's engine once more, for OpenVINO in float32."""
    out = tmp_path_factory.mktemp("engines") / "mug-openvino"
    build(mug_lora, base=small_base, out=out, name="mug", engine=EngineOptions(backend="openvino", precision="float32"))
    return out


def test_it_has_the_parts_of_onnxruntimes_engine_and_paints_its_pictures(engine: Path, mug_engine: Path) -> None:
    passport, other = Passport.read(engine), Passport.read(mug_engine)
    assert (passport.backend, passport.precision, passport.parts) == ("openvino", "float32", other.parts)
    assert passport.backend_version == passport.versions["openvino"]
    assert "--backend openvino --precision float32" in passport.command
    pictures = []
    for folder in (mug_engine, engine):
        with DreamMix.load(folder, threads=1) as dm:
            result = dm.inpaint(PICTURE, MASK, "a sks mug", num_inference_steps=2, seed=5)
            pictures.append(np.asarray(result.images[0]))
    assert measure_psnr(*pictures) > 50


def test_devices_and_engines_that_do_not_go_together(engine: Path, mug_engine: Path) -> None:
    with pytest.raises(EngineError, match=r"is for OpenVINO, which does not run on NVIDIA's GPUs"):
        DreamMix.load(engine, device="cuda")
    with pytest.raises(EngineError, match=r"device 'GPU' is OpenVINO's; build with `--backend openvino`"):
        DreamMix.load(mug_engine, device="GPU")
    with pytest.raises(InputError, match=r"device is 'NPU\.9'; OpenVINO finds here: .*CPU"):
        DreamMix.load(engine, device="NPU.9")
    with pytest.raises(InputError, match="device is 'gpu'; allowed: cpu, cuda"):
        DreamMix.load(engine, device="gpu")


def test_bfloat16_is_the_default_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, precision in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(compiling, "has_bfloat16", lambda device="CPU", has=has: has)
        assert EngineOptions(backend="openvino").precision == precision
        assert f"'precision': '{precision}'" in str(EngineOptions(backend="openvino").words())
    with pytest.raises(InputError, match=r"neither AVX-512 BF16 nor AMX.*--precision float32"):
        EngineOptions(backend="openvino", precision="bfloat16").check()
    with pytest.raises(InputError, match="precision is 'float16'; allowed: float32, bfloat16"):
        EngineOptions(backend="openvino", precision="float16").check()


def test_what_brings_openvino_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dreammix_trt.engine.machine.find_versions", lambda: {"onnxruntime": "9.9"})
    with pytest.raises(MissingExtraError, match=r"pip install dreammix-trt\[openvino\]"):
        EngineOptions(backend="openvino").check()


@pytest.mark.parametrize(("least", "precision"), [(20.0, "bfloat16"), (1000.0, "float32")])
def test_pictures_decide_whether_it_computes_in_bfloat16(
    small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: float, precision: str
) -> None:
    """On a processor without bfloat16 OpenVINO computes in float32 and the figures are those of that."""
    monkeypatch.setattr(compiling, "has_bfloat16", lambda device="CPU": True)
    monkeypatch.setattr(bfloat16, "LEAST_PSNR", least)
    monkeypatch.setattr(bfloat16, "_STEPS", 2)
    told: list[str] = []
    options = EngineOptions(backend="openvino", precision="bfloat16", look=1)
    passport = build(base=small_base, out=tmp_path / "engine", engine=options, notice=told.append)
    assert passport.precision == precision
    assert any(line.startswith("bfloat16 against float32, 1 pictures: PSNR ") for line in told)
    assert any("less than 1000 dB" in line for line in told) == (precision == "float32")


def test_nothing_is_painted_of_a_large_base_unless_asked_for(
    small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (choose_count(None, 256), choose_count(None, 1024), choose_count(2, 1024), choose_count(0, 256)) == (
        6,
        0,
        2,
        0,
    )
    monkeypatch.setattr(compiling, "has_bfloat16", lambda device="CPU": True)
    told: list[str] = []
    options = EngineOptions(backend="openvino", precision="bfloat16", look=0)
    assert build(base=small_base, out=tmp_path / "engine", engine=options, notice=told.append).precision == "bfloat16"
    assert any("no picture was painted" in line and "--look 2" in line for line in told)


def test_the_embedded_models_judge_is_heard(mug_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small frames of it will do: what counts is that both lists are read and compared."""
    monkeypatch.setattr(bfloat16, "_STEPS", 1)
    base = BaseFiles.open()
    found = look_at_pictures(base, open_engine(mug_engine).parts, 1)
    assert found.psnr and found.psnr[0] > 20 and found.alike is not None and found.right is not None
    assert min(found.alike, *found.right) >= 0 and max(found.alike, *found.right) <= 1
    assert "the judge reads" in str(found)


def test_figures_as_they_are_told() -> None:
    found = Looked((30.0, 50.0), 0.5, (0.75, 0.25))
    assert found.good and not Looked((34.0,)).good
    assert str(found) == (
        "bfloat16 against float32, 2 pictures: PSNR 40.0 dB, the lowest 30.0; the judge reads 50 % of parts alike, "
        "right in float32 75 %, now 25 %"
    )
    grey, brighter = np.full((4, 4, 3), 100, np.uint8), np.full((4, 4, 3), 110, np.uint8)
    assert measure_psnr(grey, grey) == 99 and measure_psnr(grey, brighter) == pytest.approx(28.13, abs=0.01)
