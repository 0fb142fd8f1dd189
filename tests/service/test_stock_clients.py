"""Clients that exist already, as they come: `openai` and `webuiapi`."""

from __future__ import annotations

import base64
import io
import threading
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import webuiapi
from PIL import Image

from tests.service.conftest import MASK, PICTURE
from tests.service.test_native import wait_until
from tests.support.fake_service import LONG, FakePainter, Running, make_png, paint_plainly, read_pixels

ERASED = make_png(np.dstack([PICTURE, 255 - MASK]))
PLAIN = ("image.png", make_png(PICTURE))


def decode(text: str) -> Any:
    return read_pixels(base64.b64decode(text))


def open_openai(service: Running, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, **options)


def open_webui(service: Running) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{service.url}/sdapi/v1")


def test_openai_lists_engines_and_subjects(running: Running) -> None:
    with open_openai(running) as client:
        assert [each.id for each in client.models.list()][:2] == ["fake", "mug"]


def test_openai_edits(running: Running) -> None:
    with open_openai(running) as client:
        answer = client.images.edit(
            image=PLAIN, mask=("mask.png", ERASED), prompt="a mug", n=2, model="mug", size="64x48", quality="low",
            response_format="b64_json", user="someone", extra_body={"seed": 5, "substitute": ["blue", "red"]},
        )  # fmt: skip
        assert answer.data is not None and answer.size == "64x48"
        for k, picture in enumerate(answer.data):
            assert picture.b64_json is not None
            assert np.array_equal(decode(picture.b64_json), paint_plainly(PICTURE, MASK, 5 + k))
        whole = client.images.edit(
            image=[("a.png", ERASED)], prompt="a mug", output_format="webp", extra_body={"seed": 5}
        )
        assert whole.data is not None and whole.data[0].b64_json is not None
        assert np.array_equal(decode(whole.data[0].b64_json), paint_plainly(PICTURE, MASK, 5))
    assert running.app.state.house.jobs.list_open() == []


def test_openai_streams(running: Running) -> None:
    with open_openai(running) as client:
        stream = client.images.edit(
            image=("a.png", ERASED), prompt="slow", stream=True, partial_images=3,
            extra_body={"seed": 5, "num_inference_steps": 8},
        )  # fmt: skip
        events = list(stream)
    assert [each.type for each in events] == ["image_edit.partial_image"] * 3 + ["image_edit.completed"]
    assert [each.partial_image_index for each in events[:3]] == [0, 1, 2]  # type: ignore[union-attr]
    for each in events:
        assert np.array_equal(decode(each.b64_json), paint_plainly(PICTURE, MASK, 5))
        assert each.size == "64x48" and each.output_format == "png"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", "1024x1024"), ("quality", "xhigh"), ("response_format", "url"), ("background", "transparent"),
        ("input_fidelity", "low"), ("output_format", "gif"), ("output_compression", 50), ("partial_images", 4),
        ("n", 0), ("complexity", "low"),
    ],
)  # fmt: skip
def test_openai_is_told_by_name_what_cannot_be(running: Running, field: str, value: Any) -> None:
    with open_openai(running) as client, pytest.raises(openai.UnprocessableEntityError) as caught:
        client.images.edit(image=("a.png", ERASED), prompt="a", **{field: value})
    assert caught.value.body["field"] == field and field in caught.value.message  # type: ignore[index]


