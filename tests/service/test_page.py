"""The page in a real browser: what a user draws is what the service gets, and what comes back is what they see."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from tests.support.chromium import open_browser
from tests.support.page_server import Refusal, Service, paint, serve_page

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext

    from tests.support.desk import Desk


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def running() -> Iterator[Service]:
    with serve_page() as service:
        yield service


@pytest.fixture
def service(running: Service) -> Service:
    running.reset()
    return running


WINDOW: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce"}


@pytest.fixture(scope="module")
def profile(browser: Browser) -> BrowserContext:
    """What the tests share, so that the browser reads the page's files once. A new page is a session of its own."""
    return browser.new_context(**WINDOW)


@pytest.fixture
def own_context(browser: Browser, request: pytest.FixtureRequest) -> Iterator[BrowserContext]:
    """One that keeps nothing, with the options of the test's parameter."""
    made = browser.new_context(**{**WINDOW, **getattr(request, "param", {})})
    yield made
    made.close()


@contextmanager
def sit_down(context: BrowserContext, service: Service) -> Iterator[Desk]:
    """The loaded page. What the browser complains about in its console fails the test."""
    from tests.support.desk import Desk

    desk = Desk(context.new_page(), service)
    desk.load()
    yield desk
    desk.page.close()
    assert desk.complaints == []


@pytest.fixture
def desk(profile: BrowserContext, service: Service) -> Iterator[Desk]:
    with sit_down(profile, service) as desk:
        yield desk


@pytest.fixture
def opened(desk: Desk) -> Desk:
    """The page with a picture of 200 x 120 pixels."""
    desk.open_picture()
    return desk


def near(mask: np.ndarray, x: float, y: float, radius: float) -> np.ndarray:
    """Which pixels have their centre within so many pixels of a point."""
    rows, columns = np.mgrid[: mask.shape[0], : mask.shape[1]] + 0.5
    return np.asarray(np.hypot(columns - x, rows - y) <= radius)


def test_a_stroke_that_leaves_the_stage_goes_on_and_keeps_the_mask(opened: Desk) -> None:
    opened.set_size(10)
    opened.drag((40, 90))
    mouse = opened.page.mouse
    mouse.move(*opened.at(150, 30))
    mouse.down()
    mouse.move(*opened.at(190, 30), steps=3)
    mouse.move(1200, 300, steps=3)  # over the panel
    mouse.move(1200, 790, steps=2)
    mouse.move(*opened.at(150, 70), steps=6)
    mouse.up()
    mouse.move(*opened.at(60, 60), steps=3)  # lifted: draws no more
    mask = opened.sent_mask()
    assert mask[90, 40] == 255, "what was there before"
    assert mask[30, 150:200].all() and mask[70, 150] == 255, "before and after it was outside"
    assert mask[60, 60] == 0 and mask[20, 160] == 0


def test_a_click_marks_a_disc_of_the_brush_size(opened: Desk) -> None:
    size = opened.set_size(20)
    opened.drag((100, 60))
    mask = opened.sent_mask() > 0
    assert (mask >= near(mask, 100, 60, size / 2 - 0.5)).all()
    assert (mask <= near(mask, 100, 60, size / 2 + 0.5)).all()


def test_eraser_undo_and_redo(opened: Desk) -> None:
    keys = opened.page.keyboard
    opened.set_size(16)
    opened.drag((40, 60), (160, 60))
    whole = opened.sent_mask()
    keys.press("e")
    opened.drag((100, 60))
    erased = opened.sent_mask()
    assert whole[60, 100] == 255 and erased[60, 100] == 0 and erased[60, 50] == erased[60, 150] == 255
    keys.press("Control+z")
    assert (opened.sent_mask() == whole).all()
    keys.press("Control+Shift+Z")
    assert (opened.sent_mask() == erased).all()
    keys.press("Control+z")
    keys.press("Control+z")
    opened.page.click("#redo")
    assert (opened.sent_mask() == whole).all()
    keys.press("Control+y")
    assert (opened.sent_mask() == erased).all()
    keys.press("Control+z")
    keys.press("b")
    opened.drag((100, 20))
    assert opened.page.is_disabled("#redo"), "what was undone is gone after a new stroke"


