"""The engine set: weights mapped from safetensors, sessions on demand, and what is wrong with a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dreammix_trt.core.errors import DreamMixError, EngineError, InputError
from dreammix_trt.engine.build import open_engine
from dreammix_trt.engine.networks import EngineSet, read_weights


@pytest.fixture(scope="module")
def folder(mug_engine: Path) -> Path:
    """The embedded base's engine set."""
    return open_engine(mug_engine).networks


@pytest.fixture(scope="module")
def networks(folder: Path) -> Iterator[EngineSet]:
    with EngineSet.load(folder, threads=1) as opened:
        yield opened


def unet_inputs(networks: EngineSet, pictures: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    sides = {"pictures": pictures, "rows": 2 * pictures, "h": 8, "w": 12}
    arrays = {}
    for spec in networks.entries["unet"]["inputs"]:
        shape = [sides.get(side, side) for side in spec["shape"]]
        arrays[spec["name"]] = (0.1 * rng.standard_normal(shape)).astype(np.float32)
    return arrays


def test_weights_are_mapped_and_halves_widened(tmp_path: Path) -> None:
    single, half = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([0.5, -2], np.float16)
    save_file({"single": single, "half": half, "count": np.array([3], np.int64)}, tmp_path / "w.safetensors")
    weights = read_weights(tmp_path / "w.safetensors")
    assert weights["single"].dtype == np.float32 and not weights["single"].flags.owndata
    assert weights["half"].dtype == np.float32 and weights["half"].tolist() == [0.5, -2]
    np.testing.assert_array_equal(weights["single"], single)
    assert weights["count"].tolist() == [3]


@pytest.mark.parametrize("length", [0, 5, 60, -3])
def test_a_truncated_weight_file_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": np.ones((4, 4), np.float32)}, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(EngineError, match=r"w\.safetensors"):
        read_weights(path)


def test_both_unets_run_one_graph_with_two_weight_sets(networks: EngineSet) -> None:
    assert networks.entries["unet"]["graph"] == networks.entries["unet_raw"]["graph"]
    inputs = unet_inputs(networks)
    patched, raw = (networks.run(name, **inputs)["eps"] for name in ("unet", "unet_raw"))
    assert patched.shape == inputs["sample"].shape and patched.dtype == np.float32
    assert np.abs(patched - raw).max() > 1e-3


def test_the_same_call_gives_the_same_bits_in_any_batch(networks: EngineSet) -> None:
    inputs = unet_inputs(networks, pictures=2)
    both = networks.run("unet", **inputs)["eps"]
    np.testing.assert_array_equal(networks.run("unet", **inputs)["eps"], both)
    alone = {name: array[len(array) // 2 :] for name, array in inputs.items()}
    np.testing.assert_allclose(networks.run("unet", **alone)["eps"], both[2:], atol=1e-5)


def test_lora_factors_change_the_answer_and_zeros_do_not(networks: EngineSet) -> None:
    inputs = unet_inputs(networks)
    off = networks.run("unet", **{**inputs, "lora": np.zeros_like(inputs["lora"])})["eps"]
    assert np.abs(networks.run("unet", **inputs)["eps"] - off).max() > 1e-4
    assert sum(slot.size for slot in networks.slots("unet")) == inputs["lora"].shape[1]
    assert networks.slots("vae_decoder") == ()


def test_an_unknown_network_is_named(networks: EngineSet) -> None:
    assert "unet" in networks and "asuka" not in networks
    with pytest.raises(EngineError, match="asuka"):
        networks.run("asuka")


def test_threads_below_one_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="threads is 0"):
        EngineSet.load(folder, threads=0)


def _newer(folder: Path) -> None:
    table = json.loads((folder / "networks.json").read_text())
    (folder / "networks.json").write_text(json.dumps({**table, "schema": 99}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no table": (lambda folder: (folder / "networks.json").unlink(), "networks.json"),
    "broken table": (lambda folder: (folder / "networks.json").write_text("{"), "networks.json"),
    "newer table": (_newer, "schema 99"),
    "no base": (lambda folder: (folder / "base.json").write_text("{}"), "native_side"),
    "no weights": (lambda folder: (folder / "weights/vae_encoder.safetensors").unlink(), "vae_encoder.safetensors"),
    "no graph": (lambda folder: (folder / "graphs/unet.onnx").unlink(), "unet.onnx"),
    "broken graph": (lambda folder: (folder / "graphs/vae_encoder.onnx").write_bytes(b"x"), "vae_encoder.onnx"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_with_the_remedy(folder: Path, tmp_path: Path, damage: str) -> None:
    broken = tmp_path / "networks"
    shutil.copytree(folder, broken)
    act, named = DAMAGES[damage]
    act(broken)
    with pytest.raises(DreamMixError, match=named) as caught, EngineSet.load(broken, threads=1) as networks:
        networks.prepare(["vae_encoder"])
    assert "dreammix-trt build" in str(caught.value)
