"""The page as a user has it before them: where pixels of the picture are on the screen, and what was sent."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from playwright.sync_api import Page

from tests.support.page_server import PAINT, Service

U8 = npt.NDArray[np.uint8]
WIDTH, HEIGHT = 200, 120
#: Two blocks by which a test sees where the picture lies: colour -> left, top, right, bottom.
_BLOCKS = {(0, 120, 60): (8, 8, 16, 16), (120, 0, 130): (180, 100, 188, 108)}


def make_picture() -> Image.Image:
    """A grey picture with a green block above and a purple one below."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), (190, 190, 190))
    for colour, block in _BLOCKS.items():
        picture.paste(colour, block)
    return picture


def encode(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """A picture as the bytes of a file."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


class Desk:
    """A page with its service. refused: the browser's own line about an answer of 4xx is expected."""

    def __init__(self, page: Page, service: Service) -> None:
        self.page, self.service, self.refused = page, service, False
        self.complaints: list[str] = []
        page.set_default_timeout(20_000)
        page.on("console", lambda message: self._hear(message.type, message.text))
        page.on("pageerror", lambda error: self._hear("error", str(error)))

    def _hear(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and not (self.refused and "Failed to load resource" in text):
            self.complaints.append(text)

    def load(self) -> None:
        """Load the page, and wait until it has asked the service."""
        self.page.goto(self.service.url)
        self.page.wait_for_selector(".card-add")

    def open_picture(self, data: bytes | None = None, name: str = "table.png") -> None:
        """Choose a file as the picture."""
        buffer = encode(make_picture()) if data is None else data
        self.page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": buffer})
        self.page.wait_for_selector("#empty", state="hidden")
        self.measure()

    def drop(self, data: bytes, name: str = "finished.png") -> None:
        """Drop a file on the page."""
        held = self.page.evaluate_handle(
            """([bytes, name]) => {
                const held = new DataTransfer();
                held.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
                return held;
            }""",
            [list(data), name],
        )
        for event in ("dragover", "drop"):
            self.page.dispatch_event("body", event, {"dataTransfer": held})

    def see(self) -> U8:
        """What the whole page shows, uint8 (H, W, 3)."""
        self.page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return np.array(Image.open(io.BytesIO(self.page.screenshot())).convert("RGB"))

    def measure(self, *, or_keep: bool = False) -> None:
        """Find where the picture lies, by its two blocks. or_keep: it is where it was if the mask hides them."""
        shown = self.see().astype(np.int16)
        inner, outer = [], []
        for colour, (left, top, right, bottom) in _BLOCKS.items():
            rows, columns = np.nonzero(np.abs(shown - np.array(colour, np.int16)).max(axis=2) < 12)
            if or_keep and len(rows) < 50:
                return
            assert len(rows), "a block of the picture is not in sight"
            inner.append(((left + right) / 2, (top + bottom) / 2))
            outer.append(((columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2))
        (a, b), (c, d) = np.array(inner), np.array(outer)
        self.scale = float((d - c)[0] / (b - a)[0])
        assert abs((d - c)[1] / (b - a)[1] - self.scale) < 0.05
        self.origin = c - a * self.scale

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the picture is on the screen."""
        across, down = self.origin + np.array([x, y]) * self.scale
        return float(across), float(down)

    def drag(self, *points: tuple[float, float]) -> None:
        """Draw with the mouse through points of the picture."""
        mouse = self.page.mouse
        mouse.move(*self.at(*points[0]))
        mouse.down()
        for point in points[1:]:
            mouse.move(*self.at(*point), steps=4)
        mouse.up()

    def set_size(self, wanted: int) -> int:
        """Bring the brush near a size in pixels of the picture; returns the size it has."""
        largest = 0.75 * min(WIDTH, HEIGHT)
        self.page.fill("#size", str(round(100 * math.log(wanted) / math.log(largest))))
        size = int(self.page.inner_text("#size-value").split()[0])
        assert abs(size - wanted) <= 0.1 * wanted
        return size

    def paint(self) -> None:
        """Press the button and wait for the result."""
        jobs = len(self.service.jobs)
        if not self.page.input_value("#prompt"):
            self.page.fill("#prompt", "a red sks mug")
        self.page.click("#paint")
        self.page.wait_for_selector("#modes:visible")
        assert len(self.service.jobs) == jobs + 1

    def sent_mask(self) -> U8:
        """The mask as the service gets it when the page paints now, uint8 (H, W); the page shows the mask again."""
        self.paint()
        self.page.click("#modes label:first-child")
        self.measure(or_keep=True)  # the first result brings the history, which takes some of the stage's height
        mask = self.service.mask()
        assert (mask.format, mask.mode, mask.size) == ("PNG", "L", (WIDTH, HEIGHT))
        values = np.array(mask)
        assert set(np.unique(values)) <= {0, 255}
        return values

    def shows_paint(self, x: float, y: float) -> bool:
        """Whether the canned engine's colour is seen at a point of the picture."""
        across, down = (round(each) for each in self.at(x, y))
        return bool(np.abs(self.see()[down, across].astype(int) - PAINT).max() < 25)