def test_rectangle_lasso_invert_and_clear(opened: Desk) -> None:
    keys = opened.page.keyboard
    keys.press("r")
    opened.drag((60, 80), (20, 30))
    wanted = np.zeros((120, 200), np.uint8)
    wanted[30:80, 20:60] = 255
    assert (opened.sent_mask() == wanted).all()

    keys.press("l")
    opened.drag((100, 20), (160, 20), (100, 80))  # a triangle; the line closes by itself
    rows, columns = np.mgrid[:120, :200] + 0.5
    inside, hem = (columns - 100) + (rows - 20), 1.0
    lasso = opened.sent_mask() > wanted
    assert lasso[(columns > 100 + hem) & (rows > 20 + hem) & (inside < 60 - hem)].all()
    assert not lasso[(columns < 100 - hem) | (rows < 20 - hem) | (inside > 60 + hem)].any()

    before = opened.sent_mask()
    keys.press("i")
    assert (opened.sent_mask() == 255 - before).all()
    keys.press("Delete")
    opened.page.click("#paint")
    assert "Mark the place" in opened.page.inner_text("#problem")
    keys.press("Escape")
    opened.page.click("#undo")
    assert (opened.sent_mask() == 255 - before).all()


def test_alt_takes_away(opened: Desk) -> None:
    keys = opened.page.keyboard
    keys.press("r")
    opened.drag((20, 20), (100, 100))
    keys.down("Alt")
    opened.drag((40, 40), (80, 80))
    keys.up("Alt")
    mask = opened.sent_mask()
    assert mask[30, 30] == 255 and mask[60, 60] == 0


def test_drawing_hits_what_is_seen_after_zoom_and_pan(opened: Desk) -> None:
    page, mouse = opened.page, opened.page.mouse
    shown = page.inner_text("#zoom-value")
    mouse.move(*opened.at(184, 104))
    mouse.wheel(0, 400)  # out
    page.keyboard.down(" ")
    mouse.down()
    mouse.move(*opened.at(150, 120), steps=3)
    mouse.up()
    page.keyboard.up(" ")
    mouse.down(button="middle")
    mouse.move(*opened.at(140, 100), steps=3)
    mouse.up(button="middle")
    page.wait_for_selector(f"#zoom-value:not(:text-is('{shown}'))")
    opened.measure()
    page.keyboard.press("r")
    opened.drag((60, 30), (90, 50))
    wanted = np.zeros((120, 200), bool)
    wanted[30:50, 60:90] = True
    mask = opened.sent_mask() > 0
    wider = np.zeros_like(wanted)
    wider[29:51, 59:91] = True
    assert (mask <= wider).all() and mask[31:49, 61:89].all(), (
        "panning drew nothing, the rectangle is where it was seen"
    )
    page.keyboard.press("0")
    page.wait_for_selector(f"#zoom-value:text-is('{shown}')")
    for key, larger in (("+", True), ("-", False)):
        before = int(page.inner_text("#zoom-value")[:-1])
        page.keyboard.press(key)
        page.wait_for_selector(f"#zoom-value:not(:text-is('{before}%'))")
        assert (int(page.inner_text("#zoom-value")[:-1]) > before) is larger


def test_keys_choose_tools_and_sizes_but_not_while_writing(opened: Desk) -> None:
    page = opened.page
    for key, tool in (("e", "eraser"), ("r", "rectangle"), ("l", "lasso"), ("h", "hand"), ("b", "brush")):
        page.keyboard.press(key)
        assert page.get_attribute(f"#rail [data-tool={tool}]", "aria-pressed") == "true"
    size = page.inner_text("#size-value")
    page.keyboard.press("]")
    assert page.inner_text("#size-value") != size
    page.keyboard.press("[")
    page.click("#prompt")
    page.keyboard.type("a red [sks] label")
    assert page.input_value("#prompt") == "a red [sks] label"
    assert page.get_attribute("#rail [data-tool=brush]", "aria-pressed") == "true"


