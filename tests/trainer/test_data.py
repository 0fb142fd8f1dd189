"""Photographs in, views out: what is refused, and what a view promises."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dreammix_trt.core.errors import InputError
from dreammix_trt.trainer.data import (
    Photograph,
    article,
    box_of,
    draw_view,
    latent_mask,
    random_hole,
    read_photographs,
)


def write(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def subject_mask(width: int = 40, height: int = 30) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[8:20, 10:25] = 255
    return mask


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for index in range(3):
        write(tmp_path / "image" / f"{index:02d}.png", rng.integers(0, 256, (30, 40, 3), np.uint8))
        write(tmp_path / "mask" / f"{index:02d}.png", subject_mask())
    return tmp_path


def test_photographs_are_read_in_order_with_their_masks(photos: Path) -> None:
    (photos / "image" / "notes.txt").write_text("not a photograph")
    found = read_photographs(photos)
    assert [photograph.name for photograph in found] == ["00.png", "01.png", "02.png"]
    assert found[0].image.shape == (30, 40, 3)
    assert found[0].box == (10, 8, 25, 20)


def test_jpeg_goes_with_a_png_mask_and_transparency_becomes_white(photos: Path) -> None:
    write(photos / "image" / "05.jpg", np.full((30, 40, 3), 9, np.uint8))
    write(photos / "mask" / "05.png", subject_mask())
    write(photos / "image" / "06.png", np.zeros((30, 40, 4), np.uint8))
    write(photos / "mask" / "06.png", subject_mask())
    found = read_photographs(photos)
    assert [photograph.name for photograph in found[-2:]] == ["05.jpg", "06.png"]
    assert (found[-1].image == 255).all()


def test_a_photograph_without_mask_is_left_out_with_a_warning(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    (photos / "mask" / "01.png").unlink()
    with caplog.at_level(logging.WARNING):
        found = read_photographs(photos)
    assert [photograph.name for photograph in found] == ["00.png", "02.png"]
    assert "01.png" in caplog.text


def test_what_cannot_be_used_is_named(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        read_photographs(tmp_path / "nowhere")
    mask = photos / "mask" / "01.png"
    write(mask, subject_mask(41, 30))
    with pytest.raises(InputError, match=r"01\.png: 41x30 pixels.*40x30"):
        read_photographs(photos)
    write(mask, np.zeros((30, 40), np.uint8))
    with pytest.raises(InputError, match=r"01\.png: the mask is empty"):
        read_photographs(photos)
    mask.write_bytes((photos / "mask" / "00.png").read_bytes()[:40])
    with pytest.raises(InputError, match=r"01\.png: not a picture"):
        read_photographs(photos)
    for file in (photos / "mask").iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"no photograph has a mask.*00\.png"):
        read_photographs(photos)
    (photos / "mask").rmdir()
    with pytest.raises(InputError, match=r"mask is missing"):
        read_photographs(photos)


def test_missing_and_empty_image_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="image is missing"):
        read_photographs(tmp_path)
    (tmp_path / "image").mkdir()
    with pytest.raises(InputError, match="holds no photographs"):
        read_photographs(tmp_path)


def test_two_photographs_of_one_name_are_refused(photos: Path) -> None:
    write(photos / "image" / "00.jpg", np.zeros((30, 40, 3), np.uint8))
    with pytest.raises(InputError, match="two photographs are named 00"):
        read_photographs(photos)


@given(
    width=st.integers(8, 90), height=st.integers(8, 90), corner=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    extent=st.tuples(st.floats(0, 1), st.floats(0, 1)), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_view_shows_the_whole_subject_under_its_hole(
    width: int, height: int, corner: tuple[float, float], extent: tuple[float, float], seed: int
) -> None:
    x0, y0 = int(corner[0] * (width - 1)), int(corner[1] * (height - 1))
    x1, y1 = x0 + 1 + int(extent[0] * (width - x0 - 1)), y0 + 1 + int(extent[1] * (height - y0 - 1))
    subject = np.zeros((height, width), bool)
    subject[y0:y1, x0:x1] = True
    image = np.where(subject, 255, 0).astype(np.uint8)[..., None].repeat(3, 2)
    view = draw_view(np.random.default_rng(seed), Photograph(image, subject, "x"), 32)
    assert view.image.shape == (32, 32, 3)
    assert view.hole.shape == (32, 32)
    assert view.hole.any()
    assert view.sharp_side >= max(x1 - x0, y1 - y0)
    touches_edge = x0 == 0 or y0 == 0 or x1 == width or y1 == height
    if not touches_edge and max(x1 - x0, y1 - y0) >= 4:  # nothing of the subject lies outside the hole
        assert view.image[..., 0][~view.hole].max(initial=0) < 200


def test_equal_seeds_draw_equal_views(photos: Path) -> None:
    photograph = read_photographs(photos)[0]
    first, second, other = (draw_view(np.random.default_rng(seed), photograph, 64) for seed in (1, 1, 2))
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.hole, second.hole)
    assert not np.array_equal(first.hole, other.hole)


def test_random_holes_cover_the_subject_and_grow_as_the_reference_says() -> None:
    subject = np.zeros((128, 128), bool)
    subject[50:80, 40:80] = True
    ratios = []
    for seed in range(40):
        hole = random_hole(np.random.default_rng(seed), subject)
        assert (hole & subject).sum() == subject.sum()
        x0, y0, x1, _ = box_of(hole)
        ratios.append((x1 - x0) / 40)
        assert x0 <= 40
        assert y0 <= 50
    assert 1.05 < min(ratios) < 1.3
    assert 1.6 < max(ratios) < 2.6


def test_a_latent_cell_counts_when_any_pixel_is_masked() -> None:
    hole = np.zeros((16, 24), bool)
    hole[7, 8] = True
    assert latent_mask(hole).tolist() == [[0, 1, 0], [0, 0, 0]]


def test_articles() -> None:
    assert (article("sks"), article("orange")) == ("a", "an")
