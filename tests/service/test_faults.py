"""What goes wrong around a job: clients that are gone, results that crowd each other out, devices that are lost."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import numpy as np
import pytest

from dreammix_trt import serve_cli
from dreammix_trt.core.errors import DeviceError
from dreammix_trt.service import house as house_module
from dreammix_trt.service.app import make_app
from dreammix_trt.service.jobs import Job
from dreammix_trt.service.served import Served
from dreammix_trt.service.settings import Settings
from tests.service.conftest import FILES
from tests.service.test_meters import read
from tests.service.test_native import finish, post, wait_until
from tests.support.fake_service import LONG, FakePainter, Running, make_png


class Losing(FakePainter):
    """Its device is lost in the middle of a request for "lose"."""

    def _paint(self, source: Any, mask: Any, request: Any) -> Iterator[Any]:
        for event in super()._paint(source, mask, request):
            if "lose" in request.prompt:
                error = DeviceError("the device fell off the bus")
                error.lost = True
                raise error
            yield event


def test_a_job_that_arrives_while_the_end_begins_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its picture is being looked at when draining begins: nobody would wait for it any more."""
    with Running() as service, httpx.Client(base_url=service.url) as client:
        house, check = service.app.state.house, house_module.check_picture

        def begin(*arguments: Any) -> Any:
            house.draining = True
            return check(*arguments)

        monkeypatch.setattr(house_module, "check_picture", begin)
        answer = post(client)
        assert answer.status_code == 503 and answer.json()["error"]["type"] == "draining"
        assert not house.jobs.list_open()


def test_an_origin_that_is_none_is_refused_in_our_shape(client: httpx.Client) -> None:
    answer = client.get("/v1/models", headers={"Origin": "http://["})
    assert answer.status_code == 403 and answer.json()["error"]["type"] == "forbidden"


def test_a_slow_job_is_not_forgotten_the_moment_it_ends() -> None:
    """It was accepted first and ends last: those that ended before it go."""
    slow, quick = FakePainter(), FakePainter()
    with Running(slow, quick, keep_results=2) as service, httpx.Client(base_url=service.url) as client:
        held = post(client, prompt="hold").json()["id"]
        painter = wait_until(lambda: next((each for each in (slow, quick) if each.held.is_set()), None))
        others = [post(client, seed=k).json()["id"] for k in range(3)]
        wait_until(lambda: len(service.app.state.house.jobs.list_open()) == 1)
        painter.let_go.set()
        assert finish(client, held)["state"] == "done"
        assert client.get(f"/v1/jobs/{held}/images/0").status_code == 200
        assert [client.get(f"/v1/jobs/{id}").status_code for id in others] == [404, 404, 200]


def test_an_upload_that_breaks_off_is_no_fault_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("ERROR"), Running() as service:
        host, port = service.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=LONG) as half:
            half.sendall(
                b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
            )
            wait_until(lambda: service.server.server_state.tasks)
        wait_until(lambda: not service.server.server_state.tasks)
    assert not caplog.records


def test_failures_of_other_doors_crowd_nothing_out() -> None:
    with Running(keep_results=2) as service, httpx.Client(base_url=service.url) as client:
        done = post(client).json()["id"]
        finish(client, done)
        for prompt in ("break", "break", "a mug", "break"):
            client.post("/v1/images/edits", files={"image": make_erased()}, data={"prompt": prompt})
        assert client.get(f"/v1/jobs/{done}").status_code == 200
        assert list(service.app.state.house.jobs._jobs) == [done]


def test_a_job_of_two_pictures_is_fetched_when_both_are(client: httpx.Client, running: Running) -> None:
    id = post(client, num_images_per_prompt=2).json()["id"]
    finish(client, id)

    def is_left() -> bool:
        return id in [job.id for job in running.app.state.house.jobs.list_uncollected()]

    for k, left in ((1, True), (1, True), (0, False)):
        assert client.get(f"/v1/jobs/{id}/images/{k}").status_code == 200
        assert is_left() == left