def test_the_keyboard_alone_draws_and_paints(opened: Desk) -> None:
    page = opened.page
    page.focus("#stage")
    page.keyboard.press("Enter")
    for _ in range(3):
        page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")  # lifted
    page.focus("#prompt")
    page.keyboard.type("a sks mug")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#modes:visible")
    columns = np.nonzero(np.array(opened.service.mask()).any(axis=0))[0]
    size = int(page.evaluate("document.getElementById('size').getAttribute('aria-valuetext')").split()[0])
    assert abs(len(columns) - (size + 120 / opened.scale)) < 2.5


def test_the_result_is_shown_compared_downloaded_and_kept(opened: Desk) -> None:
    page = opened.page
    page.keyboard.press("r")
    opened.drag((60, 40), (140, 80))
    page.click("text=Auto")
    page.fill("#field-seed", "18446744073709551610")
    page.fill("#field-num_inference_steps", "7")
    opened.paint()
    (job,) = opened.service.jobs
    assert job.request["seed"] == 18446744073709551610 and job.request["substitute"] == "auto"
    assert job.request["subject"] == "mug" and job.request["num_inference_steps"] == 7
    opened.measure()
    assert opened.shows_paint(70, 60) and opened.shows_paint(130, 60) and not opened.shows_paint(30, 60)

    page.keyboard.press("c")
    assert not opened.shows_paint(70, 60) and opened.shows_paint(130, 60)
    page.focus("#divider")
    page.keyboard.press("Home")
    assert opened.shows_paint(70, 60)
    x, y = opened.at(0, 60)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(*opened.at(160, 60), steps=3)
    page.mouse.up()
    assert not opened.shows_paint(130, 60)

    with page.expect_download() as download:
        page.click("#download")
    with Image.open(download.value.path()) as saved:
        assert np.array_equal(saved, paint(job)) and json.loads(saved.info["dreammix"])["seed"] == job.request["seed"]

    page.fill("#field-seed", "")
    page.fill("#field-num_inference_steps", "9")
    page.click("#again")
    assert page.input_value("#field-seed") == "18446744073709551610"
    assert page.input_value("#field-num_inference_steps") == "7"
    page.keyboard.press("m")
    assert not opened.shows_paint(70, 60)
    page.click(".thumb")
    page.wait_for_selector("#result-part:visible")
    page.keyboard.press("v")
    assert opened.shows_paint(70, 60)
    page.click("#go-on")
    page.wait_for_selector("#result-part", state="hidden")
    assert opened.shows_paint(70, 60), "the result is the picture now"


def test_several_pictures_have_the_seeds_that_paint_them_alone(opened: Desk) -> None:
    page = opened.page
    opened.drag((100, 60))
    page.fill("#field-seed", "41")
    page.fill("#field-num_images_per_prompt", "3")
    opened.paint()
    assert page.locator(".thumb").count() == 3
    page.locator(".thumb").nth(2).click()
    page.click("#again")
    assert (page.input_value("#field-seed"), page.input_value("#field-num_images_per_prompt")) == ("43", "1")


