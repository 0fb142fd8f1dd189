"""Views are encoded a few at a time: their number does not decide the memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dreammix_trt.trainer.data import TrainingView

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from dreammix_trt.trainer.samples import BATCH, encode_views  # noqa: E402

SIDE = 16


class Averages:
    """A VAE whose latents are averages over 8 x 8 pixels; it notes how many pictures came at a time."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def encode(self, pictures: np.ndarray) -> Any:
        self.counts.append(len(pictures))
        return torch.nn.functional.avg_pool2d(torch.from_numpy(np.asarray(pictures, np.float32)), 8)


def draw(count: int, alive: list[int]) -> Iterator[TrainingView]:
    """Views, each of one level; `alive` gets how many exist when the next is drawn."""
    drawn: list[weakref.ref[np.ndarray]] = []
    for number in range(count):
        gc.collect()
        alive.append(sum(image() is not None for image in drawn))
        image = np.full((SIDE, SIDE, 3), number, np.uint8)
        hole = np.zeros((SIDE, SIDE), bool)
        hole[:8, :8] = True
        drawn.append(weakref.ref(image))
        view = TrainingView(image, hole, 100 + number)
        del image
        yield view
        del view


def test_views_are_encoded_in_order_and_let_go() -> None:
    networks, alive = Averages(), []
    samples = encode_views(networks, draw(5 * BATCH - 1, alive))  # type: ignore[arg-type]
    assert networks.counts == [BATCH] * 8 + [BATCH - 1] * 2  # masked and plain
    assert max(alive) < 2 * BATCH
    levels = np.arange(5 * BATCH - 1) / 127.5 - 1
    np.testing.assert_allclose(samples.latents[:, 0, 1, 1].numpy(), levels, atol=1e-6)
    assert (samples.masked[:, :, 0, 0] == 0).all() and samples.mask[:, 0, 0, 0].all()
    assert samples.sharp.tolist() == [100 + number for number in range(5 * BATCH - 1)]
