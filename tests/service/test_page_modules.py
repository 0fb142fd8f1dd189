"""The page's modules that know no document, against formulas and against the engine."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from dreammix_trt.core.request_schema import describe_request
from dreammix_trt.engine import kernels
from dreammix_trt.engine.canvas.geometry import feather_width
from tests.support.chromium import open_browser
from tests.support.page_server import serve_page

if TYPE_CHECKING:
    from playwright.sync_api import Page

U8 = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with open_browser() as browser, serve_page() as service:
        page = browser.new_page()
        page.goto(service.url)
        yield page


def draw(page: Page, width: int, height: int, script: str, given: Any = None) -> U8:
    """The mask after a script has drawn on `mask`, uint8 (H, W)."""
    values = page.evaluate(
        "async ([width, height, given]) => { const {Mask} = await import('/page/mask.js');"
        f"const mask = new Mask(width, height); {script}; return [...mask.data]; }}",
        [width, height, given],
    )
    return np.array(values, np.uint8).reshape(height, width)


def centres(height: int, width: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """x and y of every pixel's centre."""
    y, x = np.mgrid[:height, :width] + 0.5
    return x, y


@pytest.mark.parametrize("seed", range(6))
def test_a_stroke_is_every_pixel_within_the_radius_of_its_way(page: Page, seed: int) -> None:
    rng = np.random.default_rng(seed)
    (ax, ay), (bx, by) = rng.uniform(-15, 60, (2, 2)).round(3)
    if seed == 0:
        by = ay  # along a row
    if seed == 1:
        bx = ax
    radius = float(rng.uniform(1, 12))
    script = "mask.fillStroke({x: given[0], y: given[1]}, {x: given[2], y: given[3]}, given[4], 255)"
    drawn = draw(page, 50, 40, script, [float(ax), float(ay), float(bx), float(by), radius])
    x, y = centres(40, 50)
    along = np.clip(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2), 0, 1)
    distance = np.hypot(x - ax - along * (bx - ax), y - ay - along * (by - ay))
    assert (np.abs(distance - radius) > 1e-9).all()
    assert np.array_equal(drawn > 0, distance <= radius)


def test_the_smallest_brush_marks_the_pixel_it_is_on(page: Page) -> None:
    drawn = draw(page, 9, 7, "mask.fillStroke({x: 4.9, y: 2.1}, {x: 4.9, y: 2.1}, 0.5, 255)")
    assert drawn[2, 4] == 255 and drawn.astype(bool).sum() <= 3


@pytest.mark.parametrize("seed", range(4))
def test_a_lasso_is_what_its_line_goes_around(page: Page, seed: int) -> None:
    points = np.random.default_rng(seed).uniform(-8, 48, (7, 2))
    drawn = draw(page, 40, 40, "mask.fillPolygon(given.map(([x, y]) => ({x, y})), 255)", points.tolist())
    x, y = centres(40, 40)
    angle = np.zeros_like(x)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0), strict=True):
        turn = np.arctan2(by - y, bx - x) - np.arctan2(ay - y, ax - x)
        angle += (turn + np.pi) % (2 * np.pi) - np.pi
    assert np.array_equal(drawn > 0, np.abs(np.round(angle / (2 * np.pi))) > 0)


def test_undo_gives_back_every_state_and_packing_keeps_it(page: Page) -> None:
    script = """
        const states = [[...mask.data]];
        const change = (act) => { mask.begin(); act(); mask.commit(); states.push([...mask.data]); };
        change(() => mask.fillRect({x: 3, y: 2}, {x: 20, y: 11}, 255));
        change(() => mask.fillStroke({x: -5, y: 8}, {x: 40, y: 3}, 3, 255));
        change(() => mask.fillRect({x: 8, y: 0}, {x: 12, y: 99}, 0));
        mask.invert(); states.push([...mask.data]);
        const same = (a, b) => a.every((value, at) => value === b[at]);
        const packed = Mask.unpack(width, height, mask.pack());
        const told = [same(packed.data, mask.data)];
        for (let at = states.length - 2; at >= 0; at--) { mask.undo(); told.push(same(mask.data, states[at])); }
        told.push(!mask.canUndo);
        for (let at = 1; at < states.length; at++) { mask.redo(); told.push(same(mask.data, states[at])); }
        mask.begin(); mask.fillRect({x: 0, y: 0}, {x: 30, y: 30}, 255); mask.cancel();
        told.push(same(mask.data, states.at(-1)), !mask.canRedo);
        mask.data.fill(0); told.forEach((each, at) => { mask.data[at] = each ? 255 : 0; });
        mask.data[told.length] = 7;
    """
    told = draw(page, 30, 20, script).ravel()
    (count,) = np.nonzero(told == 7)[0]
    assert count == 12 and (told[:count] == 255).all()


