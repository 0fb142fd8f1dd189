"""The authors' folders of regular pictures, read and named."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreammix_trt.core.errors import InputError
from dreammix_trt.trainer.listing import list_photographs
from dreammix_trt.trainer.photographs import choose_twin, read_photographs
from dreammix_trt.trainer.regular_folder import RegularPicture, place_regular, read_regular


def write(file: Path, colour: int = 255) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), colour).save(file)
    return file


def test_the_authors_layout_is_read(tmp_path: Path) -> None:
    """`regular_<cat>/<prompt_with_underscores>/<seed>-image.png` and `<seed>-mask.png`."""
    folder = tmp_path / "regular_teapot"
    for seed in (0, 2, 10):
        write(folder / "a_photo_of_a_clay_teapot" / f"{seed}-image.png")
        write(folder / "a_photo_of_a_clay_teapot" / f"{seed}-mask.png")
    write(folder / "a_photo_of_a_teapot" / "7-image.jpg")
    for place in (folder, tmp_path):
        found = read_regular(place)
        assert [(each.caption, each.name.rpartition("/")[2]) for each in found] == [
            ("a photo of a clay teapot", "0"),
            ("a photo of a clay teapot", "2"),
            ("a photo of a clay teapot", "10"),
            ("a photo of a teapot", "7"),
        ]
        assert found[1].mask == folder / "a_photo_of_a_clay_teapot" / "2-mask.png"
        assert found[3] == RegularPicture(
            folder / "a_photo_of_a_teapot" / "7-image.jpg", None, "a photo of a teapot", "a photo of a teapot/7"
        )


def test_what_is_named_is_found_again(tmp_path: Path) -> None:
    caption = "a photo of a red sugar bowl with a cream foot, a lid and an orange star"
    image, mask = place_regular(tmp_path, "sugar bowl", caption, 12)
    assert image.relative_to(tmp_path).parts == ("regular_sugar_bowl", caption.replace(" ", "_"), "12-image.png")
    write(image), write(mask)
    assert read_regular(tmp_path) == [RegularPicture(image, mask, caption, f"{caption}/12")]


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompt = tmp_path / "a_photo_of_a_mug"
    for name in ("1-image.png", "1-image.jpg", "2-image.png", "2-mask.png", "cover.png", "9-mask.png"):
        write(prompt / name)
    (prompt / "notes.txt").write_text("hm")
    with caplog.at_level(logging.WARNING):
        assert [each.image.name for each in read_regular(tmp_path)] == ["1-image.png", "2-image.png"]
    assert "left out (not named SEED-image or SEED-mask): 3, such as" in caplog.text and "cover.png" in caplog.text
    assert "regular pictures without a mask: 1, such as a photo of a mug/1" in caplog.text


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ([], "holds no regular pictures"),
        (["a_photo_of_a_mug/picture.png"], "7-mask.png beside"),
        (["regular_mug/a/1-image.png", "regular_jar/a/1-image.png"], r"several classes \(regular_jar, regular_mug\)"),
    ],
)
def test_folders_without_regular_pictures_are_refused(tmp_path: Path, files: list[str], told: str) -> None:
    for name in files:
        write(tmp_path / name)
    with pytest.raises(InputError, match=told):
        read_regular(tmp_path)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        read_regular(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is a file"):
        read_regular(write(tmp_path / "file.png"))


@pytest.mark.parametrize("wrong", ["a/b", "tea_pot", "..", "a\\b", "what?", " ", "a" * 300])
def test_names_that_no_folder_can_have_are_refused(tmp_path: Path, wrong: str) -> None:
    for class_name, caption in ((wrong, "a photo"), ("mug", wrong)):
        if class_name == "..":
            continue  # regular_.. is a name like any other
        with pytest.raises(InputError, match="folder"):
            place_regular(tmp_path, class_name, caption, 0)


def test_the_authors_subjects_are_read(shared: Path) -> None:
    """`train_data/<cat>/image/NN.jpg` and `mask/NN.png`, of their own data set."""
    data = shared / "data" / "dreambooth"
    files = read_photographs(data / "teapot")
    assert [file.name for file in files] == [f"{number:02d}.jpg" for number in range(5)]
    photograph = files[1].read()
    assert photograph.image.shape[:2] == photograph.subject.shape
    assert 0.02 < np.mean(photograph.subject) < 0.6
    clock = list_photographs(data / "clock", choose_twin)
    assert [mask.name if mask else "" for mask in clock.pairs.values()] == [f"{number:02d}.png" for number in range(6)]
    assert not clock.left_out
    with pytest.raises(InputError, match=r"folders of subjects \(clock, teapot\); name one of them"):
        read_photographs(data)
