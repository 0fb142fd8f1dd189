"""Networks on TensorRT: by a stand-in that keeps the rules of the real packages, names by the real one, and where
there is a GPU by a real plan."""

from __future__ import annotations

import ast
import gc
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dreammix_trt.core.axes import Sides
from dreammix_trt.core.errors import DeviceError, EngineError, OutOfMemoryError
from dreammix_trt.core.networks import KINDS as NETWORK_KINDS
from dreammix_trt.core.networks import kind_of
from dreammix_trt.core.seam import Array, DeviceNetworks
from dreammix_trt.core.slots import Slot
from dreammix_trt.engine import hardware
from dreammix_trt.engine.backends.tensorrt import bound as tensorrt_bound
from dreammix_trt.engine.backends.tensorrt import callbacks, plans
from dreammix_trt.engine.backends.tensorrt import compiled as tensorrt_compiled
from dreammix_trt.engine.backends.tensorrt import engine as tensorrt_engine
from dreammix_trt.engine.backends.tensorrt import network as tensorrt_network
from dreammix_trt.engine.backends.tensorrt import on_device as tensorrt_networks
from dreammix_trt.engine.backends.tensorrt import package as tensorrt_package
from dreammix_trt.engine.backends.tensorrt import place as tensorrt_place
from dreammix_trt.engine.backends.tensorrt import shapes as tensorrt_shapes
from dreammix_trt.engine.backends.tensorrt.callbacks import collect_messages
from dreammix_trt.engine.backends.tensorrt.on_device import ProfileError, TensorRtNetworks
from dreammix_trt.engine.backends.tensorrt.package import PACKAGES, RUNTIME_NAMES, RUNTIME_NAMES_JIT, check_runtime
from dreammix_trt.engine.backends.tensorrt.plans import explain_failure
from dreammix_trt.engine.backends.tensorrt.profiles import profiles_for
from dreammix_trt.engine.device.slot_layout import list_slotted
from dreammix_trt.engine.hardware import Driver, Gpu
from tests.support import fake_tensorrt as fake

BOTH = ["tensorrt-rtx", "tensorrt"]
NATIVE = 128  # pixels
WEIGHT_NAME = "block.to_q.weight"
SLOTS = [Slot.of("block.to_q", 32, 48).describe()]
SLOT_WEIGHTS = {WEIGHT_NAME: np.arange(32 * 48, dtype=np.float16).reshape(32, 48)}
UNET_INPUTS = [
    {"name": "sample", "dtype": "float16", "shape": ["rows", 4, "h", "w"]},
    {"name": "timestep", "dtype": "float32", "shape": ["rows"]},
    {"name": "inpaint_feature", "dtype": "float16", "shape": ["pictures", 8, "h", "w"]},
    {"name": WEIGHT_NAME, "dtype": "float16", "shape": [32, 48]},
]
UNET_OUTPUTS = [{"name": "eps", "dtype": "float16", "shape": ["rows", 4, "h", "w"]}]
VAE_INPUTS = [{"name": "latent", "dtype": "float16", "shape": ["pictures", 4, "h", "w"]}]
VAE_OUTPUTS = [{"name": "image", "dtype": "float16", "shape": ["pictures", 3, "H", "W"]}]
KINDS = {"float16": "HALF", "float32": "FLOAT", "int64": "INT64"}
ONE = Sides(rows=2, pictures=1, height=16, width=16)
TWIN = "vae_decoder_float32"


def write_part(
    folder: Path,
    inputs: list[dict[str, Any]],
    outputs: list[dict[str, Any]],
    *,
    shapes: str = "static",
    pictures: int = 1,
    version: str | None = "1.7.1.116",
    slots: list[Any] | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
    contexts: Sequence[int] = (77,),
    **plan: Any,
) -> None:
    """A part as `dreammix-trt build` writes it, its engine a stand-in's plan: fixed sides are static in it.

    weights: of the slots.
    contexts: lengths of the text condition.
    """
    known = folder.name in {kind.name for kind in NETWORK_KINDS}
    call = kind_of(folder.name).call if known else "step"
    sizes: dict[str, Any] = {"pictures": pictures, "shapes": shapes, "contexts": contexts}
    profiles = profiles_for(inputs, **sizes, latent_side=NATIVE // 8, step=1, call=call)
    tensors = {}
    for mode, specs in (("INPUT", inputs), ("OUTPUT", outputs)):
        for spec in specs:
            ends = [profile.shapes.get(spec["name"]) for profile in profiles]
            spans = list(zip(*(shape for span in ends if span for shape in span), strict=True))
            shape = [
                spans[index][0] if spans and len(set(spans[index])) == 1 else -1 if isinstance(side, str) else side
                for index, side in enumerate(spec["shape"])
            ]
            tensors[spec["name"]] = (mode, KINDS[spec["dtype"]], shape)
    folder.mkdir(parents=True, exist_ok=True)
    dropped = plan.pop("dropped", ())
    tensors = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    fake.write_plan(
        folder / f"{folder.name}.engine",
        tensors,
        [{name: span for name, span in profile.to_dict().items() if name not in dropped} for profile in profiles],
        named={spec["name"]: spec["shape"] for spec in (*inputs, *outputs)},
        **plan,
    )
    build = {"targets": ["sm_89"]} | ({"version": version} if version else {})
    entry = {"schema": 3, "inputs": inputs, "outputs": outputs, "slots": slots or []}
    if weights:
        save_file(dict(weights), folder / "slots.safetensors")
        entry["slot_weights"] = "slots.safetensors"
    (folder / "network.json").write_text(json.dumps({**entry, "engine": f"{folder.name}.engine", "build": build}))


def write_base(root: Path, backend: str, **options: Any) -> dict[str, Path]:
    """The parts of a base with a UNet and a VAE decoder."""
    options = {"version": None} | options if backend == "tensorrt" else options
    write_part(root / "unet", UNET_INPUTS, UNET_OUTPUTS, slots=SLOTS, weights=SLOT_WEIGHTS, **options)
    write_part(root / "vae_decoder", VAE_INPUTS, VAE_OUTPUTS, **options)
    (root / "base").mkdir(exist_ok=True)
    facts = {"native_side": NATIVE, "divisor": 8, "scaling_factor": 0.13, "feature_channels": 8}
    (root / "base" / "base.json").write_text(json.dumps(facts))
    return {name: root / name for name in ("unet", "vae_decoder", "base")}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> fake.Gpu:
    """A stand-in GPU with both packages on it."""
    made = fake.Gpu()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake.make_package(made))
    monkeypatch.setitem(sys.modules, "tensorrt", fake.make_package(made, "tensorrt"))
    monkeypatch.setattr(hardware, "ask_driver", lambda: Driver("13.0", (Gpu(made.name, "sm_89", made.total),)))
    return made


