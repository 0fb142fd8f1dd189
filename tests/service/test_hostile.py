"""Bodies that were damaged on purpose: the service answers each one, with no fault of its own, and goes on."""

from __future__ import annotations

import base64
import json
import random
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from dreammix_trt.service.a1111_fields import FIELDS, NEUTRAL
from tests.service.conftest import FILES, MASK, PICTURE
from tests.service.test_native import finish, post
from tests.support.fake_service import Running, make_png

BOUNDARY = b"----dreammix"
ERASED = make_png(np.dstack([PICTURE, 255 - MASK]))
DOORS = ("/v1/jobs", "/v1/images/edits", "/v1/subjects", "/v1/subjects/enroll", "/v1/read-request")
TOKENS = (
    b"--" + BOUNDARY, b"--" + BOUNDARY + b"--", b"\r\n", b"\r\n\r\n", b"\0", b"\xff\xfe", b'"', b"'", b"; ", b"name=",
    b"filename=", b"filename*=UTF-8''..%2f..%2fetc%2fpasswd", b"../../../../etc/passwd", b"Content-Disposition: ",
    b"Content-Type: multipart/mixed", b"Content-Transfer-Encoding: base64", b"{", b"[" * 2000, b"1e999", b"NaN",
    b'{"prompt":', b"9" * 5000, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"II*\0", b"<svg>", b"\xed\xa0\x80",
)  # fmt: skip


