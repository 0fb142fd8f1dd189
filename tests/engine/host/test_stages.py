"""What stages do besides the loop: large frames through the VAE in tiles, frames that engines do not take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.noise import SeededNoise
from dreammix_trt.core.request import Request
from dreammix_trt.core.schedule import make_schedule
from dreammix_trt.engine.backends.onnxruntime.engine_set import BaseFacts
from dreammix_trt.engine.canvas import tiles
from dreammix_trt.engine.canvas.frames import Canvas
from dreammix_trt.engine.canvas.geometry import Size
from dreammix_trt.engine.host import stages
from dreammix_trt.engine.host.denoiser import FakeDenoiser
from dreammix_trt.engine.host.stages import Painter, Text, painted
from tests.engine.host.test_loop import LinearNetworks

REQUEST = Request("a mug", num_inference_steps=6)


class NotedNetworks(LinearNetworks):
    """Averages blocks and repeats them, and notes the shapes of what the VAE got."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[str, tuple[int, ...]]] = []

    def run(self, name: str, **arrays: Any) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
        if name.startswith("vae"):
            self.shapes.append((name, next(iter(arrays.values())).shape))
        return super().run(name, **arrays)


def painter_of(networks: LinearNetworks, request: Request = REQUEST, sizes: list[Size] | None = None) -> Painter:
    image, mask = np.random.default_rng(5).integers(0, 256, (60, 90, 3), np.uint8), np.zeros((60, 90), np.uint8)
    mask[:14, 24:70] = 255  # reference mode's square around it is cut off at the top
    texts = {name: Text(np.zeros((2, 77, 2), np.float32), np.zeros((2, 2), np.float32)) for name in ("lcg", "gch")}
    canvas = Canvas.of(image, mask, mode=request.mode, native=64, divisor=8, sizes=sizes)
    facts = BaseFacts(native_side=64, divisor=8, scaling_factor=0.5, feature_channels=8)
    return Painter(canvas, request, make_schedule(request), texts, {}, SeededNoise(9), networks, facts)


def test_large_frames_go_through_the_vae_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In both stages and both directions, all of one size; a VAE that looks at single cells gives the same picture."""
    pictures = {}
    for above in (1536, 40):
        networks = NotedNetworks()
        monkeypatch.setattr(tiles, "ABOVE", above)
        monkeypatch.setattr(stages, "tiles_of", lambda h, w: tiles.tiles_of(h, w, side=5, overlap=2))
        painter = painter_of(networks)
        *_, last = painted([painter], make_schedule(REQUEST), FakeDenoiser())
        pictures[above] = painter.finish(last.x).astype(int)
        shapes = set(networks.shapes)
        if above == 40:
            assert shapes == {("vae_encoder", (1, 3, 40, 40)), ("vae_decoder", (1, 4, 5, 5))}
        else:
            assert all(max(shape[2:]) >= (64 if name == "vae_encoder" else 8) for name, shape in shapes)
    assert np.abs(pictures[40] - pictures[1536]).max() <= 1


def test_a_frame_that_engines_do_not_take_is_refused_before_the_first_step() -> None:
    """Of either stage, reference mode's only; fields of stages that do not run do not matter."""
    square = [(64, 64)]
    reference = REQUEST.replace(mode="reference", lcg_field=0.1)
    with pytest.raises(InputError, match="--shapes dynamic"):
        painter_of(NotedNetworks(), reference, square)
    painter_of(NotedNetworks(), reference.replace(lcg_fraction=0.0), square)
    painter_of(NotedNetworks(), reference.replace(mode="native"), square)
    painter_of(NotedNetworks(), reference)