def test_openai_gets_its_own_errors(running: Running) -> None:
    with open_openai(running) as client:
        with pytest.raises(openai.NotFoundError, match="model"):
            client.images.edit(image=("a.png", ERASED), prompt="a", model="gpt-image-1")
        for mask in (PLAIN, ("m.png", make_png(MASK))):
            with pytest.raises(openai.UnprocessableEntityError, match="transparent"):
                client.images.edit(image=PLAIN, mask=mask, prompt="a")
        with pytest.raises(openai.UnprocessableEntityError, match="one picture"):
            client.images.edit(image=[PLAIN, PLAIN], prompt="a")
        with pytest.raises(openai.UnprocessableEntityError, match="no field nonsense"):
            client.images.edit(image=("a.png", ERASED), prompt="a", extra_body={"nonsense": 1})
        with pytest.raises(openai.APIError, match="ZeroDivisionError"):
            list(client.images.edit(image=("a.png", ERASED), prompt="break", stream=True))
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
            client.images.edit(image=("a.png", ERASED), prompt="break")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_cancels_its_job(stream: bool) -> None:
    painter = FakePainter()
    with Running(painter) as service:
        with open_openai(service, timeout=httpx.Timeout(1.0)) as client, pytest.raises(openai.APITimeoutError):
            answer = client.images.edit(image=("a.png", ERASED), prompt="hold", stream=stream)  # type: ignore[call-overload]
            list(answer)
        (job,) = service.app.state.house.jobs._jobs.values()
        wait_until(lambda: job.ticket._stop is not None)
        painter.let_go.set()
        wait_until(lambda: job.state == "cancelled")


def test_whoever_waits_is_told_of_the_deadline_and_leaves_nothing_when_he_goes() -> None:
    painter = FakePainter()
    body = {"init_images": [base64.b64encode(ERASED).decode()], "prompt": "hold", "steps": 9}
    with Running(painter, timeout=0.3) as service, httpx.Client(base_url=service.url) as client:
        answer = client.post("/sdapi/v1/img2img", json=body)
        assert answer.status_code == 504 and answer.json()["error"]["type"] == "timed_out"
        painter.let_go.set()
    painter = FakePainter()
    with Running(painter) as service, httpx.Client(base_url=service.url) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/sdapi/v1/img2img", json=body, timeout=0.5)
        (job,) = service.app.state.house.jobs._jobs.values()
        wait_until(lambda: job.ticket._stop is not None)
        painter.let_go.set()
        wait_until(lambda: job.state == "cancelled")


def test_webuiapi_paints(running: Running) -> None:
    api = open_webui(running)
    image, mask = Image.fromarray(PICTURE), Image.fromarray(MASK)
    answer = api.img2img(images=[image], mask_image=mask, prompt="a mug <lora:mug:0.5>", seed=4, steps=5, batch_size=2)
    for k, each in enumerate(answer.images):
        assert np.array_equal(np.asarray(each), paint_plainly(PICTURE, MASK, 4 + k))
    assert answer.info["all_seeds"] == [4, 5] and answer.info["prompt"] == "a mug" and answer.info["steps"] == 5
    assert answer.info["cfg_scale"] == 7.0 and "init_images" not in answer.parameters
    inverted = api.img2img(images=[image], mask_image=mask, inpainting_mask_invert=1, seed=4, denoising_strength=1.0)
    assert np.array_equal(np.asarray(inverted.image), paint_plainly(PICTURE, 255 - MASK, 4))
    assert np.asarray(answer.image).shape == PICTURE.shape
    assert [each["name"] for each in api.get_loras()] == ["mug"]
    assert (
        [each["model_name"] for each in api.get_sd_models()] == ["fake"] == [api.get_options()["sd_model_checkpoint"]]
    )
    assert "DPM++ 2M SDE" in [each["name"] for each in api.get_samplers()]
    assert api.get_progress()["progress"] == 0.0
    assert api.set_options({"sd_model_checkpoint": "fake"}) == {}
    assert "error" in api.set_options({"sd_model_checkpoint": "other"})