def test_steps_and_previews_are_shown_and_a_job_is_cancelled(opened: Desk) -> None:
    page = opened.page
    opened.service.step_seconds = 0.1
    page.keyboard.press("r")
    opened.drag((60, 40), (140, 80))
    page.fill("#prompt", "a sks mug")
    page.fill("#field-num_inference_steps", "200")
    page.click("#paint")
    page.wait_for_selector("#running-text:text-matches('Step ([4-9]|[0-9]{2,}) of 200')")
    assert opened.shows_paint(100, 60), "the preview is in the picture's place"
    opened.drag((20, 20), (40, 30))  # nothing is drawn meanwhile
    page.click("#cancel")
    page.wait_for_selector("text=Cancelled.")
    assert opened.service.jobs[0].cancelled.is_set()
    assert page.is_visible("#paint") and page.is_hidden("#running") and page.is_hidden("#modes")
    assert not opened.shows_paint(100, 60)
    opened.service.step_seconds = 0
    page.fill("#field-num_inference_steps", "3")
    mask = opened.sent_mask()
    assert mask[60, 100] == 255 and mask[25, 30] == 0


def test_a_broken_stream_is_taken_up_again(opened: Desk) -> None:
    opened.service.cuts = 1
    opened.drag((100, 60))
    opened.paint()
    assert len(opened.service.jobs) == 1 and opened.service.cuts == 0


def test_a_reload_keeps_picture_mask_settings_and_history(opened: Desk) -> None:
    page = opened.page
    page.keyboard.press("r")
    opened.drag((60, 40), (140, 80))
    page.fill("#prompt", "a striped sks mug")
    page.click(".chip >> text=blue")
    page.fill("#field-guidance_scale", "5.5")
    mask = opened.sent_mask()
    page.wait_for_timeout(250)  # kept once things are quiet
    page.reload()
    page.wait_for_selector("#empty", state="hidden")
    opened.measure()
    assert page.input_value("#prompt") == "a striped sks mug"
    assert page.locator(".thumb").count() == 1
    assert (opened.sent_mask() == mask).all()
    request = opened.service.jobs[-1].request
    assert request["substitute"] == ["blue"] and request["guidance_scale"] == 5.5


def test_a_reload_finds_the_job_that_runs(opened: Desk) -> None:
    opened.service.step_seconds = 0.08
    opened.drag((100, 60))
    opened.page.fill("#prompt", "a sks mug")
    opened.page.fill("#field-num_inference_steps", "30")
    opened.page.click("#paint")
    opened.page.wait_for_selector("#running-text:text-matches('Step [0-9]+')")
    opened.page.reload()
    opened.page.wait_for_selector("#modes:visible")
    assert len(opened.service.jobs) == 1 and opened.page.locator(".thumb").count() == 1


def test_a_finished_picture_brings_its_settings_back(opened: Desk) -> None:
    page = opened.page
    page.keyboard.press("r")
    opened.drag((60, 40), (140, 80))
    page.fill("#prompt", "a plain sks mug")
    page.click(".chip >> text=white")
    page.fill("#field-seed", "99")
    page.click("#advanced summary")
    page.fill("#field-sharpness", "0.25")
    opened.paint()
    with page.expect_download() as download:
        page.click("#download")
    data = download.value.path().read_bytes()
    page.keyboard.press("m")
    for name in ("#prompt", "#field-seed", "#field-sharpness"):
        page.fill(name, "")
    page.click(".chip >> text=white")
    opened.drop(data)
    page.wait_for_selector("text=settings of that picture")
    assert [page.input_value(name) for name in ("#prompt", "#field-seed", "#field-sharpness")] == [
        "a plain sks mug",
        "99",
        "0.25",
    ]
    assert page.get_attribute(".chip >> text=white", "aria-pressed") == "true"
    assert not opened.shows_paint(100, 60), "picture and mask stay"
    page.click("text=Open it, too")
    page.wait_for_selector("#undo:disabled")
    assert opened.shows_paint(100, 60)