@pytest.fixture(params=BOTH)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def networks(card: fake.Gpu, backend: str, tmp_path: Path) -> Iterator[TensorRtNetworks]:
    parts = write_base(tmp_path / "parts", backend)
    with open_networks(parts, backend, card, cache=tmp_path / "cache") as made:
        yield made


def open_networks(parts: Mapping[str, Path], backend: str, card: fake.Gpu, **options: Any) -> TensorRtNetworks:
    device: Any = card
    return TensorRtNetworks.open(parts, backend, device, **options)


def make_arrays(networks: TensorRtNetworks, card: fake.Gpu, name: str, sides: Sides = ONE) -> dict[str, Array]:
    tensors = (*networks.inputs(name), *networks.outputs(name))
    return {tensor.name: card.make_array(sides.shape(tensor), tensor.dtype) for tensor in tensors}


def bind_network(networks: TensorRtNetworks, card: fake.Gpu, name: str = "unet", sides: Sides = ONE) -> Any:
    workspace = card.make_array((networks.workspace_bytes(name, sides),), "uint8")
    return networks.bind(name, sides, make_arrays(networks, card, name, sides), workspace)


# --- what a base is ---------------------------------------------------------------------------------------------------


def test_a_base_tells_its_networks_frames_and_batch(networks: TensorRtNetworks, card: fake.Gpu, tmp_path: Path) -> None:
    seam: DeviceNetworks = networks
    assert "unet" in seam and "unet_raw" not in seam and seam.facts.native_side == NATIVE
    assert [slot.module for slot in seam.slots("unet")] == ["block.to_q"] and seam.slots("vae_decoder") == ()
    assert [tensor.name for tensor in seam.inputs("unet")] == [entry["name"] for entry in UNET_INPUTS]
    assert [tensor.name for tensor in seam.outputs("unet")] == ["eps"]
    assert seam.frames() == ((NATIVE, NATIVE),) and seam.most_pictures == 1
    assert seam.weight_bytes("unet") == (tmp_path / "parts" / "unet" / "unet.engine").stat().st_size
    assert seam.workspace_bytes("unet", ONE) == 100 * 2 * 4 * 16 * 16
    with pytest.raises(EngineError, match="no network 'unet_raw'; it has unet, vae_decoder"):
        seam.inputs("unet_raw")


def test_weights_of_slots_are_mapped_from_their_file(networks: TensorRtNetworks, tmp_path: Path) -> None:
    held = networks.weights("unet")
    assert held.keys() == {WEIGHT_NAME} and networks.weights("unet") is held and networks.weights("vae_decoder") == {}
    np.testing.assert_array_equal(held[WEIGHT_NAME], SLOT_WEIGHTS[WEIGHT_NAME])
    assert not held[WEIGHT_NAME].flags.writeable
    slotted = list_slotted(networks)["unet"]
    assert slotted.merged.arrays == {WEIGHT_NAME: ((32, 48), "float16")} and slotted.in_place


def test_weights_of_slots_that_are_damaged_are_refused(card: fake.Gpu, backend: str, tmp_path: Path) -> None:
    parts = write_base(tmp_path, backend)
    save_file({WEIGHT_NAME: np.zeros((32, 32), np.float16)}, tmp_path / "unet" / "slots.safetensors")
    told = r"slots\.safetensors: block\.to_q\.weight is \(32, 32\), expected \(32, 48\)"
    with open_networks(parts, backend, card) as networks, pytest.raises(EngineError, match=told):
        networks.weights("unet")


def test_dynamic_sides_take_any_frame_within_the_profiles(card: fake.Gpu, backend: str, tmp_path: Path) -> None:
    parts = write_base(tmp_path, backend, shapes="dynamic", pictures=3)
    with open_networks(parts, backend, card) as networks:
        assert networks.frames() is None and networks.most_pictures == 3
        card.log.clear()
        for sides in (Sides(6, 3, 16, 16), Sides(1, 1, 12, 20), Sides(2, 2, 20, 12)):
            bind_network(networks, card, "unet", sides).close()
        chosen = [entry for entry in card.log if "profile" in entry]
        # five profiles of landscape, then five of portrait: 1 and 2 rows, 3 and 6, and the range between them
        assert chosen == ["unet: profile 3", "unet: profile 0", "unet: profile 9"]


# --- binding and running ----------------------------------------------------------------------------------------------


def test_one_context_is_set_up_once_in_order_and_runs_where_it_was_bound(
    networks: TensorRtNetworks, card: fake.Gpu
) -> None:
    card.log.clear()
    unet = bind_network(networks, card)
    names = [tensor.name for tensor in networks.inputs("unet")]
    assert card.log == [
        "synchronize",
        "context unet",
        "unet: profile 1",
        "synchronize",
        *(f"unet: shape {name}" for name in names),
        "synchronize",
        "unet: memory",
        *(f"unet: address {name}" for name in (*names, "eps")),
    ]
    assert not unet.capturable
    card.log.clear()
    stream = card.make_stream()
    unet.enqueue(stream)
    assert unet.capturable
    card.capturing = True
    unet.enqueue(stream)
    card.capturing = False
    run = f"unet: run {stream.handle:#x}"
    assert card.log == ["work unet", run, "work unet", f"{run} captured"]


def test_each_binding_has_a_context_of_its_own(networks: TensorRtNetworks, card: fake.Gpu) -> None:
    card.log.clear()
    first, second = bind_network(networks, card), bind_network(networks, card)
    assert card.log.count("context unet") == 2
    first.close()
    assert card.log.count("free context unet") == 1
    first.close()
    second.enqueue(card.make_stream())
    with pytest.raises(EngineError, match="unet: closed; bind it again"):
        first.enqueue(card.make_stream())


def test_asking_for_the_workspace_makes_the_context_that_is_bound(networks: TensorRtNetworks, card: fake.Gpu) -> None:
    card.log.clear()
    assert networks.workspace_bytes("unet", ONE) == networks.workspace_bytes("unet", ONE)
    fewer = replace(ONE, rows=1)
    assert networks.workspace_bytes("unet", fewer) == networks.workspace_bytes("unet", ONE) // 2
    assert card.log.count("context unet") == 2 and card.log.count("free context unet") == 1
    bind_network(networks, card, "unet", fewer)
    assert card.log.count("context unet") == 2


def test_the_package_says_whether_a_context_may_be_captured(card: fake.Gpu, tmp_path: Path) -> None:
    """It is asked after each run until it says yes."""
    for refused, after in ((True, [False, False, False]), (1, [False, True, True])):
        parts = write_base(tmp_path / str(refused), "tensorrt-rtx", not_capturable=refused)
        with open_networks(parts, "tensorrt-rtx", card) as networks:
            unet, said = bind_network(networks, card), []
            for _ in after:
                unet.enqueue(card.make_stream())
                said.append(unet.capturable)
            assert said == after


