"""What an adapter learns on: folders in their layouts, rendered objects, and references made of them."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreammix_trt.core.attributes import with_article
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import InputError
from dreammix_trt.trainer.data import Photograph
from dreammix_trt.trainer.micro import captions, world
from dreammix_trt.trainer.tokens.objects import FolderObjects, RenderedObjects
from dreammix_trt.trainer.tokens.references import vary_reference
from tests.support.training import write_photographs


def test_both_layouts_are_read(objects: Path) -> None:
    pool = FolderObjects(objects)
    assert (len(pool), pool.trained_on) == (3, "3 objects: mug")
    mine, *regular = (pool.open(number) for number in range(3))
    assert mine is not None and mine.class_name == "mug"
    assert [photograph.name for photograph in mine.photographs] == ["00.png", "01.png"]
    assert mine.captions == ["a photo of a red mug", "a photo of a mug"], "of the file beside it, else of the class"
    assert [each and each.captions for each in regular] == [["a photo of a blue mug"], ["a photo of a red mug"]]
    assert all(each and len(each.photographs) == 1 for each in regular)


def test_a_class_may_be_one_object_and_two_words(tmp_path: Path) -> None:
    write_photographs(tmp_path / "alarm_clock")
    seen = FolderObjects(tmp_path).open(0)
    assert seen is not None and (seen.class_name, len(seen.photographs)) == ("alarm clock", 2)
    assert seen.captions[0] == "a photo of an alarm clock"


def test_the_description_changes_with_the_objects(objects: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(objects, copy)
    told = FolderObjects(objects).describe()
    assert FolderObjects(copy).describe() == told, "where they lie does not matter"
    (copy / "mug" / "mine" / "image" / "00.txt").write_text("a photo of a blue mug")
    other = FolderObjects(copy).describe()
    (copy / "mug" / "mine" / "image" / "01.png").unlink()
    assert len({told, other, FolderObjects(copy).describe()}) == 3


def test_what_cannot_be_read_is_named_and_left_out(
    objects: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "objects"
    shutil.copytree(objects, place)
    (place / "mug" / "mine" / "mask" / "00.png").unlink()
    (place / "mug" / "empty").mkdir()
    pool = FolderObjects(place)
    assert "photographs without a mask are left out: 00.png" in caplog.text and "empty: no photographs" in caplog.text
    Image.new("L", (80, 60)).save(place / "mug" / "mine" / "mask" / "01.png")
    assert pool.open(0) is None and "it is left out" in caplog.text


@pytest.mark.parametrize(("name", "said"), [("nowhere", "no such folder"), ("", "holds no objects with masks")])
def test_a_folder_without_objects_is_refused(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        FolderObjects(tmp_path / name)


def test_rendered_objects_are_never_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, drawn = RenderedObjects(BaseFiles.open(), 40, 1, 0), []
    honest = world.render_scene

    def note(rng: np.random.Generator, what: world.Attributes, size: int, extent: float, build: world.Build) -> object:
        drawn.append((what, build))
        return honest(np.random.default_rng(0), what, 32, 16.0, build=build)

    monkeypatch.setattr(world, "render_scene", note)
    seen = [pool.open(number) for number in range(40)]
    assert not any(world.is_held_out(what) for what, _ in drawn)
    assert len({what.shape for what, _ in drawn}) == len(world.SHAPES)
    for each in seen:
        assert each is not None
        assert each.class_name in each.captions[0] or "object" in each.captions[0]


def test_words_of_rendered_objects_tell_an_edit_of_a_part_and_never_one_that_is_held_out() -> None:
    pool, edits = RenderedObjects(BaseFiles.open(), 4, 1, 0), 0
    seen = pool.open(2)
    assert seen is not None
    (alone, whole), (_, same), *edited = seen.words
    assert alone == f"a photo of {with_article(seen.class_name)}" and same == whole and len(whole) > len(alone)
    assert len(edited) == 2 and all(text != whole for _, text in edited)
    for number in range(200):
        rng = np.random.default_rng(number)
        what = world.random_attributes(rng)
        part, other = captions.draw_edit(rng, what)
        changed = [name for name, value in asdict(what).items() if getattr(other, name) != value]
        assert changed == ["decal_colour" if part == "decal" else part] and not world.is_held_out(other)
        edits += getattr(other, changed[0]) in captions.phrase(rng, other, [part])
    assert edits == 200, "the request names what it changes"


def test_a_rendered_object_stands_in_another_room_each_time() -> None:
    pool = RenderedObjects(BaseFiles.open(), 2, 2, 0)
    seen, again = pool.open(1), pool.open(1)
    assert seen is not None and again is not None
    one, other = seen.photographs
    assert np.array_equal(one.image, again.photographs[0].image) and not np.array_equal(one.image, other.image)
    assert one.subject.any() and one.image.shape == (256, 256, 3)


def test_another_base_needs_a_folder(base: BaseFiles) -> None:
    with pytest.raises(InputError, match="needs a folder of objects to learn from"):
        RenderedObjects(base, 2, 2, 0)


# -- references -------------------------------------------------------------------------------------------------------


def test_a_reference_is_the_object_alone() -> None:
    image, subject = np.zeros((60, 80, 3), np.uint8), np.zeros((60, 80), bool)
    image[..., 2], image[20:45, 25:60] = 200, (250, 10, 10)
    subject[20:45, 25:60] = True
    pictures = [vary_reference(np.random.default_rng(seed), Photograph(image, subject, "a"), 64) for seed in range(20)]
    for picture, mask in pictures:
        assert picture.shape[:2] == mask.shape and 0.6 < mask.mean() <= 1
        inside = picture[mask].astype(int)
        assert (inside[:, 0] > 240).all() and np.median(inside[:, 1]) < 20, "red"
        assert (inside[:, 2] < inside[:, 1] + 9).all(), "towards white at its edge, never towards the blue behind it"
    sides = [max(mask.shape) for _, mask in pictures]
    assert len(set(sides)) > 8 and max(sides) < 60, "turned, stretched and of less detail"
    again = vary_reference(np.random.default_rng(3), Photograph(image, subject, "a"), 64)
    assert all(np.array_equal(one, other) for one, other in zip(again, pictures[3], strict=True))


def test_a_thing_of_one_pixel_stays_itself() -> None:
    subject = np.zeros((9, 9), bool)
    subject[4, 4] = True
    photograph = Photograph(np.zeros((9, 9, 3), np.uint8), subject, "a")
    for seed in range(8):
        assert vary_reference(np.random.default_rng(seed), photograph, 64)[1].any()
