"""The sampling loop: a schedule's rows, one after the other; between the stages one hand-over.

golden/README.md steps 10 to 12. Everything that depends on the step stands in its row; everything that depends on the
stage stands in a `Stage`; the loop itself decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.noise import NoiseProvider
from dreammix_trt.core.schedule import Draw, Schedule, Step
from dreammix_trt.engine import kernels
from dreammix_trt.engine.host.denoiser import Conditioning, Denoiser

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Stage:
    """What a stage works with: N pictures of one latent size.

    latent: (N, 4, h, w) that the stage starts from. background: (N, 4, h, w) around the mask. mask: (N, 1, h, w), 1
    where it is repainted.
    """

    latent: F32
    background: F32
    mask: F32
    conditioning: Conditioning


@dataclass(frozen=True)
class Taken:
    """One step done: the blended latent it began with, the guided prediction x0, the latent after it; (N, 4, h, w).

    The latent after the last step is the result: x0 itself, or what the sampler "lcm" makes of it.
    """

    step: Step
    x_in: F32
    x0: F32
    x: F32


HandOver = Callable[[Step, F32], Stage]


def sample(
    schedule: Schedule, denoiser: Denoiser, noises: Sequence[NoiseProvider], stage: Stage, hand_over: HandOver
) -> Iterator[Taken]:
    """Run the schedule, yielding after each step; the last x is the result.

    noises: one provider a picture. hand_over: from the step about to run and the last x0 to the next stage; the noisy
    latent and the solver's history are dropped there. Leaving the iterator stops the work.
    """
    settle = _background_kept if schedule.blends_output else _as_it_is
    x, x0 = stage.latent, None
    for step in schedule:
        if step.index == schedule.hand_over_index and x0 is not None:
            stage = hand_over(step, x0)
            x, x0 = stage.latent, None
        rows = stage.conditioning.rows_per_picture
        noise = draw_all(noises, step.blend_draw, x.shape)
        x_in, doubled = kernels.blend_scale(x, stage.background, stage.mask, noise, step.sigma)
        eps = denoiser(np.ascontiguousarray(doubled[2 - rows :: 3 - rows]), step, stage.conditioning)
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
        x, x0 = settle(step, stage, x, x0)
        if not np.isfinite(x0).all():
            raise InputError(
                f"step {step.index} gave values that are not numbers: lower guidance_scale or the subject's scale"
            )
        yield Taken(step, x_in, x0, x)


def draw_all(noises: Sequence[NoiseProvider], draw: Draw | None, shape: Sequence[int]) -> F32:
    """The draw of every picture, float32 (N, 4, h, w) = `shape`; zeros where the step draws nothing."""
    if draw is None:
        return np.zeros(tuple(shape), np.float32)
    one = (1, *shape[1:])
    drawn = [noise.draw(draw[0], one, draw[1]) for noise in noises]
    return drawn[0] if len(drawn) == 1 else np.concatenate(drawn)


def _as_it_is(step: Step, stage: Stage, x: F32, x0: F32) -> tuple[F32, F32]:
    return x, x0


def _background_kept(step: Step, stage: Stage, x: F32, x0: F32) -> tuple[F32, F32]:
    """Fooocus' blend of the prediction: the step is linear in x0, so its change is carried over to x."""
    change: F32 = (stage.background - x0) * (np.float32(1) - stage.mask)
    carried: F32 = np.float32(step.c_x0 + step.c_dx0) * change
    return x + carried, x0 + change
