"""The schedule decides by step index alone; tables equal the recorded ones to the bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreammix_trt.core.request import LCM_STEPS, Request, Sampler
from dreammix_trt.core.schedule import (
    coefficients,
    karras_sigmas,
    lcm_timesteps,
    make_schedule,
    model_sigmas,
    solver_coefficients,
    timestep_of,
    trailing_timesteps,
)

SHAPE = (1, 4, 6, 5)
OLD_NUMPY = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
TRAINING = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


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
    # variance: the rest of the old noise and the drawn noise add up to the new level
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


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_few_steps_have_whole_tables(steps: int, sampler: Sampler) -> None:
    request = Request("", sampler=sampler, num_inference_steps=steps, guidance_scale=1)
    schedule = make_schedule(request)
    assert len(schedule) == steps
    assert (np.diff(schedule.sigmas) < 0).all() and schedule.sigmas[-1] == 0
    assert (np.diff(schedule.timesteps) < 0).all() and schedule.timesteps[0] == 999
    assert schedule.hand_over_index == (request.local_steps if steps > 1 else None)
    patched = [1, 2, 3, 4, 5, 5, 6, 7][steps - 1]
    assert [step.network for step in schedule] == ["unet"] * patched + ["unet_raw"] * (steps - patched)
    assert schedule[-1].solver_draw is None
    wanted = [] if sampler == "euler" else [(f"solver_noise_step{i:02d}", i) for i in range(steps - 1)]
    assert [step.solver_draw for step in schedule if step.solver_draw] == wanted
    assert [step.blend_draw for step in schedule] == [(f"blend_noise_step{i:02d}", i) for i in range(steps)]


def test_a_base_without_a_raw_unet_never_names_it() -> None:
    for fields in ({}, {"patched_fraction": 0.0}, {"strength": 0.4}, {"sampler": "lcm", "num_inference_steps": 8}):
        request = Request("", **fields)  # type: ignore[arg-type]
        alone, both = make_schedule(request, raw_unet=False), make_schedule(request)
        assert {step.network for step in alone} == {"unet"}
        assert {step.network for step in both} == {"unet", "unet_raw"}
        assert alone == make_schedule(request.replace(patched_fraction=1))


@pytest.mark.parametrize("sampler", ["euler", "lcm"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_strength_shortens_few_steps_too(sampler: Sampler, strength: float) -> None:
    schedule = make_schedule(Request("", sampler=sampler, num_inference_steps=8, strength=strength))
    fewer = make_schedule(Request("", sampler=sampler, num_inference_steps=int(8 * strength)))
    assert schedule.timesteps.tolist() == fewer.timesteps.tolist()
    assert schedule.fills == (strength == 1)
    unit = sampler == "lcm" and strength == 1
    assert schedule.start_scale == pytest.approx(math.sqrt(14.61464**2 + unit), rel=1e-5)


@given(st.sampled_from(["euler", "lcm"]), st.floats(19, 999), st.floats(0.03, 14), st.floats(0, 0.99))
def test_few_step_rows_keep_a_prediction_that_is_right(
    sampler: Sampler, timestep: float, sigma: float, fall: float
) -> None:
    c_x, c_x0, c_dx0, c_noise = coefficients(sampler, timestep, sigma, sigma * fall, None)
    assert c_dx0 == 0
    assert c_x + c_x0 == pytest.approx(1, abs=1e-5)
    assert (c_x * sigma) ** 2 + c_noise**2 == pytest.approx((sigma * fall) ** 2, rel=1e-6, abs=1e-9)


def analytic(x: Any, sigma: float) -> Any:
    """The exact noise prediction for x = x0 + sigma n, where x0 has mean 0.3 and deviation 0.7."""
    return sigma * (x - 0.3) / (sigma**2 + 0.49)


def run_rows(sampler: Sampler, steps: int, start: Any, noise: list[Any]) -> list[Any]:
    """Run our rows in double precision, with background 0 and everything masked. Returns the latent after each step."""
    schedule = make_schedule(Request("", sampler=sampler, num_inference_steps=steps, lcg_steps=steps))
    x, found = start * schedule.start_scale, []
    for step in schedule:
        x0 = x - step.sigma * analytic(x, step.sigma)
        x = step.c_x * x + step.c_x0 * x0 + (step.c_noise * noise[step.index] if step.solver_draw else 0)
        found.append(x)
    return found


@OLD_NUMPY
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 30])
@pytest.mark.parametrize("sampler", ["euler", "lcm"])
def test_few_step_rows_do_what_diffusers_schedulers_do(
    sampler: Sampler, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    rng = np.random.default_rng(steps)
    start, *noise = rng.standard_normal((steps + 1, *SHAPE))
    drawn = iter(noise)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: torch.from_numpy(next(drawn))
    )
    kind = diffusers.LCMScheduler if sampler == "lcm" else diffusers.EulerDiscreteScheduler
    scheduler = kind(**TRAINING) if sampler == "lcm" else kind(**TRAINING, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(start) * scheduler.init_noise_sigma
    ours = run_rows(sampler, steps, start, noise)
    for i, t in enumerate(scheduler.timesteps):
        kept = float(scheduler.alphas_cumprod[int(t)])
        sigma = math.sqrt((1 - kept) / kept)
        told = scheduler.scale_model_input(x, t)
        eps = analytic(told.double() * math.sqrt(1 + sigma**2), sigma)
        x = scheduler.step(eps, t, x, return_dict=False)[0]
        preserved = 1.0  # diffusers' LCM latents have unit variance, except the finished one
        if sampler == "lcm" and i + 1 < steps:
            preserved = 1 / math.sqrt(float(scheduler.alphas_cumprod[int(scheduler.timesteps[i + 1])]))
        wanted = x.double().numpy() * preserved
        assert np.abs(ours[i] - wanted).max() < 1e-5 * np.abs(wanted).max()


@OLD_NUMPY
def test_few_step_timesteps_and_scalings_are_those_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    euler = diffusers.EulerDiscreteScheduler(**TRAINING, timestep_spacing="trailing")
    lcm = diffusers.LCMScheduler(**TRAINING)
    for count in range(1, LCM_STEPS + 1):
        lcm.set_timesteps(count)
        assert lcm_timesteps(count) == lcm.timesteps.tolist()
        for t in lcm_timesteps(count):
            sigma = float(model_sigmas()[t])
            c_x, c_x0, _, c_noise = coefficients("lcm", t, sigma, 0.25 * sigma, None)
            scalings = (c_x * math.sqrt(1 + sigma**2), c_x0)
            assert scalings == pytest.approx(lcm.get_scalings_for_boundary_condition_discrete(t), rel=1e-12)
            assert c_noise == 0.25 * sigma
        if count != 48:  # there diffusers adds up 1000/48 and misses a half by 1e-13
            euler.set_timesteps(count)
            assert trailing_timesteps(count) == euler.timesteps.tolist()
    assert trailing_timesteps(1000) == list(range(999, -1, -1))
