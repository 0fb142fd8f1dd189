"""Masks as people have them, and pictures that are none."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.masks import looks_drawn, marked_share, mask_from_alpha, read_mask
from dreammix_trt.core.pictures import read_image

HEIGHT, WIDTH = 60, 90
MASK = np.zeros((HEIGHT, WIDTH), np.uint8)
MASK[20:40, 30:70] = 255
FULL = np.full((HEIGHT, WIDTH), 255, np.uint8)


def make_photo() -> np.ndarray:
    """Something like a photograph: soft shapes, many colours, some noise."""
    rng = np.random.default_rng(4)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    colours = [120 + 80 * np.sin(x / 9 + y / 14), 40 + 2 * x, 200 - 2.5 * y]
    return np.clip(np.stack(colours, 2) + rng.normal(0, 3, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)


PHOTO = make_photo()
PICTURE = read_image(PHOTO)


def grey(mask: np.ndarray) -> np.ndarray:
    return mask[..., None].repeat(3, 2)


def layers(rgb: np.ndarray, alpha: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([rgb, alpha]))


def clear_corners(mask: np.ndarray) -> np.ndarray:
    """An alpha whose corners are transparent, as designers' tools round them."""
    alpha = np.full_like(mask, 255)
    for rows in (slice(0, 8), slice(-8, None)):
        for columns in (slice(0, 8), slice(-8, None)):
            alpha[rows, columns] = 0
    return alpha


