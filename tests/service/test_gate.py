"""Who may come in, how much they may send and how slowly, and how the service ends."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.remarks import remark
from dreammix_trt.service.served import Served
from dreammix_trt.service.settings import Settings
from tests.service.conftest import FILES
from tests.service.test_native import finish, post, wait_until
from tests.support.fake_service import LONG, FakePainter, Running


def test_another_host_needs_a_key_or_the_word() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(InputError, match="--insecure"):
            Settings(host=host)
        Settings(host=host, api_key="k")
        Settings(host=host, insecure=True)
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        assert Settings(host=host).is_private
    with pytest.raises(InputError, match="API key"):
        Settings(api_key="a b")


def test_a_key_opens_and_nothing_else_does() -> None:
    with Running(api_key="secret") as service, httpx.Client(base_url=service.url) as client:
        for path in ("/healthz", "/readyz"):
            assert client.get(path).status_code == 200
        basic = base64.b64encode(b"user:secret").decode()
        for header in ("Bearer secret", "bearer secret", f"Basic {basic}"):
            assert client.get("/v1/models", headers={"Authorization": header}).status_code == 200
        wrong = ["", "secret", "Bearer", "Bearer secre", "Bearer secrets", "Basic !", "Basic c2VjcmV0", "Bearer \xff"]
        for path in ("/v1/models", "/metrics", "/openapi.json", "/sdapi/v1/options", "/nothing"):
            for header in wrong:
                answer = client.get(path, headers={"Authorization": header.encode("latin-1")})
                assert answer.status_code == 401 and answer.json()["error"]["type"] == "unauthorized"
                assert answer.headers["www-authenticate"] == "Bearer"
        assert post(client).status_code == 401


def test_no_foreign_page_is_answered(client: httpx.Client, running: Running) -> None:
    own = running.url
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "evil.example"},
        {"Host": "localhost.evil.example"},
        {"Host": ""},
        {"Origin": own + "0"},
    ):
        answer = client.get("/v1/models", headers=headers)
        assert answer.status_code == 403 and answer.json()["error"]["type"] == "forbidden", headers
        assert "access-control-allow-origin" not in answer.headers
    for headers in ({"Origin": own}, {"Sec-Fetch-Site": "same-origin"}, {"Host": "localhost:1"}, {"Host": "[::1]"}):
        if "Origin" not in headers:
            assert client.get("/v1/models", headers=headers).status_code == 200, headers
    assert client.get("/v1/models", headers={"Origin": own}).status_code == 200
    assert "access-control-allow-origin" not in client.options("/v1/models", headers={"Origin": own}).headers


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    with Running(
        body_bytes=50_000,
        subject_bytes=60_000,
        field_bytes=1000,
        fields=4,
        pixels=10_000,
        body_seconds=0.5,
        head_seconds=0.5,
    ) as service:
        yield service


def test_bodies_fields_and_pixels_have_limits(small: Running) -> None:
    with httpx.Client(base_url=small.url) as client:
        assert post(client).status_code == 202
        cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
            ({**FILES, "mask": b"0" * 60_000}, {"request": '{"prompt": "a"}'}),
            (FILES, {"request": json.dumps({"prompt": "a" * 2000})}),
            (FILES, {"request": '{"prompt": "a"}', **{f"f{k}": "1" for k in range(4)}}),
            (FILES, {"a" * 300: "1"}),
        ]
        for files, data in cases:
            answer = client.post("/v1/jobs", files=files, data=data)
            assert answer.status_code == 413 and answer.json()["error"]["type"] == "too_large", answer.text
        streamed = client.post(
            "/v1/jobs",
            content=(b"x" * 10_000 for _ in range(9)),  # says no length
            headers={"Content-Type": "multipart/form-data; boundary=b"},
        )
        assert streamed.status_code in (413, 422)
        flood = client.post("/sdapi/v1/img2img", content=(b" " * 10_000 for _ in range(9)))
        assert flood.status_code == 413
        many = client.post("/v1/jobs", files=[("image", FILES["image"])] * 5, data={"request": "{}"})
        assert many.status_code == 413


def test_pixels_are_counted_before_they_are_decoded(client: httpx.Client) -> None:
    """A bomb: 60,000 x 60,000 pixels in some hundred bytes of PNG."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
    )
    encoded = base64.b64encode(bomb).decode()
    begun = time.monotonic()
    answers = [
        client.post("/v1/jobs", files={**FILES, name: bomb}, data={"request": '{"prompt": "a"}'})
        for name in ("image", "mask")
    ]
    answers += [
        client.post("/v1/read-request", files={"image": bomb}),
        client.post("/v1/images/edits", files={"image": FILES["image"], "mask": bomb}, data={"prompt": "a"}),
        client.post("/sdapi/v1/img2img", json={"init_images": [encoded]}),
    ]
    assert [answer.status_code for answer in answers] == [413] * 5
    assert time.monotonic() - begun < 5


def open_socket(service: Running) -> socket.socket:
    host, port = service.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=LONG)


