"""Networks as `open_device` opens them, without weights, and a runtime over them that plans its memory first.

TensorRT is a stand-in that keeps the packages' rules, on the simulated device; its arithmetic is the host's. ONNX
Runtime itself runs on the simulated device's memory.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.networks import list_groups, names_of_group
from dreammix_trt.core.seam import Array
from dreammix_trt.engine import DreamMix
from dreammix_trt.engine.backends.onnxruntime.on_device import OnnxNetworks
from dreammix_trt.engine.device.loading import OnDevice, open_device
from dreammix_trt.engine.device.memory_plan import Options
from dreammix_trt.engine.drivers import cuda
from dreammix_trt.engine.drivers.simulated import SimulatedDevice
from tests.engine.backends.test_tensorrt_on_device import BOTH, write_part
from tests.engine.conftest import make_scene
from tests.support import fake_tensorrt as fake

TWINS = ("vae_encoder_float32", "vae_decoder_float32")


class Gpu(fake.Gpu):
    """held: the networks whose weights were there together, each time some came; overflowing: those that give no
    numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[set[str]] = []
        self.overflowing: tuple[str, ...] = ()

    def fit(self, name: str, nbytes: int) -> bool:
        fits = super().fit(name, nbytes)
        self.held.append(set(self.weights))
        return fits


class Card(SimulatedDevice):
    """The simulated device with the stand-in's streams, and its weights in memory."""

    def __init__(self, gpu: fake.Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def memory(self) -> tuple[int, int]:
        free, total = super().memory()
        return free - sum(self.gpu.weights.values()), total

    def make_stream(self) -> Any:
        return self.gpu.make_stream()

    def synchronize(self, stream: Any) -> None:
        self.gpu.current = True
        super().synchronize(stream)


@pytest.fixture
def loaded(
    opened: Any, own_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[DreamMix, Gpu]]]:
    """Opens the embedded model as engines of a back end, and makes a DreamMix of it as `DreamMix.load` does."""
    engines, tokenizers, subjects = opened
    gpu, made = Gpu(), list[DreamMix]()
    card = Card(gpu)

    def compute(name: str, arrays: dict[str, Array]) -> None:
        plain, values = plain_name(name), {key: card.view(array) for key, array in arrays.items()}
        inputs = {entry["name"]: values[entry["name"]] for entry in engines.entries[plain]["inputs"]}
        for key, value in engines.run(plain, **inputs).items():
            values[key][...] = np.nan if name in gpu.overflowing else value

    def load(
        backend: str, shapes: str = "dynamic", contexts: tuple[Any, ...] = (77,), **options: Any
    ) -> tuple[DreamMix, Gpu]:
        parts = {"base": engines.parts["base"]}
        version = {"tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1.116"}[backend]
        for name in (*engines.entries, *TWINS):
            entry, parts[name] = engines.entries[plain_name(name)], tmp_path / name
            tensors = entry["inputs"], entry["outputs"]
            told = {"slots": entry["slots"], "weights": engines.weights(plain_name(name))}
            pictures = options.get("pictures", 1)
            write_part(
                parts[name], *tensors, **told, shapes=shapes, version=version, contexts=contexts, pictures=pictures
            )
        engine: Any = SimpleNamespace(passport=SimpleNamespace(backend=backend), parts=parts)
        here = open_device(engine, tmp_path / "store")
        assert here.networks.loaded == () and not gpu.weights
        given = Options(**{"largest_picture": 320 * 320, "subjects": 3, "texts": 8, **options})
        dm = DreamMix.on_device(
            *(here.device, here.networks, tokenizers, subjects, given),
            stream=here.stream,
            adapter=own_adapter,
            owned=(here,),
        )
        made.append(dm)
        return dm, gpu

    gpu.compute = compute
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake.make_package(gpu))
    monkeypatch.setitem(sys.modules, "tensorrt", fake.make_package(gpu, "tensorrt"))
    monkeypatch.setattr(cuda, "CudaDevice", lambda: card)
    yield load
    for dm in made:
        dm.close()
    assert not gpu.weights


def plain_name(name: str) -> str:
    return name.removesuffix("_float32")