def test_the_feather_is_the_engines(page: Page) -> None:
    mask = np.zeros((60, 90), np.uint8)
    mask[10:25, 20:50] = 255
    mask[40:42, 80:] = 255
    for reach in (1, 2, 7, 32):
        weights = page.evaluate(
            "async ([mask, reach]) => { const {featherWeights} = await import('/page/feather.js');"
            "return [...featherWeights(new Uint8Array(mask), 90, 60, reach)]; }",
            [mask.ravel().tolist(), reach],
        )
        assert np.array_equal(np.reshape(weights, mask.shape), kernels.feather(mask, reach)), reach
    for side in (64, 80, 112, 256, 1023, 1024, 3000):
        told = page.evaluate(f"async () => (await import('/page/feather.js')).usualFeather({side})")
        assert told == feather_width((side, side + 5))


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (300, 41)])
def test_a_mask_arrives_as_it_is(page: Page, size: tuple[int, int]) -> None:
    width, height = size
    mask = (np.random.default_rng(3).random((height, width)) > 0.6).astype(np.uint8) * 255
    text = page.evaluate(
        """async ([mask, width, height]) => {
            const {encodeGrey} = await import('/page/png.js');
            const bytes = new Uint8Array(await (await encodeGrey(new Uint8Array(mask), width, height)).arrayBuffer());
            return btoa(String.fromCharCode(...bytes));
        }""",
        [mask.ravel().tolist(), width, height],
    )
    with Image.open(io.BytesIO(base64.b64decode(text))) as read:
        read.verify()
    with Image.open(io.BytesIO(base64.b64decode(text))) as read:
        assert (read.format, read.mode) == ("PNG", "L") and np.array_equal(read, mask)


def test_events_come_whole_however_they_are_cut(page: Page) -> None:
    stream = ': beat\n\nid: 1\nevent: step\ndata: {"step": 1}\n\r\n'
    stream += 'event: done\r\ndata: {"seed": 18446744073709551615}\r\n\r\n'
    read = """async ([text, size]) => {
        const {readEvents} = await import('/page/api.js');
        const bytes = new TextEncoder().encode(text);
        const body = new ReadableStream({start(out) {
            for (let at = 0; at < bytes.length; at += size) out.enqueue(bytes.slice(at, at + size));
            out.close();
        }});
        const events = [];
        for await (const event of readEvents(body)) events.push(event);
        return events;
    }"""
    wanted = [{"name": "step", "data": {"step": 1}}, {"name": "done", "data": {"seed": "18446744073709551615"}}]
    for size in (1, 2, 5, 1000):
        assert page.evaluate(read, [stream, size]) == wanted


def test_every_field_of_a_request_has_a_control_that_gives_its_default_back(page: Page) -> None:
    properties = describe_request()["properties"]
    told = page.evaluate(
        """async (properties) => {
            const {makeField} = await import('/page/fields.js');
            return Object.entries(properties).filter(([name]) => name !== 'prompt').map(([name, schema]) => {
                const field = makeField(name, schema);
                const control = field.row.querySelector('input, select');
                return [name, field.get(), field.isUsual(), control !== null];
            });
        }""",
        properties,
    )
    for name, value, usual, control in told:
        assert value == properties[name]["default"] and usual and control, name
