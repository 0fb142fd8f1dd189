"""The pictures that a describer is shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreammix_trt.core.errors import InputError
from dreammix_trt.trainer.attributes import read_pictures
from dreammix_trt.trainer.attributes.describing import GREY, cut_out
from dreammix_trt.trainer.data import Photograph


def write(folder: Path, count: int, masks: bool) -> Path:
    """Photographs of a size, a red rectangle of each the subject."""
    for n in range(count):
        image = np.random.default_rng(n).integers(0, 256, (30, 40, 3)).astype(np.uint8)
        image[10:20, 5:25] = (200, 0, 0)
        (folder / "image").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "image" / f"{n:02d}.png")
        if masks:
            mask = Image.new("L", (40, 30))
            mask.paste(255, (5, 10, 25, 20))
            (folder / "mask").mkdir(exist_ok=True)
            mask.save(folder / "mask" / f"{n:02d}.png")
    return folder


def test_photographs_are_taken_from_all_over_the_folder(tmp_path: Path) -> None:
    names = [each.name for each in read_pictures(write(tmp_path, 9, masks=True), 3, need_masks=True)]
    assert names == ["01.png", "04.png", "07.png"]
    assert len(read_pictures(tmp_path, 20, need_masks=True)) == 9


def test_without_masks_all_of_a_photograph_is_shown_or_nothing(tmp_path: Path) -> None:
    photos = write(tmp_path, 2, masks=False)
    pictures = read_pictures(photos, 6, need_masks=False)
    assert [picture.subject.all() for picture in pictures] == [True, True]
    assert (cut_out(pictures[0]) == pictures[0].image).all()
    with pytest.raises(InputError, match=r"no photograph has a mask.*--segment"):
        read_pictures(photos, 6, need_masks=True)


def test_masks_are_used_where_there_are_some(tmp_path: Path) -> None:
    photos = write(tmp_path, 2, masks=True)
    (photos / "mask" / "01.png").unlink()
    (picture,) = read_pictures(photos, 6, need_masks=False)
    assert picture.name == "00.png" and picture.subject.sum() == 200


def test_a_subject_stands_alone_on_grey() -> None:
    image = np.full((30, 40, 3), 9, np.uint8)
    image[10:20, 5:25] = (200, 0, 0)
    subject = np.zeros((30, 40), bool)
    subject[10:20, 5:25] = True
    alone = cut_out(Photograph(image, subject, "x"))
    wanted = np.full((24, 24, 3), GREY, np.uint8)  # 20 and a tenth on each side
    wanted[7:17, 2:22] = (200, 0, 0)
    assert (alone == wanted).all()
