"""What stages do besides the loop: large frames through the VAE in tiles, frames that engines do not take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.noise import SeededNoise
from dreammix_trt.core.request import Request
from dreammix_trt.core.schedule import make_schedule
from dreammix_trt.core.seam import BaseFacts
from dreammix_trt.core.subject import NOBODY
from dreammix_trt.engine.canvas import tiles
from dreammix_trt.engine.canvas.frames import Canvas
from dreammix_trt.engine.canvas.geometry import Size
from dreammix_trt.engine.host import painter as host_painter
from dreammix_trt.engine.host.denoiser import FakeDenoiser
from dreammix_trt.engine.host.painter import HostPainter, Sitting
from dreammix_trt.engine.host.runtime import HostRuntime
from dreammix_trt.engine.host.texts import Text
from dreammix_trt.engine.prompts import Prompt, PromptPlan
from dreammix_trt.engine.runtime import Work
from tests.engine.host.test_loop import LinearNetworks
from tests.support.host import paint_all

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


def lay_canvas(request: Request = REQUEST, sizes: list[Size] | None = None) -> Canvas:
    image, mask = np.random.default_rng(5).integers(0, 256, (60, 90, 3), np.uint8), np.zeros((60, 90), np.uint8)
    mask[:14, 24:70] = 255  # reference mode's square around it is cut off at the top
    return Canvas.of(image, mask, mode=request.mode, native=64, divisor=8, sizes=sizes)


FACTS = BaseFacts(native_side=64, divisor=8, scaling_factor=0.5, feature_channels=8)


def make_painter(networks: LinearNetworks) -> HostPainter:
    texts = {name: Text(np.zeros((2, 77, 2), np.float32), np.zeros((2, 2), np.float32)) for name in ("lcg", "gch")}
    sitting = Sitting(lay_canvas(), REQUEST, make_schedule(REQUEST), texts, {}, SeededNoise(9))
    return HostPainter(sitting, networks, FACTS, FakeDenoiser())


def check(request: Request, sizes: list[Size] | None = None) -> None:
    """Ask the host's runtime whether it would paint the picture."""
    plan = PromptPlan((Prompt(NOBODY, np.zeros((2, 77), np.int64)),), None, (), None, {})
    work = Work(lay_canvas(request, sizes), request, make_schedule(request), 0, NOBODY, plan)
    HostRuntime(NotedNetworks(), FACTS).check(work)


def test_large_frames_go_through_the_vae_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In both stages and both directions, all of one size; a VAE that looks at single cells gives the same picture."""
    pictures = {}
    for above in (1536, 40):
        networks = NotedNetworks()
        monkeypatch.setattr(tiles, "ABOVE", above)
        monkeypatch.setattr(host_painter, "tiles_of", lambda h, w: tiles.tiles_of(h, w, side=5, overlap=2))
        _, finished = paint_all(make_painter(networks))
        pictures[above] = finished.astype(int)
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
        check(reference, square)
    check(reference.replace(lcg_fraction=0.0), square)
    check(reference.replace(mode="native"), square)
    check(reference)