def test_only_a_service_without_any_worker_says_so_and_ends() -> None:
    """It stays some seconds for whoever has not fetched a picture yet."""
    first, second = Losing(), Losing()
    with Running(first, second) as service, httpx.Client(base_url=service.url) as client:
        lost = finish(client, post(client, prompt="lose").json()["id"])
        assert lost["state"] == "failed" and lost["error"]["type"] == "engine_error"
        wait_until(lambda: read(client)["dreammix_workers", "fake"] == 1)
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        done = finish(client, post(client).json()["id"])
        assert done["state"] == "done" and not service.server.lost
        finish(client, post(client, prompt="lose").json()["id"])
        wait_until(lambda: read(client)["dreammix_workers", "fake"] == 0)
        assert client.get("/healthz").json()["error"]["type"] == "unavailable"
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 503
        assert post(client).status_code in (500, 503)
        assert client.get(done["images"][0]).status_code == 200
        service.thread.join(LONG)
        assert service.server.lost and first.closed and second.closed


def test_the_command_tells_that_it_ended_of_lost_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: Queue[str] = Queue()
    monkeypatch.setattr(serve_cli, "_load", lambda *given: iter(()))
    monkeypatch.setattr(serve_cli, "_open", lambda *given: Served("fake", [Losing()]))
    monkeypatch.setattr(serve_cli, "_tell", lambda *given: addresses.put(given[-1]))
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(serve_cli.serve, [Path("fake")], port=0)
        with httpx.Client(base_url=addresses.get(timeout=LONG)) as client:
            post(client, prompt="lose")
        with pytest.raises(DeviceError, match="start it again") as caught:
            ended.result(LONG)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("path", ["/v1/images/edits", "/v1/jobs/{id}/events"])
def test_who_leaves_before_the_first_event_leaves_nothing_behind(path: str) -> None:
    painter = FakePainter()

    async def ask() -> None:
        app = make_app([Served("fake", [painter])], Settings())
        async with app.router.lifespan_context(app):
            house = app.state.house
            files = [FILES["image"][1], FILES["mask"][1]]
            request = house.first.make_request({"prompt": "hold"})
            if "{id}" in path:
                job: Job = await house.accept(house.first, *files, request, door="native")
                await call(app, "GET", path.format(id=job.id), b"", "")
                assert not job.watchers and job.ended is None
            else:
                form = httpx.Request(
                    "POST",
                    "http://localhost",
                    files={"image": make_erased()},
                    data={"prompt": "hold", "stream": "true"},
                )
                await call(app, "POST", path, form.read(), form.headers["content-type"])
                (job,) = house.jobs.list_open() or [None]
                assert job is None or job.ticket._stop is not None
            painter.let_go.set()

    asyncio.run(asyncio.wait_for(ask(), LONG))


def test_a_reader_that_stalls_is_left() -> None:
    """A picture of noise fills both sockets' buffers and waits in memory; nobody takes it."""
    picture = np.random.default_rng(1).integers(0, 256, (1700, 1700, 3), np.uint8)
    with Running(body_seconds=0.5) as service, httpx.Client(base_url=service.url, timeout=LONG) as client:
        mask = np.zeros(picture.shape[:2], np.uint8)
        mask[:9, :9] = 255
        files = {"image": make_png(picture), "mask": make_png(mask)}
        id = client.post("/v1/jobs", files=files, data={"request": '{"prompt": "a"}'}).json()["id"]
        finish(client, id)
        host, port = service.url.removeprefix("http://").split(":")
        with socket.socket() as still:
            still.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            still.connect((host, int(port)))
            still.sendall(f"GET /v1/jobs/{id}/images/0 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            connections = service.server.server_state.connections
            wait_until(lambda: len(connections) == 2)
            wait_until(lambda: len(connections) == 1)
        begun = time.monotonic()
        assert len(client.get(f"/v1/jobs/{id}/images/0").content) > 8_000_000
        assert time.monotonic() - begun < LONG


def make_erased() -> bytes:
    """A picture whose middle is transparent."""
    pixels = np.full((48, 64, 4), 255, np.uint8)
    pixels[10:30, 20:44, 3] = 0
    return make_png(pixels)


async def call(app: Any, method: str, path: str, body: bytes, kind: str) -> None:
    """One request of a client that has sent its body and is gone."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.sleep(0)

    headers = [(b"host", b"localhost"), (b"content-type", kind.encode())]
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": headers, "http_version": "1.1", "scheme": "http", "root_path": "",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
    }  # fmt: skip
    await app(scope, receive, send)
