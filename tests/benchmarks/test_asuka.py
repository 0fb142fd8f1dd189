"""The evidence of ASUKA with a fake painter and fake networks: what is kept, what is counted, and round trips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import asuka
import numpy as np
import pytest
from _asuka_ways import REMOVE, WAYS, count_rooms, draw_room, key_of_picture

from dreammix_trt.core.removal import REMOVAL
from dreammix_trt.core.request import Request
from dreammix_trt.evaluation.metrics.seen import ObjectSeen


class FakePainter:
    """Leaves the hole as it is, or fills it with one colour."""

    text_key = "fake"

    def __init__(self, colour: int | None = None, key: str = "fake") -> None:
        self.painted, self._colour, self.key = list[str](), colour, key

    def paint(self, way: Any, picture: Any, mask: Any, seed: int) -> Any:
        self.painted.append(way.name)
        return picture if self._colour is None else np.where(mask[..., None], np.uint8(self._colour), picture)


class FakeNetworks:
    """A VAE of cells that are means of 8x8 pixels and come back 4 levels brighter; ASUKA's gives the picture."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def run(self, name: str, **arrays: Any) -> dict[str, Any]:
        self.calls.append(name)
        if name == "vae_encoder":
            n, c, h, w = arrays["image"].shape
            return {"mean": arrays["image"].reshape(n, c, h // 8, 8, w // 8, 8).mean((3, 5))}
        if name == "vae_decoder":
            return {"image": arrays["latent"].repeat(8, 2).repeat(8, 3) + np.float32(8 / 255)}
        assert set(np.unique(arrays["mask"])) == {0.0, 1.0}
        return {"picture": arrays["image"]}


def test_ways_are_requests_and_only_those_of_asuka_use_it() -> None:
    for way in WAYS:
        request = Request(way.prompt, **dict(way.fields))
        assert (way.kind == "text") == (request.prior is None and request.decoder == "vae"), way.name
    assert dict(REMOVE.fields) == REMOVAL
    assert len({way.name for way in WAYS}) == len(WAYS)
    assert all(count_rooms(way, 200) == 200 for way in WAYS if way.kind != "trial")
    assert {count_rooms(way, 201) for way in WAYS if way.kind == "trial"} == {51}


def test_a_reading_is_painted_once_and_kept(tmp_path: Path) -> None:
    painter = FakePainter()
    first = asuka.Work(tmp_path, painter).read(REMOVE, "empty room", 3)
    assert asuka.Work(tmp_path, painter).read(REMOVE, "empty room", 3) == first
    assert painter.painted == ["remove"]
    assert first[ObjectSeen.name] == 0 and first["psnr_asuka"] == 70


def test_other_weights_of_asuka_paint_their_own_ways_anew(tmp_path: Path) -> None:
    text = next(way for way in WAYS if way.kind == "text")
    painters = [FakePainter(), FakePainter(key="other weights")]
    for painter in painters:
        for way in (text, REMOVE):
            asuka.Work(tmp_path, painter).read(way, "empty room", 3)
    assert [painter.painted for painter in painters] == [[text.name, "remove"], ["remove"]]


def test_things_are_seen_where_they_stand_and_not_where_they_do_not(tmp_path: Path) -> None:
    work = asuka.Work(tmp_path, FakePainter())
    assert np.mean([work.read(REMOVE, "thing's room", number)["object_seen"] for number in range(6)]) > 0.8
    assert [work.read(REMOVE, "empty room", number)["object_seen"] for number in range(6)] == [0] * 6
    magenta = asuka.Work(tmp_path / "other", FakePainter(255))
    assert magenta.read(REMOVE, "empty room", 0)["ring_colour"] > 20


def test_key_of_picture_changes_with_everything() -> None:
    keys = {key_of_picture(painter, way, room, number)
            for painter in "ab" for way in WAYS[:3] for room in ("empty room", "thing's room") for number in (0, 1)}  # type: ignore[arg-type] # fmt: skip
    assert len(keys) == 2 * 3 * 2 * 2


def test_rooms_are_the_same_each_time_and_the_hole_covers_the_thing() -> None:
    scene, mask = draw_room(5)
    draw_room.cache_clear()
    again, same = draw_room(5)
    assert np.array_equal(scene.image, again.image) and np.array_equal(mask, same)
    assert mask[scene.alpha > 0.5].all() and not mask.all()


@pytest.mark.parametrize(("trips", "brighter"), [(1, 4), (5, 20)])
def test_round_trips_add_up_in_the_hole_alone(trips: int, brighter: int) -> None:
    picture, mask = np.full((64, 64, 3), 100, np.uint8), np.zeros((64, 64), bool)
    mask[16:48, 16:48] = True
    networks = FakeNetworks()
    sent = asuka.send_round(networks, "vae", picture, mask, trips)  # type: ignore[arg-type]
    assert np.abs(sent[mask].astype(int) - 100 - brighter).max() <= trips
    assert np.array_equal(sent[~mask], picture[~mask])
    assert networks.calls == ["vae_encoder", "vae_decoder"] * trips
    darker = asuka.send_round(networks, "vae", picture, mask, 1, darker=0.1)  # type: ignore[arg-type]
    assert np.abs(darker[mask].astype(int) - 94).max() <= 1 and np.array_equal(darker[~mask], picture[~mask])
    assert np.array_equal(asuka.send_round(networks, "asuka", picture, mask, trips), picture)  # type: ignore[arg-type]


def test_a_corner_lies_on_the_seam_and_in_the_picture() -> None:
    mask = np.zeros((256, 256), bool)
    mask[2:100, 250:256] = True
    left, top, right, bottom = asuka._find_corner(mask)
    assert (left, top, right, bottom) == (200, 0, 256, 56) and mask[top:bottom, left:right].any()