def test_a_picture_is_pasted_and_what_is_none_is_told(desk: Desk) -> None:
    from tests.support.desk import encode, make_picture

    page = desk.page
    page.set_input_files("#file", {"name": "notes.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.wait_for_selector(".message.bad")
    assert "cannot read the file as a picture" in page.inner_text(".message.bad")
    page.click(".message.bad [aria-label=Close]")
    large = Image.new("RGB", (2500, 2000))
    page.set_input_files("#file", {"name": "large.png", "mimeType": "image/png", "buffer": encode(large)})
    page.wait_for_selector(".message.bad")
    assert "5.0 million pixels" in page.inner_text(".message.bad") and page.is_visible("#empty")
    page.evaluate(
        """bytes => {
            const held = new DataTransfer();
            held.items.add(new File([new Uint8Array(bytes)], "image.png", {type: "image/png"}));
            document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData: held, bubbles: true}));
        }""",
        list(encode(make_picture())),
    )
    page.wait_for_selector("#empty", state="hidden")


def test_an_upright_view_of_a_turned_photograph_and_an_erased_part(desk: Desk) -> None:
    from tests.support.desk import encode, make_picture

    exif = Image.Exif()
    exif[0x0112] = 8  # lies on its side in the file
    turned = make_picture().transpose(Image.Transpose.ROTATE_270)
    desk.open_picture(encode(turned, "PNG", exif=exif.tobytes()))
    desk.page.keyboard.press("r")
    desk.drag((20, 30), (60, 80))
    mask = desk.sent_mask()
    assert mask[30:80, 20:60].all() and mask.astype(bool).sum() == 2000
    erased = make_picture().convert("RGBA")
    erased.paste((0, 0, 0, 0), (100, 50, 120, 60))
    desk.open_picture(encode(erased))
    mask = desk.sent_mask()
    assert mask[50:60, 100:120].all() and mask.astype(bool).sum() == 200


def test_what_is_wrong_stands_beside_its_field(opened: Desk) -> None:
    page = opened.page
    opened.drag((100, 60))
    page.click("#paint")
    assert page.inner_text("#error-prompt") == "Say what to paint."
    page.fill("#prompt", "a sks mug")
    assert page.locator("#error-prompt").count() == 0
    page.fill("#field-num_inference_steps", "0")
    page.click("#paint")
    assert page.inner_text("#error-num_inference_steps") == "Steps: a whole number from 1 up to 1000."
    assert page.evaluate("document.activeElement.id") == "field-num_inference_steps"
    assert page.get_attribute("#field-num_inference_steps", "aria-invalid") == "true"
    page.fill("#field-num_inference_steps", "4")
    opened.refused = True
    opened.service.refuse = Refusal(422, "invalid_request", "prior is 'negative', but nothing is guided", "prior")
    page.click("#paint")
    page.wait_for_selector("#error-prior")
    assert page.inner_text("#error-prior") == "Prior is 'negative', but nothing is guided"
    assert page.is_visible("#field-prior")
    opened.service.refuse = Refusal(429, "queue_full", "the queue is full")
    page.click("#paint")
    page.wait_for_selector("#problem:visible")
    assert page.inner_text("#problem") == "the queue is full"
    assert opened.sent_mask()[60, 100] == 255
    assert page.is_hidden("#problem")


def test_every_other_field_of_a_request_is_in_the_drawer(opened: Desk) -> None:
    page = opened.page
    page.click("#advanced summary")
    page.select_option("#field-sampler", "euler")
    page.check("#field-soft_blending")
    page.select_option("#field-vae_sample", "No")
    page.fill("#field-negative_prompt", "dim")
    page.fill("#field-feather", "12")
    page.uncheck("#field-tas_stages [value=pooled_lcg]")
    assert page.inner_text("#advanced-count") == "6 changed"
    page.fill("#advanced-search", "feather")
    assert page.is_visible("#field-feather") and page.is_hidden("#field-sampler")
    opened.drag((100, 60))
    opened.paint()
    request = opened.service.jobs[-1].request
    changed = {
        "sampler": "euler",
        "soft_blending": True,
        "vae_sample": False,
        "negative_prompt": "dim",
        "feather": 12,
    }
    assert {name: request[name] for name in changed} == changed
    assert request["tas_stages"] == ["tokens_lcg", "tokens_gch"]
    assert set(request) == {*changed, "tas_stages", "prompt", "seed", "subject", "num_inference_steps"}
    page.click("#advanced-reset")
    assert page.inner_text("#advanced-count") == ""


def test_the_feather_is_shown_around_the_mask(opened: Desk) -> None:
    page = opened.page
    page.click("#advanced summary")
    page.fill("#field-feather", "20")
    page.keyboard.press("Escape")
    page.locator("#stage").focus()
    page.keyboard.press("r")
    opened.drag((80, 40), (120, 80))
    page.mouse.move(5, 5)
    plain = opened.see().astype(int)
    page.click("#feather")
    page.mouse.move(5, 5)
    page.wait_for_timeout(150)
    change = np.abs(opened.see().astype(int) - plain).max(axis=2)
    row = [int(change[round(opened.at(0, 60)[1]), round(opened.at(x, 60)[0])]) for x in (130, 138, 145, 100)]
    assert row[0] > row[1] > row[2] == 0, "it fades, and ends after 20 pixels"
    assert row[3] == 0


def test_a_subject_is_made_of_the_picture_and_its_mask(opened: Desk) -> None:
    page = opened.page
    page.keyboard.press("r")
    opened.drag((60, 40), (140, 80))
    page.click(".card-add")
    page.click("#subject-ways label:last-child")
    page.fill("#subject-name", "mug")
    page.fill("#subject-class", "teapot")
    opened.refused = True
    page.click("#subject-add")
    page.wait_for_selector("#error-name")
    page.fill("#subject-name", "pot")
    page.click("#subject-add")
    page.wait_for_selector("#subject-dialog", state="hidden")
    sent = opened.service.enrolled[-1]
    assert np.array(Image.open(io.BytesIO(sent["mask"]))).astype(bool).sum() == 3200
    assert Image.open(io.BytesIO(sent["image"])).size == (200, 120)
    assert page.is_checked("[name=subject][value=pot]")
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator(".card", has_text="pot").hover()
    page.click(".card-remove")
    page.wait_for_selector("[name=subject][value=pot]", state="detached")
    assert page.is_checked("[name=subject][value=mug]")
    page.locator(".card", has_text="None").click()
    assert page.is_hidden("#substitute-group")
    opened.paint()
    assert opened.service.jobs[-1].request["subject"] == ""


def test_the_key_is_asked_for_once(profile: BrowserContext, service: Service) -> None:
    from tests.support.desk import Desk

    service.key = "right"
    desk = Desk(profile.new_page(), service)
    desk.refused = True
    desk.page.goto(service.url)
    for key in ("wrong", "right"):
        desk.page.wait_for_selector("#key-dialog[open]")
        desk.page.fill("#key", key)
        desk.page.keyboard.press("Enter")
    desk.page.wait_for_selector(".card img")
    desk.open_picture()
    desk.drag((100, 60))
    desk.paint()
    desk.page.reload()
    desk.page.wait_for_selector(".card-add")
    assert desk.page.is_hidden("#key-dialog") and desk.complaints == []
    desk.page.close()


def test_a_pen_draws_with_its_pressure_and_a_palm_does_nothing(opened: Desk) -> None:
    page = opened.page
    driver = page.context.new_cdp_session(page)

    def pen(kind: str, x: float, y: float, force: float) -> None:
        across, down = opened.at(x, y)
        event = {"type": kind, "x": across, "y": down, "button": "left", "buttons": 1, "clickCount": 1}
        driver.send("Input.dispatchMouseEvent", {**event, "pointerType": "pen", "force": force})

    def touch(kind: str, *points: tuple[float, float]) -> None:
        fingers = [dict(zip("xy", opened.at(*point), strict=True), id=k) for k, point in enumerate(points)]
        driver.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})

    opened.set_size(20)
    for y, force in ((30, 1.0), (80, 0.2)):
        pen("mousePressed", 40, y, force)
        for x in (80, 120, 160):
            pen("mouseMoved", x, y, force)
        pen("mouseReleased", 160, y, force)
    touch("touchStart", (20, 100))
    touch("touchMove", (60, 105))
    touch("touchEnd")
    mask = opened.sent_mask()
    thick, thin = (int(mask[rows, 100].astype(bool).sum()) for rows in (slice(0, 60), slice(60, 120)))
    assert mask[30, 40:160].all() and mask[80, 40:160].all(), "it drew, and the picture did not move"
    assert thick > 1.5 * thin > 0
    assert not mask[95:, :70].any(), "the palm drew nothing"
    assert page.is_visible("#pressure-part")
    before = page.inner_text("#zoom-value")
    touch("touchStart", (80, 60), (120, 60))
    touch("touchMove", (70, 60), (130, 60))
    touch("touchEnd")
    page.wait_for_selector(f"#zoom-value:not(:text-is('{before}'))")
    assert (opened.sent_mask() == mask).all()


