"""A running service of a fake painter, shared by the tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.support.fake_service import Running, make_png, make_scene

PICTURE, MASK = make_scene()
FILES = {"image": ("../../etc/passwd", make_png(PICTURE)), "mask": ("mask.png", make_png(MASK))}


@pytest.fixture(scope="package")
def running() -> Iterator[Running]:
    with Running() as service:
        yield service


@pytest.fixture
def client(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=30) as each:
        yield each
