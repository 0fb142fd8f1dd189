"""The file of a calibration: what it keeps, which layers stay float16, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dreammix_trt.core.calibration import BUDGET, MOST_HURT, Calibration, Layer
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.float8 import HEADROOM, LARGEST

LAYERS = {
    "conv_in": Layer(4.0, 1.0, None),
    "mid.proj_in": Layer(448.0, 0.5, 0.5e-5),
    "mid.proj_out": Layer(449.0, 0.25, 1e-5),
    "mid.ff": Layer(3.0, 1.0, 1.5e-5),
    "up.conv1": Layer(7.0, 2.0, 1e-3),
}


@pytest.fixture
def made() -> Calibration:
    return Calibration("a base", {"unet": "0" * 64}, ("first",), {"unet": LAYERS})


def test_what_is_read_is_what_was_written(made: Calibration, tmp_path: Path) -> None:
    made.write(tmp_path / "calibration.json")
    assert Calibration.read(tmp_path / "calibration.json") == made
    assert json.loads((tmp_path / "calibration.json").read_text())["kept_in_float16"] == {
        "unet": ["conv_in", "up.conv1"]
    }


def test_as_few_as_bring_the_sum_of_errors_down_stay_float16(made: Calibration) -> None:
    assert made.hurt("unet") == ("up.conv1",) and made.kept("unet") == ("conv_in", "up.conv1")
    assert made.weigh("unet", {"up.conv1": BUDGET - 3.1e-5}).hurt("unet") == ()
    assert made.weigh("unet", {"up.conv1": BUDGET - 2.9e-5}).hurt("unet") == ("up.conv1",)
    all_bad = made.weigh("unet", {f"mid.{name}": 2 * BUDGET for name in ("proj_in", "proj_out", "ff")})
    assert len(all_bad.hurt("unet")) == MOST_HURT * 4
    unmeasured = Calibration("b", {}, (), {"unet": {n: Layer(x.input, x.weight) for n, x in LAYERS.items()}})
    assert unmeasured.kept("unet") == ("conv_in",)


def test_scales_hold_the_largest_input_and_twice_the_largest_weight(made: Calibration) -> None:
    scales = made.scales("unet")
    assert scales.keys() == LAYERS.keys() - {"conv_in", "up.conv1"}
    assert scales["mid.proj_in"][0] == 1.0 and scales["mid.proj_out"][0] == 2.0
    for name, (_, of_weight) in scales.items():
        assert HEADROOM * LAYERS[name].weight / of_weight <= LARGEST


def test_a_run_raises_what_was_seen_and_is_remembered(made: Calibration) -> None:
    seen = made.see("second", {"unet": {"mid.ff": Layer(9.0, 1.0)}, "unet_raw": {"mid.ff": Layer(1.0, 1.0)}})
    seen = seen.see("third", {"unet": {"mid.ff": Layer(2.0, 1.0)}})
    assert seen.runs == ("first", "second", "third")
    assert seen.layers["unet"]["mid.ff"] == Layer(9.0, 1.0)
    assert seen.layers["unet_raw"]["mid.ff"].input == 1.0 and made.layers == {"unet": LAYERS}


def test_an_error_is_unknown_once_its_scale_is_another(made: Calibration) -> None:
    seen = made.see("more", {"unet": {"mid.proj_in": Layer(449.0, 0.5), "mid.proj_out": Layer(450.0, 0.25)}})
    assert seen.layers["unet"]["mid.proj_in"] == Layer(449.0, 0.5), "its scale doubled"
    assert seen.layers["unet"]["mid.proj_out"] == Layer(450.0, 0.25, 1e-5), "its scale stayed"
    assert made.unmeasured("unet") == () and seen.unmeasured("unet") == ("mid.proj_in",)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_not_written(made: Calibration, tmp_path: Path, value: float) -> None:
    made.write(tmp_path / "c.json")
    with pytest.raises(FileFormatError, match=r"not written: of mid\.ff in unet, error is (nan|inf)"):
        made.weigh("unet", {"mid.ff": value}).write(tmp_path / "c.json")
    assert Calibration.read(tmp_path / "c.json") == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, r"no calibration of schema 1, but 99; make it again with `dreammix-trt calibrate`"),
        ({"layers": {"unet": {"conv_in": {"input": -1.0, "weight": 1.0, "error": None}}}}, r"is damaged .*input is -1"),
        ({"layers": {"unet": {"conv_in": {"input": 1.0}}}}, r"is damaged \(KeyError\('error'\)\)"),
        ({"runs": None}, r"is damaged"),
    ],
)
def test_a_damaged_file_is_refused(made: Calibration, tmp_path: Path, change: dict, message: str) -> None:
    made.write(tmp_path / "c.json")
    record = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps(record | change))
    with pytest.raises(FileFormatError, match=message):
        Calibration.read(tmp_path / "c.json")
    (tmp_path / "c.json").write_text("no json")
    with pytest.raises(FileFormatError, match=r"c\.json"):
        Calibration.read(tmp_path / "c.json")