TABLET = {"viewport": {"width": 820, "height": 1180}, "has_touch": True}


@pytest.mark.parametrize("own_context", [TABLET], indirect=True)
def test_a_finger_draws_on_a_tablet_and_nothing_is_cut_off(own_context: BrowserContext, service: Service) -> None:
    with sit_down(own_context, service) as desk:
        desk.open_picture()
        _use_a_tablet(desk)


def _use_a_tablet(opened: Desk) -> None:
    page = opened.page
    driver = page.context.new_cdp_session(page)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        fingers = [dict(zip("xy", opened.at(*point), strict=True), id=k) for k, point in enumerate(points)]
        driver.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})

    touch("touchStart", (40, 60))
    touch("touchMove", (90, 60))
    touch("touchMove", (140, 60))
    touch("touchEnd")
    touch("touchStart", (40, 100))
    touch("touchMove", (60, 100))
    touch("touchStart", (60, 100), (100, 100))  # a second finger: this was no stroke
    touch("touchEnd")
    mask = opened.sent_mask()
    assert mask[60, 40:140].all() and not mask[100].any()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for name in ("#paint", "#prompt", "#modes", "#rail", "#bar", "#history"):
        box = page.locator(name).bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= 820 and box["y"] + box["height"] <= 1180, name


def test_dark_and_light(own_context: BrowserContext, service: Service) -> None:
    with sit_down(own_context, service) as desk:
        _switch_themes(desk)


