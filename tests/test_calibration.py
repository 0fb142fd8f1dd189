"""`calibrate`, and builds with UNets in E4M3 or bfloat16: from a tiny base to its engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

for package in ("torch", "diffusers", "onnx", "onnxslim", "onnxruntime"):
    pytest.importorskip(package)

from dreammix_trt.building import BaseSources, EngineOptions, build  # noqa: E402
from dreammix_trt.building.calibrated import find_calibration  # noqa: E402
from dreammix_trt.building.order import BuildOrder  # noqa: E402
from dreammix_trt.calibration import LEAST_STEPS, CalibrationOptions, calibrate, draw_cases, list_pictures  # noqa: E402
from dreammix_trt.core.calibration import Calibration, weight_of_step  # noqa: E402
from dreammix_trt.core.checkpoint import BaseFiles  # noqa: E402
from dreammix_trt.core.errors import BuildError, InputError  # noqa: E402
from dreammix_trt.core.passport import Passport  # noqa: E402
from dreammix_trt.core.request import Request  # noqa: E402
from dreammix_trt.core.schedule import make_schedule  # noqa: E402
from dreammix_trt.engine import DreamMix  # noqa: E402
from dreammix_trt.export.calibrating import Watched  # noqa: E402
from tests.support.tiny_model import write_tiny_model  # noqa: E402

OPTIONS = CalibrationOptions(count=2, steps=6, probes=1, threads=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseFiles:
    """A tiny base with one UNet: without patch and head."""
    return open_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def file(base: BaseFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base's calibration."""
    out = tmp_path_factory.mktemp("calibration") / "calibration.json"
    calibrate(base, out, OPTIONS, lambda *_: None)
    return out


def open_tiny(folder: Path, seed: int = 0) -> BaseFiles:
    made = write_tiny_model(folder, seed=seed)
    for extra in (made.patch, made.head):
        extra.unlink()
    return BaseFiles.open(made.folder)


def stop_at(what: str, number: int) -> Callable[[str, float, str], None]:
    seen = 0

    def update(told: str, _fraction: float, _message: str) -> None:
        nonlocal seen
        seen += told == what
        if told == what and seen > number:
            raise KeyboardInterrupt

    return update


def test_every_layer_has_ranges_and_an_error(file: Path) -> None:
    found = Calibration.read(file)
    assert found.layers.keys() == {"unet"} and len(found.runs) == 2
    layers = found.layers["unet"]
    assert {"conv_in", "mid_block.resnets.0.conv1", "conv_out"} <= layers.keys()
    assert all(layer.input > 0 and layer.weight > 0 for layer in layers.values())
    assert layers["conv_in"].error is None and layers["mid_block.resnets.0.conv1"].error > 0  # type: ignore[operator]


@pytest.mark.parametrize(("what", "number"), [("requests", 1), ("errors", 3)])
def test_what_was_stopped_goes_on_to_the_same_result(
    base: BaseFiles, file: Path, tmp_path: Path, what: str, number: int
) -> None:
    out, options = tmp_path / "calibration.json", replace(OPTIONS, probes=int(what == "errors"))
    with pytest.raises(KeyboardInterrupt):
        calibrate(base, out, options, stop_at(what, number))
    begun, whole = Calibration.read(out), Calibration.read(file)
    assert len(begun.runs) == (1 if what == "requests" else 2)
    if what == "errors":  # spare the test most of the layers
        known = whole.layers["unet"].items()
        begun.weigh("unet", {name: layer.error for name, layer in known if "mid_block" not in name}).write(out)
    calibrate(base, out, options, lambda *_: None)
    found = Calibration.read(out)
    assert found.runs == whole.runs
    for name, layer in whole.layers["unet"].items():
        assert found.layers["unet"][name] == (layer if what == "errors" else replace(layer, error=None))


