"""Depths, colour profiles, EXIF and resolution: what holds for a result goes with it."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.pictures import read_image, readable_formats, readable_suffixes
from dreammix_trt.engine.result import write_picture

RNG = np.random.default_rng(6)
RGB = RNG.integers(0, 256, (12, 18, 3), np.uint8)
GREY = RNG.integers(0, 256, (12, 18), np.uint8)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def make_profile(space: bytes, *tags: tuple[bytes, bytes]) -> bytes:
    """An ICC profile (version 2) with a header for `space` and some tags."""
    table, body, at = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags:
        data += b"\0" * (-len(data) % 4)
        table += struct.pack(">4sII", name, at + len(body), len(data))
        body += data
    white = struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)  # D50
    head = b"\0" * 4 + b"lcms" + b"\x02\x10\0\0" + b"prtr" + space + b"Lab " + b"\0" * 12 + b"acsp" + b"\0" * 28
    head += white + b"\0" * 48
    whole = head[4:] + table + body
    return struct.pack(">I", len(whole) + 4) + whole


def make_cmyk_profile() -> bytes:
    """A press whose inks are no colours: only black counts, and paper is L = 80."""
    corners = b""
    for number in range(16):  # c, m, y, k: k runs fastest
        corners += bytes([0 if number % 2 else 204, 128, 128])  # 8-bit Lab
    ramp = bytes(range(256))
    matrix = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x10000)
    table = b"mft1" + b"\0" * 4 + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + corners + ramp * 3
    text = b"desc" + b"\0" * 4 + struct.pack(">I", 5) + b"test\0" + b"\0" * 78
    return make_profile(b"CMYK", (b"desc", text), (b"A2B0", table), (b"A2B1", table))


GREY_PROFILE = make_profile(b"GRAY")


def save_deep_colour(path: Path, values: np.ndarray) -> None:
    """Write a PNG of 16 bits a channel, uint16 (H, W, 3 or 4), which Pillow cannot."""
    height, width, bands = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if bands == 3 else 6, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(make_chunk(*each) for each in chunks))


def make_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def add_chunk(path: Path, kind: bytes, body: bytes) -> None:
    """Put a chunk behind a PNG's header."""
    data = path.read_bytes()
    path.write_bytes(data[:33] + make_chunk(kind, body) + data[33:])


def test_sixteen_bit_grey_keeps_its_range_and_its_profile(tmp_path: Path) -> None:
    deep = Image.fromarray(GREY.astype(np.uint16) * 256 + 128)
    for name in ("g.png", "g.tif"):
        deep.save(tmp_path / name, icc_profile=GREY_PROFILE)
        picture = read_image(tmp_path / name)
        np.testing.assert_array_equal(picture.rgb[..., 0], GREY)
        assert picture.grey and picture.icc_profile == GREY_PROFILE


def test_eight_bit_values_in_a_deep_file_are_recognised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(GREY.astype(np.uint16)).save(tmp_path / "g.png")
    save_deep_colour(tmp_path / "c.png", RGB.astype(np.uint16))
    alpha = np.full((12, 18, 1), 255, np.uint8)
    save_deep_colour(tmp_path / "a.png", np.dstack([RGB, alpha]).astype(np.uint16))
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(read_image(tmp_path / "g.png").rgb[..., 0], GREY)
        np.testing.assert_array_equal(read_image(tmp_path / "c.png").rgb, RGB)
        np.testing.assert_array_equal(read_image(tmp_path / "a.png").rgb, RGB)
    assert caplog.text.count("read as 8-bit values") == 3
    save_deep_colour(tmp_path / "full.png", RGB.astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_image(tmp_path / "full.png").rgb, RGB)
    save_deep_colour(tmp_path / "black.png", RGB.astype(np.uint16) * 0)
    assert not read_image(tmp_path / "black.png").rgb.any()


def test_deep_integers_and_floats(tmp_path: Path) -> None:
    wide = Image.fromarray(GREY.astype(np.int32) * 257)  # as 16-bit PGM files are read
    np.testing.assert_array_equal(read_image(wide).rgb[..., 0], GREY)
    for bad in (Image.fromarray(GREY.astype(np.int32) * 70000), Image.fromarray(GREY.astype(np.int32) - 300)):
        with pytest.raises(InputError, match="32-bit"):
            read_image(bad)


