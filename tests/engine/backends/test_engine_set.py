"""The engine set: parts in the store or in one folder, sessions on demand, and what is wrong with a part."""

from __future__ import annotations

import gc
import json
import re
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dreammix_trt.core.errors import DreamMixError, EngineError, InputError
from dreammix_trt.core.networks import twin_name
from dreammix_trt.core.store import Store
from dreammix_trt.engine.backends.onnxruntime.engine_set import EngineSet, list_parts
from dreammix_trt.engine.directory import open_engine
from tests.engine.backends.test_sessions import draw_inputs


@pytest.fixture(scope="module")
def parts(mug_engine: Path) -> dict[str, Path]:
    """The embedded base's parts, each in its place in the store."""
    return open_engine(mug_engine).parts


@pytest.fixture(scope="module")
def networks(parts: dict[str, Path]) -> Iterator[EngineSet]:
    with EngineSet.load(parts, threads=1) as opened:
        yield opened


def draw_unet_inputs(networks: EngineSet, pictures: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    sides = {"pictures": pictures, "rows": 2 * pictures, "context": 77, "h": 8, "w": 12}
    arrays, weights = {}, networks.weights("unet")
    for spec in networks.entries["unet"]["inputs"]:
        if spec["name"] in weights:
            continue
        shape = [sides.get(side, side) for side in spec["shape"]]
        arrays[spec["name"]] = (0.1 * rng.standard_normal(shape)).astype(np.float32)
    return arrays


def test_parts_below_one_folder_are_those_of_the_mapping(
    parts: dict[str, Path], networks: EngineSet, tmp_path: Path
) -> None:
    for name, folder in parts.items():
        shutil.copytree(folder, tmp_path / name)
    assert list_parts(tmp_path) == {name: tmp_path / name for name in sorted(parts)}
    inputs = {"mask": np.ones((1, 1, 8, 8), np.float32), "masked_latent": np.ones((1, 4, 8, 8), np.float32)}
    with EngineSet.load(tmp_path, threads=1) as moved:
        assert moved.facts == networks.facts
        found = moved.run("inpaint_head", **inputs)["feature"]
    np.testing.assert_array_equal(found, networks.run("inpaint_head", **inputs)["feature"])


def test_a_folder_without_a_base_is_no_set_of_parts(parts: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(parts["unet"], tmp_path / "unet")
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(EngineError, match=r"no folder `base`.*dreammix-trt build"):
            EngineSet.load(folder)


def test_both_unets_run_one_graph_with_two_weight_sets(parts: dict[str, Path], networks: EngineSet) -> None:
    graphs = [(parts[name] / networks.entries[name]["graph"]).read_bytes() for name in ("unet", "unet_raw")]
    assert graphs[0] == graphs[1]
    inputs = draw_unet_inputs(networks)
    patched, raw = (networks.run(name, **inputs)["eps"] for name in ("unet", "unet_raw"))
    assert patched.shape == inputs["sample"].shape and patched.dtype == np.float32
    assert np.abs(patched - raw).max() > 1e-3


def test_the_same_call_gives_the_same_bits_in_any_batch(networks: EngineSet) -> None:
    inputs = draw_unet_inputs(networks, pictures=2)
    both = networks.run("unet", **inputs)["eps"]
    np.testing.assert_array_equal(networks.run("unet", **inputs)["eps"], both)
    alone = {name: array[len(array) // 2 :] for name, array in inputs.items()}
    np.testing.assert_allclose(networks.run("unet", **alone)["eps"], both[2:], atol=1e-5)


def test_weights_that_are_not_given_are_the_bases_own(networks: EngineSet) -> None:
    inputs, own = draw_unet_inputs(networks), networks.weights("unet")
    assert own.keys() == {slot.weight for slot in networks.slots("unet")}
    plain = networks.run("unet", **inputs)["eps"]
    np.testing.assert_array_equal(networks.run("unet", **inputs, **own)["eps"], plain)
    name = next(iter(own))
    assert not own[name].flags.writeable, "it is mapped, and the same for everybody"
    changed = networks.run("unet", **inputs, **{name: own[name] * np.float32(1.5)})["eps"]
    assert np.abs(changed - plain).max() > 1e-5
    np.testing.assert_array_equal(networks.run("unet", **inputs)["eps"], plain)
    assert networks.slots("vae_decoder") == () and networks.weights("vae_decoder") == {}


def test_an_array_that_is_written_between_calls_is_read_again(networks: EngineSet) -> None:
    """Inputs stay bound from call to call, and so does the memory of an array that is given again."""
    inputs = draw_unet_inputs(networks)
    first = networks.run("unet", **inputs)["eps"]
    inputs["sample"] += 1
    second = networks.run("unet", **inputs)["eps"]
    fresh = networks.run("unet", **{name: array.copy() for name, array in inputs.items()})["eps"]
    assert np.abs(second - first).max() > 1e-4
    np.testing.assert_array_equal(second, fresh)


def test_results_outlive_later_calls(networks: EngineSet) -> None:
    inputs = draw_unet_inputs(networks)
    first = networks.run("unet", **inputs)["eps"]
    kept = first.copy()
    networks.run("unet", **{**inputs, "sample": inputs["sample"] + 1})
    np.testing.assert_array_equal(first, kept)


def test_several_threads_share_a_network(networks: EngineSet) -> None:
    many = [{**draw_unet_inputs(networks), "timestep": np.full(2, 100 * n + 1, np.float32)} for n in range(6)]
    alone = [networks.run("unet", **inputs)["eps"] for inputs in many]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda inputs: networks.run("unet", **inputs)["eps"], many))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_unknown_network_is_named(networks: EngineSet) -> None:
    assert "unet" in networks and "asuka" not in networks
    with pytest.raises(EngineError, match="asuka"):
        networks.run("asuka")


def write_half_part(folder: Path) -> dict[str, Path]:
    """A base whose head is a float16 network of one node without slots: feature = masked_latent * mask."""
    from onnx import TensorProto, helper

    half, sides = TensorProto.FLOAT16, ["pictures", 4, "h", "w"]
    graph = helper.make_graph(
        [helper.make_node("Mul", ["masked_latent", "mask"], ["feature"])],
        "half",
        [helper.make_tensor_value_info(name, half, sides) for name in ("mask", "masked_latent")],
        [helper.make_tensor_value_info("feature", half, sides)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (folder / "inpaint_head").mkdir()
    (folder / "inpaint_head/inpaint_head.onnx").write_bytes(model.SerializeToString())
    entry = {
        "schema": 3,
        "graph": "inpaint_head.onnx",
        "inputs": [{"name": name, "dtype": "float16", "shape": sides} for name in ("mask", "masked_latent")],
        "outputs": [{"name": "feature", "dtype": "float16", "shape": sides}],
        "slots": [],
    }
    (folder / "inpaint_head/network.json").write_text(json.dumps(entry))
    facts = {"native_side": 64, "divisor": 32, "scaling_factor": 0.13, "feature_channels": 4}
    (folder / "base").mkdir()
    (folder / "base/base.json").write_text(json.dumps(facts))
    return list_parts(folder)


def test_float16_networks_take_and_give_float32(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    rng = np.random.default_rng(0)
    mask, latent = (rng.standard_normal((1, 4, 3, 5), np.float32) for _ in range(2))
    with EngineSet.load(write_half_part(tmp_path), threads=1) as networks:
        found = networks.run("inpaint_head", mask=mask, masked_latent=latent)["feature"]
        assert networks.facts.defaults == {}
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, (mask.astype(np.float16) * latent.astype(np.float16)).astype(np.float32))


def test_inputs_a_network_does_not_have_are_left_out(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    ones = np.ones((1, 4, 2, 2), np.float32)
    with EngineSet.load(write_half_part(tmp_path), threads=1) as networks:
        given: dict[str, Any] = {"mask": ones, "masked_latent": ones, "lora": np.zeros((1, 0), np.float32)}
        assert networks.run("inpaint_head", **given)["feature"].shape == ones.shape


def test_a_part_with_a_plan_needs_no_onnx_beside_it(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/network.json").write_text(json.dumps({"schema": 3, "engine": "unet.engine", "inputs": []}))
    (tmp_path / "base").mkdir()
    facts = {"native_side": 64, "divisor": 32, "scaling_factor": 0.13, "feature_channels": 4}
    (tmp_path / "base/base.json").write_text(json.dumps({**facts, "defaults": {"sampler": "lcm"}}))
    with EngineSet.load(tmp_path) as networks:
        assert networks.slots("unet") == () and networks.facts.defaults == {"sampler": "lcm"}


def test_a_network_has_a_session_for_each_of_the_sides_used_last(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    rng = np.random.default_rng(3)
    with EngineSet.load(write_half_part(tmp_path), threads=1) as networks:
        for width in (2, 3, 4, 5, 6, 2, 7):
            mask, latent = (rng.standard_normal((1, 4, 2, width), np.float32) for _ in range(2))
            found = networks.run("inpaint_head", mask=mask, masked_latent=latent)["feature"]
            expected = mask.astype(np.float16) * latent.astype(np.float16)
            np.testing.assert_array_equal(found, expected.astype(np.float32))
        held = [dict(sides)["w"] for _, sides in networks._opened]
    assert held == [5, 6, 2, 7] and networks._opened == {}


def test_a_large_network_has_one_session_for_all_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    parts = write_half_part(tmp_path)
    entry = json.loads((tmp_path / "inpaint_head/network.json").read_text())
    (tmp_path / "inpaint_head/weights").write_bytes(bytes(9))
    (tmp_path / "inpaint_head/network.json").write_text(json.dumps({**entry, "weights": "weights"}))
    for limit, sessions in ((8, 1), (9, 2)):
        for name in ("LARGE", "MOST_KEPT"):
            monkeypatch.setattr(f"dreammix_trt.engine.backends.onnxruntime.engine_set.{name}", limit)
        with EngineSet.load(parts, threads=1, shelf=Store(tmp_path / "store")) as networks:
            for width in (2, 3):
                ones = np.ones((1, 4, 2, width), np.float32)
                networks.run("inpaint_head", mask=ones, masked_latent=ones)
            assert len(networks._opened) == sessions
        assert len(Store(tmp_path / "store").entries()) == 2 * (sessions - 1), "what is large is not kept twice"


def test_weights_of_slots_count_for_what_is_kept(parts: dict[str, Path]) -> None:
    with EngineSet.load(parts, threads=1) as networks:
        entry = networks.entries["unet_kv"]
        files = [parts["unet_kv"] / entry[key] for key in ("weights", "slot_weights")]
        assert networks._count_bytes("unet_kv") == sum(file.stat().st_size for file in files)
        assert networks.is_kept("unet_kv") and not networks.is_large("unet_kv")
        limit = networks._count_bytes("unet_kv") - 1
        with pytest.MonkeyPatch.context() as patch:
            for name in ("LARGE", "MOST_KEPT"):
                patch.setattr(f"dreammix_trt.engine.backends.onnxruntime.engine_set.{name}", limit)
            assert networks.is_large("unet_kv") and not networks.is_kept("unet_kv")


def test_threads_that_want_the_same_session_share_one(parts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened, plain, together = [], EngineSet._open, threading.Barrier(3)

    def open_slowly(self: EngineSet, name: str, sides: Any) -> Any:
        opened.append(name)
        time.sleep(0.2)
        return plain(self, name, sides)

    monkeypatch.setattr(EngineSet, "_open", open_slowly)
    mask, latent = np.ones((1, 1, 4, 4), np.float32), np.ones((1, 4, 4, 4), np.float32)
    with EngineSet.load(parts, threads=1) as networks:

        def run() -> None:
            together.wait()
            networks.run("inpaint_head", mask=mask, masked_latent=latent)

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert opened == ["inpaint_head"]


def test_merged_weights_are_freed_with_their_last_user(parts: dict[str, Path]) -> None:
    with EngineSet.load(parts, threads=1) as networks:
        inputs, name = draw_inputs(networks, "unet_kv"), next(iter(networks.weights("unet_kv")))
        own = networks.run("unet_kv", **inputs)
        merged = {name: 2 * networks.weights("unet_kv")[name]}
        alive = weakref.ref(merged[name])
        changed = networks.run("unet_kv", **inputs, **merged)
        assert any(not np.array_equal(changed[output], own[output]) for output in own)
        del merged
        gc.collect()
        assert alive() is None
        again = networks.run("unet_kv", **inputs)
        assert all(np.array_equal(again[output], own[output]) for output in own)


def test_threads_below_one_are_refused(parts: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="threads is 0"):
        EngineSet.load(parts, threads=0)


def test_twins_are_opened_when_asked_for_and_not_before(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    twin = twin_name("inpaint_head")
    write_half_part(tmp_path)
    shutil.copytree(tmp_path / "inpaint_head", tmp_path / twin)
    (tmp_path / twin / "inpaint_head.onnx").write_bytes(b"no graph")
    ones = np.ones((1, 4, 2, 2), np.float32)
    with EngineSet.load(tmp_path, threads=1) as networks:
        networks.run("inpaint_head", mask=ones, masked_latent=ones)
        assert twin in networks
        with pytest.raises(EngineError, match="inpaint_head_float32 cannot be loaded"):
            networks.run(twin, mask=ones, masked_latent=ones)


def _write_newer(folder: Path) -> None:
    table = json.loads((folder / "unet/network.json").read_text())
    (folder / "unet/network.json").write_text(json.dumps({**table, "schema": 99}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no entry": (lambda folder: (folder / "unet/network.json").unlink(), "network.json"),
    "broken entry": (lambda folder: (folder / "unet/network.json").write_text("{"), "network.json"),
    "a list for an entry": (lambda folder: (folder / "unet/network.json").write_text("[]"), "network.json"),
    "newer entry": (_write_newer, "schema 99"),
    "no facts": (lambda folder: (folder / "base/base.json").write_text("{}"), "native_side"),
    "no weights": (lambda folder: (folder / "vae_encoder/vae_encoder.safetensors").unlink(), "vae_encoder.safetensors"),
    "no graph": (lambda folder: (folder / "unet/unet.onnx").unlink(), "unet.onnx"),
    "broken graph": (lambda folder: (folder / "vae_encoder/vae_encoder.onnx").write_bytes(b"x"), "vae_encoder.onnx"),
    "no slot weights": (lambda folder: (folder / "unet/unet.slots.safetensors").unlink(), "unet.slots.safetensors"),
    "cut weights": (lambda folder: _cut(folder / "vae_encoder/vae_encoder.safetensors"), "vae_encoder"),
    "empty weights": (lambda folder: _cut(folder / "vae_encoder/vae_encoder.safetensors", 0), "vae_encoder"),
}


def _cut(file: Path, share: float = 0.5) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_with_the_remedy(parts: dict[str, Path], tmp_path: Path, damage: str) -> None:
    for name, folder in parts.items():
        shutil.copytree(folder, tmp_path / name)
    act, named = DAMAGES[damage]
    act(tmp_path)
    with pytest.raises(DreamMixError, match=named) as caught, EngineSet.load(tmp_path, threads=1) as networks:
        networks.run("vae_encoder", image=np.zeros((1, 3, 64, 64), np.float32))
    assert "dreammix-trt build" in str(caught.value)


def test_damaged_slot_weights_are_told_with_the_remedy(parts: dict[str, Path], tmp_path: Path) -> None:
    for name, folder in parts.items():
        shutil.copytree(folder, tmp_path / name)
    file = tmp_path / "unet/unet.slots.safetensors"
    held = load_file(file)
    name = next(iter(held))
    save_file({**held, name: held[name][:-1]}, file)
    with (
        EngineSet.load(tmp_path, threads=1) as networks,
        pytest.raises(
            EngineError, match=rf"unet\.slots\.safetensors: {re.escape(name)} is .*expected .*dreammix-trt build"
        ),
    ):
        networks.weights("unet")
    _cut(file)
    with EngineSet.load(tmp_path, threads=1) as networks, pytest.raises(EngineError, match=r"unet\.slots.*build"):
        networks.weights("unet")
