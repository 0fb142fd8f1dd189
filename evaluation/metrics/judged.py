"""What the embedded model's judge sees of a painted thing: its parts in words, and its likeness to its photographs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dreammix_trt.core.errors import InputError
from dreammix_trt.evaluation.metrics.metric import U8, Metric, Sample
from dreammix_trt.evaluation.protocol import FILE_NAME, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from dreammix_trt.trainer.micro.judge import Judge, Reading


class Jury:
    """The judge, asked once a picture for all metrics that need it."""

    def __init__(self, model: Path) -> None:
        """model: folder of the embedded model."""
        from dreammix_trt.trainer.micro.judge import Judge

        self._judge: Judge = Judge.load(model)
        self._sample: Sample | None = None
        self._reading: Reading = {}
        self._embedding: NDArray[np.float32] = np.zeros(0, np.float32)
        self._subject, self._references = "", np.zeros((0, 0), np.float32)

    def read(self, sample: Sample) -> Reading:
        """The word of every head."""
        self._look(sample)
        return self._reading

    def compare(self, sample: Sample) -> float:
        """Mean cosine to the subject's photographs."""
        from dreammix_trt.trainer.micro.judge import crop_of_mask

        if sample.subject.name != self._subject:
            photographs = [file.read() for file in sample.subject.photographs]
            self._references = self._judge.embed([crop_of_mask(each.image, each.subject) for each in photographs])
            self._subject = sample.subject.name
        self._look(sample)
        return float((self._references @ self._embedding).mean())

    def _look(self, sample: Sample) -> None:
        from dreammix_trt.trainer.micro.judge import HEADS, crop_of_mask

        if sample is self._sample:
            return
        crop: U8 = crop_of_mask(sample.image, sample.mask)
        heads, embeddings = self._judge.scores([crop])
        self._reading = {name: HEADS[name][int(heads[name][0].argmax())] for name in HEADS}
        self._embedding, self._sample = embeddings[0], sample


class Judged(Metric):
    """What metrics of the jury share."""

    def __init__(self, jury: Jury) -> None:
        self._jury = jury

    def check(self, protocol: Protocol) -> None:
        """Refuse parts and words that the judge does not know."""
        for subject in protocol.subjects:
            where = f"{protocol.folder / FILE_NAME}: subjects.{subject.name}."
            _check_words(f"{where}expected", subject.expected)
            for prompt in subject.prompts:
                _check_words(f"{where}{prompt.name}: expected", prompt.expected)

    def _share(self, sample: Sample, wanted: Mapping[str, str]) -> float | None:
        """The share of these parts that have their word; None: there are none."""
        if not wanted:
            return None
        reading = self._jury.read(sample)
        return float(np.mean([reading[part] == word for part, word in wanted.items()]))


class AttributeAgreement(Judged):
    """Share of all expected parts that the judge reads as expected, changed ones included."""

    name = "attribute_agreement"
    about = "share of the expected attributes that the judge reads off the picture"

    def add(self, sample: Sample) -> float | None:
        return self._share(sample, {**sample.subject.expected, **sample.changed})


class EditSuccess(Judged):
    """1 where the judge reads every changed part as the edit wants it, else 0; of edits alone."""

    name = "edit_success"
    about = "share of edits whose changed attributes the judge reads as asked for"

    def add(self, sample: Sample) -> float | None:
        share = self._share(sample, sample.changed)
        return None if share is None else float(share == 1)


class AttributesKept(Judged):
    """Share of the expected parts that no edit changes which the judge reads as expected."""

    name = "attributes_kept"
    about = "share of the subject's unchanged attributes that the judge reads off the picture"

    def add(self, sample: Sample) -> float | None:
        kept = {part: word for part, word in sample.subject.expected.items() if part not in sample.changed}
        return self._share(sample, kept)


class SubjectCosine(Judged):
    """Cosine of the judge's embeddings of the painted thing and of the subject's photographs, mean of these."""

    name = "subject_cosine"
    about = "likeness to the subject's photographs in the judge's embedding"

    def add(self, sample: Sample) -> float | None:
        return self._jury.compare(sample) if sample.subject.photographs else None


JUDGED: tuple[type[Judged], ...] = (AttributeAgreement, EditSuccess, AttributesKept, SubjectCosine)


def _check_words(where: str, expected: Mapping[str, str]) -> None:
    from dreammix_trt.trainer.micro.judge import HEADS

    for part, word in expected.items():
        if part not in HEADS:
            raise InputError(f"{where}.{part}: the judge does not read this; it reads {', '.join(HEADS)}")
        if word not in HEADS[part]:
            raise InputError(f"{where}.{part} is {word!r}; the judge knows {', '.join(HEADS[part])}")
