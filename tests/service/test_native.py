"""Our own API over real sockets: a job from its acceptance until it is forgotten."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from dreammix_trt.core.request import Request
from dreammix_trt.core.request_schema import describe_request
from tests.service.conftest import FILES, MASK, PICTURE
from tests.support.fake_service import LONG, FakePainter, Running, make_png, paint_plainly, read_pixels


def post(client: httpx.Client, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    fields = {"prompt": "a mug", "seed": 7, **fields}
    return client.post("/v1/jobs", files=FILES, data={"request": json.dumps(fields)}, headers=headers or {})


def wait_until(true: Callable[[], Any]) -> Any:
    for _ in range(LONG * 100):
        if found := true():
            return found
        time.sleep(0.01)
    raise AssertionError("it never came")


def finish(client: httpx.Client, id: str) -> dict[str, Any]:
    """The job once it has ended."""

    def look() -> dict[str, Any] | None:
        facts: dict[str, Any] = client.get(f"/v1/jobs/{id}").json()
        return facts if facts["state"] in ("done", "failed", "cancelled") else None

    found: dict[str, Any] = wait_until(look)
    return found


def read_events(client: httpx.Client, path: str) -> list[tuple[int, str, dict[str, Any]]]:
    events = []
    with client.stream("GET", path) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for block in response.read().decode().split("\n\n"):
            lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
            if lines:
                events.append((int(lines["id"]), lines["event"], json.loads(lines["data"])))
    return events


def test_a_job_from_its_acceptance_to_its_picture(client: httpx.Client) -> None:
    accepted = post(client, seed=9, num_images_per_prompt=2)
    assert accepted.status_code == 202
    job = accepted.json()
    assert len(job["id"]) >= 20 and job["links"]["self"] == f"/v1/jobs/{job['id']}"
    assert len(job["links"]["images"]) == 2
    done = finish(client, job["id"])
    assert (done["state"], done["step"], done["steps"], done["position"]) == ("done", 8, 8, None)
    assert done["request"] == {**done["request"], "prompt": "a mug", "seed": 9} and done["error"] is None
    for k, place in enumerate(done["images"]):
        for kind in ("png", "webp", "jpeg"):
            response = client.get(place, params={"format": kind})
            assert response.headers["content-type"] == f"image/{kind}"
            if kind != "jpeg":
                assert np.array_equal(read_pixels(response.content), paint_plainly(PICTURE, MASK, 9 + k))
    read = client.post("/v1/read-request", files={"image": client.get(done["images"][1]).content})
    assert read.json()["request"] == {**done["request"], "seed": 10, "num_images_per_prompt": 1}
    again = client.post("/v1/jobs", files=FILES, data={"request": json.dumps(read.json()["request"])})
    assert again.status_code == 202
    whole = Request("a mug", seed=9).to_json()  # with its schema number
    assert client.post("/v1/jobs", files=FILES, data={"request": whole}).status_code == 202


def test_a_picture_may_bring_its_mask(client: httpx.Client) -> None:
    erased = make_png(np.dstack([PICTURE, 255 - MASK]))
    job = client.post("/v1/jobs", files={"image": erased}, data={"request": '{"prompt": "a", "seed": 3}'}).json()
    done = finish(client, job["id"])
    assert np.array_equal(read_pixels(client.get(done["images"][0]).content), paint_plainly(PICTURE, MASK, 3))


def test_events_tell_every_step_and_show_the_whole_picture(client: httpx.Client) -> None:
    job = post(client, prompt="slow", num_inference_steps=8).json()
    events = read_events(client, f"{job['links']['events']}?previews=3")
    assert [number for number, _, _ in events] == list(range(1, len(events) + 1))
    names = [name for _, name, _ in events]
    assert names[-1] == "done" and names.count("done") == 1
    assert [data["step"] for _, name, data in events if name == "preview"] == [3, 6]
    steps = [data["step"] for _, name, data in events if name == "step"]
    assert steps == sorted(set(steps)) and steps[-1] <= 8
    (preview, *_) = (data["image"] for _, name, data in events if name == "preview")
    shown = read_pixels(base64.b64decode(preview.removeprefix("data:image/webp;base64,")))
    assert shown.shape == PICTURE.shape
    assert abs(shown[12:28, 22:42].mean((0, 1)) - paint_plainly(PICTURE, MASK, 7)[15, 25]).max() < 12
    last = events[-1][2]
    assert last["images"] == finish(client, job["id"])["images"] and last["request"]["seed"] == 7
    assert set(last["seconds"]) == {"waited", "ran"}
    assert [name for _, name, _ in read_events(client, job["links"]["events"])] == ["done"]


def test_no_previews_where_nobody_wants_them(client: httpx.Client) -> None:
    job = post(client, prompt="slow").json()
    assert not [1 for _, name, _ in read_events(client, f"{job['links']['events']}?previews=0") if name == "preview"]


def test_places_in_the_line_cancelling_and_a_full_queue() -> None:
    painter = FakePainter()
    with Running(painter, waiting=2) as service, httpx.Client(base_url=service.url) as client:
        first = post(client, prompt="hold").json()
        assert painter.held.wait(LONG)
        second, third = post(client, prompt="b").json(), post(client, prompt="c").json()
        assert (second["position"], third["position"]) == (1, 2)
        full = post(client)
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["type"] == "queue_full"
        with client.stream("GET", third["links"]["events"]) as events:
            lines = events.iter_lines()
            assert next(line for line in lines if line.startswith("data")) == 'data: {"position": 2}'
            assert client.delete(second["links"]["self"]).status_code == 202
            assert next(line for line in lines if line.startswith("data")) == 'data: {"position": 1}'
        assert finish(client, second["id"])["state"] == "cancelled"
        early = client.get(f"/v1/jobs/{first['id']}/images/0")
        assert early.status_code == 409 and early.json()["error"]["type"] == "conflict"
        client.delete(first["links"]["self"])
        painter.let_go.set()
        assert finish(client, first["id"])["error"]["type"] == "cancelled"
        assert finish(client, third["id"])["state"] == "done" and painter.painted == ["hold", "c"]
        assert read_events(client, first["links"]["events"])[-1][1:] == ("cancelled", {})
        assert client.delete(third["links"]["self"]).status_code == 202
        gone = client.get(third["links"]["self"])
        assert gone.status_code == 404 and gone.json()["error"]["type"] == "not_found"


def test_a_deadline_and_a_painter_that_breaks() -> None:
    painter = FakePainter()
    with Running(painter, timeout=0.2) as service, httpx.Client(base_url=service.url) as client:
        late = post(client, prompt="hold").json()
        assert finish(client, late["id"])["error"]["type"] == "timed_out"
        painter.let_go.set()
        broken = finish(client, post(client, prompt="break").json()["id"])
        assert broken["state"] == "failed" and broken["error"]["type"] == "engine_error"
        assert "secret" not in json.dumps(broken) and "ZeroDivisionError" in broken["error"]["message"]
        assert finish(client, post(client).json()["id"])["state"] == "done"


def test_one_key_one_job(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "abc"}
    first, second = (post(client, headers, seed=1).json()["id"] for _ in range(2))
    assert first == second != post(client, seed=1).json()["id"]
    other = post(client, headers, seed=2)
    assert other.status_code == 409 and other.json()["error"]["field"] == "Idempotency-Key"
    finish(client, first)
    client.delete(f"/v1/jobs/{first}")
    assert post(client, headers, seed=2).status_code == 202


@pytest.mark.parametrize(
    ("bounds", "left"),
    [({"keep_results": 2}, 2), ({"keep_bytes": 2 * PICTURE.size}, 2), ({"keep_seconds": 0.0}, 0)],
)
def test_results_stay_within_bounds(bounds: dict[str, Any], left: int) -> None:
    with Running(**bounds) as service, httpx.Client(base_url=service.url) as client:
        ids = []
        for k in range(5):
            job = post(client, {"Idempotency-Key": str(k)}, seed=k).json()
            ids.append(job["id"])
            wait_until(lambda: not service.app.state.house.jobs.list_open())
        answers = [client.get(f"/v1/jobs/{id}").status_code for id in ids]
        assert answers == [404] * (5 - left) + [200] * left
        assert len(service.app.state.house.jobs._keys) == left


REFUSED = [(name, "\0") for name, schema in describe_request()["properties"].items() if "anyOf" not in schema]


@pytest.mark.parametrize(("name", "value"), [*REFUSED, ("substitute", 3), ("subject", "cup"), ("nonsense", 1)])
def test_a_bad_field_is_named(client: httpx.Client, name: str, value: Any) -> None:
    answer = post(client, **{name: value})
    error = answer.json()["error"]
    assert answer.status_code == 422 and error["type"] == "invalid_request" and name in error["message"]
    assert error["field"] == (None if name == "nonsense" else name)


def test_what_is_missing_or_too_much_is_named(client: httpx.Client) -> None:
    good = {"request": '{"prompt": "a"}'}
    cases: list[tuple[dict[str, Any], dict[str, Any], str | None, int]] = [
        ({}, good, None, 422),
        ({"mask": FILES["mask"]}, good, "image", 422),
        (FILES, {}, "request", 422),
        (FILES, {"request": "{"}, "request", 422),
        (FILES, {"request": "[1]"}, "request", 422),
        (FILES, {"request": '{"seed": 3}'}, "prompt", 422),
        (FILES, {**good, "other": "1"}, "other", 422),
        (FILES, {**good, "engine": "none"}, "engine", 404),
        ({**FILES, "image": b"no picture"}, good, "image", 422),
        ({**FILES, "mask": b""}, good, "mask_image", 422),
        (FILES, {"request": '{"prompt": "a", "num_images_per_prompt": 17}'}, "num_images_per_prompt", 422),
    ]
    for files, data, field, status in cases:
        answer = client.post("/v1/jobs", files=files, data=data)
        assert (answer.status_code, answer.json()["error"]["field"]) == (status, field), (data, answer.text)
    twice = client.post("/v1/jobs", files=[("image", FILES["image"]), ("image", FILES["image"])], data=good)
    assert twice.status_code == 422 and "2 times" in twice.text
    assert client.get("/v1/jobs/x/events?previews=-1").json()["error"]["field"] == "previews"
    assert client.get("/nothing").json()["error"]["type"] == "not_found"
    assert client.put("/v1/jobs").json()["error"]["type"] == "method_not_allowed"
    plain = client.post("/v1/read-request", files={"image": FILES["image"][1]})
    assert plain.status_code == 422 and "carries no request" in plain.text


def test_what_the_painter_finds_is_told_by_the_job(client: httpx.Client) -> None:
    empty = {**FILES, "mask": make_png(np.zeros_like(MASK))}
    job = client.post("/v1/jobs", files=empty, data={"request": '{"prompt": "a"}'}).json()
    error = finish(client, job["id"])["error"]
    assert error["type"] == "invalid_request" and error["field"] == "mask_image"
    assert read_events(client, job["links"]["events"])[-1][1] == "failed"


def test_the_schema_says_what_the_page_needs(client: httpx.Client, running: Running) -> None:
    schema = client.get("/v1/schema").json()
    assert schema["request"] == describe_request()
    assert schema["engine"] == {"name": "fake", "native_size": 256, "backend": "none", "context": 154}
    assert schema["limits"]["pixels"] == running.settings.pixels and schema["can_enroll"] is False
    assert schema["defaults"]["num_inference_steps"] == 4


def test_many_clients_at_once_get_their_own_pictures(client: httpx.Client) -> None:
    wrong: list[int] = []

    def ask(seed: int) -> None:
        with httpx.Client(base_url=client.base_url, timeout=LONG) as own:
            done = finish(own, post(own, seed=seed).json()["id"])
            if not np.array_equal(read_pixels(own.get(done["images"][0]).content), paint_plainly(PICTURE, MASK, seed)):
                wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert not wrong
