"""A network is added by one entry in the list, one torch module, and a phase that uses it: nothing else changes.

The toy network is not part of the package. Building exports and checks it, the CPU runs it, a device plans its memory,
loads its weights, binds it in every room and has a flag for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from dreammix_trt.building import build
from dreammix_trt.core.networks import KINDS, flag_of, names_of_group
from dreammix_trt.engine import DreamMix
from dreammix_trt.engine.device.memory_plan import Options
from dreammix_trt.engine.device.room import RoomShape
from dreammix_trt.engine.drivers.simulated import SimulatedDevice, SimulatedNetworks
from dreammix_trt.engine.host import runtime as host_runtime
from dreammix_trt.engine.host.painter import HostPainter
from tests.engine.conftest import make_scene
from tests.support.toy_network import GAIN, TOY


@dataclass(frozen=True)
class Change:
    """A phase of a device that runs the toy."""


WORDS = {"num_inference_steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def engine(test_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An engine directory that is built while the toy network is in the list."""
    KINDS.append(TOY)
    try:
        out = tmp_path_factory.mktemp("toy") / "engine"
        build(out=out)
        yield out
    finally:
        KINDS.remove(TOY)


def test_it_is_built_and_checked(engine: Path) -> None:
    with DreamMix.load(engine, threads=1) as dm:
        entry = json.loads((dm.networks.parts["toy"] / "network.json").read_text())
    assert [tensor["name"] for tensor in entry["inputs"]] == ["latent"]
    assert entry["parity"]["max_rel"] <= 1e-6 and entry["parity"]["sizes"]
    assert names_of_group("picture")[-1] == "toy"


def test_a_phase_on_the_host_uses_it(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A painter whose last latent goes through the toy: the picture is the decoder's of the changed latent."""
    seen: dict[str, Any] = {}

    class Painter(HostPainter):
        def finish(self) -> Any:
            assert self.taken is not None
            changed = self._networks.run("toy", latent=self.taken.x)["changed"]
            seen["before"], seen["after"] = self.taken.x, changed
            self.taken = replace(self.taken, x=changed)
            return super().finish()

    image, mask = make_scene()
    with DreamMix.load(engine, threads=1) as dm:
        plain = dm.inpaint(image, mask, "a mug", **WORDS).images[0]
        monkeypatch.setattr(host_runtime, "HostPainter", Painter)
        changed = dm.inpaint(image, mask, "a mug", **WORDS).images[0]
        assert dm.inpaint(image, mask, "a mug", **WORDS).timings["network:toy"] > 0
    np.testing.assert_allclose(seen["after"], seen["before"] * GAIN[:, None, None], rtol=1e-6)
    assert (np.asarray(plain) != np.asarray(changed)).any()


def test_a_device_plans_loads_and_binds_it(engine: Path) -> None:
    device = SimulatedDevice()
    with DreamMix.load(engine, threads=1) as host:
        networks = SimulatedNetworks(device, host.networks)
        options = Options(largest_picture=128 * 128)
        with DreamMix.on_device(device, networks, host.tokenizers, (), options, owned=(device,)) as dm:
            image, mask = make_scene()
            dm.inpaint(image, mask, "a mug", **WORDS)
            studio = dm.studio
            assert studio is not None and "toy" in str(studio.plan)
            side = host.facts.native_side
            room, _ = studio.rooms.enter(RoomShape((side, side), 1, 2))
            studio.residency.need("toy")
            arrays = room.arrays["toy"]
            latent = np.random.default_rng(0).standard_normal(arrays["latent"].shape).astype(np.float32)
            studio.put(arrays["latent"], latent)
            for _ in range(2):  # run plainly and captured, then replayed
                room.play(Change(), lambda _: room.enqueue("toy", studio.stream), studio.stream, capture=True)
            assert any(entry.kind == "launch" for entry in device.record)
            found = studio.bring(arrays["changed"])
    np.testing.assert_allclose(found, latent * GAIN[:, None, None], rtol=1e-6)
    assert flag_of("toy") == 1 << len(KINDS) - 1
