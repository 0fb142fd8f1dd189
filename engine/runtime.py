"""What `DreamMix` asks of the side that carries requests out: the host, or a device. It is chosen once, at loading."""

from __future__ import annotations

from collections.abc import Collection, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.noise import NoiseProvider
from dreammix_trt.core.request import Request
from dreammix_trt.core.schedule import Schedule
from dreammix_trt.core.seam import BaseFacts
from dreammix_trt.core.subject import Subject
from dreammix_trt.engine.canvas.frames import Canvas
from dreammix_trt.engine.canvas.geometry import Size
from dreammix_trt.engine.painting import Progress
from dreammix_trt.engine.prompts import PromptPlan

U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Work:
    """One picture to paint, checked and laid out; nothing of it has run yet.

    subject: whose factors are used, "" for none. noise: where its random numbers come from; None: the seed.
    """

    canvas: Canvas
    request: Request
    schedule: Schedule
    seed: int
    subject: str
    prompts: PromptPlan
    noise: NoiseProvider | None = None


@dataclass(frozen=True)
class Painted:
    """A finished picture, uint8 (H, W, 3), and named pictures of what each stage did, where they were asked for."""

    pixels: U8
    stages: Mapping[str, U8] = field(default_factory=dict)


Painting = Generator[Progress | list[Painted], None, None]


class Runtime(Protocol):
    """Carries requests out, one batch at a time."""

    @property
    def facts(self) -> BaseFacts: ...

    @property
    def networks(self) -> Any:
        """The base's: `core.seam.Networks` on the host, `DeviceNetworks` on a device."""
        ...

    @property
    def most_pictures(self) -> int:
        """The largest batch."""
        ...

    @property
    def frames(self) -> Sequence[Size] | None:
        """The frame sizes (height, width) in pixels that it takes; None: any."""
        ...

    @property
    def has_raw_unet(self) -> bool:
        """Whether steps run on the unpatched UNet."""
        ...

    @property
    def lost_raw_unet(self) -> bool:
        """Whether the base has an unpatched UNet that the memory plan left out."""
        ...

    def add_subject(self, name: str, subject: Subject) -> None:
        """Make a subject known; one of the same name is replaced. Raises FileFormatError where it does not fit the
        base; then nothing changes."""
        ...

    def check(self, work: Work) -> Hashable:
        """What pictures of one batch must share. Raises InputError for a picture that cannot be painted here."""
        ...

    def paint(self, batch: Sequence[Work], keep: Collection[int] = ()) -> Painting:
        """Paint pictures of equal `check`: a Progress after each step, last the finished pictures.

        keep: the numbers of pictures whose stages are wanted, too. Leaving the generator stops the work; until it is
        left, the last progress can be asked for previews. Raises NotFiniteError; on a device OutOfMemoryError and
        DeviceError, too.
        """
        ...

    @property
    def timings(self) -> Mapping[str, float]:
        """Seconds of the last batch by phase, after it was finished."""
        ...

    def another(self) -> Runtime:
        """A second one over the same networks, with memory of its own. Raises EngineError where none can be had."""
        ...

    def close(self) -> None:
        """Release what it holds; again does nothing."""
        ...