def test_the_file_of_another_base_is_refused(file: Path, tmp_path: Path) -> None:
    other = open_tiny(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"is the calibration of .*, and its weights are not those of"):
        calibrate(other, file, OPTIONS, lambda *_: None)


def test_prompts_and_pictures_may_be_the_users(base: BaseFiles, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no pictures there"):
        list_pictures(tmp_path)
    Image.new("RGB", (90, 60), "red").save(tmp_path / "red.png")
    options = CalibrationOptions(prompts=["one"], images=list_pictures(tmp_path), count=2)
    cases = list(draw_cases(base, options))
    assert [case.prompt for case in cases] == ["one", "one"] and cases[0].name != cases[1].name
    assert cases[0].picture.shape == (64, 64, 3) and (cases[0].picture == (255, 0, 0)).all()
    assert all(0 < case.mask.mean() < 1 for case in cases)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 0}, "count is 0; allowed: 1 and more"),
        ({"steps": 5}, "steps is 5; allowed: 6 and more"),
        ({"side": 100}, "side is 100; allowed: multiples of 64 pixels"),
        ({"device": "tpu"}, "device is 'tpu'; allowed: cpu, cuda"),
    ],
)
def test_options_that_cannot_be_are_refused(base: BaseFiles, tmp_path: Path, given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        calibrate(base, tmp_path / "c.json", replace(OPTIONS, **given), lambda *_: None)


def test_every_allowed_number_of_steps_runs_both_unets() -> None:
    for steps in range(LEAST_STEPS, 31):
        assert {step.network for step in make_schedule(Request("a", num_inference_steps=steps))} == {"unet", "unet_raw"}
    assert {step.network for step in make_schedule(Request("a", num_inference_steps=LEAST_STEPS - 1))} == {"unet"}


def test_a_unet_that_never_ran_is_no_result(base: BaseFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a schedule does that leaves the unpatched UNet out: nothing is recorded of the UNet, the file stays."""
    take = Watched.take
    monkeypatch.setattr(Watched, "take", lambda self: {name: {} for name in take(self)})
    with pytest.raises(BuildError, match=r"its 1 requests never ran unet, .* with more --steps"):
        calibrate(base, tmp_path / "c.json", replace(OPTIONS, count=1), lambda *_: None)
    assert len(Calibration.read(tmp_path / "c.json").runs) == 1


def test_a_unet_without_calls_is_not_measured_and_that_is_said(
    base: BaseFiles, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = Calibration.read(file)
    bare = {name: replace(layer, error=None) for name, layer in whole.layers["unet"].items()}
    out = tmp_path / "c.json"
    replace(whole, layers={"unet": bare}).write(out)
    monkeypatch.setattr("dreammix_trt.calibration._paint", lambda *_: None)
    found = calibrate(base, out, OPTIONS, lambda *_: None)
    assert "unet: its layers' errors were not measured, as none of the 6 steps ran it" in caplog.text
    assert len(found.unmeasured("unet")) > 20 and Calibration.read(out) == found


@pytest.mark.parametrize(
    ("out", "message"),
    [("", "is a directory; name a file in it"), ("file/c.json", "cannot be made: .*file is a file, not a directory")],
)
def test_a_place_that_cannot_be_written_is_refused_before_any_request(
    base: BaseFiles, tmp_path: Path, out: str, message: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=message):
        calibrate(base, tmp_path / out, OPTIONS, lambda *_: pytest.fail("it began"))


def test_steps_with_as_much_noise_as_picture_count_most() -> None:
    weights = [weight_of_step(step) for step in (0, 41, 400, 999)]
    assert weights[2] == max(weights) > 0.95 and weights[0] < 0.01 and weights[3] < 0.05


def test_an_engine_in_e4m3_paints_nearly_the_same_and_its_passport_says_which_layers(
    base: BaseFiles, file: Path, tmp_path: Path
) -> None:
    options = EngineOptions(precision="fp8", calibration=file)
    build(out=tmp_path / "fp8", base=base.folder, engine=options, verify=False)
    build(out=tmp_path / "plain", base=base.folder, verify=False)
    passport, found = Passport.read(tmp_path / "fp8"), Calibration.read(file)
    kept = list(found.kept("unet"))
    assert passport.base["float8"] == {
        "requests": 2,
        "unets": {"unet": {"layers": len(found.layers["unet"]) - len(kept), "kept_in_float16": kept}},
    }
    assert "--precision fp8" in passport.command and f"--calibration {file}" in passport.command
    parts = Passport.read(tmp_path / "plain").parts
    assert {name for name in parts if parts[name] != passport.parts[name]} == {"unet"}
    case = next(iter(draw_cases(base, OPTIONS)))
    mask = Image.fromarray(case.mask.astype(np.uint8) * 255)
    pictures = []
    for name in ("fp8", "plain"):
        with DreamMix.load(tmp_path / name, threads=1) as dm:
            painted = dm.inpaint(Image.fromarray(case.picture), mask, "a", num_inference_steps=2).images[0]
            pictures.append(np.asarray(painted, np.float64))
    difference = np.abs(pictures[0] - pictures[1])
    assert difference.max() > 0 and np.mean(difference**2) < 255**2 / 10**2.5  # 25 dB


def test_without_a_calibration_the_build_says_how_to_make_one(base: BaseFiles, file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run `dreammix-trt calibrate .*model --out calibration\.json`, then build"):
        build(out=tmp_path / "e", base=base.folder, engine=EngineOptions(precision="fp8"))
    lacking = tmp_path / "lacking.json"
    replace(Calibration.read(file), sources={}).write(lacking)
    with pytest.raises(InputError, match=r"lacking\.json: holds nothing of unet, .*; run `dreammix-trt calibrate"):
        build(out=tmp_path / "e", base=base.folder, engine=EngineOptions(precision="fp8", calibration=lacking))
    other = open_tiny(tmp_path / "other", seed=1).folder
    with pytest.raises(InputError, match=r"whose weights are not those of .*; run `dreammix-trt calibrate"):
        build(out=tmp_path / "e", base=other, engine=EngineOptions(precision="fp8", calibration=file))


def test_layers_without_an_error_are_told(
    base: BaseFiles, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    order = BuildOrder(
        tmp_path / "e", BaseSources(base.folder), engine=EngineOptions(precision="fp8", calibration=file)
    )
    assert find_calibration(order, base) is not None and caplog.text == ""
    whole, begun = Calibration.read(file), tmp_path / "begun.json"
    name = next(name for name, layer in whole.layers["unet"].items() if layer.error is not None)
    whole.weigh("unet", {name: None}).write(begun)
    find_calibration(replace(order, engine=EngineOptions(precision="fp8", calibration=begun)), base)
    total = len(whole.layers["unet"])
    assert f"the errors of 1 of {total} layers were never measured (ranges are from 2 requests)" in caplog.text
    assert f"--out {begun}`" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"unet_precision": "bfloat16"}, "goes with TensorRT and precision float16 alone, not onnxruntime and float32"),
        ({"calibration": Path("nowhere.json")}, "only precision fp8 uses one; it is float32"),
        ({"calibration": Path("nowhere.json"), "precision": "fp8"}, r"nowhere\.json: no such calibration"),
        ({"precision": "fp4"}, "precision is 'fp4'; allowed: float32, float16, fp8"),
    ],
)
def test_precisions_that_cannot_be_built_are_refused(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        EngineOptions(**given).check()


def test_a_gpu_without_e4m3_is_refused() -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(InputError, match="sm_86 cannot multiply E4M3 numbers; sm_89"):
        EngineOptions(precision="fp8", targets=("sm_89", "sm_86")).check()
    EngineOptions(precision="fp8", targets=("sm_89", "sm_120")).check()
    with pytest.raises(InputError, match="rtx4090"):
        EngineOptions(precision="fp8", targets=("rtx4090",)).check()
