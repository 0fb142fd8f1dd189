"""What `DreamMix` needs from the runtime that carries requests out, on the host or on a device. Chosen at loading."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import EngineError, InputError
from dreammix_trt.core.noise import NoiseProvider
from dreammix_trt.core.request import Request
from dreammix_trt.core.schedule import Schedule
from dreammix_trt.core.seam import BaseFacts
from dreammix_trt.core.subject import Role, Subject
from dreammix_trt.core.token_adapter import TokenAdapter
from dreammix_trt.engine.canvas.frames import Canvas
from dreammix_trt.engine.canvas.geometry import Size
from dreammix_trt.engine.enrolment import Reference
from dreammix_trt.engine.painting import Progress
from dreammix_trt.engine.prompts import PromptPlan
from dreammix_trt.engine.text import Tokenizer

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Work:
    """One picture to paint, checked and prepared. None of it has run yet.

    subject: whose factors are used.
    noise: where its random numbers come from; None: the seed.
    prior_image: what ASUKA's prior sees in place of the picture, uint8 of the canvas' size; None: the picture.
    """

    canvas: Canvas
    request: Request
    schedule: Schedule
    seed: int
    subject: Role
    prompts: PromptPlan
    noise: NoiseProvider | None = None
    prior_image: U8 | None = None


@dataclass(frozen=True)
class Painted:
    """A finished picture.

    pixels: uint8 (H, W, 3).
    stages: named pictures of what each stage did, where they were asked for.
    """

    pixels: U8
    stages: Mapping[str, U8] = field(default_factory=dict)


Painting = Generator[Progress | list[Painted], None, None]


def find_subject(subjects: Mapping[str, Subject], role: Role) -> Subject:
    """The subject of a role, at its strength.

    subjects: those a runtime knows, by name.

    Raises EngineError for one that was removed after the request had been checked.
    """
    if role.name not in subjects:
        raise EngineError(f"subject {role.name!r} was removed before the request was painted: add it again")
    subject = subjects[role.name]
    return replace(subject, scale=subject.scale * role.scale)


def check_parts(request: Request, has: Callable[[str], bool]) -> None:
    """Raise InputError for a request that needs a part of ASUKA which the engine's base has not."""
    for name, wanted, field_name in (
        ("asuka_prior", request.prior is not None, "prior"),
        ("asuka_decoder", request.decoder == "asuka", "decoder"),
    ):
        if wanted and not has(name):
            raise InputError(
                f"{field_name} is {getattr(request, field_name)!r}, but this engine's base has no {name}: build it "
                "again with `--asuka FOLDER` (dreammix-trt train-asuka makes one)"
            )


class Runtime(Protocol):
    """Carries requests out, one batch at a time."""

    @property
    def facts(self) -> BaseFacts: ...

    @property
    def networks(self) -> Any:
        """The base's networks: `core.seam.Networks` on the host, `DeviceNetworks` on a device."""
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
    def contexts(self) -> Sequence[int] | None:
        """The lengths of the text condition that it takes; None: any. A range: those that it has memory for."""
        ...

    @property
    def has_raw_unet(self) -> bool:
        """Whether steps run on the unpatched UNet."""
        ...

    @property
    def lost_raw_unet(self) -> bool:
        """Whether the base has an unpatched UNet that the memory plan omits."""
        ...

    @property
    def adapter(self) -> TokenAdapter | None:
        """The base's token adapter; None: it has none."""
        ...

    def make_rows(self, references: Sequence[Reference], class_name: str, tokenizers: Sequence[Tokenizer]) -> F32:
        """Make the rows of a subject, float32 (tokens, context width). There is an adapter.

        references: its photographs.

        Raises InputError for a class that cannot be encoded, FileFormatError where the base has no slots for the
        adapter's factors, NotFiniteError.
        """
        ...

    def add_subject(self, name: str, subject: Subject) -> None:
        """Make a subject known. It replaces one of the same name.

        Raises FileFormatError when it does not fit the base; then nothing changes.
        """
        ...

    def remove_subject(self, name: str) -> None:
        """Forget a subject and free what it takes. Work that is under way has what it needs; later work is refused."""
        ...

    def check(self, work: Work) -> Hashable:
        """What pictures of one batch must share. Raises InputError for a picture that cannot be painted here."""
        ...

    def paint(self, batch: Sequence[Work], keep: Collection[int] = ()) -> Painting:
        """Paint pictures of equal `check`: a Progress after each step, last the finished pictures.

        keep: numbers of the pictures whose stages are wanted as well.

        Leaving the generator stops the work. Until then the last progress can be asked for previews. Raises
        NotFiniteError; on a device also OutOfMemoryError and DeviceError.
        """
        ...

    @property
    def timings(self) -> Mapping[str, float]:
        """Seconds of the last finished batch by phase."""
        ...

    def another(self) -> Runtime:
        """Make a second runtime over the same networks, with its own memory.

        Raises EngineError where that is not possible.
        """
        ...

    def close(self) -> None:
        """Release what it holds. Calling it again does nothing."""
        ...