def paint(dm: DreamMix, *size: int) -> np.ndarray:
    result = dm.inpaint(*make_scene(*size), "a sks mug", num_inference_steps=3, seed=3)
    return np.asarray(result.images[0]).astype(int)


@pytest.mark.parametrize("residency", ["resident", "swap"])
@pytest.mark.parametrize("backend", BOTH)
def test_engines_opened_without_weights_paint_what_the_host_does(
    loaded: Any, host: DreamMix, backend: str, residency: str
) -> None:
    """Two frames, the second again after the first; each asks for shapes of its own."""
    dm, _ = loaded(backend, residency=residency)
    for size in ((128, 128), (128, 160), (128, 128)):
        assert np.abs(paint(dm, *size) - paint(host, *size)).max() <= 1


@pytest.mark.parametrize("residency", ["resident", "swap"])
@pytest.mark.parametrize("backend", BOTH)
def test_a_twin_is_bound_before_its_weights_come(loaded: Any, host: DreamMix, backend: str, residency: str) -> None:
    dm, gpu = loaded(backend, residency=residency)
    gpu.overflowing = ("vae_decoder",)
    assert np.abs(paint(dm, 128, 160) - paint(host, 128, 160)).max() <= 1
    assert {"vae_decoder_float32"} <= set(gpu.weights)


@pytest.mark.parametrize("backend", BOTH)
def test_an_engine_is_read_only_when_it_must_be(loaded: Any, backend: str) -> None:
    """TensorRT 11 reads it to learn of it and once more with its weights; not to plan the memory. Twins are not."""
    _, gpu = loaded(backend, shapes="static", residency="resident")
    read = Counter(entry.removeprefix("deserialise ") for entry in gpu.log if entry.startswith("deserialise"))
    assert read.pop("unet") == read.pop("vae_encoder") == (2 if backend == "tensorrt" else 1)
    assert not read["vae_encoder_float32"]


@pytest.mark.parametrize("backend", BOTH)
def test_networks_that_take_turns_are_there_with_their_phase_alone(loaded: Any, backend: str) -> None:
    dm, gpu = loaded(backend, shapes="static", residency="swap")
    assert gpu.weights == {}
    paint(dm, 128, 128)
    together = [set(map(plain_name, held)) for held in gpu.held]
    assert {"unet_kv", "unet"} in together and all(
        any(held <= set(phase) for phase in map(names_of_group, list_groups())) for held in together
    )


def test_onnx_runtimes_sessions_take_turns_and_are_gone_after_theirs(
    opened: Any, host: DreamMix, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, tokenizers, subjects = opened
    held, alive, made = list[set[str]](), dict[str, weakref.ref[Any]](), OnnxNetworks._open_session

    def session(self: OnnxNetworks, name: str) -> Any:
        found = made(self, name)
        alive[name] = weakref.ref(found)
        held.append({each for each, session in alive.items() if session() is not None})
        return found

    monkeypatch.setattr(OnnxNetworks, "_open_session", session)
    options = Options(largest_picture=320 * 320, residency="swap")
    with SimulatedDevice() as device:
        networks = OnnxNetworks.open(engines.parts, device.make_stream(), provider="cpu", resident=())
        with networks, DreamMix.on_device(device, networks, tokenizers, subjects, options) as dm:
            assert held == []
            for size in ((128, 128), (128, 160), (128, 128)):
                assert np.abs(paint(dm, *size) - paint(host, *size)).max() <= 1
    assert {"unet_kv", "unet"} in held and all(
        any(each <= set(phase) for phase in map(names_of_group, list_groups())) for each in held
    )


@pytest.mark.parametrize("failing", ["networks", "stream", "device"])
def test_closing_closes_all_whatever_fails(failing: str) -> None:
    closed = []

    def close(name: str) -> None:
        closed.append(name)
        if name == failing:
            raise RuntimeError(name)

    def part(name: str) -> Any:
        return SimpleNamespace(close=lambda: close(name))

    with pytest.raises(RuntimeError, match=failing):
        OnDevice(part("device"), part("networks"), part("stream")).close()
    assert closed == ["networks", "stream", "device"]
