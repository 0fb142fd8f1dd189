"""All decisions of the sampling loop that depend on the step index, computed up front as a table of frozen rows.

The tables are the reference's (docs/algorithm.md, 6): Karras sigmas and their timesteps, the UNet of each step, the
size-conditioning trick, and DPM-Solver++(2M) SDE (midpoint, eta 1) as coefficients

    x_next = c_x x + c_x0 x0 + c_dx0 (x0 - x0_previous) + c_noise n.

Few-step bases are sampled as they were distilled, on training steps: Euler with trailing spacing (Lin et al.
2305.08891, table 2) or a latent consistency model's multistep sampling (Luo et al. 2310.04378), in the same form.
Everywhere x = x0 + sigma n; a variance-preserving latent is x / sqrt(1 + sigma^2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.request import LCM_STEPS, Request, Sampler

F32 = npt.NDArray[np.float32]
Stage = Literal["lcg", "gch"]
STAGES: tuple[Stage, ...] = ("lcg", "gch")  # local content generation, global context harmonisation
Draw = tuple[str, int]
Coefficients = tuple[float, float, float, float]

SIGMA_MAX, SIGMA_MIN, RHO = 14.6146, 0.0292, 7.0
TRAINING_STEPS = 1000
LCM_TIMESTEP_SCALING, LCM_SIGMA_DATA = 10.0, 0.5


@dataclass(frozen=True)
class Step:
    """One row of the schedule.

    network: the UNet of this step.
    sigma, sigma_next: the noise level before and after the step.
    timestep: what the UNet is given for sigma.
    size_scale_positive, size_scale_negative: factors on the size that the UNet is given.
    blur_alpha: weight of blur guidance.
    c_x, c_x0, c_dx0, c_noise: the solver's coefficients, see the module.
    blend_draw: noise label and step to draw for the blended background.
    solver_draw: the same for the solver. None where the solver adds no noise: in every step of "euler", and in the last
        step, which returns x0 (with "lcm" its consistency function).
    """

    index: int
    stage: Stage
    network: Literal["unet", "unet_raw"]
    sigma: float
    sigma_next: float
    timestep: float
    size_scale_positive: float
    size_scale_negative: float
    guidance_scale: float
    guidance_rescale: float
    blur_alpha: float
    c_x: float
    c_x0: float
    c_dx0: float
    c_noise: float
    blend_draw: Draw
    solver_draw: Draw | None


@dataclass(frozen=True)
class Schedule:
    """The rows of one request, in order.

    start_scale: factor of init_noise in the first latent.
    fills: whether the hole is filled before the first stage.
    blends_output: whether the background is also blended into each prediction.
    """

    steps: tuple[Step, ...]
    start_scale: float
    fills: bool
    blends_output: bool

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __getitem__(self, index: int) -> Step:
        return self.steps[index]

    @property
    def hand_over_index(self) -> int | None:
        """The index of the first global step after local ones; None when one stage has all the steps."""
        stages = [step.stage for step in self.steps]
        return stages.index("gch") if stages[0] == "lcg" and "gch" in stages else None

    @property
    def sigmas(self) -> F32:
        """The noise levels, float32 (N + 1,); the last one is 0."""
        return np.array([*(step.sigma for step in self.steps), self.steps[-1].sigma_next], np.float32)

    @property
    def timesteps(self) -> F32:
        """The timesteps, float32 (N,)."""
        return np.array([step.timestep for step in self.steps], np.float32)

    def __str__(self) -> str:
        head = "step stage network    sigma     t  size+ size-  blur       c_x      c_x0     c_dx0   c_noise"
        return "\n".join([head, *(_format_step(step) for step in self.steps)])


def _format_step(s: Step) -> str:
    return (
        f"{s.index:4d} {s.stage:<5} {s.network:<8} {s.sigma:8.4f} {s.timestep:5.0f} {s.size_scale_positive:6.2f}"
        f" {s.size_scale_negative:5.2f} {s.blur_alpha:.1e} {s.c_x:8.5f}  {s.c_x0:8.5f}"
        f"  {s.c_dx0:8.5f}  {s.c_noise:8.5f}"
    )


def time_ids(step: Step, size: tuple[int, int], target: int) -> F32:
    """The sizes that SDXL is given, float32 (2, 6), the negative row first: (h s, w s, 0, 0, target, target).

    step: has s, the factor of the size trick, for each row.
    size: (h, w) in pixels of the first stage's frame.
    target: the base's native side in pixels.
    """
    scales = step.size_scale_negative, step.size_scale_positive
    return np.array([(size[0] * s, size[1] * s, 0, 0, target, target) for s in scales], np.float32)


def make_schedule(request: Request, raw_unet: bool = True) -> Schedule:
    """Make the table of a request.

    request: with lcg_steps 0 every step is global, with lcg_steps = steps every step is local.
    raw_unet: whether the base has a UNet without the inpaint patch. If not, every step runs on "unet" (a 9-channel base
        inpaints in all its steps) and patched_fraction is ignored.
    """
    count, local = request.steps, request.local_steps
    sigmas, timesteps = noise_levels(request.sampler, count)
    share = request.patched_fraction if raw_unet else 1
    patched = int(count * share * request.strength) if share < 1 else count
    scaled = int(count * request.size_guidance_end)
    rows = []
    for i in range(count):
        sigma, following, timestep = sigmas[i], sigmas[i + 1], timesteps[i]
        previous = None if i in (0, local) else sigmas[i - 1]
        c_x, c_x0, c_dx0, c_noise = coefficients(request.sampler, timestep, sigma, following, previous)
        blended = i if request.blend_noise == "fresh" else 0
        trick = i <= scaled
        rows.append(
            Step(
                index=i,
                stage="lcg" if i < local else "gch",
                network="unet" if i <= patched else "unet_raw",
                sigma=sigma,
                sigma_next=following,
                timestep=timestep,
                size_scale_positive=request.size_guidance_positive if trick else 1.0,
                size_scale_negative=request.size_guidance_negative if trick else 1.0,
                guidance_scale=request.guidance_scale,
                guidance_rescale=request.guidance_rescale,
                blur_alpha=0.001 * request.sharpness * (1 - timestep / 999),
                c_x=c_x,
                c_x0=c_x0,
                c_dx0=c_dx0,
                c_noise=c_noise,
                blend_draw=(f"blend_noise_step{blended:02d}", blended),
                solver_draw=(f"solver_noise_step{i:02d}", i) if c_noise else None,
            )
        )
    first = sigmas[0]
    unit_variance = request.strength > 0.9999 and request.sampler != "euler"  # trailing spacing starts at sigma itself
    start = math.sqrt(1 + first * first) if unit_variance else first
    return Schedule(tuple(rows), start, request.strength > 0.99, request.blend_output)


def noise_levels(sampler: Sampler, count: int) -> tuple[list[float], list[float]]:
    """The noise levels (count + 1, the last one 0) and timesteps (count) of a sampler.

    count: 1..1000; for "lcm" 1..50.
    """
    if sampler == "dpmpp_2m_sde":
        sigmas = [float(sigma) for sigma in karras_sigmas(count)]
        return sigmas, [timestep_of(sigma) for sigma in sigmas[:-1]]
    steps = lcm_timesteps(count) if sampler == "lcm" else trailing_timesteps(count)
    return [*(float(model_sigmas()[step]) for step in steps), 0.0], [float(step) for step in steps]


def coefficients(
    sampler: Sampler, timestep: float, sigma: float, following: float, previous: float | None
) -> Coefficients:
    """The coefficients (c_x, c_x0, c_dx0, c_noise) of one step.

    timestep: of the step.
    sigma, following: the noise levels before and after the step.
    previous: the noise level of the step before; None: no history.
    """
    if sampler == "euler":
        return following / sigma, 1 - following / sigma, 0.0, 0.0
    if sampler == "lcm":
        return lcm_coefficients(timestep, sigma, following)
    return solver_coefficients(sigma, following, previous)


def lcm_coefficients(timestep: float, sigma: float, following: float) -> Coefficients:
    """(c_x, c_x0, c_dx0, c_noise): the consistency function at `timestep`, plus noise of the level `following`.

    The function is c_skip x / sqrt(1 + sigma^2) + c_out x0 with the boundary scalings of Luo et al. 2310.04378. As in
    the published models timestep_scaling is 10 and sigma_data 0.5.
    """
    scaled = timestep * LCM_TIMESTEP_SCALING
    total = scaled * scaled + LCM_SIGMA_DATA * LCM_SIGMA_DATA
    c_skip, c_out = LCM_SIGMA_DATA * LCM_SIGMA_DATA / total, scaled / math.sqrt(total)
    return c_skip / math.sqrt(1 + sigma * sigma), c_out, 0.0, following


def solver_coefficients(sigma: float, following: float, previous: float | None) -> Coefficients:
    """(c_x, c_x0, c_dx0, c_noise) of the step from `sigma` to `following`; `previous` None: no history.

    DPM-Solver++(2M) SDE, midpoint, eta 1 (Lu et al. 2211.01095), see docs/algorithm.md, 6.4.
    """
    if following == 0:
        return 0.0, 1.0, 0.0, 0.0
    h = math.log(sigma / following)
    gain = -math.expm1(-2 * h)
    history = 0.0 if previous is None else 0.5 * gain * h / math.log(previous / sigma)
    return following / sigma * math.exp(-h), gain, history, following * math.sqrt(gain)


def karras_sigmas(count: int) -> F32:
    """`count` Karras noise levels (rho 7, 14.6146 .. 0.0292) and a 0, float32 (count + 1,).

    The single-precision ramp is filled from both ends with one rounding per entry, so that every entry equals the
    recorded tables bit for bit.
    """
    one = np.float32(1)
    width = float(one / np.float32(count - 1)) if count > 1 else 0.0
    place = np.arange(count, dtype=np.float64)
    ramp = np.where(place < count // 2, place * width, 1 - (count - 1 - place) * width).astype(np.float32)
    if count == 1:
        ramp[:] = 0
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    base = np.float32(high) + ramp * np.float32(low - high)
    return np.append((base.astype(np.float64) ** RHO).astype(np.float32), np.float32(0))


def trailing_timesteps(count: int) -> list[int]:
    """`count` (1..1000) training steps, evenly spaced down from the last one, 999. Halves are rounded to even."""
    return [round(TRAINING_STEPS * (count - i) / count) - 1 for i in range(count)]


def lcm_timesteps(count: int) -> list[int]:
    """`count` (1..50) of the 50 training steps 999, 979, .. 19 on which consistency models are distilled."""
    stride = TRAINING_STEPS // LCM_STEPS
    return [(LCM_STEPS - i * LCM_STEPS // count) * stride - 1 for i in range(count)]


@cache
def model_sigmas() -> F32:
    """The noise levels of SDXL's training, float32 (1000,): scaled-linear betas .00085 .. .012."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, TRAINING_STEPS) ** 2
    kept = np.cumprod(1 - betas).astype(np.float32)
    sigmas: F32 = np.sqrt((np.float32(1) - kept) / kept)
    sigmas.setflags(write=False)
    return sigmas


def timestep_of(sigma: float) -> float:
    """The training step whose logarithmic noise level is nearest to that of `sigma`."""
    return float(np.abs(_log_model_sigmas() - math.log(sigma)).argmin())


@cache
def _log_model_sigmas() -> npt.NDArray[np.float64]:
    return np.log(model_sigmas().astype(np.float64))
