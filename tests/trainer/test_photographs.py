"""Folders of photographs as people have them: what is read, what is left out, what is asked about."""

from __future__ import annotations

import logging
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreammix_trt.core.errors import InputError
from dreammix_trt.trainer.photographs import Album, PhotographFile, read_photographs

WIDTH, HEIGHT = 40, 30
SUBJECT = np.zeros((HEIGHT, WIDTH), np.uint8)
SUBJECT[8:20, 10:25] = 255


def write(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def photo(seed: int = 0) -> np.ndarray:
    """Something like a photograph, another for every seed."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    colours = [90 + 70 * np.sin(x / 9 + seed), 40 + 4 * x, 200 - 5 * y + 0 * seed]
    noise = np.random.default_rng(seed).normal(0, 3, (HEIGHT, WIDTH, 3))
    return np.clip(np.stack(colours, 2) + 30 * (seed % 3) + noise, 0, 255).astype(np.uint8)


def fill(folder: Path, count: int = 3) -> Path:
    """Photographs and masks in the authors' layout."""
    for index in range(count):
        write(folder / "image" / f"{index:02d}.png", photo(index))
        write(folder / "mask" / f"{index:02d}.png", SUBJECT)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return fill(tmp_path)


def read_names(folder: Path) -> list[str]:
    return [file.name for file in read_photographs(folder)]


def check_all(folder: Path, *names: str) -> None:
    """These photographs, each with the subject where it is."""
    files = read_photographs(folder)
    assert [file.name for file in files] == list(names)
    for file in files:
        assert ((file.read().subject) == (SUBJECT > 127)).mean() > 0.99, file


def test_photographs_are_read_in_order_with_their_masks(photos: Path) -> None:
    (photos / "image" / "notes.txt").write_text("not a photograph")
    found = read_photographs(photos)
    assert [file.name for file in found] == ["00.png", "01.png", "02.png"]
    photograph = found[0].read()
    assert photograph.image.shape == (30, 40, 3)
    assert photograph.box == (10, 8, 25, 20)


def test_jpeg_goes_with_a_png_mask_and_transparency_becomes_white(photos: Path) -> None:
    write(photos / "image" / "05.jpg", np.full((30, 40, 3), 9, np.uint8))
    write(photos / "mask" / "05.png", SUBJECT)
    write(photos / "image" / "06.png", np.zeros((30, 40, 4), np.uint8))
    write(photos / "mask" / "06.png", SUBJECT)
    found = read_photographs(photos)
    assert [file.name for file in found[-2:]] == ["05.jpg", "06.png"]
    assert (found[-1].read().image == 255).all()


def test_a_photograph_without_mask_is_left_out_with_a_warning(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    (photos / "mask" / "01.png").unlink()
    with caplog.at_level(logging.WARNING):
        assert read_names(photos) == ["00.png", "02.png"]
    assert "left out (it has no mask): 01.png" in caplog.text


def test_what_cannot_be_used_is_named(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        read_photographs(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"00\.png: is a file; give the folder"):
        read_photographs(photos / "image" / "00.png")
    mask = photos / "mask" / "01.png"
    write(mask, np.zeros((30, 41), np.uint8))
    with pytest.raises(InputError, match=r"01\.png' is 41x30.*40x30"):
        read_photographs(photos)
    write(mask, np.zeros((30, 40), np.uint8))
    with pytest.raises(InputError, match=r"01\.png' is empty.*paint the subject white"):
        read_photographs(photos)
    mask.write_bytes((photos / "mask" / "00.png").read_bytes()[:40])
    with pytest.raises(InputError, match=r"01\.png' is (damaged|not a picture)"):
        read_photographs(photos)
    for file in (photos / "mask").iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"no photograph has a mask.*00\.png.*--segment"):
        read_photographs(photos)
    (photos / "mask").rmdir()
    with pytest.raises(InputError, match=r"mask: no photograph has a mask.*--segment"):
        read_photographs(photos)


def test_missing_and_empty_image_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no photographs"):
        read_photographs(tmp_path)
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "clip.mov").write_bytes(b"")
    with pytest.raises(InputError, match=r"image holds no photographs.*a video.*clip\.mov"):
        read_photographs(tmp_path)


# -- names


def test_what_is_left_out_is_named_with_its_reason(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("._00.png", ".DS_Store", "00.txt", "clip.mov", "IMG.CR2", "design.psd", "what.ever"):
        (photos / "image" / name).write_bytes(b"\0\5\x16\7")
    (photos / "mask" / "._00.png").write_bytes(b"\0\5\x16\7")
    (photos / "image" / "old").mkdir()
    (photos / "image" / "gone.jpg").symlink_to(photos / "nowhere.jpg")
    write(photos / "mask" / "00.jpg", SUBJECT)
    write(photos / "mask" / "77.png", SUBJECT)
    write(photos / "stray.jpg", photo())
    with caplog.at_level(logging.WARNING):
        assert read_names(photos) == ["00.png", "01.png", "02.png"]
    for text in (
        "(a side file of macOS, no picture): ._00.png, ._00.png",
        "(a system's file): .DS_Store",
        "(captions of other trainers are not read; give --prompt): 00.txt",
        "(a video; save some of its frames as pictures): clip.mov",
        "(a camera's raw file; export it as JPEG): IMG.CR2",
        "(an editor's file; export it as PNG): design.psd",
        "(not a picture that is read): what.ever",
        "(a folder, which is not searched): old",
        "(no photograph has its name): 77.png",
        "(a second mask of its photograph): 00.jpg",
        "(a link that leads nowhere): gone.jpg",
        "(it lies beside image/, not in it): stray.jpg",
    ):
        assert text in caplog.text


def test_names_are_equal_whatever_their_spelling(tmp_path: Path) -> None:
    """A Mac writes accents as characters of their own, a camera capitals."""
    write(tmp_path / "image" / unicodedata.normalize("NFC", "café.png"), photo(0))
    write(tmp_path / "mask" / unicodedata.normalize("NFD", "café.png"), SUBJECT)
    write(tmp_path / "image" / "IMG_1.JPG", photo(1))
    write(tmp_path / "mask" / "img_1.png", SUBJECT)
    check_all(tmp_path, "IMG_1.JPG", "café.png")


def test_names_that_differ_in_case_alone_keep_their_own_masks(tmp_path: Path) -> None:
    other = np.roll(SUBJECT, 9, 1)
    for name, mask in (("a.png", SUBJECT), ("A.png", other)):
        write(tmp_path / "image" / name, photo(len(name)))
        write(tmp_path / "mask" / name, mask)
    found = {file.name: file.read().subject for file in read_photographs(tmp_path)}
    assert (found["a.png"] == (SUBJECT > 0)).all() and (found["A.png"] == (other > 0)).all()


@pytest.mark.parametrize(
    "mask",
    [
        *("mask/7.jpg", "mask/7.webp", "masks/7.png", "mask/7_mask.png", "mask/7.jpg.png", "image/7_mask.png"),
        *("Masks/7.png", "image/mask_7.png", "image/7.out.png", "image/7_matte.png", "mask/image/7.png"),
    ],
)
def test_masks_by_every_name(tmp_path: Path, mask: str) -> None:
    write(tmp_path / "image" / "7.jpg", photo())
    write(tmp_path / mask, SUBJECT)
    check_all(tmp_path, "7.jpg")
    check_all(tmp_path / "image", "7.jpg")  # who gives the folder of the photographs themselves


@pytest.mark.parametrize("ending", ["_mask", "-mask", ".mask", "-masklabel", "_MASK"])
@pytest.mark.parametrize("folder", ["", "10_sks mug", "img/10_sks mug"])
def test_flat_folders_and_those_of_other_trainers(
    tmp_path: Path, folder: str, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    for index in range(2):
        write(tmp_path / folder / f"IMG_{index}.jpg", photo(index))
        write(tmp_path / folder / f"IMG_{index}{ending}.png", SUBJECT)
        (tmp_path / folder / f"IMG_{index}.txt").write_text("sks mug, on a table")
    with caplog.at_level(logging.WARNING):
        check_all(tmp_path, "IMG_0.jpg", "IMG_1.jpg")
    assert "left out (captions" in caplog.text
    check_all(tmp_path / folder, "IMG_0.jpg", "IMG_1.jpg")


def test_folders_of_several_subjects_are_asked_about(tmp_path: Path) -> None:
    for folder in ("10_sks mug", "5_ohwx cup"):
        write(tmp_path / folder / "0.jpg", photo())
    with pytest.raises(InputError, match=r"several subjects \(10_sks mug, 5_ohwx cup\)"):
        read_photographs(tmp_path)


@pytest.mark.parametrize("suffix", ["bmp", "tif", "gif", "webp", "avif", "jpeg", "JPG", "jfif", "ppm"])
def test_photographs_of_every_format(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "image" / f"0.{suffix}", photo())
    write(tmp_path / "mask" / "0.png", SUBJECT)
    check_all(tmp_path, f"0.{suffix}")


# -- one name, two pictures


def test_one_picture_in_two_formats_is_taken_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    big = np.asarray(Image.fromarray(photo()).resize((80, 60)))
    write(tmp_path / "image" / "IMG_0.PNG", big)
    write(tmp_path / "image" / "IMG_0.JPG", photo())
    write(tmp_path / "mask" / "IMG_0.png", SUBJECT)
    with caplog.at_level(logging.WARNING):
        check_all(tmp_path, "IMG_0.JPG")  # the mask has its size
    assert "(the same picture as IMG_0.JPG): IMG_0.PNG" in caplog.text


def test_two_photographs_of_one_name_are_refused_unless_each_has_a_mask(photos: Path) -> None:
    write(photos / "image" / "00.jpg", photo(7)[::-1])
    with pytest.raises(InputError, match=r"two photographs are named 00 \(00\.jpg and 00\.png\).*rename"):
        read_photographs(photos)
    write(photos / "mask" / "00.jpg.png", SUBJECT)
    write(photos / "mask" / "00.png.png", SUBJECT)
    assert read_names(photos) == ["00.jpg", "00.png", "01.png", "02.png"]


@pytest.mark.parametrize("kind", ["mask", "cut-out"])
def test_a_mask_beside_its_photograph_under_the_same_name(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "0.jpg", photo())
    write(tmp_path / "0.png", SUBJECT if kind == "mask" else np.dstack([photo(), SUBJECT]))
    check_all(tmp_path, "0.jpg")


# -- masks


def test_masks_mean_the_same_as_for_inpaint(tmp_path: Path) -> None:
    red = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    red[..., 0] = SUBJECT
    deep = np.where(SUBJECT, 65535, 3000).astype(np.uint16)
    masks = {
        "red": red,
        "deep": deep,
        "low": SUBJECT.astype(np.uint16),
        "cut-out": np.dstack([np.where(SUBJECT[..., None], photo(3), 0).astype(np.uint8), SUBJECT]),
        "kept beneath": np.dstack([photo(4), SUBJECT]),
        "brush": np.dstack([np.full((HEIGHT, WIDTH, 3), 20, np.uint8), SUBJECT]),
    }
    for index, (name, mask) in enumerate(masks.items()):
        write(tmp_path / "image" / f"{name}.png", photo(index))
        write(tmp_path / "mask" / f"{name}.png", mask)
    check_all(tmp_path, *sorted(f"{name}.png" for name in masks))


def test_deep_photographs_are_not_white(photos: Path) -> None:
    deep = photo(0)[..., 0].astype(np.uint16) * 257
    write(photos / "image" / "00.png", deep)
    image = read_photographs(photos)[0].read().image
    np.testing.assert_array_equal(image[..., 0], photo(0)[..., 0])


def test_a_cut_out_is_its_own_mask(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "0.png", np.dstack([photo(), SUBJECT]))
    write(tmp_path / "1.png", photo(1))
    with caplog.at_level(logging.WARNING):
        check_all(tmp_path, "0.png")
    assert "(it has no mask): 1.png" in caplog.text
    assert (read_photographs(tmp_path)[0].read().image[0, 0] == 255).all()


def test_inverted_masks_are_asked_about(tmp_path: Path) -> None:
    fill(tmp_path)
    for index in range(3):
        write(tmp_path / "mask" / f"{index:02d}.png", 255 - SUBJECT)
    with pytest.raises(InputError, match=r"mark 85 % of every photograph.*--invert-masks.*--large-masks"):
        read_photographs(tmp_path)
    for file in read_photographs(tmp_path, invert_masks=True):
        np.testing.assert_array_equal(file.read().subject, SUBJECT > 0)
    assert len(read_photographs(tmp_path, large_masks=True)) == 3
    fill(tmp_path)
    with pytest.raises(InputError, match=r"mark 85 % of every photograph.*omit --invert-masks"):
        read_photographs(tmp_path, invert_masks=True)


def test_some_large_masks_are_only_said(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(photos / "mask" / "01.png", 255 - SUBJECT)
    with caplog.at_level(logging.WARNING):
        assert len(read_photographs(photos)) == 3
    assert "masks that mark more than 60 %: 01.png" in caplog.text


def test_an_exchanged_pair_is_asked_about(photos: Path) -> None:
    write(photos / "image" / "02.png", SUBJECT)
    write(photos / "mask" / "02.png", photo(2))
    with pytest.raises(InputError, match=r"image/02\.png looks like a mask and .*mask/02\.png like a photograph: exch"):
        read_photographs(photos)


def test_a_photograph_in_the_place_of_its_mask_is_refused(photos: Path) -> None:
    write(photos / "mask" / "02.png", photo(2))
    with pytest.raises(InputError, match=r"02\.png' is the picture itself"):
        read_photographs(photos)


# -- memory


def test_photographs_stay_files(tmp_path: Path) -> None:
    """What a training holds of 200 photographs is names; decoded ones are bounded, and the same ones stay."""
    side = 400
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    mask = np.zeros((side, side), np.uint8)
    mask[100:200, 100:200] = 255
    for index in range(6):
        write(tmp_path / "image" / f"{index}.bmp", image)
        write(tmp_path / "mask" / f"{index}.bmp", mask)
    tracemalloc.start()
    try:
        files = read_photographs(tmp_path)
        held, _ = tracemalloc.get_traced_memory()
        assert held < 200_000  # 6 decoded ones would be 3.8 million
        one = 4 * side * side
        album = Album(files, kept_bytes=2 * one)
        tracemalloc.reset_peak()
        for number in range(18):
            assert album.open(number).name == f"{number % 6}.bmp"
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 2 * one <= held < 2.2 * one
    assert peak < 12 * one  # what reading one of them takes, and the two that stay
    assert album.open(0) is album.open(6) and album.open(5) is not album.open(5)


def test_a_photograph_that_vanished_is_named(photos: Path) -> None:
    files = read_photographs(photos)
    (photos / "image" / "01.png").unlink()
    assert isinstance(files[1], PhotographFile)
    with pytest.raises(InputError, match=r"01\.png.*no such file"):
        Album(files).open(1)


def test_what_is_said_of_a_photograph_is_said_once(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(photo(9)).convert("CMYK").save(photos / "image" / "00.jpg", quality=100)
    (photos / "image" / "00.png").unlink()
    with caplog.at_level(logging.WARNING):
        album = Album(read_photographs(photos), kept_bytes=0)
        for number in range(4):
            album.open(number)
    assert [text for text in caplog.messages if "00.jpg' is CMYK without a colour profile" in text] == caplog.messages
    assert len(caplog.messages) == 1
