"""The schedule decides by step index alone; tables equal the recorded ones to the bit."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreammix_trt.core.request import Request
from dreammix_trt.core.schedule import karras_sigmas, make_schedule, model_sigmas, solver_coefficients, timestep_of


def test_tables_equal_the_recorded_ones(golden: Path) -> None:
    with np.load(golden / "units.npz") as file:
        units = {name: file[name] for name in file.files if name.startswith(("sigma", "timestep", "fooocus", "adm"))}
    for row, count in enumerate(int(n) for n in units["sigma_steps"]):
        schedule = make_schedule(Request("", num_inference_steps=count))
        np.testing.assert_array_equal(schedule.sigmas, units["sigma_table"][row, : count + 1])
        np.testing.assert_array_equal(schedule.timesteps, units["timestep_table"][row, :count])
        for share, wanted in zip(units["fooocus_time_values"], units["fooocus_step_count"][row], strict=True):
            steps = make_schedule(Request("", num_inference_steps=count, patched_fraction=float(share)))
            assert sum(step.network == "unet" for step in steps) == wanted
        for end, wanted in zip(units["adm_end_values"], units["adm_scaled_step_count"][row], strict=True):
            steps = make_schedule(Request("", num_inference_steps=count, size_guidance_end=float(end)))
            assert sum(step.size_scale_negative != 1 for step in steps) == wanted
    assert [timestep_of(float(sigma)) for sigma in units["sigma_to_t_in"]] == units["sigma_to_t_out"].tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 30, 1000])
def test_sigmas_fall_from_the_highest_to_nothing(count: int) -> None:
    sigmas = karras_sigmas(count)
    assert sigmas.dtype == np.float32
    assert len(sigmas) == count + 1
    assert sigmas[0] == pytest.approx(14.6146, rel=1e-6)
    assert sigmas[-1] == 0
    assert (np.diff(sigmas) < 0).all()
    if count > 1:
        assert sigmas[-2] == pytest.approx(0.0292, rel=1e-5)


def test_the_training_noise_levels_cannot_be_changed() -> None:
    assert timestep_of(float(model_sigmas()[417])) == 417
    with pytest.raises(ValueError, match="read-only"):
        model_sigmas()[0] = 1


@given(st.floats(0.03, 14), st.floats(0.1, 0.99), st.floats(1.01, 3))
def test_the_solver_keeps_a_prediction_that_is_right(sigma: float, fall: float, rise: float) -> None:
    """A latent that already is its steady prediction stays: the coefficients of x and x0 sum to 1."""
    c_x, c_x0, c_dx0, c_noise = solver_coefficients(sigma, sigma * fall, sigma * rise)
    assert c_x + c_x0 == pytest.approx(1)
    assert c_dx0 == pytest.approx(0.5 * (1 - fall**2) * -math.log(fall) / math.log(rise))
    # variance: what is left of the old noise and what is drawn make up the new level
    assert (c_x * sigma) ** 2 + c_noise**2 == pytest.approx((sigma * fall) ** 2)
    assert solver_coefficients(sigma, 0.0, None) == (0.0, 1.0, 0.0, 0.0)


def test_two_stages_and_one() -> None:
    both = make_schedule(Request("", num_inference_steps=30))
    assert [step.stage for step in both] == ["lcg"] * 20 + ["gch"] * 10
    assert both.hand_over_index == 20
    assert [i for i, step in enumerate(both) if step.c_dx0 == 0] == [0, 20, 29]
    assert [i for i, step in enumerate(both) if step.solver_draw is None] == [29]
    for lcg_steps, stage in ((30, "lcg"), (0, "gch")):
        one = make_schedule(Request("", num_inference_steps=30, lcg_steps=lcg_steps))
        assert {step.stage for step in one} == {stage}
        assert one.hand_over_index is None
        assert [i for i, step in enumerate(one) if step.c_dx0 == 0] == [0, 29]


def test_patched_steps() -> None:
    def raw(**fields: object) -> int:
        steps = make_schedule(Request("", **fields))  # type: ignore[arg-type]
        return sum(step.network == "unet_raw" for step in steps)

    assert raw() == 5
    assert raw(num_inference_steps=20) == 3
    assert raw(patched_fraction=1) == 0
    assert raw(patched_fraction=1, strength=0.5) == 0
    assert raw(patched_fraction=0) == 29


def test_draws_are_named_as_recorded_ones() -> None:
    fresh = make_schedule(Request("", num_inference_steps=3))
    assert [step.blend_draw for step in fresh] == [(f"blend_noise_step{i:02d}", i) for i in range(3)]
    assert fresh[1].solver_draw == ("solver_noise_step01", 1)
    fixed = make_schedule(Request("", num_inference_steps=3, blend_noise="fixed"))
    assert {step.blend_draw for step in fixed} == {("blend_noise_step00", 0)}


def test_strength_shortens_and_leaves_out_the_fill() -> None:
    full, nearly, half = (make_schedule(Request("", strength=s)) for s in (1.0, 0.9999, 0.5))
    assert (len(full), len(nearly), len(half)) == (30, 29, 15)
    assert (full.fills, nearly.fills, half.fills) == (True, True, False)
    assert full.start_scale == pytest.approx(math.sqrt(1 + 14.6146**2))
    assert nearly.start_scale == half.start_scale == pytest.approx(14.6146)
    assert half[0].sigma == full[0].sigma


def test_equal_requests_have_equal_schedules_that_print() -> None:
    request = Request("a mug", sharpness=3, guidance_rescale=0.5)
    schedule = make_schedule(request)
    assert schedule == make_schedule(request.replace(prompt="another"))
    assert schedule != make_schedule(request.replace(sharpness=2))
    lines = str(schedule).splitlines()
    assert len(lines) == 31
    assert lines[1].split()[:3] == ["0", "lcg", "unet"]
    assert lines[30].split()[:3] == ["29", "gch", "unet_raw"]
