"""The procedural world, its captions, and the judge's cropping: numpy only."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from dreammix_trt.trainer.micro import world
from dreammix_trt.trainer.micro.captions import WORDS, caption, describe


def test_the_world_does_not_need_torch() -> None:
    code = "import sys; from dreammix_trt.trainer.micro import captions, world; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_same_seed_renders_the_same_scene() -> None:
    one, two = (world.render_scene(np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(one.image, two.image)
    assert (one.attributes, one.box) == (two.attributes, two.box)


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("size", [64, 128, (96, 160)])
def test_a_scene_knows_its_object(shape: str, size: int | tuple[int, int]) -> None:
    scene = world.render_scene(np.random.default_rng(1), world.Attributes(shape, "red", "plain"), size, object_size=48)
    height, width = (size, size) if isinstance(size, int) else size
    assert scene.image.shape == scene.background.shape == (height, width, 3)
    assert scene.image.dtype == np.uint8
    assert scene.alpha.dtype == np.float32
    assert scene.alpha.min() >= 0 and scene.alpha.max() <= 1
    x0, y0, x1, y1 = scene.box
    assert 40 <= max(x1 - x0, y1 - y0) <= 56
    inside = scene.image[scene.alpha > 0.99].astype(float)
    assert np.median(inside[:, 0]) > np.median(inside[:, 1]) + 60  # red
    outside = (scene.alpha == 0) & ~_near(scene.box, height, width, 16)
    assert not outside.any() or np.abs(scene.image.astype(int) - scene.background)[outside].mean() < 2


def _near(box: world.Box, height: int, width: int, margin: int) -> np.ndarray:
    x0, y0, x1, y1 = box
    near = np.zeros((height, width), bool)
    near[max(0, y0 - margin) : y1 + margin, max(0, x0 - margin) : x1 + margin] = True
    return near


@pytest.mark.parametrize("colour", world.COLOURS)
def test_patterns_differ_strongly(colour: str) -> None:
    pictures = [
        world.render_scene(np.random.default_rng(2), world.Attributes("ball", colour, p), object_size=90).image.astype(
            int
        )
        for p in world.PATTERNS
    ]
    for first in range(4):
        for second in range(first):
            assert np.abs(pictures[first] - pictures[second]).mean() > 5


def test_masks_cover_the_object_box() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        box = (40, 50, 80, 100)
        mask = world.draw_mask(rng, box, 128, 128)
        assert mask[51:99, 41:79].all()
        assert mask.sum() < 128 * 128 / 2


def test_held_out_scenes_run_through_all_attributes() -> None:
    seen = {scene.attributes for scene, _ in world.held_out_scenes(256, size=32, object_size=(16, 24))}
    assert len(seen) == 256


def test_blurred_scenes_keep_their_frame() -> None:
    scene = world.render_scene(np.random.default_rng(4), None, 128, object_size=50, sharp_side=70)
    assert scene.image.shape == (128, 128, 3)
    assert scene.sharp_side == 70


def test_subject_photos() -> None:
    photos = world.render_subject_photos(5, seed=1, size=128)
    assert len(photos) == 5
    for image, mask in photos:
        assert image.shape == (128, 128, 3)
        assert set(np.unique(mask)) == {0, 255}
        assert 0.1 < (mask > 0).mean() < 0.6
        colours = image[mask > 0].astype(int)
        assert (colours[:, 2] - colours[:, 0] > 60).mean() > 0.2  # blue above
        assert (colours.min(1) > 170).mean() > 0.1  # cream below
    again = world.render_subject_photos(5, seed=1, size=128)
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(photos, again, strict=True))


def test_captions_use_known_words_only() -> None:
    rng = np.random.default_rng(0)
    texts = [caption(rng, world.random_attributes(rng) if n % 4 else None) for n in range(500)]
    assert 0.05 < sum(not text for text in texts) / 500 < 0.25
    assert {word for text in texts for word in text.split()} <= set(WORDS)
    assert describe(world.Attributes("mug", "orange", "striped")) == "a photo of an orange striped mug on a table"