def test_both_clients_bring_a_key() -> None:
    with Running(api_key="secret") as service:
        api = open_webui(service)
        assert "error" in api.get_options()
        api.set_auth("anybody", "secret")
        assert api.get_options()["sd_model_checkpoint"] == "fake"
        with openai.OpenAI(base_url=f"{service.url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
            assert client.with_options(api_key="secret").models.list().data


def test_webuiapi_sees_progress_and_interrupts() -> None:
    painter = FakePainter()
    with Running(painter) as service:
        api, answers = open_webui(service), list[Any]()

        def ask() -> None:
            image, mask = Image.fromarray(PICTURE), Image.fromarray(MASK)
            answers.append(api.img2img(images=[image], mask_image=mask, prompt="hold", steps=20, seed=5))

        thread = threading.Thread(target=ask)
        thread.start()
        assert painter.held.wait(LONG)
        other = open_webui(service)
        progress = other.get_progress()
        assert 0 < progress["progress"] < 1 and progress["state"]["sampling_steps"] == 15
        other.interrupt()
        painter.let_go.set()
        thread.join(LONG)
        (answer,) = answers  # the picture so far, as there; it is not said to be what its request makes
        assert np.array_equal(np.asarray(answer.image), paint_plainly(PICTURE, MASK, 5))
        assert answer.info["warnings"] == ["it was interrupted"] and answer.info["infotexts"] == [""]
        assert answer.info["all_seeds"] == [5] and read_ends(service) == {"cancelled": 1.0}


def test_webuiapi_looks_at_the_picture_as_it_becomes() -> None:
    with Running() as service:
        api = open_webui(service)
        image, mask = Image.fromarray(PICTURE), Image.fromarray(MASK)
        arguments = {
            "images": [image],
            "mask_image": mask,
            "prompt": "slow",
            "steps": 400,
            "denoising_strength": 1.0,
            "seed": 3,
        }

        def ask() -> None:
            assert len(api.img2img(**arguments).images) == 1

        thread = threading.Thread(target=ask)
        thread.start()
        shown = wait_until(lambda: open_webui(service).get_progress()["current_image"])
        assert np.array_equal(
            np.asarray(Image.open(io.BytesIO(base64.b64decode(shown)))), paint_plainly(PICTURE, MASK, 3)
        )
        (job,) = service.app.state.house.jobs.list_open("a1111")
        wait_until(lambda: not job.watchers[0].asked)
        shown_at, before = job.watchers[0].previews[-1].step, job.steps[0]
        wait_until(lambda: job.steps[0] > before + 5)
        assert job.watchers[0].previews[-1].step == shown_at, "a picture is made for a question, not for each step"
        open_webui(service).interrupt()
        thread.join(LONG)


def read_ends(service: Running) -> dict[str, float]:
    """How many jobs ended in which way."""
    text = httpx.get(f"{service.url}/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("dreammix_jobs_total")]
    return {line.split('state="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("inpainting_fill", 2), ("resize_mode", 1), ("width", 640), ("restore_faces", True), ("styles", ["x"]),
        ("alwayson_scripts", {"ControlNet": {"args": []}}), ("script_name", "x"), ("subseed_strength", 0.5),
        ("sampler_name", "Heun"), ("mask_blur", -1), ("batch_size", 0), ("inpainting_mask_invert", 2), ("tiling", True),
        ("override_settings", {"CLIP_stop_at_last_layers": 2}), ("seed", "x"), ("nonsense", 1), ("init_images", []),
        ("init_images", ["http://example.org/a.png"]), ("init_images", [{}]), ("mask", "?"), ("mask", 3),
        ("eta", {"a": 1}), ("steps", 0), ("inpaint_full_res", {}), ("sampler_index", []), ("prompt", 3),
    ],
)  # fmt: skip
def test_a1111_is_told_by_name_what_cannot_be(client: httpx.Client, field: str, value: Any) -> None:
    body = {"init_images": [base64.b64encode(ERASED).decode()], "prompt": "a"}
    assert client.post("/sdapi/v1/img2img", json=body).status_code == 200
    answer = client.post("/sdapi/v1/img2img", json={**body, field: value})
    assert answer.status_code == 422
    names = {"steps": "num_inference_steps", "sampler_index": "sampler_name"}
    assert names.get(field, field) in answer.json()["error"]["message"]