def make_body(path: str) -> bytes:
    """A good form for one of the doors."""
    texts = {
        "/v1/jobs": {"request": b'{"prompt": "a", "seed": 1}'},
        "/v1/images/edits": {"prompt": b"a", "n": b"1", "seed": b"3", "size": b"auto"},
        "/v1/subjects": {"name": b"x", "token": b"sks"},
        "/v1/subjects/enroll": {"name": b"x", "class_name": b"mug"},
        "/v1/read-request": {},
    }[path]
    files = (
        {"file": b"\2\0\0\0\0\0\0\0{}"} if path == "/v1/subjects" else {name: data for name, (_, data) in FILES.items()}
    )
    if path == "/v1/read-request":
        files = {"image": ERASED}
    if path == "/v1/images/edits":
        files = {"image": ERASED}
    parts = [
        b'Content-Disposition: form-data; name="%s"\r\n\r\n%s' % (name.encode(), text) for name, text in texts.items()
    ]
    parts += [
        b'Content-Disposition: form-data; name="%s"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n%s'
        % (name.encode(), data)
        for name, data in files.items()
    ]
    return b"".join(b"--" + BOUNDARY + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + BOUNDARY + b"--\r\n"


def mutate(body: bytes, chance: random.Random) -> bytes:
    """The body with one to eight changes: bytes, cuts, repeats, and tokens that mean something."""
    data = bytearray(body)
    for _ in range(chance.randint(1, 8)):
        # most of a form is a picture, so half of the changes go to where the headers are
        marks = [k for k in range(0, len(data), 7) if chance.random() < 0.01] or [0]
        place = chance.choice(marks) if chance.random() < 0.5 else chance.randrange(min(len(data), 700) + 1)
        kind = chance.randrange(5)
        if kind == 0 and data:
            data[place % len(data)] = chance.randrange(256)
        elif kind == 1:
            del data[place : place + chance.randint(1, 200)]
        elif kind == 2:
            data[place:place] = data[max(0, place - 100) : place]
        elif kind == 3:
            data[place:place] = chance.choice(TOKENS)
        else:
            del data[-chance.randint(1, 60) :]
    return bytes(data)


def attack(running: Running, count: int, seed: int) -> dict[int, int]:
    """Send so many bodies; returns how often each status came. A job's own failure is looked at, too."""
    chance, seen = random.Random(seed), dict[int, int]()
    before = set(Path(tempfile.gettempdir()).iterdir())
    with httpx.Client(base_url=running.url, timeout=20) as client:
        for number in range(count):
            path = DOORS[number % len(DOORS)]
            body, kind = mutate(make_body(path), chance), f"multipart/form-data; boundary={BOUNDARY.decode()}"
            if chance.random() < 0.05:
                kind = chance.choice(
                    ["multipart/form-data", "text/plain", kind + "x", 'multipart/form-data; boundary=""', ""]
                )
            answer = client.post(path, content=body, headers={"Content-Type": kind})
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, (number, path, answer.text)
            if answer.status_code >= 400:
                error = answer.json()["error"]
                assert error["type"] in ("invalid_request", "too_large", "queue_full", "not_found", "conflict"), (
                    answer.text
                )
            elif answer.status_code == 202:
                ended = finish(client, answer.json()["id"])
                assert ended["state"] == "done" or ended["error"]["type"] in ("invalid_request", "too_large"), ended
        assert finish(client, post(client).json()["id"])["state"] == "done"
    new = {each.name for each in set(Path(tempfile.gettempdir()).iterdir()) - before}
    assert not [name for name in new if name.startswith("dreammix-")]
    return seen


@pytest.fixture(scope="module")
def target() -> Running:  # type: ignore[misc]
    with Running(waiting=100, keep_results=8) as service:
        yield service


def test_mutated_forms(target: Running) -> None:
    seen = attack(target, 300, seed=1)
    assert set(seen) >= {200, 202, 422}  # some changes do no harm


@pytest.mark.slow
def test_ten_thousand_mutated_forms(target: Running) -> None:
    begun = time.monotonic()
    attack(target, 10_000, seed=2)
    assert time.monotonic() - begun < 1800


def test_json_that_is_deep_large_or_odd(client: httpx.Client) -> None:
    for body in (
        b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, b'{"init_images": NaN}', b"\xff\xfe{", b"", b"null", b'"a"',
        b'{"init_images": ["' + b"A" * 100_000 + b'"]}', b'{"init_images": [[]]}', b'{"mask": "data:,"}',
        b'{"init_images": ["/etc/passwd"]}', b'{"init_images": ["file:///etc/passwd"]}', b'{"\\ud800": 1}',
        b'{"init_images": ["\\ud800"]}', b'{"prompt": "\\ud800", "init_images": [""]}',
    ):  # fmt: skip
        for path in ("/sdapi/v1/img2img", "/sdapi/v1/options"):
            answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == 422, (body[:40], answer.text)
            assert answer.json()["error"]["type"] == "invalid_request"


def test_fields_of_a1111_with_odd_values(client: httpx.Client) -> None:
    """Each field with each odd value is taken or refused by its name, never a fault."""
    odd = [
        None,
        True,
        -1,
        0,
        1,
        3,
        1e9,
        1.5,
        "",
        "a",
        "\ud800",
        [],
        [1],
        {},
        {"a": []},
        2**70,
        [[[]]],
        {"sd_model_checkpoint": 3},
    ]
    good = {"init_images": [base64.b64encode(ERASED).decode()], "prompt": "a", "steps": 2, "denoising_strength": 1.0}
    seen = set()
    for name in (*FIELDS, *NEUTRAL):
        for value in odd:
            body = json.dumps({**good, name: value})
            answer = client.post("/sdapi/v1/img2img", content=body, headers={"Content-Type": "application/json"})
            seen.add(answer.status_code)
            assert answer.status_code in (200, 404, 422), (name, value, answer.text)
            assert answer.status_code == 200 or answer.json()["error"]["message"]
    assert seen == {200, 422}


def test_paths_do_not_lead_out_of_the_page(client: httpx.Client) -> None:
    for path in (
        "/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page//etc/passwd", "/page/%00", "/page/",
        "/page/index.html/..", "/v1/jobs/..%2f..%2fetc", "/v1/jobs/%00/images/0", "/v1/subjects/..%2fx/thumbnail",
    ):  # fmt: skip
        answer = client.get(path)
        assert answer.status_code == 404 and "error" in answer.json(), (path, answer.text)
