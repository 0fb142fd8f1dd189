"""The host's steps and painters, driven by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dreammix_trt.core.noise import NoiseProvider
from dreammix_trt.core.schedule import Schedule, Step
from dreammix_trt.engine.host.denoiser import Denoiser
from dreammix_trt.engine.host.painter import HostPainter
from dreammix_trt.engine.host.sampling import StageInputs, Taken, take_step
from dreammix_trt.engine.painting import paint


def sample(
    schedule: Schedule,
    denoiser: Denoiser,
    noises: Sequence[NoiseProvider],
    stage: StageInputs,
    hand_over: Callable[[Step, np.ndarray], StageInputs],
) -> Iterator[Taken]:
    """Every row of a schedule, with a hand-over of the test's own."""
    before: Taken | None = None
    for step in schedule:
        if step.index == schedule.hand_over_index and before is not None:
            stage, before = hand_over(step, before.x0), None
        before = take_step(step, stage, before, denoiser, noises, schedule.blends_output)
        yield before


def paint_all(painter: HostPainter) -> tuple[list[Taken], np.ndarray]:
    """What each step took, and the finished picture."""
    taken, painting = [], paint(painter)
    while True:
        try:
            taken.append(next(painting).taken)
        except StopIteration as end:
            return taken, end.value[0]