@pytest.mark.parametrize("kind", ["profile", "text", "plain text"])
def test_chunks_beyond_pillows_limit(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(RGB).save(tmp_path / "p.png")
    large = SRGB + b"\0" * (3 << 20)
    bodies = {
        "profile": (b"iCCP", b"name\0\0" + zlib.compress(large)),
        "text": (b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (3 << 20))),
        "plain text": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"<x>" * (1 << 20))),
    }
    add_chunk(tmp_path / "p.png", *bodies[kind])
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"), Image.open(tmp_path / "p.png") as image:
        image.load()  # the limit is there
    with caplog.at_level(logging.WARNING):
        picture = read_image(tmp_path / "p.png")
    np.testing.assert_array_equal(picture.rgb, RGB)
    assert picture.icc_profile == (large if kind == "profile" else None)
    assert ("p.png" in caplog.text and "text is absurdly large" in caplog.text) == (kind != "profile")


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_a_grey_profile_is_not_written_to_colours(tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    image = Image.new(mode, (8, 8))
    image.info["icc_profile"] = GREY_PROFILE
    kept = {}
    for suffix in (".png", ".jpg", ".webp"):
        write_picture(image, tmp_path / f"o{suffix}")
        with Image.open(tmp_path / f"o{suffix}") as written:
            kept[suffix] = written.info.get("icc_profile")
    assert kept == {".png": GREY_PROFILE, ".jpg": GREY_PROFILE, ".webp": None}
    assert "a WebP has no grey: its colour profile is for 'GRAY' values, but it has 'RGB'" in caplog.text


def test_a_bomb_of_a_profile_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(RGB).save(tmp_path / "p.png")
    add_chunk(tmp_path / "p.png", b"iCCP", b"name\0\0" + zlib.compress(b"\0" * (64 << 20)))
    with caplog.at_level(logging.WARNING):
        assert read_image(tmp_path / "p.png").icc_profile is None
    assert "profile is absurdly large" in caplog.text


def test_a_palette_with_a_grey_profile_becomes_grey(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grey = Image.fromarray(GREY).convert("P")
    grey.save(tmp_path / "grey.png", icc_profile=GREY_PROFILE)
    picture = read_image(tmp_path / "grey.png")
    out = picture.with_pixels(picture.rgb)
    assert out.mode == "L" and out.info["icc_profile"] == GREY_PROFILE
    np.testing.assert_array_equal(np.asarray(out), GREY)
    Image.fromarray(RGB).quantize(16).save(tmp_path / "colour.png", icc_profile=GREY_PROFILE)
    with caplog.at_level(logging.WARNING):
        picture = read_image(tmp_path / "colour.png")
    assert picture.with_pixels(picture.rgb).mode == "RGB" and picture.icc_profile is None
    assert "its colour profile is for 'GRAY' values, but it has 'RGB'" in caplog.text
    Image.fromarray(RGB).quantize(16).save(tmp_path / "colour.png", icc_profile=SRGB)
    assert read_image(tmp_path / "colour.png").icc_profile == SRGB


def test_cmyk_goes_through_its_profile(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inks = np.zeros((12, 18, 4), np.uint8)
    inks[:6, :, 0], inks[6:, :, 3] = 255, 255
    image = Image.fromarray(inks, "CMYK")
    image.save(tmp_path / "press.tif", icc_profile=make_cmyk_profile())
    picture = read_image(tmp_path / "press.tif")
    assert picture.icc_profile is None  # the pixels are sRGB now
    cyan, black = picture.rgb[0, 0].astype(int), picture.rgb[-1, 0].astype(int)
    assert np.ptp(cyan) <= 2 and 190 <= cyan[0] <= 205  # L = 80, no colour: by the profile and not by Pillow's formula
    assert black.max() <= 3
    assert not caplog.text
    image.save(tmp_path / "plain.tif")
    with caplog.at_level(logging.WARNING):
        assert tuple(read_image(tmp_path / "plain.tif").rgb[0, 0]) == (0, 255, 255)
    assert "CMYK without a colour profile" in caplog.text
    image.save(tmp_path / "bad.tif", icc_profile=b"nothing of the kind")
    with caplog.at_level(logging.WARNING):
        assert tuple(read_image(tmp_path / "bad.tif").rgb[0, 0]) == (0, 255, 255)
    assert "its CMYK profile cannot be used" in caplog.text


def make_exif(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Copyright], exif[ExifTags.Base.Artist] = "(c) A. Painter", "A. Painter"
    exif[ExifTags.Base.DateTime], exif[ExifTags.Base.Make] = "2024:05:06 07:08:09", "Camera"
    camera = exif.get_ifd(ExifTags.IFD.Exif)
    camera[ExifTags.Base.DateTimeOriginal], camera[ExifTags.Base.ExifImageWidth] = "2024:05:06 07:08:09", 9999
    camera[ExifTags.Base.MakerNote], camera[ExifTags.Base.UserComment] = b"offsets", b"ASCII\0\0\0Steps: 20"
    exif[ExifTags.IFD.Exif] = camera
    return exif


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_exif_and_resolution_are_kept(tmp_path: Path, suffix: str) -> None:
    given = {"exif": make_exif(), "dpi": (300, 150)}
    Image.fromarray(RGB).save(tmp_path / "in.jpg", **given)
    picture = read_image(tmp_path / "in.jpg")
    assert picture.size == (18, 12)  # turned
    write_picture(picture.with_pixels(picture.rgb), tmp_path / f"out.{suffix}")
    with Image.open(tmp_path / f"out.{suffix}") as out:
        exif = out.getexif()
        camera = exif.get_ifd(ExifTags.IFD.Exif)
        assert exif[ExifTags.Base.Copyright] == "(c) A. Painter" and exif[ExifTags.Base.Artist] == "A. Painter"
        assert camera[ExifTags.Base.DateTimeOriginal] == "2024:05:06 07:08:09"
        assert exif.get(ExifTags.Base.Orientation, 1) == 1
        gone = (ExifTags.Base.MakerNote, ExifTags.Base.UserComment, ExifTags.Base.ExifImageWidth)
        assert not set(gone) & camera.keys()
        if suffix != "webp":  # which has no place for it but EXIF
            assert out.info["dpi"] == pytest.approx((150, 300), abs=0.1)  # the sides were exchanged


def test_tiff_structure_is_no_exif(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "in.tif", dpi=(240, 240), tiffinfo={33432: "(c) me"})
    picture = read_image(tmp_path / "in.tif")
    exif = Image.Exif()
    exif.load(picture.exif)
    assert exif[ExifTags.Base.Copyright] == "(c) me" and 273 not in exif and 258 not in exif
    assert picture.dpi == pytest.approx((240, 240))


def test_a_picture_without_information_gets_none() -> None:
    picture = read_image(RGB)
    assert picture.exif is None and picture.dpi is None and picture.icc_profile is None
    assert picture.with_pixels(RGB).info == {}


def make_photo(side: int = 256) -> np.ndarray:
    """Noise with a falling spectrum, an edge, a saturated patch, and a little grain."""
    rng = np.random.default_rng(7)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1 / side
    values = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, side, side))) / frequency**1.2, (side, side))
    values = values.mean(0) + 0.3 * values
    values = 120 + 50 * values / values.std()
    values[:, 90:160, 60:200] = np.array([200, 30, 20])[:, None, None] + values[:, 90:160, 60:200] * 0.1
    return np.clip(values + rng.normal(0, 1, values.shape), 0, 255).astype(np.uint8).transpose(1, 2, 0).copy()


