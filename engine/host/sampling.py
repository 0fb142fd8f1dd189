"""One row of the schedule on the host (docs/algorithm.md, 7).

A row holds everything that depends on the step, `StageInputs` everything that depends on the stage. The step itself
decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import NotFiniteError
from dreammix_trt.core.noise import NoiseProvider
from dreammix_trt.core.schedule import Draw, Step
from dreammix_trt.engine import kernels
from dreammix_trt.engine.host.denoiser import Conditioning, Denoiser

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class StageInputs:
    """What a stage works with: N pictures of one latent size.

    latent: (N, 4, h, w) that the stage starts from.
    background: (N, 4, h, w) around the mask.
    mask: (N, 1, h, w), 1 where it is repainted.
    """

    latent: F32
    background: F32
    mask: F32
    conditioning: Conditioning


@dataclass(frozen=True)
class Taken:
    """A step that was taken. All latents are (N, 4, h, w).

    x_in: the blended latent that it began with.
    x0: the guided prediction.
    x: the latent after it. After the last step that is the result: x0 itself, or what the sampler "lcm" makes of it.
    stage: the stage in which it was taken.
    """

    step: Step
    x_in: F32
    x0: F32
    x: F32
    stage: StageInputs


def take_step(
    step: Step,
    stage: StageInputs,
    before: Taken | None,
    denoiser: Denoiser,
    noises: Sequence[NoiseProvider],
    keeps: bool,
) -> Taken:
    """Blend, predict, guide, solve.

    before: the previous step of this stage; None for the first, which starts from the stage's latent and has no
        history.
    noises: one provider for each picture.
    keeps: whether the background is also blended into the prediction (`Schedule.blends_output`).

    Raises NotFiniteError where the prediction is not finite.
    """
    x, x0 = (stage.latent, None) if before is None else (before.x, before.x0)
    rows = stage.conditioning.rows_per_picture
    noise = draw_all(noises, step.blend_draw, x.shape)
    x_in, doubled = kernels.blend_scale(x, stage.background, stage.mask, noise, step.sigma)
    chosen = doubled[2 - rows :: 3 - rows]  # all rows, or without guidance the positive ones alone
    eps = denoiser(np.ascontiguousarray(chosen), step, stage.conditioning)
    x, x0 = kernels.guided_step(
        x_in,
        eps,
        x0,
        draw_all(noises, step.solver_draw, x.shape),
        sigma=step.sigma,
        guidance_scale=step.guidance_scale,
        blur_alpha=step.blur_alpha,
        c_x=step.c_x,
        c_x0=step.c_x0,
        c_dx0=step.c_dx0,
        c_noise=step.c_noise,
        guidance_rescale=step.guidance_rescale,
        rows_per_picture=rows,
    )
    if keeps:
        x, x0 = _keep_background(step, stage, x, x0)
    if not np.isfinite(x0).all():
        raise NotFiniteError(f"step {step.index} gave values that are not numbers", step.network)
    return Taken(step, x_in, x0, x, stage)


def draw_all(noises: Sequence[NoiseProvider], draw: Draw | None, shape: Sequence[int]) -> F32:
    """Draw the noise of every picture, float32 (N, 4, h, w) = `shape`; zeros where the step draws nothing."""
    if draw is None:
        return np.zeros(tuple(shape), np.float32)
    one = (1, *shape[1:])
    drawn = [noise.draw(draw[0], one, draw[1]) for noise in noises]
    return drawn[0] if len(drawn) == 1 else np.concatenate(drawn)


def _keep_background(step: Step, stage: StageInputs, x: F32, x0: F32) -> tuple[F32, F32]:
    """Fooocus' blend of the prediction. The step is linear in x0, so the change of x0 is applied to x as well."""
    change: F32 = (stage.background - x0) * (np.float32(1) - stage.mask)
    carried: F32 = np.float32(step.c_x0 + step.c_dx0) * change
    return x + carried, x0 + change
