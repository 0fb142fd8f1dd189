"""What is learnt from without captions: folders of pictures, and rendered rooms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import InputError
from dreammix_trt.trainer import picture_pool
from dreammix_trt.trainer.micro import world
from dreammix_trt.trainer.picture_pool import FolderPool, ScenePool, crop_picture
from tests.support.asuka_training import write_pictures

Rng = np.random.Generator


@pytest.fixture
def rng() -> Rng:
    return np.random.default_rng(0)


def test_a_folder_gives_squares_of_pictures_of_any_size(tmp_path: Path, rng: Rng) -> None:
    """Also of those in folders within it, grey ones, and what is seen through is white."""
    folder = write_pictures(tmp_path / "pictures")
    (folder / "more").mkdir()
    Image.new("L", (30, 70), 77).save(folder / "more" / "grey.jpg")
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(folder / "clear.png")
    (folder / "notes.txt").write_text("not a picture")
    pool = FolderPool(folder)
    drawn = [pool.draw(rng, 32, (0.2, 1.0)) for _ in range(60)]
    assert {(each.shape, each.dtype.name) for each in drawn} == {((32, 32, 3), "uint8")}
    assert any((each == 77).all() for each in drawn) and any((each == 255).all() for each in drawn)
    again = FolderPool(folder)
    other = [again.draw(np.random.default_rng(0), 32, (0.2, 1.0)) for _ in range(1)]
    assert np.array_equal(other[0], drawn[0]) and again.describe() == pool.describe()
    assert pool.describe().startswith("5 pictures, ")
    (folder / "new.png").write_bytes((folder / "clear.png").read_bytes())
    assert FolderPool(folder).describe() != pool.describe()


def test_crops_show_as_much_as_they_shall(rng: Rng) -> None:
    across = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    widths, mirrored = [], 0
    for _ in range(200):
        row = crop_picture(rng, across, 100, (0.25, 1.0))[50, :, 0].astype(int)
        mirrored += row[0] > row[-1]
        widths.append(abs(row[-1] - row[0]) + 1)
    assert 45 <= min(widths) < 60 and 95 < max(widths) <= 100 and 60 < mirrored < 140
    exact = crop_picture(rng, across, 50, (0.25, 0.25))[0, :, 0].astype(int)
    assert set(np.abs(np.diff(exact))) == {1}, "pixels of the right size stay what they are"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda place: place.mkdir(), "holds no pictures; it should hold pictures to learn from"),
        (lambda place: place.write_text(""), "is a file; give a folder of pictures"),
        (lambda place: None, "no such folder; give a folder of pictures"),
    ],
    ids=["empty", "file", "missing"],
)
def test_a_folder_without_pictures_is_refused(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "pictures")
    with pytest.raises(InputError, match=message):
        FolderPool(tmp_path / "pictures")


def test_a_damaged_picture_is_left_out(tmp_path: Path, rng: Rng, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_pictures(tmp_path / "pictures")
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:200])
    pool = FolderPool(folder)
    for _ in range(20):
        pool.draw(rng, 32, (1.0, 1.0))
    assert sum("0.png" in line and "it is left out" in line for line in caplog.messages) == 1
    for file in folder.iterdir():
        file.write_bytes(b"nothing")
    with pytest.raises(InputError, match="20 pictures one after the other cannot be read"):
        pool.draw(rng, 32, (1.0, 1.0))


def test_silhouettes_are_what_is_white(tmp_path: Path) -> None:
    folder, masks = write_pictures(tmp_path / "pictures"), tmp_path / "masks"
    masks.mkdir()
    Image.fromarray(np.pad(np.full((5, 7), 255, np.uint8), 4)).save(masks / "0.png")
    pool = FolderPool(folder, masks)
    assert [int(each.sum()) for each in pool.objects] == [35]
    assert pool.describe() != FolderPool(folder).describe()
    Image.new("L", (9, 9)).save(masks / "1.png")
    with pytest.raises(InputError, match=r"1\.png marks nothing: no value is above 127"):
        FolderPool(folder, masks)


def test_rooms_are_rendered_once_and_half_of_them_are_empty(
    tmp_path: Path, rng: Rng, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base, told, scenes, honest = BaseFiles.open(), [], [], world.render_scene

    def render(*given: object, **named: object) -> world.Scene:
        scenes.append(honest(*given, **named))  # type: ignore[arg-type]
        return scenes[-1]

    def prepared() -> ScenePool:
        pool = ScenePool(base, tmp_path, 2, 5)
        assert pool.describe() == "2 rendered rooms, seed 5", "nothing has to be rendered for it"
        pool.prepare(told.append)
        return pool

    monkeypatch.setattr(world, "render_scene", render)
    pool = prepared()
    assert np.array_equal(pool.images[0], scenes[0].image) and np.array_equal(pool.images[1], scenes[1].background)
    assert len(pool.objects) == 2 and told == [0.5, 1.0]
    monkeypatch.setattr(picture_pool, "_render", None)
    again = prepared()
    assert np.array_equal(again.images, pool.images) and len(told) == 2
    assert again.draw(rng, 64, (1.0, 1.0)).shape == (64, 64, 3)
    monkeypatch.undo()
    file = next(tmp_path.glob("rooms-*"))
    file.write_bytes(file.read_bytes()[:1000])
    assert np.array_equal(prepared().images, pool.images)
    assert "the rooms are rendered again" in caplog.text


def test_rooms_are_of_the_embedded_base_alone(base: BaseFiles, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a folder of pictures to learn from"):
        ScenePool(base, tmp_path, 2, 0)
