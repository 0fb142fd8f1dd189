"""The real thing: `dreammix-trt serve` in a process of its own on the embedded model, and subjects that come and go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from dreammix_trt.engine import DreamMix
from dreammix_trt.service.served import Served
from tests.conftest import write_lora
from tests.engine.conftest import make_scene
from tests.service.test_native import finish
from tests.support.fake_service import LONG, make_png, read_pixels

PICTURE, MASK = make_scene()
FIELDS = {"prompt": "a red sks mug", "seed": 7, "num_inference_steps": 3}


def serve(*arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dreammix_trt", "serve", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})


def read_address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("serving at "):
            return line.split()[2].rstrip("/")
    raise AssertionError("it never served")


@pytest.fixture(scope="module")
def process(mug_engine: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with serve(str(mug_engine), "--port", "0", "--threads", "1") as process:
        yield process, read_address(process)
        process.kill()


def post(client: httpx.Client, **fields: Any) -> str:
    files = {"image": make_png(PICTURE), "mask": make_png(MASK)}
    answer = client.post("/v1/jobs", files=files, data={"request": json.dumps({**FIELDS, **fields})})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def test_it_paints_what_the_engine_paints_and_ends_when_it_is_told(
    process: tuple[subprocess.Popen[str], str], mug_engine: Path
) -> None:
    with httpx.Client(base_url=process[1], timeout=LONG) as client:
        assert client.get("/v1/subjects").json()["subjects"][0]["name"] == "mug"
        facts = client.get("/v1/schema").json()["engine"]
        assert facts["name"] == mug_engine.name and facts["native_size"] == 128 and facts["backend"] == "onnxruntime"
        done = finish(client, post(client))
        served = read_pixels(client.get(done["images"][0]).content)
        with DreamMix.load(mug_engine, threads=1) as dm:
            alone = np.asarray(dm.inpaint(PICTURE, MASK, **FIELDS).images[0])
        assert np.array_equal(served, alone) and (served != PICTURE).any()
        last = post(client, num_inference_steps=12)
        process[0].send_signal(signal.SIGTERM)
        assert finish(client, last)["state"] == "done"
        assert client.get(f"/v1/jobs/{last}/images/0").status_code == 200
    assert process[0].wait(LONG) == 0


def test_subjects_of_a_real_engine_come_and_go(mug_engine: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", seed=5) / "pytorch_lora_weights.safetensors"
    painter = DreamMix.load(mug_engine, threads=1)
    served = Served("mug", [painter])
    try:
        assert served.can_enroll is False and served.cards["mug"].removable is False

        def paint(subject: str) -> Any:
            ticket = served.queue.submit(PICTURE, MASK, served.make_request({**FIELDS, "subject": subject}))
            return np.asarray(ticket.result(LONG).images[0])

        before = paint("mug")
        card = served.add(lora.read_bytes(), "cup", "ohwx", "cup")
        assert (card.name, card.token, card.class_name, card.kind) == ("cup", "ohwx", "cup", "lora")
        assert (paint("cup") != before).any() and np.array_equal(paint("mug"), before)
        served.remove("cup")
        assert painter.subjects == ("mug",) and np.array_equal(paint("mug"), before)
    finally:
        served.queue.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "--insecure"),
        (["--host", "nowhere.invalid", "--insecure"], "cannot be listened on"),
        (["--api-key", "a b"], "API key"),
        (["{engine}"], "two engines are called"),
        (["--residency", "swap"], "residency"),
    ],
)
def test_wrong_use_is_told_before_anything_is_served(mug_engine: Path, arguments: list[str], said: str) -> None:
    given = [each.format(engine=mug_engine) for each in arguments]
    with serve(str(mug_engine), "--port", "0", *given) as process:
        _, errors = process.communicate(timeout=LONG)
    assert process.returncode == 2 and said in errors.replace("\n", " "), errors


def test_the_key_may_come_from_the_environment(mug_engine: Path) -> None:
    with serve(str(mug_engine), "--port", "0", "--host", "0.0.0.0", env={"DREAMMIX_API_KEY": "k"}) as process:
        address = read_address(process)
        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert httpx.get(f"{address}/v1/models", headers={"Authorization": "Bearer k"}).status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(LONG) == 0
