"""A subject's attributes in the embedded model's world, read off its photographs by the shipped judge."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.attributes import AttributeDictionary
from dreammix_trt.trainer.data import Photograph
from dreammix_trt.trainer.micro.captions import name_parts
from dreammix_trt.trainer.micro.judge import HEADS, Judge, Reading, crop_of_mask
from dreammix_trt.trainer.micro.objects import COLOURS, DECALS, PATTERNS, SHAPES, Attributes

log = logging.getLogger(__name__)

THRESHOLD: Final = 0.5
_ABSENT: Final = ("none", "unclear")
_CONTRASTS: Final = {"finish": ("matte", "shiny"), "colour": COLOURS, "pattern": PATTERNS}


class JudgeDescriber:
    """Reads the parts of a thing of the embedded model's world.

    threshold: 0..1, the mean probability over the photographs below which a part is left out. A decal that is surely
        there is named a sticker where no form reaches it.
    """

    def __init__(self, model_dir: str | Path, threshold: float = THRESHOLD) -> None:
        """model_dir: the embedded model's folder, which holds the judge."""
        self._judge, self._threshold = Judge.load(model_dir), threshold

    def describe(self, pictures: Sequence[Photograph], class_name: str) -> AttributeDictionary:
        """What the judge reads, averaged over the photographs. Anything that is no rendering is read as if it were one.

        pictures: with the masks of the subject.
        """
        heads, _ = self._judge.scores([crop_of_mask(picture.image, picture.subject) for picture in pictures])
        reading = {name: self._choose(name, scores) for name, scores in heads.items()}
        if reading["shape"] != class_name:
            log.warning(
                "the judge sees %s, not a %s; it knows the embedded model's world alone (%s)",
                "no clear shape" if reading["shape"] in _ABSENT else f"a {reading['shape']}",
                class_name,
                ", ".join(SHAPES),
            )
        found = _name_attributes(reading, class_name)
        return AttributeDictionary.of(class_name, found, "judge", "the judge", _CONTRASTS)

    def _choose(self, name: str, scores: NDArray[np.float32]) -> str:
        """The word of a head; "none" where it is not sure, "other" where it is sure of a decal and of no form.

        scores: logits (N, words).
        """
        shares = np.exp(scores - scores.max(1, keepdims=True))
        shares = (shares / shares.sum(1, keepdims=True)).mean(0)
        best, words = int(shares.argmax()), HEADS[name]
        if shares[best] >= self._threshold:
            return words[best]
        gives = f"the judge gives {words[best]} {shares[best]:.2f}, below {self._threshold:.2f}"
        if "other" in words and 1 - shares[words.index("none")] >= self._threshold:  # there, of whatever form
            log.warning("a %s is there, of no clear form: %s", name, gives)
            return "other"
        log.warning("%s is left out: %s", name, gives)
        return "none"


def _name_attributes(reading: Reading, class_name: str) -> dict[str, list[str]]:
    """The kinds of a dictionary, in the words of the embedded model's captions."""
    seen = {name: None if word in _ABSENT else word for name, word in reading.items()}
    found: dict[str, list[str]] = {}
    if seen["finish"]:  # "a shiny blue mug", but "a blue glass mug"
        found["material" if seen["finish"] == "glass" else "finish"] = [seen["finish"]]
    for kind in ("colour", "pattern"):
        if seen[kind]:
            found[kind] = [seen[kind] or ""]
    form = "blot" if seen["decal"] not in DECALS and seen["decal"] else seen["decal"]
    shape = class_name if class_name in SHAPES else seen["shape"] or SHAPES[0]
    thing = Attributes(
        shape,
        seen["colour"] or COLOURS[0],
        "plain",
        seen["foot"],
        seen["band"],
        seen["top"],
        form,
        seen["decal_colour"],
    )
    for part, (colour, word) in name_parts(thing).items():
        found.setdefault("decal" if part == "decal" else "part", []).append(f"{colour} {word}")
    return found
