"""The page, the service and the embedded model together, as a user has them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from dreammix_trt.engine import DreamMix
from tests.support.chromium import open_browser

if TYPE_CHECKING:
    from playwright.sync_api import Page


@pytest.fixture(scope="module")
def address(mug_engine: Path) -> Iterator[str]:
    from dreammix_trt.service.app import make_app
    from dreammix_trt.service.running import Server
    from dreammix_trt.service.served import Served
    from dreammix_trt.service.settings import Settings

    settings, began = Settings(port=0), threading.Event()
    served = Served("mug", [DreamMix.load(mug_engine)], backend="onnxruntime")
    server = Server(make_app([served], settings), settings, 5.0, lambda _: began.set())
    thread = threading.Thread(target=server.serve_to_end)
    thread.start()
    assert began.wait(30)
    yield server.address
    server.should_exit = True
    thread.join(30)


@pytest.fixture
def page() -> Iterator[Page]:
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        yield page
        assert complaints == []


def see(page: Page, path: Path) -> np.ndarray:
    """The stage as it is shown."""
    page.mouse.move(1270, 60)
    page.wait_for_timeout(80)
    page.screenshot(path=path, clip={"x": 300, "y": 160, "width": 400, "height": 300})
    with Image.open(path) as shown:
        return np.array(shown.convert("RGB")).astype(int)


def test_mark_paint_cancel_undo_reload(page: Page, address: str, tmp_path: Path) -> None:
    picture = np.linspace(90, 200, 160 * 120).reshape(120, 160, 1).repeat(3, axis=2).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "room.png")
    page.goto(address)
    page.set_input_files("#file", tmp_path / "room.png")
    page.wait_for_selector("#rail:visible")
    page.keyboard.press("r")
    page.mouse.move(400, 220)
    page.mouse.down()
    page.mouse.move(600, 420, steps=4)
    page.mouse.up()
    page.fill("#prompt", "a red sks mug")
    page.fill("#field-seed", "7")
    page.fill("#field-num_inference_steps", "1000")
    page.click("#paint")
    page.wait_for_selector("#running-text:text-matches('Step [0-9]+ of 1000')", timeout=30_000)
    page.click("#cancel")
    page.wait_for_selector("text=Cancelled.")

    marked = see(page, tmp_path / "marked.png")
    page.fill("#field-num_inference_steps", "4")
    page.click("#paint")
    page.wait_for_selector("#modes:visible", timeout=30_000)
    with page.expect_download() as download:
        page.click("#download")
    with Image.open(download.value.path()) as finished:
        request, result = json.loads(finished.info["dreammix"]), np.array(finished.convert("RGB"))
    assert (request["prompt"], request["seed"], request["num_inference_steps"]) == ("a red sks mug", 7, 4)
    changed = (result != picture).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert changed[40:60, 70:90].mean() > 0.9
    assert rows.min() > 5 and rows.max() < 115 and columns.min() > 5 and columns.max() < 155, "the rest stays"
    assert np.abs(see(page, tmp_path / "result.png") - marked).max() > 40

    page.keyboard.press("m")
    page.click("#undo")
    page.click("#paint")
    assert "Mark the place" in page.inner_text("#problem")
    page.click("#redo")
    page.wait_for_timeout(250)
    page.reload()
    page.wait_for_selector("#rail:visible")
    assert page.input_value("#prompt") == "a red sks mug"
    page.click("#paint")
    page.wait_for_selector("#modes:visible", timeout=30_000)
    assert page.locator(".thumb").count() == 2
    with page.expect_download() as download:
        page.click("#download")
    with Image.open(download.value.path()) as again:
        assert np.array_equal(again.convert("RGB"), result), "the same picture, mask and settings: the same pixels"
