"""Subjects that come and go while requests run."""

from __future__ import annotations

import struct
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from dreammix_trt.core.subject import Subject, write_subject
from tests.service.conftest import FILES, MASK, PICTURE
from tests.service.test_native import finish, post, wait_until
from tests.support.fake_service import LONG, FakePainter, Running, make_png, read_pixels


@pytest.fixture(scope="module")
def subject_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("subject") / "cup.safetensors"
    pair = (np.ones((4, 2), np.float32), np.ones((2, 4), np.float32))
    write_subject(path, Subject("cup", "sks", "cup", {"unet": {"down_blocks.0.attn.to_k": pair}}))
    return path.read_bytes()


def test_a_subject_comes_is_painted_and_goes(subject_file: bytes) -> None:
    painters = [FakePainter(), FakePainter()]
    with Running(*painters) as service, httpx.Client(base_url=service.url) as client:
        held = post(client, prompt="hold").json()
        wait_until(lambda: any(each.held.is_set() for each in painters))
        answers: list[httpx.Response] = []

        def upload() -> None:
            with httpx.Client(base_url=service.url, timeout=LONG) as own:
                form = {"name": "pot", "token": "ohwx", "class_name": "pot"}
                answers.append(own.post("/v1/subjects", files={"file": ("../../x.pkl", subject_file)}, data=form))

        thread = threading.Thread(target=upload)
        thread.start()
        wait_until(lambda: sum("pot" in each.subjects for each in painters) == 1)  # the idle one has it already
        assert not answers
        meanwhile = client.post("/v1/subjects", files={"file": subject_file})
        assert meanwhile.status_code == 429 and "retry-after" in meanwhile.headers
        assert post(client, subject="pot").status_code == 422
        for each in painters:
            each.let_go.set()
        thread.join(LONG)
        assert finish(client, held["id"])["state"] == "done"
        assert answers[0].status_code == 201 and all("pot" in each.subjects for each in painters)
        assert answers[0].json() == {
            "name": "pot", "token": "ohwx", "class_name": "pot", "kind": "lora", "attributes": {}, "thumbnail": False,
            "removable": True,
        }  # fmt: skip
        listed = client.get("/v1/subjects").json()
        assert [each["name"] for each in listed["subjects"]] == ["mug", "pot"] and listed["default"] == "mug"
        assert listed["subjects"][0]["attributes"] == {"colour": ["blue"]}
        assert finish(client, post(client, subject="pot").json()["id"])["state"] == "done"
        again = client.post("/v1/subjects", files={"file": subject_file}, data={"name": "pot"})
        assert again.status_code == 409 and again.json()["error"]["field"] == "name"
        assert client.delete("/v1/subjects/pot").status_code == 204
        assert client.delete("/v1/subjects/pot").status_code == 404
        assert not any("pot" in each.subjects for each in painters)
        kept = client.delete("/v1/subjects/mug")
        assert kept.status_code == 409 and "belongs to the engine" in kept.text


def test_a_subject_that_some_painter_refuses_is_nowhere(subject_file: bytes) -> None:
    class Full(FakePainter):
        def add_subject(self, subject: Subject) -> str:
            raise MemoryError("none left")

    painters = [FakePainter(), Full()]
    with Running(*painters) as service, httpx.Client(base_url=service.url) as client:
        answer = client.post("/v1/subjects", files={"file": subject_file})
        assert answer.status_code == 500 and "MemoryError" in answer.text and "none left" not in answer.text
        assert all(each.subjects == ("mug",) for each in painters)
        misfit = client.post("/v1/subjects", files={"file": subject_file}, data={"class_name": "misfit"})
        assert misfit.status_code == 422 and misfit.json()["error"]["message"] == "subject 'cup' does not fit this base"
        assert all(each.subjects == ("mug",) for each in painters)
        assert [each["name"] for each in client.get("/v1/subjects").json()["subjects"]] == ["mug"]


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "a\nb", "x" * 65, "C:\\x", "..", "\u202e", "a b", "a\\b"])
def test_names_like_paths_are_refused(client: httpx.Client, subject_file: bytes, name: str) -> None:
    answer = client.post("/v1/subjects", files={"file": subject_file}, data={"name": name})
    assert answer.status_code == 422 and answer.json()["error"]["type"] == "invalid_request"