def test_lossy_formats_keep_what_was_not_repainted(tmp_path: Path) -> None:
    """JPEG is 4:4:4 and at its best; WebP is exact, hidden colours included."""
    photo = make_photo()
    write_picture(Image.fromarray(photo), tmp_path / "o.jpg")
    with Image.open(tmp_path / "o.jpg") as out:
        assert [layer[1:3] for layer in out.layer] == [(1, 1)] * 3  # no chroma is subsampled
        difference = np.abs(np.asarray(out).astype(int) - photo)
    assert (difference > 3).mean() < 5e-4 and difference.max() <= 4
    write_picture(Image.fromarray(np.dstack([photo, photo[..., 0] // 128 * 255])), tmp_path / "o.webp")
    with Image.open(tmp_path / "o.webp") as out:
        np.testing.assert_array_equal(np.asarray(out)[..., :3], photo)


def test_transparency_is_laid_on_white_for_jpeg(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hidden = Image.fromarray(np.dstack([RGB * 0, np.zeros((12, 18), np.uint8)]))
    with caplog.at_level(logging.WARNING):
        write_picture(hidden, tmp_path / "o.jpg")
    with Image.open(tmp_path / "o.jpg") as out:
        assert np.asarray(out).min() == 255
    assert "laid on white" in caplog.text


def test_resolution_that_nobody_gave_is_not_invented(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "i.jpg", exif=make_exif(1))
    Image.fromarray(RGB).save(tmp_path / "i.tif")
    Image.fromarray(RGB).save(tmp_path / "zero.jpg", dpi=(0, 0))
    for file in tmp_path.iterdir():
        assert read_image(file).dpi is None, file.name


@pytest.mark.parametrize(
    "block", [b"II*\0\x08\0\0\0\xff\xff", bytes(range(200)), b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0"]
)
def test_damaged_exif_is_no_reason_to_refuse(tmp_path: Path, block: bytes, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(RGB).save(tmp_path / "i.jpg", exif=b"Exif\0\0" + block, quality=100, subsampling=0)
    with caplog.at_level(logging.WARNING):
        picture = read_image(tmp_path / "i.jpg")
    assert picture.size == (12, 18) and picture.exif is None
    assert ("i.jpg" in caplog.text and "EXIF block is damaged" in caplog.text) == (block[:2] != b"MM")


def test_exif_that_no_jpeg_can_hold_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    exif = make_exif(1)
    exif[ExifTags.Base.ImageDescription] = "x" * 100_000
    Image.fromarray(RGB).save(tmp_path / "i.png", exif=exif)
    with caplog.at_level(logging.WARNING):
        picture = read_image(tmp_path / "i.png")
    assert picture.exif is None and "too large for a JPEG" in caplog.text
    write_picture(picture.with_pixels(picture.rgb), tmp_path / "o.jpg")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_several_pictures_the_first_is_read_and_that_is_said(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (Image.new("RGB", (18, 12), colour) for colour in ((250, 0, 0), (0, 0, 250)))
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second])
    with caplog.at_level(logging.WARNING):
        assert np.abs(read_image(tmp_path / f"a.{suffix}").rgb.astype(int) - (250, 0, 0)).max() <= 6
    assert "holds 2 pictures: the first one is read" in caplog.text


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("<!DOCTYPE html><html>404</html>", "a web page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
        ("<svg xmlns=''/>", "a drawing"),
        ("%PDF-1.4", "a PDF file"),
    ],
)
def test_other_files_are_named_as_what_they_are(tmp_path: Path, text: str, kind: str) -> None:
    (tmp_path / "p.png").write_text(text)
    with pytest.raises(InputError, match=rf"p\.png.*is {kind}.*not a picture"):
        read_image(tmp_path / "p.png")


def test_heic_is_read_where_its_plugin_is(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    photo = Image.fromarray(make_photo(64))
    assert "HEIF" in readable_formats() and ".heic" in readable_suffixes()
    photo.save(tmp_path / "i.heic", quality=95, exif=make_exif(6))
    picture = read_image(tmp_path / "i.heic")
    assert picture.size == (64, 64) and picture.exif is not None


def test_formats_and_suffixes() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif"} <= readable_suffixes()
    assert not {".eps", ".pdf", ".psd", ".txt"} & readable_suffixes()
    assert "EPS" not in readable_formats()


def test_heic_without_its_plugin_says_what_to_install(tmp_path: Path) -> None:
    if "HEIF" in readable_formats():
        pytest.skip("pillow-heif is installed")
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 400)
    with pytest.raises(InputError, match=r"IMG_1\.HEIC.*pip install pillow-heif"):
        read_image(tmp_path / "IMG_1.HEIC")


def test_an_mpo_of_a_phone_is_its_first_picture() -> None:
    buffer = io.BytesIO()
    Image.fromarray(make_photo(64)).save(buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (64, 64))])
    picture = read_image(Image.open(buffer))
    assert np.abs(picture.rgb.astype(int) - make_photo(64)).mean() < 15
