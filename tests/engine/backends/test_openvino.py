"""OpenVINO behind the host's seam, held against ONNX Runtime on the same parts."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dreammix_trt.core.errors import EngineError, InputError
from dreammix_trt.core.store import Store
from dreammix_trt.engine.backends.onnxruntime.engine_set import EngineSet
from dreammix_trt.engine.backends.openvino import compiling
from dreammix_trt.engine.backends.openvino.compiling import Compiler
from dreammix_trt.engine.backends.openvino.engine_set import OpenVinoSet
from dreammix_trt.engine.directory import open_engine
from tests.engine.backends.test_sessions import draw_inputs, raise_full, replace_kept

pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def parts(mug_engine: Path) -> dict[str, Path]:
    return open_engine(mug_engine).parts


@pytest.fixture(scope="module")
def oracle(parts: dict[str, Path]) -> Iterator[EngineSet]:
    with EngineSet.load(parts, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def networks(parts: dict[str, Path]) -> Iterator[OpenVinoSet]:
    with OpenVinoSet.open(parts, threads=1) as opened:
        yield opened


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "vae_encoder", "inpaint_head", "unet_kv", "unet"])
def test_every_network_computes_what_it_does_on_onnxruntime(
    networks: OpenVinoSet, oracle: EngineSet, name: str
) -> None:
    inputs = draw_inputs(oracle, name)
    for output, wanted in oracle.run(name, **inputs).items():
        found = networks.run(name, **inputs)[output]
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def test_merged_weights_count_and_the_bases_own_come_back(networks: OpenVinoSet, oracle: EngineSet) -> None:
    inputs, name = draw_inputs(oracle, "unet_kv"), next(iter(oracle.weights("unet_kv")))
    merged = {name: 2 * oracle.weights("unet_kv")[name]}
    first = networks.run("unet_kv", **inputs)
    changed = networks.run("unet_kv", **inputs, **merged)
    for output, wanted in oracle.run("unet_kv", **inputs, **merged).items():
        np.testing.assert_allclose(changed[output], wanted, atol=2e-5 * np.abs(wanted).max())
    again = networks.run("unet_kv", **inputs)
    assert any(not np.array_equal(changed[output], first[output]) for output in first)
    assert all(np.array_equal(again[output], first[output]) for output in first), "A -> B -> A to the bit"


def test_merged_weights_are_freed_with_their_last_user(networks: OpenVinoSet, oracle: EngineSet) -> None:
    inputs, name = draw_inputs(oracle, "unet_kv"), next(iter(oracle.weights("unet_kv")))
    merged = {name: 2 * oracle.weights("unet_kv")[name]}
    alive = weakref.ref(merged[name])
    networks.run("unet_kv", **inputs, **merged)
    del merged
    gc.collect()
    assert alive() is None
    for output, wanted in oracle.run("unet_kv", **inputs).items():
        np.testing.assert_allclose(networks.run("unet_kv", **inputs)[output], wanted, atol=2e-5 * np.abs(wanted).max())


def test_an_output_is_the_callers_own(networks: OpenVinoSet, oracle: EngineSet) -> None:
    inputs = draw_inputs(oracle, "inpaint_head")
    found = networks.run("inpaint_head", **inputs)["feature"]
    before = found.copy()
    networks.run("inpaint_head", **{name: -array for name, array in inputs.items()})
    np.testing.assert_array_equal(found, before)


def test_what_was_compiled_is_kept_and_taken(
    parts: dict[str, Path], oracle: EngineSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, inputs, compiled = Store(tmp_path), draw_inputs(oracle, "inpaint_head"), []
    plain = Compiler._compile
    monkeypatch.setattr(Compiler, "_compile", lambda *given: compiled.append(given) or plain(*given))
    results = []
    for count in (1, 1):
        with OpenVinoSet.open(parts, threads=1, shelf=shelf) as networks:
            results.append(networks.run("inpaint_head", **inputs)["feature"])
        assert len(compiled) == count and [entry.kind for entry in shelf.entries()] == ["session"]
    np.testing.assert_array_equal(*results)
    (entry,) = shelf.entries()
    (tmp_path / entry.key / "compiled.blob").write_bytes(b"damaged")
    with OpenVinoSet.open(parts, threads=1, shelf=shelf) as networks:
        np.testing.assert_array_equal(networks.run("inpaint_head", **inputs)["feature"], results[0])
    assert len(compiled) == 2


def test_what_cannot_be_taken_is_replaced_and_a_full_disk_costs_time_alone(
    parts: dict[str, Path], oracle: EngineSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, inputs = Store(tmp_path), draw_inputs(oracle, "inpaint_head")
    expected = oracle.run("inpaint_head", **inputs)["feature"]

    def run() -> None:
        with OpenVinoSet.open(parts, threads=1, shelf=shelf) as networks:
            np.testing.assert_allclose(networks.run("inpaint_head", **inputs)["feature"], expected, atol=1e-5)

    monkeypatch.setattr(Store, "put", raise_full)
    run()
    assert shelf.entries() == []
    monkeypatch.undo()
    run()
    (entry,) = shelf.entries()
    assert entry.name == "inpaint_head"
    file = tmp_path / entry.key / "compiled.blob"
    sound = len(file.read_bytes())
    replace_kept(shelf, entry.key, "compiled.blob", b"sound, but not OpenVINO's")
    run()
    assert len(file.read_bytes()) == sound


def test_a_precision_that_the_device_lacks_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, wanted in ((True, "bf16"), (False, "f32")):
        monkeypatch.setattr(compiling, "has_bfloat16", lambda device, has=has: has)
        assert Compiler(precision="bfloat16")._settings["INFERENCE_PRECISION_HINT"] == wanted
        assert Compiler(precision="float32")._settings["INFERENCE_PRECISION_HINT"] == "f32"


def test_a_device_that_is_not_here_is_named(parts: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"device is .NPU\.7.; OpenVINO finds here: .*CPU"):
        OpenVinoSet.open(parts, device="NPU.7")
    OpenVinoSet.open(parts, device="AUTO").close()


@pytest.mark.parametrize(("device", "known"), [("GPU", True), ("GPU.1", True), ("GPU.2", False), ("CPU.3", False)])
def test_one_of_several_devices_may_be_named(monkeypatch: pytest.MonkeyPatch, device: str, known: bool) -> None:
    core = SimpleNamespace(available_devices=["CPU", "GPU.0", "GPU.1"])
    monkeypatch.setattr(compiling, "open_core", lambda: core)
    if known:
        Compiler(device).check()
        return
    with pytest.raises(InputError, match=rf"device is '{device}'; OpenVINO finds here: CPU, GPU\.0, GPU\.1; or AUTO"):
        Compiler(device).check()


def test_a_graph_that_it_refuses_is_named(parts: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    for name in ("base", "inpaint_head"):
        shutil.copytree(parts[name], tmp_path / name)
    (tmp_path / "inpaint_head/inpaint_head.onnx").write_bytes(b"no graph")
    one = np.ones((1, 1, 8, 8), np.float32)
    with (
        OpenVinoSet.open(tmp_path, threads=1) as networks,
        pytest.raises(EngineError, match=r"inpaint_head\.onnx: inpaint_head cannot be compiled .*dreammix-trt build"),
    ):
        networks.run("inpaint_head", mask=one, masked_latent=np.ones((1, 4, 8, 8), np.float32))
