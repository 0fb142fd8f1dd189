"""Pictures of every kind, and the ones that are refused."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreammix_trt.core.errors import InputError, TooManyPixels
from dreammix_trt.core.pictures import read_image, read_size

RNG = np.random.default_rng(3)
RGB = RNG.integers(0, 256, (6, 9, 3), np.uint8)
GREY = RNG.integers(0, 256, (6, 9), np.uint8)
ALPHA = RNG.integers(0, 256, (6, 9), np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
def test_what_comes_in_goes_out_unchanged(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(GREY if mode[0] == "L" else RGB)
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(ALPHA))
    image.save(tmp_path / "in.png")
    for source in (tmp_path / "in.png", str(tmp_path / "in.png"), image):
        picture = read_image(source)
        assert picture.size == (6, 9) and picture.rgb.shape == (6, 9, 3) and picture.rgb.dtype == np.uint8
        back = picture.with_pixels(picture.rgb)
        assert back.mode == mode
        np.testing.assert_array_equal(np.asarray(back), np.asarray(image))


@pytest.mark.parametrize(
    ("array", "mode"), [(RGB, "RGB"), (GREY, "L"), (GREY[..., None], "L"), (np.dstack([RGB, ALPHA]), "RGBA")]
)
def test_arrays(array: np.ndarray, mode: str) -> None:
    back = read_image(array).with_pixels(read_image(array).rgb)
    assert back.mode == mode
    np.testing.assert_array_equal(np.asarray(back), array.squeeze())


def test_other_kinds_become_near_ones() -> None:
    palette = Image.fromarray(RGB).quantize(200)
    np.testing.assert_array_equal(read_image(palette).rgb, np.asarray(palette.convert("RGB")))
    assert read_image(Image.fromarray(RGB).convert("CMYK")).rgb.shape == (6, 9, 3)
    assert read_image(Image.fromarray(GREY > 99)).with_pixels(RGB).mode == "L"
    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_image(deep).rgb[..., 1], GREY)


def test_a_see_through_palette_keeps_its_alpha(tmp_path: Path) -> None:
    palette = Image.fromarray(RGB).quantize(16)
    palette.save(tmp_path / "p.png", transparency=3)
    picture = read_image(tmp_path / "p.png")
    assert picture.alpha is not None and picture.alpha.min() == 0
    assert picture.with_pixels(picture.rgb).mode == "RGBA"


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(RGB).save(tmp_path / "i.png", exif=exif)
    picture = read_image(tmp_path / "i.png")
    np.testing.assert_array_equal(picture.rgb, np.rot90(RGB, -1))


def test_the_colour_profile_is_passed_on(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "i.png", icc_profile=b"profile")
    picture = read_image(tmp_path / "i.png")
    picture.with_pixels(picture.rgb).save(tmp_path / "o.png")
    with Image.open(tmp_path / "o.png") as written:
        assert written.info["icc_profile"] == b"profile"


def make_huge_png() -> bytes:
    """The first bytes of a 20,000 x 20,000 picture: enough to refuse it."""
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    body = b"IHDR" + header
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    data = b"IDAT" + zlib.compress(b"")
    return start + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.png.*no such file"):
        read_image(tmp_path / "nowhere.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(InputError, match=r"text\.png.*not a picture"):
        read_image(tmp_path / "text.png")
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8))
    for name in ("cut.png", "cut.jpg"):
        noise.save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:900])
        with pytest.raises(InputError, match=r"cut\.\w+.*(truncated|damaged)"):
            read_image(tmp_path / name)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"empty\.png"):
        read_image(tmp_path / "empty.png")
    with pytest.raises(InputError, match="is a folder: name a picture in it"):
        read_image(tmp_path)


def test_huge_pictures_are_refused_before_decoding(tmp_path: Path) -> None:
    (tmp_path / "huge.png").write_bytes(make_huge_png())
    with pytest.raises(InputError, match=r"huge\.png.*million pixels|huge\.png.*too many pixels"):
        read_image(tmp_path / "huge.png")
    with pytest.raises(InputError, match="9x6"):
        read_image(RGB, max_pixels=50)
    blank = Image.new("1", (10000, 9500))  # above ours, below Pillow's own
    blank.save(tmp_path / "large.png")
    with pytest.raises(InputError, match="10000x9500, 95 million"):
        read_image(tmp_path / "large.png")


@pytest.mark.parametrize("bad", [RGB.astype(np.float32), RGB.astype(np.int64), RGB[:, :, :2], RGB[:0]])
def test_bad_arrays(bad: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"image is a|image has"):
        read_image(bad)


def test_pictures_in_memory_are_those_of_files(tmp_path: Path) -> None:
    """Encoded bytes, open files, floats and CHW; see also test_sources.py."""
    Image.fromarray(RGB).save(tmp_path / "i.png")
    data = (tmp_path / "i.png").read_bytes()
    with (tmp_path / "i.png").open("rb") as file:
        for source in (data, file, file, io.BytesIO(data), RGB / 255, RGB.transpose(2, 0, 1)):
            np.testing.assert_array_equal(read_image(source).rgb, RGB)
    with pytest.raises(InputError, match=r"^image is not a picture"):
        read_image(b"no picture")
    with pytest.raises(InputError, match=r"^image is damaged"):
        read_image(data[:-30])


def test_bad_kinds() -> None:
    with pytest.raises(InputError, match="32-bit"):
        read_image(Image.fromarray(GREY.astype(np.float32)))
    with pytest.raises(InputError, match="is a list"):
        read_image([[1, 2]])  # type: ignore[arg-type]


def test_one_pixel() -> None:
    assert read_image(RGB[:1, :1]).size == (1, 1)


def test_the_size_is_read_from_the_header_alone() -> None:
    def encode(image: Image.Image, kind: str, **options: object) -> bytes:
        to = io.BytesIO()
        image.save(to, kind, **options)  # type: ignore[arg-type]
        return to.getvalue()

    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"):
        assert read_size(encode(Image.fromarray(RGB), kind)) == (6, 9)
    png = encode(Image.fromarray(RGB), "PNG")
    cut = png[: png.index(b"IDAT") + 4]
    assert read_size(cut) == (6, 9), "no pixel is decoded"
    for bad in (b"", b"no picture", png[:20]):
        with pytest.raises(InputError, match=r"^mask "):
            read_size(bad, name="mask")
    with pytest.raises(TooManyPixels, match="too many pixels"):
        header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + png[24:29]
        read_size(png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:])
    with pytest.raises(TooManyPixels, match="at most"):
        read_image(RGB, max_pixels=50)
