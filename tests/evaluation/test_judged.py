"""The embedded model's judge as a metric: on renderings of which everything is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import InputError
from dreammix_trt.evaluation.metrics.judged import JUDGED, Jury
from dreammix_trt.evaluation.metrics.metric import Sample
from dreammix_trt.evaluation.protocol import Protocol, Subject
from dreammix_trt.evaluation.reading import read_protocol
from dreammix_trt.trainer.micro import world
from tests.support.protocols import save, write_protocol

MUG = world.Attributes("mug", "blue", foot="white", top="white", decal="heart", decal_colour="green")


@pytest.fixture(scope="module")
def jury() -> Jury:
    return Jury(BaseFiles.open().folder)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A protocol's subject whose photographs are of the blue mug."""
    folder = write_protocol(tmp_path_factory.mktemp("judged") / "p", subjects=1)
    for number, (image, mask) in enumerate(world.render_photos(world.Thing(MUG, world.Build()), 2, size=128)):
        save(folder / f"subjects/mug-0/image/{number}.png", image)
        save(folder / f"subjects/mug-0/mask/{number}.png", mask)
    expected = {"shape": "mug", "colour": "blue", "pattern": "plain", "foot": "white"}
    return replace(read_protocol(folder).subjects[0], expected=expected)


def measure(jury: Jury, subject: Subject, what: world.Attributes, changed: dict[str, str]) -> dict[str, float | None]:
    room = world.render_scene(np.random.default_rng(5), what, 160, 100, build=world.Build())
    mask = room.alpha > 0.5
    sample = Sample(room.image, room.background, mask, subject, "a sks mug", "editing", changed)
    return {kind.name: kind(jury).add(sample) for kind in JUDGED}


def test_it_reads_what_is_there_and_what_an_edit_changed(jury: Jury, subject: Subject) -> None:
    itself = measure(jury, subject, MUG, {})
    assert (itself["attribute_agreement"], itself["edit_success"], itself["attributes_kept"]) == (1, None, 1)
    red = measure(jury, subject, replace(MUG, colour="red"), {"colour": "red"})
    assert (red["attribute_agreement"], red["edit_success"], red["attributes_kept"]) == (1, 1, 1)
    missed = measure(jury, subject, MUG, {"colour": "red"})
    assert (missed["edit_success"], missed["attributes_kept"]) == (0, 1)
    assert missed["attribute_agreement"] == pytest.approx(3 / 4)
    house = measure(jury, subject, world.Attributes("house", "yellow", "striped", top="black"), {})
    assert (house["attribute_agreement"] or 0) < 0.5
    assert (itself["subject_cosine"] or 0) > 0.8 > (house["subject_cosine"] or 0)


def test_words_that_it_does_not_know_are_refused(jury: Jury, subject: Subject) -> None:
    metric = JUDGED[0](jury)
    for expected, told in (
        ({"hue": "red"}, r"mug-0\.expected\.hue: the judge does not read"),
        ({"colour": "lime"}, "'lime'"),
    ):
        protocol = Protocol(Path("p"), "p", (0,), {}, (replace(subject, expected=expected),))
        with pytest.raises(InputError, match=told):
            metric.check(protocol)
