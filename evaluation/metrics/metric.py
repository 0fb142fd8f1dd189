"""What a metric is: a name, a unit, a direction; it is given pictures one by one and keeps sums alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.evaluation.protocol import Protocol, Subject

U8 = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Direction = Literal["higher", "lower", "zero"]


@dataclass(frozen=True)
class Sample:
    """One painted picture and what it may be compared with.

    image: the painted picture, uint8 (H, W, 3); where the scene is the truth, with the scene outside the mask.
    scene: the picture it was painted into, uint8 (H, W, 3).
    mask: what was to be painted, bool (H, W), True somewhere.
    prompt: the text, with the subject's token.
    task: "identity", "editing" or "removal".
    changed: what an edit changes: part -> word.
    reference: a picture to compare with as a whole, uint8 (H, W, 3); None: the scene, outside the mask.
    truth: what the picture should be everywhere, uint8 (H, W, 3); None: nobody knows. `hold_against_scene` sets it.
    """

    image: U8
    scene: U8
    mask: Mask
    subject: Subject
    prompt: str
    task: str
    changed: dict[str, str]
    reference: U8 | None = None
    truth: U8 | None = None

    def hold_against_scene(self) -> Sample:
        """This sample with the scene as its truth: the picture is the scene with the painted hole, and is compared as a
        whole, with the scene unless there is another reference."""
        image = np.where(self.mask[..., None], self.image, self.scene)
        return replace(
            self, image=image, reference=self.scene if self.reference is None else self.reference, truth=self.scene
        )

    @cached_property
    def region(self) -> Mask:
        """Where the picture is compared with `target`, bool (H, W)."""
        return ~self.mask if self.reference is None else np.ones(self.mask.shape, bool)

    @cached_property
    def target(self) -> U8:
        """What the picture is compared with, uint8 (H, W, 3)."""
        return self.scene if self.reference is None else self.reference

    @cached_property
    def compared(self) -> U8:
        """The picture where it is compared, and `target` elsewhere: what lies inside the mask counts nowhere."""
        return np.where(self.region[..., None], self.image, self.target)

    @cached_property
    def crop(self) -> U8:
        """The painted thing: `crop_thing` of the picture."""
        return crop_thing(self.image, self.mask)


class Metric:
    """One measure.

    name: as in tables.
    unit: of the values; "" for none.
    better: which values are; "zero": close to zero.
    about: one sentence.
    missing: why it is not measured; "": it is.
    """

    name: str
    unit: str = ""
    better: Direction = "higher"
    about: str = ""
    missing: str = ""

    def check(self, protocol: Protocol) -> None:
        """Raise InputError where the protocol asks for what cannot be measured. Called before anything is painted."""

    def add(self, sample: Sample) -> float | None:
        """Measure a picture. Returns its value; None: it has none of its own, or this does not apply to it."""
        return None

    def result(self, task: str) -> float | None:
        """What is known of all pictures of a task together; None: the mean of their own values."""
        return None


class NotMeasured(Metric):
    """Stands in a table for a metric that lacks something."""

    def __init__(self, kind: type[Metric], missing: str) -> None:
        self.name, self.unit, self.better, self.about = kind.name, kind.unit, kind.better, kind.about
        self.missing = missing


def crop_thing(image: U8, mask: Mask, grow: float = 0.02) -> U8:
    """The square around a mask and little more, uint8 (h, w, 3). It is moved into the picture where it leaves it; where
    it is larger than a side of the picture, that side is taken whole.

    mask: bool (H, W), True somewhere.
    grow: by which share of its side the square is larger than the mask.
    """
    spans = []
    for axis, length in enumerate(mask.shape):
        marked = np.flatnonzero(mask.any(1 - axis))
        spans.append((int(marked[0]), int(marked[-1]) + 1, length))
    side = max(round((stop - start) * (1 + grow)) for start, stop, _ in spans)
    cuts = []
    for start, stop, length in spans:
        first = min(max((start + stop - side) // 2, 0), max(length - side, 0))
        cuts.append(slice(first, min(first + side, length)))
    return np.ascontiguousarray(image[cuts[0], cuts[1]])


def read_references(subject: Subject) -> Sequence[U8]:
    """The subject in each of its photographs, cropped like a painted thing."""
    photographs = (file.read() for file in subject.photographs)
    return [crop_thing(each.image, each.subject) for each in photographs]
