"""The procedural world, its captions, and the judge's cropping: numpy only."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from dreammix_trt.core.attributes import compose_phrase
from dreammix_trt.trainer.micro import objects, world
from dreammix_trt.trainer.micro.captions import WORDS, caption, compose, describe, dictionary_of, subject_captions
from dreammix_trt.trainer.micro.distances import decal
from dreammix_trt.trainer.micro.rooms import SURFACES
from dreammix_trt.trainer.micro.world import Attributes, Build

MUG = Attributes("mug", "blue", foot="white", top="red", decal="star", decal_colour="yellow")
FRONT = objects.View()


def paint(what: Attributes, **traits: float) -> tuple[np.ndarray, np.ndarray]:
    """The thing alone on grey: (uint8 (200, 200, 3), coverage)."""
    canvas, coverage, _ = objects.paint(
        np.full((200, 200, 3), 128, np.float32), what, Build(**traits), FRONT, (100, 100), 180
    )
    return np.clip(canvas, 0, 255).astype(np.uint8), coverage


def share_of(picture: np.ndarray, colour: str) -> float:
    """Share of the pixels in a world colour, in light or shade."""
    wanted = np.asarray(objects.COLOUR_RGB[colour], float)
    cosine = picture @ wanted / (np.linalg.norm(picture.astype(float), axis=-1) * np.linalg.norm(wanted) + 1e-6)
    return float((cosine > 0.99).mean())


def test_the_world_does_not_need_torch() -> None:
    code = "import sys; from dreammix_trt.trainer.micro import captions, world; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_detail_is_where_the_small_parts_are() -> None:
    grey = np.full((200, 200, 3), 128, np.float32)
    parts = {"foot": None, "decal": None, "decal_colour": None}
    with_parts, _, detail = objects.paint(grey, MUG, Build(), FRONT, (100, 100), 180)
    for part, level in (({"foot": "white"}, 0.5), ({"decal": "star", "decal_colour": "yellow"}, 1.0)):
        without, _, _ = objects.paint(
            grey, replace(MUG, **{name: parts[name] for name in part}), Build(), FRONT, (100, 100), 180
        )
        changed = np.abs(with_parts - without).max(-1) > 60
        assert changed.sum() > 300
        assert float(detail[changed].mean()) == pytest.approx(level, abs=0.06)
    plain = objects.paint(grey, Attributes("mug", "blue"), Build(), FRONT, (100, 100), 180)[2]
    assert not plain.any()


def test_the_same_seed_renders_the_same_scene() -> None:
    one, two = (world.render_scene(np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(one.image, two.image)
    assert (one.attributes, one.box, one.surface) == (two.attributes, two.box, two.surface)


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("size", [64, 128, (96, 160)])
def test_a_scene_knows_its_thing(shape: str, size: int | tuple[int, int]) -> None:
    scene = world.render_scene(np.random.default_rng(1), Attributes(shape, "red"), size, object_size=48)
    height, width = (size, size) if isinstance(size, int) else size
    assert scene.image.shape == scene.background.shape == (height, width, 3)
    assert scene.image.dtype == np.uint8
    assert scene.alpha.dtype == np.float32
    assert scene.alpha.min() >= 0 and scene.alpha.max() <= 1
    x0, y0, x1, y1 = scene.box
    assert 38 <= max(x1 - x0, y1 - y0) <= 57
    inside = scene.image[scene.alpha > 0.99].astype(float)
    assert np.median(inside[:, 0]) > np.median(inside[:, 1]) + 60  # red
    above = np.s_[: max(0, y0 - 2)]  # shadows fall beside and below
    assert np.array_equal(scene.image[above], scene.background[above])


@pytest.mark.parametrize("shape", world.SHAPES)
def test_a_thing_stays_within_the_reach_that_places_it(shape: str) -> None:
    rng = np.random.default_rng(3)
    side, up, down = (180 * part for part in objects.REACH[shape])
    for _ in range(6):
        view = world.random_view(rng, FRONT.light)
        _, coverage, _ = objects.paint(
            np.zeros((240, 240, 3), np.float32),
            Attributes(shape, "red"),
            world.random_build(rng),
            view,
            (120, 120),
            180,
        )
        rows, columns = np.nonzero(coverage > 0.5)
        assert rows.min() >= 120 - up - 1 and rows.max() <= 120 + down + 1
        assert columns.min() >= 120 - side - 1 and columns.max() <= 120 + side + 1


@pytest.mark.parametrize("colour", world.COLOURS)
def test_patterns_differ_strongly(colour: str) -> None:
    pictures = [paint(Attributes("ball", colour, pattern))[0].astype(int) for pattern in world.PATTERNS]
    for first in range(4):
        for second in range(first):
            assert np.abs(pictures[first] - pictures[second]).mean() > 5


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("part", ["foot", "band", "top", "decal"])
def test_each_part_is_seen_in_its_colour(shape: str, part: str) -> None:
    added = {"decal": "star", "decal_colour": "yellow"} if part == "decal" else {part: "yellow"}
    bare, _ = paint(Attributes(shape, "blue"))
    with_part, _ = paint(Attributes(shape, "blue", **added))
    assert share_of(bare, "yellow") == 0
    assert share_of(with_part, "yellow") > 0.008


def test_finishes_differ() -> None:
    matte, shiny, glass = (
        paint(Attributes("vase", "green", finish=finish))[0].astype(int) for finish in world.FINISHES
    )
    assert shiny.max() > matte.max() + 20  # a highlight
    assert np.abs(glass - matte).mean() > 2  # what is behind shows through


@pytest.mark.parametrize("kind", [*world.DECALS, *world.UNNAMED_DECALS, "blot"])
def test_decals_are_of_one_size_and_unlike_each_other(kind: str) -> None:
    line = np.linspace(-1, 1, 200, dtype=np.float32)
    u, v = line[None, :], line[:, None]
    areas = {name: decal(name, u, v, 0.5) < 0 for name in {*world.DECALS, *world.UNNAMED_DECALS, "blot"}}
    assert 0.06 < areas[kind].mean() < 0.32
    for other, area in areas.items():
        assert other == kind or (area ^ areas[kind]).mean() > 0.02


def test_colours_that_look_alike_never_meet() -> None:
    rng = np.random.default_rng(0)
    for _ in range(400):
        what = world.random_attributes(rng)
        parts = set(what.colours)
        assert not any(one != other and world.look_alike(one, other) for one in parts for other in parts)
        assert what.decal_colour != what.colour
        assert (what.decal is None) == (what.decal_colour is None)


def test_held_out_combinations_are_never_drawn_for_training() -> None:
    rng = np.random.default_rng(0)
    drawn = [world.random_attributes(rng) for _ in range(600)]
    assert not any(world.is_held_out(what) for what in drawn)
    assert all(world.is_held_out(world.random_attributes(rng, held_out=True)) for _ in range(60))
    free = [Attributes("mug", "blue", foot=foot, top=top) for foot in world.COLOURS for top in world.COLOURS]
    assert 0.04 < np.mean([world.is_held_out(what) for what in free]) < 0.25
    assert {scene.attributes.shape for scene, _ in world.held_out_scenes(8, size=32)} == set(world.SHAPES)


def test_held_out_subjects_have_parts_and_some_a_decal_without_a_word() -> None:
    subjects = world.held_out_subjects(12)
    assert subjects == world.held_out_subjects(12)
    for subject in subjects:
        what = subject.attributes
        assert what.pattern == "plain" and what.foot and what.top and what.decal
        assert what.decal in world.UNNAMED_DECALS or world.is_held_out(what)
    assert sum(subject.attributes.decal in world.UNNAMED_DECALS for subject in subjects) == 3


def test_masks_cover_the_box() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        box = (40, 50, 80, 100)
        mask = world.draw_mask(rng, box, 128, 128)
        assert mask[51:99, 41:79].all()
        assert mask.sum() < 128 * 128 / 2


def test_blurred_scenes_keep_their_frame() -> None:
    scene = world.render_scene(np.random.default_rng(4), None, 128, object_size=50, sharp_side=70)
    assert scene.image.shape == (128, 128, 3)
    assert scene.sharp_side == 70


def test_a_pose_turns_the_thing_and_leaves_room_and_light_alone() -> None:
    drawn = world.render_scene(np.random.default_rng(3), MUG, 128, 80, build=Build())
    poses = [objects.View(yaw=0.3, side=side) for side in (1, -1)]
    right, left = (
        world.render_scene(np.random.default_rng(3), MUG, 128, 80, build=Build(), pose=pose) for pose in poses
    )
    assert np.array_equal(right.background, drawn.background) and np.array_equal(left.background, drawn.background)
    assert right.view == replace(poses[0], light=drawn.view.light) and drawn.view != right.view
    again = world.render_scene(np.random.default_rng(3), MUG, 128, 80, build=Build(), pose=drawn.view)
    assert np.array_equal(again.image, drawn.image)
    middles = [np.average(np.arange(128), weights=scene.alpha.sum(0)) for scene in (right, left)]
    assert middles[0] > middles[1] + 2  # the handle is on the other side


def test_portraits_are_the_scenes_of_the_photographs() -> None:
    [subject] = world.held_out_subjects(1)
    for scene, (image, mask) in zip(world.render_portraits(subject, 2), world.render_photos(subject, 2), strict=True):
        assert np.array_equal(scene.image, image) and np.array_equal(scene.alpha > 0.5, mask > 0)


def test_photographs_show_the_same_subject_in_other_rooms() -> None:
    subject = world.Thing(MUG, Build())
    photos = world.render_photos(subject, 5, seed=1, size=128)
    for image, mask in photos:
        assert image.shape == (128, 128, 3)
        assert set(np.unique(mask)) == {0, 255}
        assert 0.1 < (mask > 0).mean() < 0.6
        colours = image[mask > 0].astype(int)
        assert (colours[:, 2] - colours[:, 0] > 60).mean() > 0.2  # the blue body
        assert (colours.min(1) > 140).mean() > 0.05  # the white foot
    assert not np.array_equal(photos[0][0], photos[1][0])
    again = world.render_photos(subject, 5, seed=1, size=128)
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(photos, again, strict=True))


def test_captions_use_known_words_only() -> None:
    rng = np.random.default_rng(0)
    texts = [
        caption(rng, world.random_attributes(rng) if n % 4 else None, SURFACES[n % len(SURFACES)]) for n in range(500)
    ]
    assert 0.05 < sum(not text for text in texts) / 500 < 0.25
    assert {word.strip(",") for text in texts for word in text.split()} <= set(WORDS)


def test_a_caption_names_the_parts_asked_for_in_natural_order() -> None:
    assert describe(MUG) == "a photo of a matte blue plain mug with a white foot, a red rim and a yellow star"
    assert compose(MUG, {"colour", "decal"}, "wooden table") == "blue mug with a yellow star on a wooden table"
    assert compose(Attributes("jar", "red", finish="glass"), {"finish", "foot", "colour"}) == "red glass jar"
    assert compose(MUG, (), noun="sks mug") == "sks mug"
    assert subject_captions(MUG)[0] == "a photo of a blue sks mug"
    assert all("sks mug" in text for text in subject_captions(MUG))


def test_a_dictionary_lists_what_is_to_be_seen_of_a_thing() -> None:
    assert dictionary_of(MUG).pairs == (
        ("colour", "blue"),
        ("part", "white foot"),
        ("part", "red rim"),
        ("decal", "yellow star"),
    )
    jar = Attributes("jar", "red", "striped", band="blue", decal="blot", decal_colour="green", finish="glass")
    assert (
        compose_phrase("jar", dictionary_of(jar).pairs) == "red striped glass jar with a blue band and a green sticker"
    )
    assert dictionary_of(Attributes("ball", "pink", finish="shiny")).attributes["finish"] == ("shiny",)


def test_a_part_that_is_not_named_is_mostly_there() -> None:
    rng = np.random.default_rng(1)
    unnamed = []
    for _ in range(3000):
        what = world.random_attributes(rng)
        text = caption(rng, what, "table")
        if text and "foot" not in text:
            unnamed.append(what.foot is not None)
    assert np.mean(unnamed) > 0.5
