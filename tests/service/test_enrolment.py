"""A subject made of one picture over HTTP, on an engine with a token adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from dreammix_trt.building import build
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.engine import DreamMix
from tests.engine.conftest import make_scene
from tests.engine.test_tokens import draw_object
from tests.service.test_native import finish
from tests.support.fake_service import Running, make_png, read_pixels
from tests.support.tokens import write_small_adapter


@pytest.fixture(scope="module")
def engine(test_home: Path, small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    adapter = write_small_adapter(folder / "small.safetensors", BaseFiles.open(small_base))
    build(out=folder / "engine", base=small_base, tokens=adapter.file)
    return folder / "engine"


@pytest.fixture(scope="module")
def service(engine: Path) -> Iterator[Running]:
    with Running(DreamMix.load(engine, threads=1)) as running:  # type: ignore[arg-type]
        yield running


def test_a_picture_becomes_a_subject_that_is_painted_and_goes(service: Running, engine: Path) -> None:
    image, mask = draw_object(0)
    picture, hole = make_scene()
    fields = {"prompt": "a red mug", "seed": 7, "num_inference_steps": 2, "subject": "own"}
    with httpx.Client(base_url=service.url, timeout=60) as client:
        assert client.get("/v1/schema").json()["can_enroll"] is True
        files = {"image": make_png(image), "mask": make_png(mask)}
        card = client.post("/v1/subjects/enroll", files=files, data={"name": "own", "class_name": "mug"})
        assert card.status_code == 201, card.text
        assert card.json() == {**card.json(), "name": "own", "class_name": "mug", "kind": "tokens", "thumbnail": True}
        scene = {"image": make_png(picture), "mask": make_png(hole)}
        job = client.post("/v1/jobs", files=scene, data={"request": json.dumps(fields)}).json()
        done = finish(client, job["id"])
        assert done["state"] == "done", done
        served = read_pixels(client.get(done["images"][0]).content)
        with DreamMix.load(engine, threads=1) as dm:
            dm.enroll(image, mask, name="own", class_name="mug")
            assert np.array_equal(served, np.asarray(dm.inpaint(picture, hole, **fields).images[0]))
        empty = {"image": make_png(image), "mask": make_png(np.zeros_like(mask))}
        answer = client.post("/v1/subjects/enroll", files=empty, data={"name": "none", "class_name": "mug"})
        assert answer.status_code == 422, answer.text
        assert client.delete("/v1/subjects/own").status_code == 204
        assert client.get("/v1/subjects").json()["subjects"] == []