def test_slow_heads_and_slow_bodies_are_left(small: Running) -> None:
    with open_socket(small) as head, open_socket(small) as body, open_socket(small) as silent:
        head.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: ")
        body.sendall(
            b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
        )
        assert b"408" in body.recv(4096)
        assert head.recv(4096) == b"" and silent.recv(4096) == b""
    with httpx.Client(base_url=small.url) as client:
        assert client.get("/healthz").status_code == 200


def test_a_flood_of_headers_is_refused(small: Running) -> None:
    with open_socket(small) as flood:
        try:
            flood.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + b"X-Header: 1\r\n" * 200_000)
            assert b"400" in flood.recv(4096)[:20]
        except (ConnectionResetError, BrokenPipeError):
            pass  # it was closed while we were still sending
    with httpx.Client(base_url=small.url) as client:
        assert client.get("/healthz").status_code == 200


def test_all_bodies_together_have_a_limit() -> None:
    with Running(bodies_bytes=30_000) as service, open_socket(service) as first:
        first.sendall(
            b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 29000\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
            b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + b"0" * 25_000
        )
        with httpx.Client(base_url=service.url) as client:
            answer = wait_until(lambda: (answer := post(client)).status_code == 429 and answer)
            assert answer.json()["error"]["type"] == "queue_full"
            first.close()
            wait_until(lambda: post(client).status_code == 202)


def test_the_end_finishes_what_was_accepted() -> None:
    painter = FakePainter()
    with Running(painter, grace=LONG) as service, httpx.Client(base_url=service.url) as client:
        jobs = [post(client, prompt="hold").json(), post(client, prompt="slow").json()]
        assert painter.held.wait(LONG)
        loop = service.app.state.house.jobs.find(jobs[0]["id"])._loop
        loop.call_soon_threadsafe(service.server.handle_exit, 15, None)
        wait_until(lambda: client.get("/readyz").status_code == 503)
        refused = post(client)
        assert refused.status_code == 503 and refused.json()["error"]["type"] == "draining"
        assert "retry-after" in refused.headers and client.get("/healthz").status_code == 200
        painter.let_go.set()
        for job in jobs:
            assert finish(client, job["id"])["state"] == "done"
            assert client.get(job["links"]["images"][0]).status_code == 200
        service.thread.join(LONG)
        assert not service.thread.is_alive() and painter.closed


def test_the_end_waits_no_longer_than_the_grace() -> None:
    painter = FakePainter()
    with Running(painter, grace=0.2) as service, httpx.Client(base_url=service.url) as client:
        job = post(client, prompt="hold").json()
        waiting = post(client).json()
        assert painter.held.wait(LONG)
        known = [service.app.state.house.jobs.find(each["id"]) for each in (job, waiting)]
        known[0]._loop.call_soon_threadsafe(service.server.handle_exit, 15, None)
        wait_until(lambda: known[1].ended)
        painter.let_go.set()
        service.thread.join(LONG)
        assert not service.thread.is_alive() and [each.state for each in known] == ["cancelled"] * 2


def test_logs_hold_no_prompts_unless_asked(caplog: pytest.LogCaptureFixture) -> None:
    for asked in (False, True):
        caplog.clear()
        with (
            caplog.at_level("DEBUG"),
            Running(log_prompts=asked) as service,
            httpx.Client(base_url=service.url) as client,
        ):
            finish(client, post(client, prompt="a peculiar wish").json()["id"])
            client.post("/v1/jobs", files=FILES, data={"request": '{"prompt": "a peculiar wish", "seed": "x"}'})
            finish(client, post(client, prompt="break a peculiar wish").json()["id"])
        assert ("peculiar" in caplog.text) == asked


def test_remarks_on_a_request_go_to_its_client_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Remarking(FakePainter):
        def iterate(self, image: Any, mask_image: Any, request: Any, /, **options: Any) -> Any:
            remark(f"prompt: {request.prompt}")
            return super().iterate(image, mask_image, request, **options)

    for asked in (False, True):
        caplog.clear()
        served = Served("fake", [Remarking()], log_prompts=asked)
        served.queue.submit(FILES["image"][1], FILES["mask"][1], "peculiar").result(LONG)
        served.queue.close()
        assert ("peculiar" in caplog.text) == asked


def test_a_watched_job_has_room_for_so_many_watchers() -> None:
    painter = FakePainter()
    with Running(painter, watchers=2) as service, httpx.Client(base_url=service.url) as client:
        events = post(client, prompt="hold").json()["links"]["events"]
        done = threading.Event()

        def watch() -> None:
            with httpx.Client(base_url=service.url) as own, own.stream("GET", events) as stream:
                stream.read()
                done.set()

        threads = [threading.Thread(target=watch) for _ in range(2)]
        for thread in threads:
            thread.start()
        job = next(iter(service.app.state.house.jobs._jobs.values()))
        wait_until(lambda: len(job.watchers) == 2)
        assert client.get(events).status_code == 429
        painter.let_go.set()
        for thread in threads:
            thread.join(LONG)
        assert done.is_set()
        wait_until(lambda: not job.watchers)