def test_the_first_run_within_a_capture_is_refused(networks: TensorRtNetworks, card: fake.Gpu) -> None:
    unet = bind_network(networks, card)
    card.capturing = True
    with pytest.raises(EngineError, match=r"unet cannot be run: .*first run cannot be captured"):
        unet.enqueue(card.make_stream())
    card.capturing = False
    unet.enqueue(card.make_stream())


def test_an_input_that_the_engine_left_out_is_not_bound(card: fake.Gpu, backend: str, tmp_path: Path) -> None:
    with open_networks(write_base(tmp_path, backend, dropped=(WEIGHT_NAME,)), backend, card) as networks:
        assert WEIGHT_NAME not in [tensor.name for tensor in networks.inputs("unet")]
        assert not list_slotted(networks)
        arrays = make_arrays(networks, card, "unet") | {WEIGHT_NAME: card.make_array((32, 48), "float16")}
        workspace = card.make_array((networks.workspace_bytes("unet", ONE),), "uint8")
        networks.bind("unet", ONE, arrays, workspace).enqueue(card.make_stream())


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_go_and_come_back_and_what_is_bound_stays(
    networks: TensorRtNetworks, card: fake.Gpu, backend: str
) -> None:
    unet, stream = bind_network(networks, card), card.make_stream()
    unet.enqueue(stream)
    free, before = card.memory()[0], networks.count_loads("unet")
    networks.unload("unet")
    assert card.memory()[0] == free + 1000 and not unet.capturable
    networks.unload("unet")
    with pytest.raises(EngineError, match="unet: its weights are unloaded; load them first"):
        unet.enqueue(stream)
    card.log.clear()
    networks.load("unet")
    networks.load("unet")
    assert card.memory()[0] == free and networks.count_loads("unet") == before + 1
    remade = backend == "tensorrt"
    assert ("context unet" in card.log) is remade and ("unet: address eps" in card.log) is remade
    unet.enqueue(stream)
    assert unet.capturable


def test_networks_can_share_memory_that_is_too_small_for_all(card: fake.Gpu, backend: str, tmp_path: Path) -> None:
    card.total = 1500
    parts = write_base(tmp_path, backend)
    message = r"unet|vae_decoder.*out ?of ?memory.*--pictures 1.*weights: unet .*, vae_decoder .* are free"
    with pytest.raises(OutOfMemoryError, match=message):
        open_networks(parts, backend, card)
    assert card.weights == {}
    with open_networks(parts, backend, card, resident=["unet"]) as networks:
        assert list(card.weights) == ["unet"]
        unet = bind_network(networks, card)
        with pytest.raises(OutOfMemoryError):
            networks.load("vae_decoder")
        unet.enqueue(card.make_stream())
        networks.unload("unet")
        networks.load("vae_decoder")
        bind_network(networks, card, "vae_decoder").enqueue(card.make_stream())
        with pytest.raises(OutOfMemoryError):
            networks.load("unet")
        networks.unload("vae_decoder")
        networks.load("unet")
        unet.enqueue(card.make_stream())
    assert card.weights == {}


def test_a_float32_twin_costs_nothing_until_it_is_needed(card: fake.Gpu, backend: str, tmp_path: Path) -> None:
    """No engine, no context, nothing compiled; then it is bound, loaded and run like any other."""
    parts = write_base(tmp_path, backend)
    parts[TWIN] = tmp_path / TWIN
    version = None if backend == "tensorrt" else "1.7.1.116"
    write_part(parts[TWIN], VAE_INPUTS, VAE_OUTPUTS, version=version)
    with open_networks(parts, backend, card) as networks:
        arrays = make_arrays(networks, card, TWIN)
        assert TWIN in networks and networks.weight_bytes(TWIN) and networks.slots(TWIN) == ()
        assert networks.most_pictures == 1 and networks.frames() == ((NATIVE, NATIVE),)
        networks.unload(TWIN)
        assert networks.loaded == ("unet", "vae_decoder") and networks.count_loads(TWIN) == 0
        assert not [entry for entry in card.log if TWIN in entry]

        twin = networks.bind(TWIN, ONE, arrays, card.make_array((networks.workspace_bytes(TWIN, ONE),), "uint8"))
        with pytest.raises(EngineError, match="load them first"):
            twin.enqueue(card.make_stream())
        networks.load(TWIN)
        twin.enqueue(card.make_stream())
        assert networks.loaded == ("unet", "vae_decoder", TWIN) and networks.count_loads(TWIN) == 1
    assert card.log.count(f"deserialise {TWIN}") == (2 if backend == "tensorrt" else 1)
    assert card.weights == {}


def test_a_float32_twin_can_be_loaded_before_it_is_bound(card: fake.Gpu, backend: str, tmp_path: Path) -> None:
    parts = write_base(tmp_path, backend) | {TWIN: tmp_path / TWIN}
    write_part(parts[TWIN], VAE_INPUTS, VAE_OUTPUTS, version=None)
    with open_networks(parts, backend, card, resident=()) as networks:
        networks.load(TWIN)
        bind_network(networks, card, TWIN).enqueue(card.make_stream())
        assert card.log.count(f"deserialise {TWIN}") == 1 and networks.loaded == (TWIN,)


def test_a_float32_twin_of_another_version_is_refused_at_once(card: fake.Gpu, backend: str, tmp_path: Path) -> None:
    parts = write_base(tmp_path, backend) | {TWIN: tmp_path / TWIN}
    write_part(parts[TWIN], VAE_INPUTS, VAE_OUTPUTS, version="1.6.0")
    with pytest.raises(EngineError, match=r"vae_decoder_float32\.engine: built with .* 1\.6\.0"):
        open_networks(parts, backend, card, resident=())


def test_the_bytes_of_a_plan_live_as_long_as_its_engine(
    networks: TensorRtNetworks, card: fake.Gpu, tmp_path: Path
) -> None:
    """The package may read them when it likes; weights that come back are the very bytes, not the file's of today."""
    unet, stream = bind_network(networks, card), card.make_stream()
    unet.enqueue(stream)
    (tmp_path / "parts" / "vae_decoder" / "vae_decoder.engine").unlink()
    bind_network(networks, card, "vae_decoder").enqueue(stream)
    networks.unload("unet")
    networks.load("unet")
    gc.collect()
    unet.enqueue(stream)
    networks.close()
    freed = [entry for entry in card.log if entry.startswith("free ") and "context" not in entry]
    assert freed[-2:] == ["free unet", "free vae_decoder"]


