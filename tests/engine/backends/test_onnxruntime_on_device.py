"""ONNX Runtime behind the device runtime's seam: for real on host memory, and what it is told for a GPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.axes import Sides
from dreammix_trt.core.errors import DeviceError, EngineError, InputError, OutOfMemoryError
from dreammix_trt.core.onnx_runtime import import_onnxruntime
from dreammix_trt.core.seam import Array, DeviceNetworks
from dreammix_trt.engine.backends.onnxruntime.engine_set import EngineSet
from dreammix_trt.engine.backends.onnxruntime.on_device import OnnxNetworks
from dreammix_trt.engine.directory import open_engine

ort = import_onnxruntime()
SIDES = Sides(rows=4, pictures=2, height=8, width=12)


@dataclass
class Line:
    """A stream by its handle."""

    handle: int | None = None

    def close(self) -> None: ...


class Held:
    """A network bound to numpy arrays: random inputs to change in place, outputs to look at."""

    def __init__(self, networks: OnnxNetworks, name: str, sides: Sides = SIDES, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.inputs = {
            tensor.name: (
                rng.integers(1, 500, sides.shape(tensor))
                if tensor.dtype == "int64"
                else (0.1 * rng.standard_normal(sides.shape(tensor))).astype(tensor.dtype)
            )
            for tensor in networks.inputs(name)
        }
        self.outputs = {t.name: np.zeros(sides.shape(t), t.dtype) for t in networks.outputs(name)}
        self.arrays = {
            key: Array(value.ctypes.data, value.shape, str(value.dtype))
            for key, value in {**self.inputs, **self.outputs}.items()
        }
        self.bound = networks.bind(name, sides, self.arrays)

    def run(self, stream: Line | None = None) -> dict[str, np.ndarray]:
        self.bound.enqueue(stream or Line())
        return {name: value.copy() for name, value in self.outputs.items()}


@pytest.fixture(scope="module")
def parts(mug_engine: Path) -> dict[str, Path]:
    return open_engine(mug_engine).parts


@pytest.fixture(scope="module")
def networks(parts: dict[str, Path]) -> Iterator[OnnxNetworks]:
    with OnnxNetworks.open(parts, Line(), provider="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def host(parts: dict[str, Path]) -> Iterator[EngineSet]:
    with EngineSet.load(parts, threads=1) as opened:
        yield opened


def test_every_network_computes_what_the_host_does_in_place(
    networks: OnnxNetworks, host: EngineSet, parts: dict[str, Path]
) -> None:
    names = [name for name in parts if name != "base"]
    assert {"unet", "unet_raw", "text_encoder", "vae_encoder", "vae_decoder", "inpaint_head"} <= set(names)
    for name in names:
        held = Held(networks, name)
        places = {key: value.ctypes.data for key, value in held.outputs.items()}
        for _ in range(2):
            found = held.run()
            for key, value in host.run(name, **held.inputs).items():
                np.testing.assert_allclose(found[key], value, atol=1e-5 * np.abs(value).max())
                assert held.outputs[key].ctypes.data == places[key]
            for value in held.inputs.values():  # the same memory, another request
                value[:] = value[::-1].copy() if value.dtype == np.int64 else 0.5 * value


def test_weights_of_slots_are_the_bases_own_and_may_be_others(networks: OnnxNetworks, host: EngineSet) -> None:
    held = Held(networks, "unet")
    for name, weight in networks.weights("unet").items():
        np.testing.assert_array_equal(weight, host.weights("unet")[name])
        held.inputs[name][:] = weight
    given = {name: value for name, value in held.inputs.items() if name not in networks.weights("unet")}
    wanted = host.run("unet", **given)["eps"]
    plain = held.run()["eps"]
    np.testing.assert_allclose(plain, wanted, atol=1e-5 * np.abs(wanted).max())
    held.inputs[networks.slots("unet")[0].weight][:] *= 2
    assert np.abs(held.run()["eps"] - plain).max() > 1e-3 * np.abs(plain).max()


def test_it_answers_as_the_seam_wants(networks: OnnxNetworks, host: EngineSet, parts: dict[str, Path]) -> None:
    seam: DeviceNetworks = networks
    assert "unet" in seam and "unet_float32" not in seam
    assert seam.facts == host.facts and seam.slots("unet") == host.slots("unet") and seam.slots("none") == ()
    slots = seam.slots("unet")
    assert [tensor.name for tensor in seam.inputs("unet")][-len(slots) :] == [slot.weight for slot in slots]
    assert seam.weights("unet").keys() == {slot.weight for slot in slots} and seam.weights("vae_decoder") == {}
    assert seam.frames() is None and seam.most_pictures is None and seam.workspace_bytes("unet", SIDES) == 0
    assert seam.weight_bytes("unet") == (parts["unet"] / "unet.safetensors").stat().st_size
    assert not Held(networks, "inpaint_head").bound.capturable


def test_a_float32_twin_is_a_part_of_that_name_and_comes_when_asked_for(parts: dict[str, Path]) -> None:
    mapping = {"base": parts["base"], "vae_decoder_float32": parts["vae_decoder"]}
    with OnnxNetworks.open(mapping, Line(), provider="cpu") as networks:
        assert "vae_decoder_float32" in networks and "vae_decoder" not in networks
        held = Held(networks, "vae_decoder_float32")
        assert networks.loaded == (), "it may never be needed"
        networks.load("vae_decoder_float32")
        assert networks.loaded == ("vae_decoder_float32",) and held.run()["image"].any()


def test_arrays_that_do_not_fit_are_named(networks: OnnxNetworks) -> None:
    arrays = Held(networks, "inpaint_head").arrays
    with pytest.raises(EngineError, match=r"inpaint_head: no array for mask; bind one of \(2, 1, 8, 12\) float32"):
        networks.bind("inpaint_head", SIDES, {key: value for key, value in arrays.items() if key != "mask"})
    with pytest.raises(EngineError, match=r"mask is bound to \(2, 1, 8, 12\) float32; it takes \(2, 1, 8, 16\)"):
        networks.bind("inpaint_head", Sides(4, 2, 8, 16), arrays)
    with pytest.raises(EngineError, match=r"mask is bound to .* float16; it takes .* float32"):
        networks.bind(
            "inpaint_head", SIDES, {**arrays, "mask": Array(arrays["mask"].pointer, (2, 1, 8, 12), "float16")}
        )
    with pytest.raises(EngineError, match="no network 'asuka'"):
        networks.bind("asuka", SIDES, arrays)


def test_what_is_closed_or_unloaded_does_not_run(parts: dict[str, Path]) -> None:
    chosen = {name: parts[name] for name in ("base", "inpaint_head")}
    with OnnxNetworks.open(chosen, Line(), provider="cpu") as networks:
        held = Held(networks, "inpaint_head")
        before = held.run()["feature"]
        networks.unload("inpaint_head")
        networks.unload("inpaint_head")
        with pytest.raises(EngineError, match="inpaint_head cannot run: load it first"):
            held.run()
        networks.load("inpaint_head")
        held.outputs["feature"][:] = 0
        np.testing.assert_array_equal(held.run()["feature"], before)
        held.bound.close()
        held.bound.close()
        with pytest.raises(EngineError, match="inpaint_head cannot run: it is closed"):
            held.run()
        held = Held(networks, "inpaint_head")
    with pytest.raises(EngineError, match="inpaint_head cannot run"):
        held.run()


def test_opened_without_sessions_it_answers_all_that_planning_asks(parts: dict[str, Path]) -> None:
    with OnnxNetworks.open(parts, Line(), provider="cpu", resident=()) as networks:
        assert networks.weight_bytes("unet") and networks.inputs("unet") and networks.slots("unet")
        assert networks.workspace_bytes("unet", SIDES) == 0 and networks.loaded == ()
        held = Held(networks, "inpaint_head")
        networks.load("inpaint_head")
        assert held.run()["feature"].any() and networks.loaded == ("inpaint_head",)


def test_bad_parts_and_options_are_refused(parts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="provider is 'gpu'; allowed: cuda, cpu"):
        OnnxNetworks.open(parts, Line(), provider="gpu")
    broken = tmp_path / "vae_decoder"
    shutil.copytree(parts["vae_decoder"], broken)
    mapping = {"base": parts["base"], "vae_decoder": broken}
    (broken / "vae_decoder.safetensors").unlink()
    with pytest.raises(EngineError, match=r"vae_decoder\.safetensors: missing, so vae_decoder cannot run"):
        OnnxNetworks.open(mapping, Line(), provider="cpu")
    (broken / "vae_decoder.safetensors").write_bytes(b"")
    with pytest.raises(EngineError, match=r"vae_decoder cannot be loaded \(.*dreammix-trt build"):
        OnnxNetworks.open(mapping, Line(), provider="cpu")
    text = (broken / "network.json").read_text()
    (broken / "network.json").write_text(text.replace('"graph"', '"engine"', 1))
    with pytest.raises(EngineError, match="vae_decoder is not an ONNX graph"):
        OnnxNetworks.open(mapping, Line(), provider="cpu")


# What ONNX Runtime is told for a GPU


class FakeSession:
    """Stands for a session of the CUDA provider: remembers what it was given."""

    made: list[FakeSession]
    fails: str = ""
    providers_found = "CUDAExecutionProvider", "CPUExecutionProvider"

    def __init__(self, graph: str, options: Any, providers: list[Any]) -> None:
        self.graph, self.providers, self.bound, self.runs = graph, providers, [], []
        FakeSession.made.append(self)

    def get_providers(self) -> list[str]:
        return [*self.providers_found]

    def io_binding(self) -> Any:
        class Binding:
            bind_input = bind_output = lambda _, *given: self.bound.append(given)

        return Binding()

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        if self.fails:
            raise RuntimeError(self.fails)
        self.runs.append(options.get_run_config_entry("disable_synchronize_execution_providers"))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> type[FakeSession]:
    monkeypatch.setattr(FakeSession, "made", [], raising=False)
    monkeypatch.setattr(ort, "InferenceSession", FakeSession)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    return FakeSession


def test_the_cuda_session_runs_in_the_given_stream_and_waits_for_nothing(
    cuda: type[FakeSession], parts: dict[str, Path]
) -> None:
    chosen = {name: parts[name] for name in ("base", "inpaint_head")}
    with OnnxNetworks.open(chosen, Line(0xABC0), memory_limit=1 << 30) as networks:
        (session,) = cuda.made
        (name, options), fallback = session.providers
        assert (name, fallback) == ("CUDAExecutionProvider", "CPUExecutionProvider")
        assert options == {
            "device_id": "0",
            "user_compute_stream": str(0xABC0),
            "do_copy_in_default_stream": "1",
            "enable_cuda_graph": "0",
            "arena_extend_strategy": "kSameAsRequested",
            "gpu_mem_limit": str(1 << 30),
        }
        held = Held(networks, "inpaint_head")
        held.run(Line(0xABC0))
        held.run(Line(0xABC0))
        assert session.runs == ["1", "1"]
        wanted = [(key, "cuda", 0, np.float32, each.shape, each.pointer) for key, each in held.arrays.items()]
        assert session.bound == wanted, "bound once"
        with pytest.raises(EngineError, match="inpaint_head runs in the stream that it was opened with alone"):
            held.run(Line(0xDEF0))
        session.fails = "BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 9"
        with pytest.raises(OutOfMemoryError, match="inpaint_head failed: the device has too little memory"):
            held.run(Line(0xABC0))
        session.fails = "some operator"
        with pytest.raises(EngineError, match=r"inpaint_head failed \(some operator\)"):
            held.run(Line(0xABC0))


def test_a_gpu_that_onnx_runtime_cannot_use_is_said(
    cuda: type[FakeSession], parts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {name: parts[name] for name in ("base", "inpaint_head")}
    with pytest.raises(DeviceError, match="default stream"):
        OnnxNetworks.open(chosen, Line(0))
    monkeypatch.setattr(cuda, "providers_found", ("CPUExecutionProvider",))
    with pytest.raises(DeviceError, match="cannot use this GPU for inpaint_head"):
        OnnxNetworks.open(chosen, Line(1))
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    for resident in (None, ()):
        with pytest.raises(DeviceError, match=r"ONNX Runtime has no CUDAExecutionProvider.*onnxruntime-gpu"):
            OnnxNetworks.open(chosen, Line(1), resident=resident)


# On a GPU


def test_on_a_gpu_it_computes_what_the_host_does(gpu: None, parts: dict[str, Path], host: EngineSet) -> None:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("ONNX Runtime has no CUDA provider here")
    from dreammix_trt.engine.drivers.cuda import CudaDevice

    device = CudaDevice()
    stream = device.make_stream()
    with OnnxNetworks.open(parts, stream) as networks, OnnxNetworks.open(parts, Line(), provider="cpu") as here:
        for name in ("unet", "vae_decoder"):
            held, memory = Held(here, name), []
            arrays = {}
            for key, each in held.arrays.items():
                memory.append(device.allocate(each.nbytes))
                arrays[key] = Array(memory[-1].pointer, each.shape, each.dtype)
            bound = networks.bind(name, SIDES, arrays)
            for _ in range(2):
                for key, value in held.inputs.items():
                    device.upload(arrays[key], value, stream)
                bound.enqueue(stream)
                for key, wanted in host.run(name, **held.inputs).items():
                    found = np.empty_like(wanted)
                    device.download(found, arrays[key], stream)
                    device.synchronize(stream)
                    assert np.abs(found - wanted).max() <= 1e-2 * np.abs(wanted).max()
                for value in held.inputs.values():
                    value *= np.float32(0.5)
            bound.close()
    device.close()
