"""The demo from photographs to report, with a training of a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dreammix_trt.demo import run_demo
from dreammix_trt.report import Figure, Row, contact_sheet, mark_region


@pytest.mark.slow
def test_the_demo_makes_its_pages(mug_engine: Path, tmp_path: Path) -> None:
    told: list[str] = []
    pages = run_demo(tmp_path / "demo", training_steps=3, picture_steps=3, progress=lambda name, *_: told.append(name))
    with Image.open(pages.sheet) as sheet:
        assert sheet.width > 1000
        assert sheet.height > 1000
    report = pages.report.read_text(encoding="utf-8")
    for text in ("data:image/png;base64,", "network:unet", "num_inference_steps", "micro-sdxl"):
        assert text in report
    assert {"train", "build", "inpaint"} <= {name.split()[0] for name in told}
    assert (tmp_path / "demo" / "engine" / "passport.json").is_file()


def test_a_sheet_holds_every_tile() -> None:
    tiles = [Figure(Image.new("RGB", (64, 32), colour), colour) for colour in ("red", "lime", "blue")]
    sheet = contact_sheet([Row("three", tiles), Row("two", tiles[:2])], tile=100, title="colours")
    seen = {sheet.getpixel((x, y)) for x in range(0, sheet.width, 4) for y in range(0, sheet.height, 4)}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255)} <= seen


def test_a_marked_region_is_veiled_and_the_rest_is_not() -> None:
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 8, 16, 16))
    picture = mark_region(Image.new("RGB", (32, 32), (100, 100, 100)), mask)
    assert picture.getpixel((0, 0)) == (100, 100, 100)
    assert picture.getpixel((12, 12)) != (100, 100, 100)