def test_what_is_opened_without_weights_answers_is_bound_and_runs_once_they_came(
    card: fake.Gpu, backend: str, tmp_path: Path
) -> None:
    with open_networks(write_base(tmp_path, backend, shapes="dynamic"), backend, card, resident=()) as networks:
        assert networks.loaded == () and card.weights == {}
        card.log.clear()
        assert networks.workspace_bytes("unet", ONE) == 100 * 2 * 4 * 16 * 16
        assert "deserialise unet" not in card.log, "the profiles' own shapes are known since it was opened"
        for _ in range(2):
            other = replace(ONE, height=12, width=20)
            assert networks.workspace_bytes("unet", other) == 100 * 2 * 4 * 12 * 20 and card.weights == {}
        assert card.log.count("deserialise unet") == (1 if backend == "tensorrt" else 0)
        unet, stream = bind_network(networks, card, "unet", other), card.make_stream()
        with pytest.raises(EngineError, match="unet: its weights are unloaded; load them first"):
            unet.enqueue(stream)
        networks.load("unet")
        assert networks.loaded == ("unet",) and networks.count_loads("unet") == 1
        unet.enqueue(stream)
        assert unet.capturable


def test_a_network_counts_as_loaded_when_all_that_is_bound_can_run(
    networks: TensorRtNetworks, card: fake.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, seen = bind_network(networks, card), []
    networks.unload("unet")
    renew = tensorrt_bound.TensorRtBound.renew

    def renewed(self: Any) -> None:
        seen.append(networks.loaded)
        if len(seen) == 1:
            raise OutOfMemoryError("no context")
        renew(self)

    monkeypatch.setattr(tensorrt_bound.TensorRtBound, "renew", renewed)
    with pytest.raises(OutOfMemoryError):
        networks.load("unet")
    assert networks.loaded == ("vae_decoder",) and "unet" not in card.weights
    networks.load("unet")
    assert seen == [("vae_decoder",)] * 2 and networks.loaded == ("unet", "vae_decoder")
    unet.enqueue(card.make_stream())


def test_threads_that_need_a_network_at_once_load_it_once(
    networks: TensorRtNetworks, card: fake.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks.unload("unet")
    fit, before = card.fit, networks.count_loads("unet")

    def slow(name: str, nbytes: int) -> bool:
        time.sleep(0.05)
        return fit(name, nbytes)

    monkeypatch.setattr(card, "fit", slow)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(networks.load, ["unet"] * 4))
    assert networks.count_loads("unet") == before + 1


def test_closing_frees_contexts_before_engines(networks: TensorRtNetworks, card: fake.Gpu) -> None:
    unet = bind_network(networks, card)
    networks.workspace_bytes("vae_decoder", ONE)
    card.log.clear()
    networks.close()
    freed = [entry for entry in card.log if entry.startswith(("free", "close"))]
    assert freed == [
        "free context unet",
        "free context vae_decoder",
        "free unet",
        "free vae_decoder",
        "close stream",
    ]
    networks.close()
    with pytest.raises(EngineError, match="closed"):
        unet.enqueue(card.make_stream())
    with pytest.raises(EngineError, match="closed"):
        networks.load("unet")
    with pytest.raises(EngineError, match="closed"):
        networks.bind("unet", ONE, make_arrays(networks, card, "unet"))


# --- what was compiled ------------------------------------------------------------------------------------------------


def test_kernels_are_compiled_once_and_kept(card: fake.Gpu, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts, cache = write_base(tmp_path / "parts", "tensorrt-rtx"), tmp_path / "cache"

    def list_compiled() -> list[str]:
        card.compilations.clear()
        with open_networks(parts, "tensorrt-rtx", card, cache=cache) as networks:
            bind_network(networks, card).enqueue(card.make_stream())
            assert len(list(cache.iterdir())) == 1  # written after the first run, not only at the end
        return list(card.compilations)

    assert list_compiled() == ["unet/2x4x16x16"] and list_compiled() == []
    (file,) = cache.iterdir()
    assert "1.7.1.116" in file.name and "Stand-in-4090-sm-89" in file.name
    file.write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        assert list_compiled() == ["unet/2x4x16x16"]
    assert "damaged, or of another driver; kernels are compiled again" in caplog.text
    assert list_compiled() == []


def write_two_unets(root: Path, **other: Any) -> dict[str, Path]:
    """A base with two UNets of one graph.

    other: how the second one's description differs.
    """
    parts = write_base(root, "tensorrt-rtx", graph="unet") | {"unet_raw": root / "unet_raw"}
    write_part(parts["unet_raw"], UNET_INPUTS, UNET_OUTPUTS, slots=SLOTS, graph="unet", version="1.7.1.116")
    (parts["unet_raw"] / "unet_raw.engine").rename(parts["unet_raw"] / "unet.engine")
    entry = json.loads((parts["unet_raw"] / "network.json").read_text()) | {"engine": "unet.engine"} | other
    (parts["unet_raw"] / "network.json").write_text(json.dumps(entry))
    return parts


def run_unets(parts: Mapping[str, Path], card: fake.Gpu, cache: Path | None) -> list[str]:
    """Run both UNets; returns what was compiled."""
    card.compilations.clear()
    with open_networks(parts, "tensorrt-rtx", card, cache=cache) as networks:
        for name in ("unet", "unet_raw"):
            bind_network(networks, card, name).enqueue(card.make_stream())
    return list(card.compilations)


@pytest.mark.parametrize("kept", [True, False])
def test_two_networks_of_one_graph_share_their_kernels(card: fake.Gpu, tmp_path: Path, kept: bool) -> None:
    """Both UNets' weights differ; their kernels do not. Another base of this structure finds them as well."""
    parts, cache = write_two_unets(tmp_path / "parts"), tmp_path / "cache" if kept else None
    plans_of = [(parts[name] / "unet.engine").read_bytes() for name in ("unet", "unet_raw")]
    assert plans_of[0] != plans_of[1]
    assert run_unets(parts, card, cache) == ["unet/2x4x16x16"]
    if cache is not None:
        assert len(list(cache.iterdir())) == 1
        assert run_unets(write_two_unets(tmp_path / "other", note="another checkpoint"), card, cache) == []


@pytest.mark.parametrize("other", [{"precision": "bfloat16"}, {"wide": ["mid"]}, {"build": {"version": "1.7.1.116"}}])
def test_networks_of_another_structure_have_another_file(card: fake.Gpu, tmp_path: Path, other: dict[str, Any]) -> None:
    run_unets(write_two_unets(tmp_path / "parts", **other), card, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_two_processes_that_compile_at_once_leave_the_larger_file(tmp_path: Path) -> None:
    """A file is replaced as a whole. What it lacks is compiled again, which costs time only."""
    file = tmp_path / "cache" / "a.kernels"

    def start(*found: str) -> tuple[tensorrt_compiled.Kernels, fake.IRuntimeCache]:
        config: Any = fake.IRuntimeConfig(None)  # type: ignore[arg-type]
        made = tensorrt_compiled.Kernels(file)
        made.join(config)
        assert config.cache.kernels == set(found)
        return made, config.cache

    (one, ones), (other, others) = start(), start()
    others.kernels |= {"a", "b"}
    other.keep()
    ones.kernels.add("c")
    one.keep()
    start("a", "b")
    ones.kernels |= {"d", "e"}
    one.keep()
    start("c", "d", "e")
    file.unlink()
    others.kernels.add("f")
    other.keep()
    start("a", "b", "f")
    assert list(file.parent.iterdir()) == [file]


def test_a_place_that_takes_no_files_costs_time_only(
    card: fake.Gpu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    parts = write_base(tmp_path / "parts", "tensorrt-rtx")
    with open_networks(parts, "tensorrt-rtx", card, cache=tmp_path / "cache") as networks:
        bind_network(networks, card).enqueue(card.make_stream())
    assert "compiled kernels cannot be kept" in caplog.text


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shapes, sides, named",
    [
        (
            "static",
            Sides(4, 2, 16, 16),
            r"larger than any profile: rows 4, pictures 2.*for rows 1, .*or rows 2, .*--pictures 2",
        ),
        ("static", Sides(2, 1, 20, 12), r"larger than any profile: .*h 20, w 12.*h 16, w 16.*rebuild with `--shapes d"),
        ("static", Sides(2, 1, 12, 12), r"outside every profile: .*h 12, w 12.*--shapes dynamic"),
        ("dynamic", Sides(2, 1, 24, 11), r"larger than any profile: .*h 11 to 16, .*; or .*a frame within these"),
        ("dynamic", Sides(2, 1, 16, 20), r"larger than any profile: .*at most 256 cells.*a smaller picture"),
    ],
)
def test_sides_outside_the_profiles_are_named_with_the_way_out(
    card: fake.Gpu, backend: str, tmp_path: Path, shapes: str, sides: Sides, named: str
) -> None:
    with open_networks(write_base(tmp_path, backend, shapes=shapes), backend, card) as networks:
        with pytest.raises(ProfileError, match=f"unet: a request {named}"):
            networks.workspace_bytes("unet", sides)
        with pytest.raises(ProfileError, match=named):
            networks.bind("unet", sides, {})


def test_arrays_that_do_not_fit_are_named(networks: TensorRtNetworks, card: fake.Gpu) -> None:
    good = make_arrays(networks, card, "unet")
    sample = good["sample"]
    bad: list[tuple[dict[str, Array], str]] = [
        ({"sample": replace(sample, dtype="float32")}, r"sample is float32 \[2, 4, 16, 16\], the engine takes float16"),
        ({"sample": replace(sample, shape=(1, 4, 16, 16))}, r"sample is .*\[1, 4, 16, 16\].*\[2, 4, 16, 16\]"),
        ({"sample": replace(sample, pointer=sample.pointer + 16)}, "sample is at address .*multiples of 256"),
        ({"eps": replace(sample, pointer=0)}, "eps is at address 0"),
        ({"block.to_k.weight": sample}, r"arrays are given for block\.to_k\.weight"),
    ]
    card.log.clear()
    for change, named in bad:
        with pytest.raises(EngineError, match=named):
            networks.bind("unet", ONE, good | change)
    with pytest.raises(EngineError, match=r"no array is given for block\.to_q\.weight"):
        networks.bind("unet", ONE, {name: array for name, array in good.items() if name != WEIGHT_NAME})
    assert set(card.log) == {"synchronize"}
    need = networks.workspace_bytes("unet", ONE)
    for workspace in (None, card.make_array((need - 1,), "uint8")):
        with pytest.raises(EngineError, match=f"needs {need} bytes of workspace"):
            networks.bind("unet", ONE, good, workspace)
    with pytest.raises(EngineError, match=r"the workspace is at address .*multiples of 256"):
        networks.bind("unet", ONE, good, Array(sample.pointer + 8, (need,), "uint8"))
    bind_network(networks, card).enqueue(card.make_stream())


def test_a_device_without_streams_is_refused(networks: TensorRtNetworks, card: fake.Gpu) -> None:
    stream: Any = card.make_stream()
    stream.handle = None
    with pytest.raises(DeviceError, match="CUDA streams only"):
        bind_network(networks, card).enqueue(stream)


@pytest.mark.parametrize(
    "diagnosis, kind, named",
    [
        ("VERSION_MISMATCH", EngineError, r"built with another TensorRT-RTX, installed is 1\.7.*dreammix-trt build"),
        ("UNSUPPORTED_CC", DeviceError, r"built for sm_89, here is NVIDIA Stand-in.*--target sm_89"),
        ("OLD_CUDA_DRIVER", DeviceError, r"driver \(installed is one for CUDA 13\.0\): this one is too old; update it"),
        ("OLD_CUDA_RUNTIME", DeviceError, r"CUDA runtime is too old; `pip install --upgrade 'dreammix-trt\[rtx\]'`"),
        ("INSUFFICIENT_GPU_MEMORY", OutOfMemoryError, "too little memory for it; end other programs"),
        ("MALFORMED_ENGINE", EngineError, "damaged, or no TensorRT-RTX engine"),
        ("CUDA_ERROR", DeviceError, "CUDA does not work here"),
    ],
)
def test_what_the_package_finds_wrong_with_a_plan(
    card: fake.Gpu, tmp_path: Path, diagnosis: str, kind: type[EngineError], named: str
) -> None:
    parts = write_base(tmp_path, "tensorrt-rtx", invalid=diagnosis, version=None)
    with pytest.raises(kind, match=named):
        open_networks(parts, "tensorrt-rtx", card)
    assert not any(entry.startswith("deserialise") for entry in card.log)


def test_plans_of_other_versions_and_gpus_are_refused_before_loading(
    card: fake.Gpu, backend: str, tmp_path: Path
) -> None:
    installed = {"tensorrt-rtx": r"1\.7\.1\.116", "tensorrt": r"11\.4\.0\.106"}[backend]
    with pytest.raises(EngineError, match=rf"unet\.engine: built with .* 1\.6\.0, installed is {installed}"):
        open_networks(write_base(tmp_path, backend, version="1.6.0"), backend, card)
    card.capability = "sm_90"
    remedy = {"tensorrt-rtx": "no engines for that: use `--backend tensorrt`", "tensorrt": "--target sm_90"}[backend]
    with pytest.raises(DeviceError, match=rf"built for sm_89, here is .*\(sm_90\).*{remedy}"):
        open_networks(write_base(tmp_path, backend), backend, card)
    assert not any(entry.startswith("deserialise") for entry in card.log)


def test_a_plan_that_will_be_slow_here_is_said(
    card: fake.Gpu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_networks(write_base(tmp_path, "tensorrt-rtx", suboptimal=True), "tensorrt-rtx", card).close()
    assert "unet.engine: not made for NVIDIA Stand-in 4090 (sm_89); it may be slow" in caplog.text


def test_without_a_driver_it_says_so(
    card: fake.Gpu, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card.driver = False
    monkeypatch.setattr(hardware, "ask_driver", lambda: Driver(problem="there is no NVIDIA driver here"))
    with pytest.raises(DeviceError, match=r"cudaError 35.*install or update the NVIDIA driver \(there is no NVIDIA"):
        open_networks(write_base(tmp_path, backend), backend, card)


@pytest.mark.parametrize("content", [b"", b"no plan", b"\x7fELF\x02\x01\x01" + bytes(9) + b"\3\0\x3e\0" + bytes(60)])
def test_damaged_missing_and_dangerous_plans_are_refused(
    card: fake.Gpu, backend: str, tmp_path: Path, content: bytes
) -> None:
    parts = write_base(tmp_path, backend)
    plan = parts["unet"] / "unet.engine"
    plan.write_bytes(content)
    with pytest.raises(EngineError, match=r"unet\.engine.*(empty|damaged|carries code for the host)"):
        open_networks(parts, backend, card)
    plan.unlink()
    with pytest.raises(EngineError, match=r"unet\.engine: missing, so unet cannot run"):
        open_networks(parts, backend, card)
    (parts["unet"] / "network.json").write_text(json.dumps({"schema": 3, "inputs": [], "outputs": []}))
    with pytest.raises(EngineError, match="unet is not a TensorRT engine"):
        open_networks(parts, backend, card)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"host": ["timestep"]}, "timestep"),
        ({"dropped": ("eps",)}, "eps"),
    ],
)
def test_an_engine_that_is_not_the_described_network_is_refused(
    card: fake.Gpu, backend: str, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(EngineError, match=f"network.json describes another network: .*{named}"):
        open_networks(write_base(tmp_path, backend, **change), backend, card)


@pytest.mark.parametrize("field, value", [("dtype", "float32"), ("shape", ["rows", 5, "h", "w"]), ("name", "x")])
def test_a_description_of_another_network_is_refused(
    card: fake.Gpu, backend: str, tmp_path: Path, field: str, value: Any
) -> None:
    parts = write_base(tmp_path, backend)
    entry = json.loads((parts["unet"] / "network.json").read_text())
    entry["inputs"][0][field] = value
    (parts["unet"] / "network.json").write_text(json.dumps(entry))
    with pytest.raises(EngineError, match="describes another network: sample"):
        open_networks(parts, backend, card)


def test_failures_of_contexts_and_runs_carry_the_packages_words(card: fake.Gpu, backend: str, tmp_path: Path) -> None:
    parts = write_base(tmp_path / "a", backend, no_context="Error Code 2: OutOfMemory (Requested size was 5 bytes.)")
    with (
        open_networks(parts, backend, card) as networks,
        pytest.raises(OutOfMemoryError, match=r"unet: no context.*5 bytes"),
    ):
        bind_network(networks, card)
    parts = write_base(tmp_path / "b", backend, fails="Error Code 1: Cuda Runtime (an illegal memory access)")
    with (
        open_networks(parts, backend, card) as networks,
        pytest.raises(DeviceError, match=r"unet cannot be run.*illegal"),
    ):
        bind_network(networks, card).enqueue(card.make_stream())
    parts = write_base(tmp_path / "d", backend, too_large=1)
    with (
        open_networks(parts, backend, card) as networks,
        pytest.raises(EngineError, match=r"eps comes out as \[3, 4, 17, 17\]"),
    ):
        bind_network(networks, card)
    parts = write_base(tmp_path / "c", backend, unknown="timestep")
    with open_networks(parts, backend, card) as networks, pytest.raises(EngineError, match=r"still lacks .* timestep"):
        bind_network(networks, card)


@pytest.mark.parametrize(
    "text, kind",
    [
        ("Error Code 2: OutOfMemory (Requested size was 12 bytes.)", OutOfMemoryError),
        ("Requested amount of GPU memory (1 bytes) could not be allocated.", OutOfMemoryError),
        ("Cuda Runtime (cudaError 2: out of memory)", OutOfMemoryError),
        ("Cuda Runtime (cudaError 35: CUDA driver version is insufficient)", DeviceError),
        ("CUDA initialization failure with error: no CUDA-capable device is detected", DeviceError),
        ("Platform specific: engine was built on a different GPU model", DeviceError),
        ("Cuda Runtime (cudaError 700: an illegal memory access was encountered)", DeviceError),
        (
            "Serialization (Serialization assertion stdVersionRead == kEXPECTED failed. Version tag mismatch)",
            EngineError,
        ),
        ("something new", EngineError),
    ],
)
def test_messages_become_errors_with_a_remedy(card: fake.Gpu, text: str, kind: type[EngineError]) -> None:
    error = explain_failure("unet", [("WARNING", "out of memory soon"), ("ERROR", text)])
    assert type(error) is kind and str(error).startswith(f"unet: {text[:40]}") and ";" in str(error)
    assert "no reason given" in str(explain_failure("unet", []))


# --- what the package says --------------------------------------------------------------------------------------------


def test_while_networks_run_no_message_is_told_to_python_but_errors(
    card: fake.Gpu, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The logger is the package's own; errors come by the recorder, into the message, and are printed nowhere."""
    parts = write_base(tmp_path, "tensorrt-rtx", fails="Error Code 1: Cuda Runtime (an illegal memory access)")
    trt = sys.modules["tensorrt_rtx"]
    listened: list[str] = []
    with open_networks(parts, "tensorrt-rtx", card) as networks:
        runtime = networks._place.runtime
        assert type(runtime.logger) is trt.Logger
        callbacks.get_logger(trt).log = lambda severity, text: listened.append(text)
        unet = bind_network(networks, card)
        for _ in range(2):
            with pytest.raises(DeviceError, match=r"unet cannot be run.*illegal memory access"):
                unet.enqueue(card.make_stream())
        runtime.say("unheard of", "INFO")
    assert listened == [] and capfd.readouterr().out == ""


def test_a_runtime_that_does_not_start_says_why(card: fake.Gpu, backend: str, tmp_path: Path) -> None:
    card.no_start = "Error Code 1: Cuda Runtime (cudaError 35: CUDA driver version is insufficient)"
    with pytest.raises(DeviceError, match=r"does not start: .*cudaError 35"):
        open_networks(write_base(tmp_path, backend), backend, card)


def test_the_real_packages_errors_come_by_the_recorder_and_builders_keep_their_listener(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """TensorRT-RTX in one process: a runtime, a builder, a runtime. Each has its own logger, in any order."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install dreammix-trt[rtx]")
    first = plans.open_guarded_runtime("tensorrt-rtx")
    builder = rtx.Builder(callbacks.get_logger(rtx))
    for runtime in (first, plans.open_guarded_runtime("tensorrt-rtx")):
        assert runtime.logger is callbacks.get_quiet_logger(rtx)
        with collect_messages() as messages:
            assert runtime.deserialize_cuda_engine(b"no plan" * 100) is None
        assert messages and messages[0][0] == "ERROR" and "magicTag" in messages[0][1]
    with collect_messages() as messages:
        config = builder.create_builder_config()
        config.set_memory_pool_limit(rtx.MemoryPoolType.WORKSPACE, 1 << 20)
        network = builder.create_network(0)
        assert builder.build_serialized_network(network, config) is None, "a network without outputs"
    assert messages and any("output" in text for _, text in messages)
    assert capfd.readouterr() == ("", "")


# --- names ------------------------------------------------------------------------------------------------------------

# Read in the source of TensorRT's published bindings at 11.1 (python/src/infer/pyCore.cpp, pyFoundationalTypes.cpp):
# these names stand there, and the release notes list none of them as removed.
IN_THE_SOURCE_OF_11 = {
    "ErrorCodeTRT.UNSPECIFIED_ERROR", "ExecutionContextAllocationStrategy.USER_MANAGED",
    "ICudaEngine.create_execution_context", "ICudaEngine.error_recorder", "ICudaEngine.get_tensor_dtype",
    "ICudaEngine.get_tensor_location", "ICudaEngine.get_tensor_mode", "ICudaEngine.get_tensor_name",
    "ICudaEngine.get_tensor_profile_shape", "ICudaEngine.get_tensor_shape",
    "ICudaEngine.num_io_tensors", "ICudaEngine.num_optimization_profiles", "IErrorRecorder",
    "IExecutionContext.error_recorder", "IExecutionContext.execute_async_v3", "IExecutionContext.get_tensor_shape",
    "IExecutionContext.infer_shapes", "IExecutionContext.set_device_memory", "IExecutionContext.set_input_shape",
    "IExecutionContext.set_optimization_profile_async", "IExecutionContext.set_tensor_address",
    "IExecutionContext.update_device_memory_size_for_shapes", "ILogger", "Logger.ERROR",
    "Runtime.deserialize_cuda_engine", "Runtime.engine_host_code_allowed", "Runtime.error_recorder",
    "TensorIOMode.INPUT", "TensorLocation.DEVICE",
}  # fmt: skip
UNVERIFIED_IN_11: set[str] = set()  # add a name here that is used and was found nowhere; none was ever run
REMOVED_IN_11 = {"ICudaEngine.device_memory_size", "ICudaEngine.get_device_memory_size_for_profile"}


def test_every_name_that_running_uses_is_in_tensorrt_rtx() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install dreammix-trt[rtx]")
    check_runtime(rtx, PACKAGES["tensorrt-rtx"])
    with pytest.raises(EngineError, match=r"lacks .*IExecutionContext\.execute_async_v3.*dreammix-trt\[rtx\]"):
        check_runtime(object(), PACKAGES["tensorrt-rtx"])
    for name in ("VALID", "SUBOPTIMAL", "INVALID"):
        assert hasattr(rtx.EngineValidity, name)
    assert {int(kind) for kind in rtx.EngineInvalidityDiagnostics.__members__.values()} == {1, 2, 4, 8, 16, 32, 64}


def test_every_name_that_running_uses_was_looked_for_in_tensorrt_11() -> None:
    assert set(RUNTIME_NAMES) == IN_THE_SOURCE_OF_11 | UNVERIFIED_IN_11
    assert not set(RUNTIME_NAMES) & {*RUNTIME_NAMES_JIT, *REMOVED_IN_11}
    eleven = fake.make_package(fake.Gpu(), "tensorrt")
    check_runtime(eleven, PACKAGES["tensorrt"])
    with pytest.raises(EngineError, match=r"load_weights"):
        check_runtime(eleven, PACKAGES["tensorrt-rtx"])


#: the modules that run plans
RUNNING = (
    plans,
    tensorrt_bound,
    tensorrt_compiled,
    tensorrt_engine,
    tensorrt_network,
    tensorrt_networks,
    tensorrt_place,
    tensorrt_shapes,
)
#: variables (and attributes of that name) that hold the package's objects
RECEIVERS = {
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "config": "IRuntimeConfig",
    "kernels": "IRuntimeCache",
}
#: names that the package's classes share with others': of DataType members, of our own classes
SHARED = {"name", "engine"}


def test_no_attribute_of_the_package_is_used_that_is_not_listed() -> None:
    listed = {*tensorrt_package.NAMES, *RUNTIME_NAMES, *RUNTIME_NAMES_JIT}
    used: set[str] = set()
    for module in RUNNING:
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and (found := _package_name(node)):
                used.add(found)
    unknown = {name for name in used if not any(name == known or known.startswith(f"{name}.") for known in listed)}
    assert unknown - {"__version__", "Runtime", "EngineInvalidityDiagnostics"} == set()
    checked = {"ILogger", "Logger", "IErrorRecorder", "ErrorCodeTRT", "EngineInvalidityDiagnostics"}
    unused = {name for name in (*RUNTIME_NAMES, *RUNTIME_NAMES_JIT) if name.split(".")[0] not in checked} - used
    assert unused == set()


def test_objects_of_the_package_are_called_by_their_names_only() -> None:
    """Else the test above would not see what is used of them."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install dreammix-trt[rtx]")
    theirs = {name for kind in RECEIVERS.values() for name in dir(getattr(rtx, kind)) if not name.startswith("_")}
    for module in RUNNING:
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in theirs - SHARED:
                assert _package_name(node), f"{ast.unparse(node)} in {module.__name__}"


def _package_name(node: ast.Attribute) -> str | None:
    """`context.infer_shapes` -> "IExecutionContext.infer_shapes", `trt.TensorIOMode.INPUT` -> "TensorIOMode.INPUT"."""
    holder = node.value
    if isinstance(holder, ast.Attribute) and isinstance(holder.value, ast.Name) and holder.value.id == "trt":
        return f"{holder.attr}.{node.attr}"
    if not isinstance(holder, ast.Name):
        return None
    if holder.id == "trt":
        return node.attr
    if holder.id == "kinds":
        return f"EngineInvalidityDiagnostics.{node.attr}"
    return f"{RECEIVERS[holder.id]}.{node.attr}" if holder.id in RECEIVERS else None


# --- on a GPU ---------------------------------------------------------------------------------------------------------

WEIGHT = (np.random.default_rng(5).standard_normal((64, 64)) / 8).astype(np.float16)


def write_real_part(folder: Path, backend: str) -> None:
    """y = x V + x W, built for the GPU at hand, as `dreammix-trt build` writes it; W is a slot's."""
    from dreammix_trt.engine.backends.tensorrt.builder import build_engine
    from tests.engine.backends.test_tensorrt_builder import write_network

    folder.mkdir(parents=True)
    nodes = [
        ("MatMul", ["x", "v"], "p"),
        ("MatMul", ["x", "m.weight"], "q"),
        ("Add", ["p", "q"], "y"),
    ]
    shapes: dict[str, list[Any]] = {"x": ["n", 7, 64], "m.weight": [64, 64]}
    graph = write_network(folder / "graph.onnx", nodes, shapes, {"v": WEIGHT})
    inputs = [
        {"name": name, "dtype": "float16", "shape": ["pictures" if side == "n" else side for side in shape]}
        for name, shape in shapes.items()
    ]
    outputs = [{"name": "y", "dtype": "float16", "shape": ["pictures", 7, 64]}]
    profiles = profiles_for(inputs, pictures=4, shapes="static", latent_side=16)
    report = build_engine(graph, folder / "m.engine", backend=backend, profiles=profiles, targets=("current",))
    slots = [Slot.of("m", 64, 64).describe()]
    entry = {"schema": 3, "inputs": inputs, "outputs": outputs, "slots": slots, "build": report.to_dict()}
    (folder / "network.json").write_text(json.dumps({**entry, "engine": "m.engine"}))


@pytest.fixture
def real(gpu: None, backend: str, tmp_path: Path) -> Iterator[tuple[Any, TensorRtNetworks]]:
    """A device and a network `m` on it; skips where the back end cannot run."""
    pytest.importorskip("onnx", reason="the network of this test needs onnx: pip install dreammix-trt[export]")
    pytest.importorskip(PACKAGES[backend].module, reason=f"{backend} is not installed")
    pytest.importorskip("cuda.bindings", reason="cuda-python is not installed")
    from dreammix_trt.engine.drivers.cuda import CudaDevice
    from dreammix_trt.engine.machine import RTX_TARGETS

    with CudaDevice() as device:
        if backend == "tensorrt-rtx" and device.capability not in RTX_TARGETS:
            pytest.skip(f"TensorRT-RTX builds nothing for {device.capability}")
        write_real_part(tmp_path / "m", backend)
        (tmp_path / "base").mkdir()
        facts = {"native_side": NATIVE, "divisor": 8, "scaling_factor": 0.13, "feature_channels": 8}
        (tmp_path / "base" / "base.json").write_text(json.dumps(facts))
        parts = {"m": tmp_path / "m", "base": tmp_path / "base"}
        with TensorRtNetworks.open(parts, backend, device, cache=tmp_path / "cache") as networks:
            yield device, networks


def test_a_real_plan_runs_is_captured_and_replayed(real: tuple[Any, TensorRtNetworks], backend: str) -> None:
    """Against float64 arithmetic; again after the weights were away."""
    device, networks = real
    sides, rng = Sides(rows=2, pictures=2, height=16, width=16), np.random.default_rng(6)
    shapes = {tensor.name: sides.shape(tensor) for tensor in (*networks.inputs("m"), *networks.outputs("m"))}
    values = {name: (rng.standard_normal(shape) / 4).astype(np.float16) for name, shape in shapes.items()}
    stream = device.make_stream()
    memories = {name: device.allocate(value.nbytes) for name, value in values.items()}
    arrays = {name: Array(memories[name].pointer, value.shape, "float16") for name, value in values.items()}
    scratch = device.allocate(max(256, networks.workspace_bytes("m", sides)))
    made = networks.bind("m", sides, arrays, Array(scratch.pointer, (scratch.nbytes,), "uint8"))

    def compare(run: Any) -> None:
        values["x"] = (rng.standard_normal(shapes["x"]) / 4).astype(np.float16)
        for name in ("x", "m.weight"):
            device.upload(arrays[name], values[name], stream)
        device.clear(arrays["y"], stream)
        run()
        got = np.empty(shapes["y"], np.float16)
        device.download(got, arrays["y"], stream)
        device.synchronize(stream)
        x, w = (values[name].astype(np.float64) for name in ("x", "m.weight"))
        want = x @ WEIGHT.astype(np.float64) + x @ w
        assert np.abs(got - want).max() < 1e-2 * np.abs(want).max()

    def play() -> None:
        compare(lambda: made.enqueue(stream))
        assert made.capturable
        with device.capture(stream, lambda: made.enqueue(stream)) as graph:
            for _ in range(3):
                compare(lambda: graph.launch(stream))

    play()
    device.synchronize(stream)
    networks.unload("m")
    networks.load("m")
    play()
    made.close()


def test_a_real_plan_refuses_what_it_was_not_built_for(
    real: tuple[Any, TensorRtNetworks], backend: str, tmp_path: Path
) -> None:
    device, networks = real
    with pytest.raises(ProfileError, match="--pictures 5"):
        networks.workspace_bytes("m", Sides(10, 5, 16, 16))
    assert networks.most_pictures == 4
    plan = tmp_path / "m" / "m.engine"
    plan.write_bytes(plan.read_bytes()[: plan.stat().st_size // 2])
    with pytest.raises(EngineError, match=r"m\.engine"):
        TensorRtNetworks.open({"m": tmp_path / "m", "base": tmp_path / "base"}, backend, device)


def test_the_real_package_without_a_driver_says_what_is_missing(tmp_path: Path) -> None:
    """TensorRT-RTX itself, on a plan for another computer; the device is the stand-in's."""
    pytest.importorskip("onnx", reason="the network of this test needs onnx: pip install dreammix-trt[export]")
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install dreammix-trt[rtx]")
    if not hardware.ask_driver().problem:
        pytest.skip("there is a driver here")
    from tests.engine.backends.test_tensorrt_builder import ROWS, build, write_linear

    (tmp_path / "unet").mkdir()
    build(write_linear(tmp_path / "unet" / "unet.onnx"), ROWS)
    entry = {"schema": 3, "inputs": [{"name": "x", "dtype": "float16", "shape": ["rows", 64]}], "outputs": []}
    (tmp_path / "unet" / "network.json").write_text(json.dumps({**entry, "engine": "unet.plan"}))
    parts = write_base(tmp_path / "other", "tensorrt-rtx") | {"unet": tmp_path / "unet"}
    with pytest.raises(DeviceError, match=r"cudaError 35.*install or update the NVIDIA driver \("):
        open_networks({name: parts[name] for name in ("unet", "base")}, "tensorrt-rtx", fake.Gpu())