def _switch_themes(desk: Desk) -> None:
    page = desk.page

    def contrast() -> tuple[float, float]:
        shown = desk.see()
        panel = shown[100:700, 940:1270].mean()
        return float(panel), float(np.abs(shown[100:700, 940:1270].astype(float) - panel).max())

    light = contrast()
    page.emulate_media(color_scheme="dark")
    dark = contrast()
    assert light[0] > 200 and dark[0] < 70 and light[1] > 150 and dark[1] > 150
    page.click("#theme")
    page.reload()
    page.wait_for_selector(".card-add")
    assert contrast()[0] > 200, "the choice stays, whatever the system says"


def test_every_control_has_a_name(opened: Desk) -> None:
    opened.drag((100, 60))
    opened.paint()
    opened.page.click("#advanced summary")
    session = opened.page.context.new_cdp_session(opened.page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "checkbox", "radio", "slider", "combobox", "searchbox", "link", "progressbar"}
    controls = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
    nameless = [node["role"] for node in controls if not node.get("name", {}).get("value", "").strip()]
    assert len(controls) > 50 and nameless == []


def test_nothing_is_inline_and_nothing_comes_from_elsewhere(desk: Desk) -> None:
    found = desk.page.evaluate(
        """() => ({
            inline: document.querySelectorAll("script:not([src]), style, [style], [onclick], [onload]").length,
            hosts: [...new Set(performance.getEntriesByType("resource").map(each => new URL(each.name).origin))],
        })"""
    )
    assert found["inline"] <= 1 and found["hosts"] == [desk.service.url.rstrip("/")]
