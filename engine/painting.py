"""The one story: how a picture comes about, whoever carries it out.

    start -> step, step, ... -> hand over -> step, step, ... -> finish

A `Painter` carries the phases out for one batch: on the host (engine/host) one picture, on a device (engine/device) one
or several of equal shape. What happens in a phase is docs/algorithm.md; what decides it, step by step, stands in the
rows of the schedule.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import NotFiniteError
from dreammix_trt.core.networks import kind_of, twin_name
from dreammix_trt.core.schedule import Schedule, Step

U8 = npt.NDArray[np.uint8]


class Painter(Protocol):
    """Carries out the phases of one batch. The phases are called in the order of `paint`, each once.

    A network whose values are not finite raises NotFiniteError, in its phase or at the latest in `finish`.
    """

    @property
    def schedule(self) -> Schedule:
        """The rows that all pictures of the batch share."""
        ...

    @property
    def keeps_local(self) -> bool:
        """Whether the local stage's pictures are kept inside the mask (`Canvas.keeps_local`)."""
        ...

    def start(self) -> None:
        """The first stage: its frame, fill, encodings, condition, and noise on the background."""
        ...

    def step(self, step: Step) -> None:
        """One row of the schedule: blend, predict, guide, solve."""
        ...

    def hand_over(self, step: Step) -> None:
        """From the local to the global stage: decode, paste, encode, noise at the level of the step about to run."""
        ...

    def finish(self) -> list[U8]:
        """The finished pictures, uint8 (H, W, 3) each: the last latent decoded and pasted."""
        ...

    def open_preview(self) -> Callable[[int], U8]:
        """What shows picture k's present prediction as a picture of the stage's frame, uint8 (h, w, 3).

        It may cost a VAE decoding, and on a device it works until the next step.
        """
        ...


@dataclass(frozen=True)
class Progress:
    """A step of a batch is done (on a device: on its way). preview(k): see `Painter.open_preview`.

    taken: the step's latents, where they are at hand (on the host: `engine.host.sampling.Taken`).
    """

    step: Step
    preview: Callable[[int], U8]
    taken: Any = None


Steps = Generator[Progress, None, list[U8]]


def paint(painter: Painter) -> Steps:
    """Take a batch through its schedule, yielding after each step; returns the finished pictures.

    Where the sharp local result will be kept, the local stage goes on to sigma 0 before the hand-over: a prediction
    from the middle of the schedule still has the haze of the noise it was made from, which the global stage otherwise
    takes away. Those steps come on top and are not yielded. Leaving the generator stops the work.
    """
    schedule = painter.schedule
    painter.start()
    for step in schedule:
        if step.index == schedule.hand_over_index:
            if painter.keeps_local:
                for rest in schedule.steps[step.index :]:
                    painter.step(replace(rest, stage="lcg"))
            painter.hand_over(step)
        painter.step(step)
        yield Progress(step, painter.open_preview(), getattr(painter, "taken", None))
    return painter.finish()


def paint_safely(open_painter: Callable[[bool], Painter], has_network: Callable[[str], bool]) -> Steps:
    """Paint a batch; where a network's values were not finite, paint it once more with the float32 twins there are.

    open_painter: a painter of the batch, of the twins where it is given True. has_network: whether there is a network
    of a name. No progress is yielded of the second time. Raises NotFiniteError where the network has no twin, or the
    values are not finite again.
    """
    try:
        return (yield from paint(open_painter(False)))
    except NotFiniteError as error:
        name = error.network
        if not has_network(twin_name(name)):
            raise NotFiniteError(
                describe_overflow(name, "and there is no float32 twin to take instead"), name
            ) from error
        logging.getLogger(__name__).warning("%s; painting again in float32", describe_overflow(name, "in float16"))
    try:
        return exhaust(paint(open_painter(True)))
    except NotFiniteError as error:
        text = describe_overflow(error.network, "again, with the twins there are in float32")
        raise NotFiniteError(text, error.network) from error


def exhaust(steps: Steps) -> list[U8]:
    """Run the steps to their end; gives the pictures."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            pictures: list[U8] = end.value
            return pictures


def describe_overflow(network: str, how: str) -> str:
    """The message for a network whose values are not finite."""
    remedy = "lower guidance_scale or the subject's scale"
    if kind_of(network).call == "vae":
        remedy += ", or build with a VAE that stays within float16 (`--vae`)"
    return f"{network} gave values that are not numbers {how}: {remedy}"


def batch_by_shape(shapes: Sequence[object], most: int) -> Iterator[list[int]]:
    """Numbers of pictures that can share a batch: at most `most` of equal shape, in order of their first."""
    waiting = list(range(len(shapes)))
    while waiting:
        batch = [number for number in waiting if shapes[number] == shapes[waiting[0]]][:most]
        waiting = [number for number in waiting if number not in batch]
        yield batch
