"""How a picture is painted, on the host as on a device.

    start -> step, step, ... -> hand over -> step, step, ... -> finish

A `Painter` carries out these phases for one batch. The host's (engine/host) paints one picture, a device's
(engine/device) one or several of equal shape. docs/algorithm.md says what happens in a phase. The rows of the schedule
hold everything that depends on the step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import NotFiniteError
from dreammix_trt.core.networks import kind_of, twin_name
from dreammix_trt.core.request import Prior, Request
from dreammix_trt.core.schedule import Schedule, Stage, Step

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
#: (picture's number, whether the whole canvas is wanted) -> the canvas with the frame pasted, uint8 (H, W, 3), or the
#: stage's frame alone, uint8 (h, w, 3). A call costs a VAE decoding.
Preview = Callable[[int, bool], U8]


class Painter(Protocol):
    """Carries out the phases of one batch. `paint` calls the phases in order, each once.

    When a network's values are not finite, its phase raises NotFiniteError, or `finish` does at the latest.
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
        """Begin the first stage: its frame, fill, encodings, condition, and noise on the background."""
        ...

    def step(self, step: Step) -> None:
        """Carry out one row of the schedule: blend, predict, guide, solve."""
        ...

    def hand_over(self, step: Step) -> None:
        """Go from the local to the global stage: decode, paste, encode, add noise.

        step: the one that runs next; it sets the level of the noise.
        """
        ...

    def finish(self) -> list[U8]:
        """Decode the last latent and paste it. Returns the finished pictures, uint8 (H, W, 3) each."""
        ...

    def open_preview(self) -> Preview:
        """A function that shows a picture's present prediction. On a device it works until the next step."""
        ...


@dataclass(frozen=True)
class Progress:
    """A batch has taken a step (on a device: has enqueued it).

    preview: see `Painter.open_preview`.
    taken: the step's latents, where they are at hand (on the host: `engine.host.sampling.Taken`).
    """

    step: Step
    preview: Preview
    taken: Any = None


Steps = Generator[Progress, None, list[U8]]


def paint(painter: Painter) -> Steps:
    """Take a batch through its schedule, yielding after each step.

    Where the sharp local result will be kept, the local stage goes on to sigma 0 before the hand-over. A prediction
    from the middle of the schedule still has the haze of its noise, which otherwise the global stage removes. These
    extra steps are not yielded.

    Leaving the generator stops the work. Returns the finished pictures.
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
    """Paint a batch; where a network's values were not finite, paint it once more with the available float32 twins.

    open_painter: makes a painter of the batch; with True, one that uses the twins.
    has_network: whether there is a network of a name.

    The second attempt yields its last progress alone, so that whoever counts comes to the end. Raises NotFiniteError
    where the network has no twin, or the values are again not finite.
    """
    try:
        return (yield from paint(open_painter(False)))
    except NotFiniteError as error:
        name = error.network
        if not has_network(twin_name(name)):
            raise NotFiniteError(
                describe_overflow(name, "and there is no float32 twin to use instead"), name
            ) from error
        logging.getLogger(__name__).warning("%s; painting again in float32", describe_overflow(name, "in float16"))
    try:
        pictures, last = _run_to_end(paint(open_painter(True)))
    except NotFiniteError as error:
        text = describe_overflow(error.network, "again, with the twins there are in float32")
        raise NotFiniteError(text, error.network) from error
    if last is not None:
        yield last
    return pictures


def run_safely(run: Callable[[bool], F32], has_network: Callable[[str], bool], when: str) -> F32:
    """Run networks outside of requests; where values were not finite, once more with the available float32 twins.

    run: with True, with the twins.
    when: continues the sentence of an error, for example "while enrolling".

    Raises NotFiniteError where the network has no twin, or the values are again not finite.
    """
    try:
        return run(False)
    except NotFiniteError as error:
        if not has_network(twin_name(error.network)):
            raise NotFiniteError(describe_overflow(error.network, when), error.network) from error
    try:
        return run(True)
    except NotFiniteError as error:
        text = describe_overflow(error.network, f"{when}, with the twins there are in float32")
        raise NotFiniteError(text, error.network) from error


def check_finite(network: str, outputs: Mapping[str, npt.NDArray[Any]]) -> None:
    """Raise NotFiniteError naming the network whose outputs are not all finite."""
    if not all(np.isfinite(values).all() for values in outputs.values()):
        raise NotFiniteError(f"{network} gave values that are not numbers", network)


def _run_to_end(steps: Steps) -> tuple[list[U8], Progress | None]:
    """Run the steps; returns the pictures and the progress after the last step."""
    last: Progress | None = None
    while True:
        try:
            last = next(steps)
        except StopIteration as end:
            pictures: list[U8] = end.value
            return pictures, last


def prior_in(stage: Stage, request: Request, schedule: Schedule) -> Prior | None:
    """What ASUKA's prior is to a stage's condition; None: no part of it. Beside the text it is in the last alone."""
    return request.prior if request.prior != "concat" or stage == schedule[-1].stage else None


def describe_overflow(network: str, how: str) -> str:
    """The message for a network whose values are not finite.

    how: continues the sentence, for example "in float16".
    """
    call, remedy = kind_of(network).call, "lower guidance_scale or the subject's scale"
    if kind_of(network).group == "asuka":  # the prior sees no latent, so guidance changes nothing there
        another = "build with another ASUKA folder (`--asuka`)"
        remedy = f"{remedy}, or {another}" if call == "vae" else another
    elif call == "vae":
        remedy += ", or build with a VAE that stays within float16 (`--vae`)"
    elif call == "step":
        remedy += (
            "; where the UNet is float16, build it in bfloat16, which reaches as far as float32 (`dreammix-trt build "
            "--unet-precision bfloat16`)"
        )
    elif call == "subject":  # before any request
        remedy = "build with another token adapter (`--tokens`)"
    elif call in ("prompt", "stage"):  # before any guidance, and what they give is float16 whatever the UNet is
        remedy = "lower the subject's scale"
    return f"{network} gave values that are not numbers {how}: {remedy}"


def batch_by_shape(shapes: Sequence[object], most: int, roles: Sequence[object]) -> Iterator[list[int]]:
    """Group pictures into batches: at most `most` of equal shape and role, in order of the first of each.

    shapes: of each picture; pictures of equal shape can share a batch.
    roles: of each picture. Roles run one after the other, so that the weights of each are merged once.

    Yields the numbers of a batch's pictures.
    """
    for role in dict.fromkeys(roles):
        waiting = [number for number, other in enumerate(roles) if other == role]
        while waiting:
            batch = [number for number in waiting if shapes[number] == shapes[waiting[0]]][:most]
            waiting = [number for number in waiting if number not in batch]
            yield batch
