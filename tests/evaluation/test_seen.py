"""Whether a thing is seen in a hole that is to be empty: on renderings, on which the metric was not calibrated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dreammix_trt.evaluation.metrics.metric import Sample
from dreammix_trt.evaluation.metrics.seen import ObjectSeen, measure_distances
from dreammix_trt.trainer.micro import world

SUBJECT: Any = None


def test_things_are_seen_and_empty_rooms_are_not() -> None:
    answers: dict[str, list[float]] = {"thing": [], "room": [], "shifted": []}
    for scene, mask in world.held_out_scenes(12, seed=404, size=128, object_share=(0.35, 0.65)):
        shifted = np.clip(scene.background + np.array([9, -6, 4]), 0, 255).astype(np.uint8)
        for name, picture in (("thing", scene.image), ("room", scene.background), ("shifted", shifted)):
            sample = Sample(picture, scene.background, mask, SUBJECT, "", "removal", {})
            assert ObjectSeen().add(sample) is None, "without a truth nobody can say"
            answers[name].append(ObjectSeen().add(sample.hold_against_scene()) or 0.0)
    assert np.mean(answers["thing"]) > 0.9 and answers["room"] == answers["shifted"] == [0.0] * 12


def test_a_thing_without_a_name_is_seen_by_its_size() -> None:
    scene, mask = world.held_out_scenes(1, seed=405, size=128)[0]
    rows, columns = np.nonzero(mask)
    blob = scene.background.copy()
    middle = mask & (np.hypot(*(np.indices(mask.shape) - np.array([rows.mean(), columns.mean()])[:, None, None])) < 30)
    blob[middle] = (20, 30, 200)
    assert ObjectSeen().add(Sample(blob, scene.background, mask, SUBJECT, "", "removal", {}).hold_against_scene()) == 1


def test_distances_are_of_averaged_colours() -> None:
    room, mask = np.full((128, 128, 3), 100, np.uint8), np.ones((128, 128), bool)
    assert measure_distances(room + np.array([30, 0, 40], np.uint8), room, mask) == pytest.approx(50)
    noise = np.random.default_rng(0).integers(60, 141, room.shape).astype(np.uint8)
    assert measure_distances(noise, room, mask).mean() < 12