def test_only_safetensors_are_opened(client: httpx.Client, subject_file: bytes, tmp_path: Path) -> None:
    import pickle
    import zipfile

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    pickled = pickle.dumps(Bomb())
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickled)
    header = struct.pack("<Q", 1 << 40)
    for data in (pickled, archive.read_bytes(), b"", b"{}", header + b"{}", subject_file[:-9], b"\2\0\0\0\0\0\0\0{}"):
        for name in ("x.safetensors", "x.bin", "x.ckpt"):
            answer = client.post("/v1/subjects", files={"file": (name, data)})
            assert answer.status_code == 422, answer.text
            assert "/tmp" not in answer.text and "dreammix-" not in answer.text
    assert not (tmp_path / "exploded").exists()
    missing = client.post("/v1/subjects", files={"other": b"1"})
    assert missing.status_code == 422 and missing.json()["error"]["field"] == "other"


def test_an_engine_without_an_adapter_says_so(client: httpx.Client) -> None:
    answer = client.post("/v1/subjects/enroll", files={"image": FILES["image"]}, data={"name": "a", "class_name": "b"})
    assert answer.status_code == 422 and "token adapter" in answer.text


def test_a_subject_is_made_of_pictures_where_the_engine_can(subject_file: bytes) -> None:
    painters = [FakePainter(can=True), FakePainter(can=True)]
    with Running(*painters) as service, httpx.Client(base_url=service.url) as client:
        assert client.get("/v1/schema").json()["can_enroll"] is True
        files = [("image", FILES["image"]), ("image", FILES["image"]), ("mask", FILES["mask"]), ("mask", FILES["mask"])]
        words = {"name": "own", "class_name": "cup"}
        card = client.post("/v1/subjects/enroll", files=files, data=words)
        assert card.status_code == 201 and card.json()["thumbnail"] is True
        assert all("own" in each.subjects for each in painters)
        picture = client.get("/v1/subjects/own/thumbnail")
        assert picture.headers["content-type"] == "image/webp"
        assert read_pixels(picture.content).shape == PICTURE.shape
        assert client.get("/v1/subjects/mug/thumbnail").status_code == 404
        assert client.post("/v1/subjects/enroll", files=files, data=words).status_code == 409
        cut_out = make_png(np.dstack([PICTURE, MASK]))
        erased = client.post("/v1/subjects/enroll", files={"image": cut_out}, data={**words, "name": "cut"})
        assert erased.status_code == 201
        whole = client.post("/v1/subjects/enroll", files={"image": FILES["image"]}, data={**words, "name": "whole"})
        assert whole.status_code == 422 and "whole" not in painters[0].subjects
        for bad, field in (
            ({"files": files[:3], "data": words}, "mask"),
            ({"files": files, "data": {"name": "b"}}, "class_name"),
            ({"files": files, "data": {"class_name": "b"}}, "name"),
            ({"files": {"mask": FILES["mask"]}, "data": words}, "image"),
        ):
            answer = client.post("/v1/subjects/enroll", **bad)  # type: ignore[arg-type]
            assert answer.status_code == 422 and answer.json()["error"]["field"] == field


def test_an_engine_has_room_for_so_many(subject_file: bytes) -> None:
    with Running() as service, httpx.Client(base_url=service.url) as client:
        service.served._most = 2
        assert client.post("/v1/subjects", files={"file": subject_file}).status_code == 201
        full = client.post("/v1/subjects", files={"file": subject_file}, data={"name": "third"})
        assert full.status_code == 409 and "the most here" in full.text