def make_masks() -> dict[str, Image.Image | np.ndarray]:
    one = Image.fromarray(MASK)
    blue = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    blue[..., 2] = MASK
    red = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    red[..., 0] = np.where(MASK, 200, 0)
    return {
        "L": one,
        "1": one.convert("1"),
        "palette": one.convert("P"),
        "painted blue": Image.fromarray(blue),
        "red on black": Image.fromarray(red),
        "a dark brush on a clear layer": layers(np.full((HEIGHT, WIDTH, 3), 40, np.uint8), MASK),
        "a brush on a layer that is black where it is clear": layers(
            grey(np.where(MASK, 60, 0).astype(np.uint8)), MASK
        ),
        "opaque": layers(grey(MASK), FULL),
        "rounded corners": layers(grey(MASK), clear_corners(MASK)),
        "rounded corners, white beneath": layers(
            grey(np.where(clear_corners(MASK) > 0, MASK, 255).astype(np.uint8)), clear_corners(MASK)
        ),
        "white, black made clear": layers(np.full((HEIGHT, WIDTH, 3), 255, np.uint8), MASK),
        "a brush at 50 %": layers(np.full((HEIGHT, WIDTH, 3), 90, np.uint8), MASK // 2),
        "a layer at 40 %": layers(grey(MASK), np.full_like(MASK, 102)),
        "16 bit": Image.fromarray(MASK.astype(np.uint16) * 257),
        "16 bit, black is 3000": Image.fromarray(np.where(MASK, 65535, 3000).astype(np.uint16)),
        "16 bit, white is 255": Image.fromarray(MASK.astype(np.uint16)),
        "32 bit integers of 16": Image.fromarray(MASK.astype(np.int32) * 257),
        "array": MASK,
        "bool": MASK > 0,
        "the picture, erased": layers(np.where(MASK[..., None], 0, PHOTO).astype(np.uint8), 255 - MASK),
        "the picture, erased but kept beneath": layers(PHOTO, 255 - MASK),
    }


@pytest.mark.parametrize("kind", list(make_masks()))
def test_masks_of_every_kind(kind: str) -> None:
    np.testing.assert_array_equal(read_mask(make_masks()[kind], PICTURE) > 127, MASK > 127)


def test_masks_of_files(tmp_path: Path) -> None:
    """Lossy files, deep ones and small palettes, as they come from a disk."""
    one = Image.fromarray(MASK)
    one.save(tmp_path / "m.jpg", quality=80)
    one.save(tmp_path / "m.bmp")
    one.convert("RGB").save(tmp_path / "m.webp", quality=80)
    one.convert("1").save(tmp_path / "m.gif")
    Image.fromarray(np.where(MASK, 65535, 3000).astype(np.uint16)).save(tmp_path / "m.png")
    Image.fromarray(np.where(MASK, 65535, 3000).astype(np.uint16)).save(tmp_path / "m.tif")
    (tmp_path / "m.pgm").write_bytes(b"P5\n90 60\n65535\n" + (MASK.astype(">u2") * 257).tobytes())
    for file in tmp_path.iterdir():
        marked = read_mask(file, PICTURE) > 127
        assert (marked != (MASK > 127)).mean() < 0.01, file.name
        assert abs(marked_share(read_mask(file, PICTURE)) - 800 / 5400) < 0.01, file.name


def test_masks_in_memory() -> None:
    picture = read_image(np.full((HEIGHT, WIDTH, 3), 9, np.uint8))
    for mask in (MASK / 255, MASK > 127, MASK[None].astype(np.float16) / 255):
        np.testing.assert_array_equal(read_mask(mask, picture), MASK)
    with pytest.raises(InputError, match=r"^mask_image is not a picture"):
        read_mask(b"no picture", picture)


def test_an_erased_picture_is_recognised_after_lossy_saving(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "photo.jpg", quality=90)
    layers(PHOTO, 255 - MASK).save(tmp_path / "erased.webp", quality=80)
    picture = read_image(tmp_path / "photo.jpg")
    with caplog.at_level(logging.WARNING):
        assert ((read_mask(tmp_path / "erased.webp", picture) > 127) != (MASK > 127)).mean() < 0.01
    assert "erased.webp' is the picture with a part erased: what is transparent is repainted" in caplog.text


def test_in_training_a_cut_out_shows_the_subject() -> None:
    for hidden in (PHOTO, np.where(MASK[..., None], PHOTO, 0).astype(np.uint8)):
        for rgb in (hidden, np.clip(hidden * 0.7, 0, 255).astype(np.uint8)):  # also when its colours were edited
            mask = read_mask(layers(rgb, MASK), PICTURE, of_subject=True)
            np.testing.assert_array_equal(mask, MASK)


def test_a_soft_mask_with_clear_corners_is_painted_and_not_a_photograph() -> None:
    soft = np.asarray(Image.fromarray(MASK).filter(ImageFilter.GaussianBlur(12)))
    mask = read_mask(layers(grey(soft), clear_corners(MASK)), PICTURE)
    np.testing.assert_array_equal(mask > 127, soft > 127)


def test_the_pictures_own_transparency() -> None:
    picture = read_image(layers(PHOTO, 255 - MASK))
    np.testing.assert_array_equal(read_mask(None, picture), MASK)
    np.testing.assert_array_equal(mask_from_alpha(picture, of_subject=True), 255 - MASK)
    with pytest.raises(InputError, match=r"image has no transparency.*give a mask"):
        read_mask(None, PICTURE)
    with pytest.raises(InputError, match="nowhere more than half transparent"):
        read_mask(None, read_image(layers(PHOTO, FULL)))
    with pytest.raises(InputError, match="transparent everywhere"):
        read_mask(None, read_image(layers(PHOTO, FULL * 0)))


def test_bad_masks() -> None:
    with pytest.raises(InputError, match=r"80x60 but the image is 90x60.*of the image's size"):
        read_mask(MASK[:, :80], PICTURE)
    with pytest.raises(InputError, match=r"60x90 but the image is 90x60.*as it lies in the file"):
        read_mask(MASK.T, PICTURE)
    with pytest.raises(InputError, match="repaints nothing: its brightest value is 0"):
        read_mask(MASK * 0, PICTURE)
    with pytest.raises(InputError, match="brightest value is 1"):
        read_mask(MASK // 255, PICTURE)
    with pytest.raises(InputError, match="is the picture itself, without a transparent part"):
        read_mask(PHOTO, PICTURE)
    with pytest.raises(InputError, match=r"a transparent part, but not this picture.*--mask-from-alpha"):
        read_mask(layers(PHOTO[::-1], 255 - MASK), PICTURE)
    for paint in (255, 0, (255, 0, 200)):  # in an editor's colour, or a cut-out that lost its transparency
        for where in (MASK > 0, MASK == 0):
            with pytest.raises(InputError, match="the picture with a part painted over"):
                read_mask(np.where(where[..., None], paint, PHOTO).astype(np.uint8), PICTURE)
    with pytest.raises(InputError, match="looks like a photograph and its picture like a mask: exchange them"):
        read_mask(PHOTO, read_image(MASK))
    red_on_white = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    red_on_white[MASK > 0] = (255, 0, 0)
    with pytest.raises(InputError, match="all equally bright"):
        read_mask(red_on_white, PICTURE)


def test_a_picture_that_is_drawn_may_be_its_own_mask() -> None:
    drawing = read_image(grey(MASK))
    np.testing.assert_array_equal(read_mask(MASK, drawing), MASK)


def test_masks_are_told_from_photographs() -> None:
    assert not looks_drawn(PICTURE)
    assert looks_drawn(read_image(MASK))
    assert looks_drawn(read_image(np.asarray(Image.fromarray(MASK).filter(ImageFilter.GaussianBlur(1)))))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PHOTO).save(tmp_path / "i.png", exif=exif)
    Image.fromarray(MASK).save(tmp_path / "m.png", exif=exif)
    picture = read_image(tmp_path / "i.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", picture), np.rot90(MASK, -1))


def test_one_pixel() -> None:
    assert read_mask(np.full((1, 1), 255, np.uint8), read_image(PHOTO[:1, :1])).tolist() == [[255]]
