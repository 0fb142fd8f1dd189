"""What a picture says about itself, in every format, and that other programs understand it."""

from __future__ import annotations

import io
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.request import Request, Sampler
from dreammix_trt.engine import Result, read_request, save
from dreammix_trt.engine.imprint import Origin, spell_parameters

REQUEST = Request(
    'a red sks müg, "new": (nice)\nin the sun',
    negative_prompt="bad, ugly",
    substitute=["blue"],
    subject_scale=0.5,
    num_images_per_prompt=2,
)
ORIGIN = Origin("1.2.3", "sdxl, base: 1.0", "ab" * 32, "mug", "cd" * 32)
KINDS = ("png", "jpg", "webp")


def make_result(image: Image.Image | None = None, request: Request = REQUEST) -> Result:
    nothing: Any = None
    images = [image or Image.new("RGB", (64, 48), (9, 8, 7))] * 2
    return Result(images, request, (7, 8), nothing, {}, origin=ORIGIN)


def reopen(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def read_parameters(image: Image.Image) -> str:
    """A1111's text as its image browser finds it."""
    if "parameters" in image.info:
        return str(image.info["parameters"])
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment[:8] == b"UNICODE\x00"
    return str(comment[8:].decode("utf-16-be"))


def parse_parameters(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and settings: lines up to "Negative prompt:", then the last line of NAME: VALUE pairs."""
    *lines, last = text.strip().split("\n")
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt: ")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    return prompt, negative, {name: json.loads(value) if value[:1] == '"' else value for name, value in pairs}


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_carries_the_request_and_what_painted_it(tmp_path: Path, kind: str) -> None:
    result = make_result()
    wanted = REQUEST.replace(seed=8, num_images_per_prompt=1)
    result.save(tmp_path / f"a.{kind}", index=1)
    save(result, tmp_path / f"b.{kind}", index=1)
    data = result.to_bytes(kind, 1)
    assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes() == data
    (tmp_path / "renamed.dat").write_bytes(data)
    with (tmp_path / f"a.{kind}").open("rb") as file:
        for source in (tmp_path / f"a.{kind}", str(tmp_path / "renamed.dat"), data, file):
            assert read_request(source) == wanted
    image = reopen(data)
    prompt, negative, settings = parse_parameters(read_parameters(image))
    assert (prompt, negative) == (REQUEST.prompt, "bad, ugly")
    assert settings == {
        "Steps": "30",
        "Sampler": "DPM++ 2M SDE",
        "Schedule type": "Karras",
        "CFG scale": "4",
        "Seed": "8",
        "Size": "64x48",
        "Denoising strength": "1",
        "Model": "sdxl, base: 1.0",
        "Base hash": "ab" * 8,
        "Subject": "mug",
        "Subject hash": "cd" * 8,
        "Subject scale": "0.5",
        "Version": "dreammix-trt 1.2.3",
    }
    if kind == "png":
        origin, software = json.loads(image.info["dreammix_origin"]), image.info["Software"]
    else:
        exif = image.getexif()
        comment = exif[ExifTags.Base.XPComment].decode("utf-16-le").rstrip("\x00")
        origin, software = json.loads(comment)["dreammix_origin"], exif[ExifTags.Base.Software]
    assert Origin(**origin) == ORIGIN and software == "dreammix-trt 1.2.3"


@pytest.mark.parametrize("kind", KINDS)
def test_without_metadata_there_is_none(tmp_path: Path, kind: str) -> None:
    result = make_result()
    result.save(tmp_path / f"a.{kind}", metadata=False)
    data = (tmp_path / f"a.{kind}").read_bytes()
    assert data == result.to_bytes(kind, metadata=False)
    assert not [word for word in (b"dreammix", b"d\0r\0e\0a\0m", b"Steps", b"Exif", b"tEXt", b"iTXt") if word in data]
    with pytest.raises(InputError, match="carries no request"):
        read_request(data)


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_the_users_exif_stays_beside_ours(kind: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Copyright], exif[ExifTags.Base.ImageDescription] = "(c) me", "my caption"
    exif[ExifTags.IFD.GPSInfo] = {1: "N", 2: (1.0, 2.0, 3.5)}
    exif[ExifTags.IFD.Exif] = {
        ExifTags.Base.DateTimeOriginal: "2020:01:01 00:00:00",
        ExifTags.Base.MakerNote: b"maker",
        ExifTags.Base.UserComment: b"ASCII\x00\x00\x00mine",
    }
    image = Image.new("RGB", (64, 48))
    image.info["exif"] = exif.tobytes()
    found = reopen(make_result(image).to_bytes(kind)).getexif()
    assert (found[ExifTags.Base.Copyright], found[ExifTags.Base.ImageDescription]) == ("(c) me", "my caption")
    assert found.get_ifd(ExifTags.IFD.GPSInfo)[2] == (1.0, 2.0, 3.5)
    details = found.get_ifd(ExifTags.IFD.Exif)
    assert details[ExifTags.Base.DateTimeOriginal] == "2020:01:01 00:00:00"
    assert details[ExifTags.Base.MakerNote] == b"maker"
    assert details[ExifTags.Base.UserComment].startswith(b"UNICODE")
    assert image.info["exif"] == exif.tobytes()  # saving leaves the result as it was


def test_a_user_comment_has_exifs_type_for_it() -> None:
    """Other readers take a comment of bytes as a list of numbers."""
    exif = reopen(make_result().to_bytes("jpg")).info["exif"]
    order = {b"II": "<", b"MM": ">"}[exif[6:8]]
    (entry,) = re.findall(struct.pack(f"{order}H", ExifTags.Base.UserComment) + b"(..)", exif, re.DOTALL)
    assert struct.unpack(f"{order}H", entry) == (7,)  # "undefined"


def test_what_a_jpeg_has_no_room_for_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    image = Image.new("RGB", (64, 48))
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "x" * 63_000
    image.info["exif"] = exif.tobytes()
    assert read_request(make_result(image).to_bytes("jpg")).seed == 7
    assert "that of the input is left out" in caplog.text
    long = make_result(request=REQUEST.replace(prompt="mug " * 20_000, truncate_prompt=True))
    caplog.clear()
    assert reopen(long.to_bytes("jpg")).size == (64, 48) and "the request is left out" in caplog.text
    for kind in ("png", "webp"):
        assert read_request(long.to_bytes(kind)).prompt == "mug " * 20_000


@pytest.mark.parametrize(("sampler", "name"), [("dpmpp_2m_sde", "DPM++ 2M SDE"), ("euler", "Euler"), ("lcm", "LCM")])
def test_parameters_of_a_plain_request(sampler: Sampler, name: str) -> None:
    request = Request("a mug", sampler=sampler, num_inference_steps=8, negative_prompt=None, guidance_scale=1.5)
    prompt, negative, settings = parse_parameters(spell_parameters(request, Origin(), (1, 2)))
    assert (prompt, negative, settings["Sampler"], settings["CFG scale"]) == ("a mug", "", name, "1.5")
    absent = {"Model", "Subject", "Subject scale", "Token subject", "Tokens", "Token weight"}
    assert settings["Version"] == "dreammix-trt" and not absent & settings.keys()


def test_parameters_of_a_request_with_tokens() -> None:
    request, origin = Request("a mug", token_count=7, token_weight=0.5), Origin(subject="lora", token_subject="mug")
    _, _, settings = parse_parameters(spell_parameters(request, origin, (1, 2)))
    told = {"Subject": "lora", "Token subject": "mug", "Tokens": "7", "Token weight": "0.5"}
    assert told.items() <= settings.items()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "cannot be read as a request"),
        (make_result().to_bytes("png")[:300], "cannot be read as a request"),
        (make_result().to_bytes("webp", metadata=False), "carries no request"),
        (b'{"schema": 1, "prompt": 3}', "prompt is 3"),
    ],
)
def test_what_holds_no_request(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(InputError, match=rf"x\.png.*{said}"):
        read_request(tmp_path / "x.png")
    with pytest.raises(InputError, match=rf"^request.*{said}"):
        read_request(data)


def test_a_request_is_read_beside_a_profile_beyond_pillows_limit(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    image.info["icc_profile"] = bytes(128 + (3 << 20))
    result = make_result(image)
    result.save(tmp_path / "out.png", 1)
    with pytest.raises(ValueError, match="too large"), Image.open(tmp_path / "out.png") as opened:
        opened.load()
    assert read_request(tmp_path / "out.png") == result.request.replace(seed=8, num_images_per_prompt=1)


def test_a_comment_of_another_program_is_no_request() -> None:
    for comment in (b"\x00", "hello\x00".encode("utf-16-le"), '{"a": 1}'.encode("utf-16-le"), "[]".encode("utf-16-le")):
        exif = Image.Exif()
        exif[ExifTags.Base.XPComment] = comment
        to = io.BytesIO()
        Image.new("RGB", (4, 4)).save(to, "JPEG", exif=exif)
        with pytest.raises(InputError, match="carries no request"):
            read_request(to.getvalue())


def test_wrong_names_and_numbers_are_refused(tmp_path: Path) -> None:
    result = make_result()
    for index in (2, -1, True, "0"):
        with pytest.raises(InputError, match=r"index is .*this result has 2 pictures, from 0 on"):
            result.save(tmp_path / "a.png", index)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"kind is 'tga'; allowed: png, jpg, webp"):
        result.to_bytes("tga")
    assert result.to_bytes(".JPEG")[:2] == b"\xff\xd8"
    with pytest.raises(InputError, match=r"picture 0: 20000x1, but WEBP holds 16383"):
        make_result(Image.new("RGB", (20_000, 1))).to_bytes("webp")
    assert list(tmp_path.iterdir()) == []
