"""A runtime on the simulated device, over the embedded model's host networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.subject import read_subject
from dreammix_trt.core.token_adapter import TokenAdapter
from dreammix_trt.engine import DreamMix
from dreammix_trt.engine.backends.onnxruntime.engine_set import EngineSet
from dreammix_trt.engine.device.memory_plan import Options
from dreammix_trt.engine.directory import open_engine
from dreammix_trt.engine.drivers.simulated import SimulatedDevice, SimulatedNetworks
from dreammix_trt.engine.text import Tokenizer
from tests.conftest import write_lora

Made = tuple[DreamMix, SimulatedDevice, SimulatedNetworks]


@pytest.fixture(scope="module")
def host(mug_engine: Path) -> Iterator[DreamMix]:
    """The same engine on the host: what the device runtime is compared with."""
    with DreamMix.load(mug_engine, threads=1) as dm:
        yield dm


@pytest.fixture(scope="module")
def cup(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second subject's engine directory."""
    from dreammix_trt.building import build

    folder = tmp_path_factory.mktemp("cup")
    build(write_lora(folder / "lora", seed=5), base=small_base, out=folder / "engine", name="cup")
    return folder / "engine"


@pytest.fixture(scope="module")
def opened(mug_engine: Path) -> Any:
    """(engine set on one thread, tokenizers, subjects) of the mug's engine."""
    parts = open_engine(mug_engine)
    tokenizers = [Tokenizer.load(parts.parts["base"] / name) for name in ("tokenizer", "tokenizer_2")]
    subjects = [read_subject(file) for file in parts.subjects]
    with EngineSet.load(parts.parts, 1) as engines:
        yield engines, tokenizers, subjects


@pytest.fixture(scope="module")
def own_adapter(mug_engine: Path) -> TokenAdapter | None:
    """The token adapter of the mug's engine, if it has one."""
    file = open_engine(mug_engine).adapter
    return TokenAdapter.open(file) if file else None


@pytest.fixture
def simulated(opened: Any, own_adapter: TokenAdapter | None) -> Iterator[Callable[..., Made]]:
    """Makes a DreamMix on a simulated device. runner: wraps the host's networks; networks: of SimulatedNetworks."""
    made: list[Any] = []

    def make(
        *,
        runner: Callable[[Any], Any] = lambda engines: engines,
        networks: dict[str, Any] | None = None,
        device: SimulatedDevice | None = None,
        **options: Any,
    ) -> Made:
        engines, tokenizers, subjects = opened
        device = device or SimulatedDevice()
        on_device = SimulatedNetworks(device, runner(engines), **(networks or {}))
        given: Any = {"largest_picture": 320 * 320, "subjects": 3, "texts": 8, **options}
        given = Options(**given)
        dm = DreamMix.on_device(device, on_device, tokenizers, subjects, given, adapter=own_adapter, owned=(device,))
        made.append(dm)
        return dm, device, on_device

    yield make
    for dm in made:
        dm.close()


def make_scene(height: int = 128, width: int = 128, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A picture uint8 (height, width, 3) with structure and noise, and a mask (height, width) with a hole."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[:height, :width]
    waves = np.stack([np.sin(rows / (9 + c)) + np.cos(cols / (7 + 2 * c)) for c in range(3)], axis=-1)
    picture = np.clip(127 + 50 * waves + rng.normal(0, 6, waves.shape), 0, 255).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[height // 3 : 2 * height // 3, width // 4 : width // 2] = 255
    return picture, mask
