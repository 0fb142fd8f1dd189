"""Networks in torch behind the device runtime's seam: what they compute, what they are bound to, what they hold."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from benchmarks._sdxl_files import sdxl_configs, shapes_of  # noqa: E402
from dreammix_trt.core.axes import Sides  # noqa: E402
from dreammix_trt.core.checkpoint import BaseFiles  # noqa: E402
from dreammix_trt.core.errors import EngineError, FileFormatError, InputError  # noqa: E402
from dreammix_trt.core.lora import Lora  # noqa: E402
from dreammix_trt.core.merging import list_changes, merge_weights  # noqa: E402
from dreammix_trt.core.network_weights import BaseLora  # noqa: E402
from dreammix_trt.core.networks import Network, describe_networks  # noqa: E402
from dreammix_trt.core.seam import Array, BaseFacts, DeviceNetworks  # noqa: E402
from dreammix_trt.export.torch_backend import resident as torch_resident  # noqa: E402
from dreammix_trt.export.torch_backend.engine_set import TorchEngineSet  # noqa: E402
from dreammix_trt.export.torch_backend.on_device import TorchNetworks  # noqa: E402
from tests.support.mini_sdxl import small_configs  # noqa: E402
from tests.support.tiny_model import write_tiny_model  # noqa: E402

SIDES = Sides(rows=4, pictures=2, height=8, width=12)
SIZES = {"rows": 4, "pictures": 2, "h": 8, "w": 12, "H": 64, "W": 96}
NAMES = (
    "text_encoder", "text_encoder_2", "unet_kv", "unet", "unet_raw_kv", "unet_raw", "inpaint_head", "vae_encoder",
    "vae_decoder",
)  # fmt: skip
#: largest difference to float32, as a share of the largest value: ten roundings or so
BOUNDS = {"float32": 1e-6, "float16": 6e-3, "bfloat16": 6e-2}


@dataclass
class Here:
    """The host, where a stream has no handle."""

    handle: int | None = None


def difference(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(found.astype(np.float32) - truth).max() / np.abs(truth).max())


def array(values: np.ndarray) -> Array:
    return Array(values.ctypes.data, values.shape, str(values.dtype))


class Held:
    """A network bound to numpy arrays: inputs to change in place, outputs to look at."""

    def __init__(self, networks: TorchNetworks, name: str, sides: Sides, inputs: dict[str, np.ndarray]) -> None:
        self.inputs = {spec.name: inputs[spec.name].astype(spec.dtype) for spec in networks.inputs(name)}
        self.outputs = {spec.name: np.zeros(sides.shape(spec), spec.dtype) for spec in networks.outputs(name)}
        arrays = {key: array(value) for key, value in {**self.inputs, **self.outputs}.items()}
        self.bound = networks.bind(name, sides, arrays)

    def run(self) -> dict[str, np.ndarray]:
        self.bound.enqueue(Here())
        return {name: value.copy() for name, value in self.outputs.items()}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseFiles:
    return BaseFiles.open(write_tiny_model(tmp_path_factory.mktemp("tiny") / "model").folder)


@pytest.fixture(scope="module")
def plain(base: BaseFiles) -> dict[str, Network]:
    return {network.name: network for network in describe_networks(base)}


@pytest.fixture(scope="module")
def opened(base: BaseFiles) -> Iterator[Callable[[str], TorchNetworks]]:
    """The base's networks on the CPU by dtype, each made once."""
    made: dict[str, TorchNetworks] = {}

    def open_as(dtype: str) -> TorchNetworks:
        if dtype not in made:
            made[dtype] = TorchNetworks.of(base, device="cpu", dtype=dtype)
        return made[dtype]

    yield open_as
    for networks in made.values():
        networks.close()


@pytest.fixture(scope="module")
def truth(base: BaseFiles) -> TorchEngineSet:
    return TorchEngineSet(base)


# What they compute


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_network_computes_what_the_oracle_does(
    opened: Callable[[str], TorchNetworks], truth: TorchEngineSet, plain: dict[str, Network], name: str, dtype: str
) -> None:
    inputs = plain[name].draw_example(SIZES, seed=3)
    wanted = truth.run(name, **inputs)
    found = Held(opened(dtype), name, SIDES, inputs).run()
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].shape == value.shape
        assert difference(found[key], value) <= BOUNDS[dtype]
    if dtype != "float32":
        assert max(difference(found[key], value) for key, value in wanted.items()) > 1e-6, "nothing was rounded"
        opened(dtype).load(f"{name}_float32")
        twin = Held(opened(dtype), f"{name}_float32", SIDES, inputs).run()
        assert max(difference(twin[key], value) for key, value in wanted.items()) <= BOUNDS["float32"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_times_and_sizes_stay_float32(
    opened: Callable[[str], TorchNetworks], plain: dict[str, Network], dtype: str
) -> None:
    """Between 512 and 1024 float16 has steps of a half and bfloat16 of four, so these times would be equal."""
    given = {spec.name: spec.dtype for spec in opened(dtype).inputs("unet")}
    other = "float16" if dtype == "float16" else "float32"
    assert given == {name: "float32" if name in ("timestep", "time_ids") else other for name in given}
    held = Held(opened(dtype), "unet", SIDES, plain["unet"].draw_example(SIZES))
    for name, first, second in (("timestep", 700.0, 700.2), ("time_ids", 1000.0, 1000.2)):
        held.inputs[name][:] = first
        before = held.run()["eps"]
        held.inputs[name][:] = second
        assert np.abs(held.run()["eps"] - before).max() > 0
        held.inputs[name][:] = first
        np.testing.assert_array_equal(held.run()["eps"], before)


def test_weights_of_slots_are_the_bases_own(
    opened: Callable[[str], TorchNetworks], truth: TorchEngineSet, plain: dict[str, Network]
) -> None:
    """With them a network computes what the oracle does where no weights are given."""
    for name in ("unet", "unet_kv", "text_encoder_2"):
        networks, inputs = opened("float32"), plain[name].draw_example(SIZES, seed=1)
        held = networks.weights(name)
        assert held.keys() == {slot.weight for slot in plain[name].slots} and networks.weights(name) is held
        given = {key: value for key, value in inputs.items() if key not in held}
        found = Held(networks, name, SIDES, {**given, **held}).run()
        for key, value in truth.run(name, **given).items():
            assert difference(found[key], value) <= 1e-6
        for key, value in opened("float16").weights(name).items():
            assert value.dtype == np.float16
            np.testing.assert_array_equal(value, held[key].astype(np.float16))
    assert opened("float32").weights("vae_decoder") == {}


def test_merged_inputs_equal_merged_networks(
    base: BaseFiles, opened: Callable[[str], TorchNetworks], plain: dict[str, Network]
) -> None:
    """W + A B in the inputs is what a network computes whose weights a LoRA was merged into, in every slot."""
    rng = np.random.default_rng(4)
    for name, part in (("unet", "unet"), ("unet_kv", "unet"), ("text_encoder_2", "text_encoder_2")):
        factors = {
            slot.module: (
                rng.standard_normal((slot.inputs, 4)).astype(np.float32) / 8,
                rng.standard_normal((4, slot.outputs)).astype(np.float32) / 8,
            )
            for slot in plain[name].slots
        }
        inputs = plain[name].draw_example(SIZES, seed=4)
        loras = [BaseLora(Lora({part: factors}, 4, Path(), {}))]
        with TorchNetworks.of(base, device="cpu", dtype="float32", slots=False, names=[name], loras=loras) as merged:
            wanted = Held(merged, name, SIDES, inputs).run()
        own = opened("float32").weights(name)
        weights = {**own, **merge_weights(own, list_changes(factors, plain[name].slots))}
        found = Held(opened("float32"), name, SIDES, {**inputs, **weights}).run()
        plainly = Held(opened("float32"), name, SIDES, {**inputs, **own}).run()
        assert max(difference(found[key], value) for key, value in wanted.items()) < 1e-5
        assert max(difference(plainly[key], value) for key, value in wanted.items()) > 1e-3


def test_a_pass_keeps_nothing_of_its_callers(opened: Callable[[str], TorchNetworks], plain: dict[str, Network]) -> None:
    networks = opened("float32")
    Held(networks, "unet", SIDES, plain["unet"].draw_example(SIZES)).run()
    module = networks._made["unet"].module
    assert module._feature is None and module.slots._given == {}


def test_wide_units_of_a_float16_vae_compute_in_float32(base: BaseFiles, plain: dict[str, Network]) -> None:
    """A stream beyond 65504 in the middle, as in SDXL's own VAE: infinite in float16, correct when widened."""
    wide = {"vae_decoder": ("mid.0", "mid.1", "mid.2")}
    inputs = plain["vae_decoder"].draw_example(SIZES)
    results = {}
    for label, units in (("narrow", {}), ("wide", wide)):
        with TorchNetworks.of(base, device="cpu", names=["vae_decoder"], wide=units) as networks:
            module = networks._made["vae_decoder"].module.network
            with torch.no_grad():
                module.decoder.mid_block.resnets[0].conv2.bias.fill_(60000)
                module.decoder.mid_block.resnets[1].conv2.bias.fill_(30000)
                module.decoder.mid_block.resnets[1].conv2.bias[::2].neg_()
            results[label] = Held(networks, "vae_decoder", SIDES, inputs).run()["image"]
            kinds = {name for name, each in module.named_parameters() if each.dtype == torch.float32}
            assert kinds == {n for n, _ in module.named_parameters() if "mid_block" in n and label == "wide"}
    assert not np.isfinite(results["narrow"]).all()
    assert results["wide"].dtype == np.float16


def test_weights_beyond_float16_are_refused(base: BaseFiles) -> None:
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = base.configs["unet"]["block_out_channels"][-1]
    factors = {"unet": {module: (np.ones((width, 1), np.float32), np.full((1, width), 1e5, np.float32))}}
    loras = [BaseLora(Lora(factors, 1, Path(), {}), target="raw")]
    options: dict[str, Any] = {"device": "cpu", "names": ["unet_raw"], "loras": loras}
    with pytest.raises(FileFormatError, match=rf"unet_raw: {module}\.weight has values beyond float16"):
        TorchNetworks.of(base, slots=False, **options)
    with (
        TorchNetworks.of(base, **options) as networks,
        pytest.raises(FileFormatError, match=rf"unet_raw: {module}\.weight has values beyond float16"),
    ):
        networks.weights("unet_raw")
    with TorchNetworks.of(base, **options, slots=False, dtype="bfloat16") as networks:
        weight = dict(networks._made["unet_raw"].module.network.named_parameters())[f"{module}.weight"]
        assert float(weight.min()) > 9e4
    with TorchNetworks.of(base, **options, dtype="bfloat16") as networks:
        assert networks.weights("unet_raw")[f"{module}.weight"].min() > 9e4


# What they are bound to


def test_bound_memory_is_read_and_written_in_place(
    opened: Callable[[str], TorchNetworks], truth: TorchEngineSet, plain: dict[str, Network]
) -> None:
    first, second = (plain["vae_encoder"].draw_example(SIZES, seed) for seed in (0, 1))
    held = Held(opened("float32"), "vae_encoder", SIDES, first)
    places = {name: value.ctypes.data for name, value in held.outputs.items()}
    held.run()
    held.inputs["image"][:] = second["image"]
    for name, value in truth.run("vae_encoder", **second).items():
        assert difference(held.run()[name], value) <= 1e-6
        assert held.outputs[name].ctypes.data == places[name]


def test_arrays_that_do_not_fit_are_named(opened: Callable[[str], TorchNetworks]) -> None:
    networks = opened("float16")
    mask, latent = (np.zeros((2, channels, 8, 12), np.float16) for channels in (1, 4))
    feature = np.zeros((2, networks.facts.feature_channels, 8, 12), np.float16)
    arrays = {"mask": array(mask), "masked_latent": array(latent), "feature": array(feature)}
    networks.bind("inpaint_head", SIDES, {**arrays, "unknown": array(mask)}).close()
    with pytest.raises(EngineError, match=r"inpaint_head: no array for mask; bind one of \(2, 1, 8, 12\) float16"):
        networks.bind("inpaint_head", SIDES, {key: value for key, value in arrays.items() if key != "mask"})
    with pytest.raises(EngineError, match=r"feature is bound to \(2, 32, 8, 12\) float16; it takes \(3, 32, 8, 12\)"):
        wrong = {"mask": np.zeros((3, 1, 8, 12), np.float16), "masked_latent": np.zeros((3, 4, 8, 12), np.float16)}
        networks.bind("inpaint_head", Sides(6, 3, 8, 12), {**arrays, **{k: array(v) for k, v in wrong.items()}})
    with pytest.raises(EngineError, match=r"mask is bound to .* float32; it takes .* float16"):
        networks.bind("inpaint_head", SIDES, {**arrays, "mask": array(mask.astype(np.float32))})
    with pytest.raises(EngineError, match=r"no network 'asuka'"):
        networks.bind("asuka", SIDES, arrays)


def test_what_is_closed_or_unloaded_does_not_run(base: BaseFiles, plain: dict[str, Network]) -> None:
    with TorchNetworks.of(base, device="cpu", dtype="float32", names=["inpaint_head"]) as networks:
        held = Held(networks, "inpaint_head", SIDES, plain["inpaint_head"].draw_example(SIZES))
        before = held.run()["feature"]
        assert networks.loaded == ("inpaint_head",)
        networks.unload("inpaint_head")
        networks.unload("inpaint_head")
        assert networks.loaded == ()
        with pytest.raises(EngineError, match="inpaint_head cannot run: load it first"):
            held.run()
        networks.load("inpaint_head")
        np.testing.assert_array_equal(held.run()["feature"], before)
        held.bound.close()
        held.bound.close()
        with pytest.raises(EngineError, match="inpaint_head cannot run: it is closed, bind it anew"):
            held.run()
        again = Held(networks, "inpaint_head", SIDES, plain["inpaint_head"].draw_example(SIZES))
    with pytest.raises(EngineError, match="inpaint_head cannot run"):
        again.run()
    assert "inpaint_head" not in networks


@pytest.mark.slow
def test_compiled_networks_compute_the_same_at_more_shapes_than_torch_allows_one_function(
    base: BaseFiles, truth: TorchEngineSet, plain: dict[str, Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one graph each; with torch's tracing compilers but without their back end, which takes minutes on a CPU."""
    asked: list[tuple[str, bool]] = []
    compile_with = torch.compile

    def traced(run: Any, *, mode: str, fullgraph: bool, dynamic: bool) -> Any:
        asked.append((mode, dynamic))
        return compile_with(run, backend="eager", fullgraph=fullgraph, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    with TorchNetworks.of(base, device="cpu", dtype="float32", compile=True, names=["unet", "vae_decoder"]) as networks:
        cases = [("unet", 8)] + [("vae_decoder", width) for width in (4, 8, 12)]
        for name, width in cases:
            inputs = plain[name].draw_example({**SIZES, "w": width, "W": 8 * width})
            found = Held(networks, name, Sides(4, 2, 8, width), inputs).run()
            for key, value in truth.run(name, **inputs).items():
                assert difference(found[key], value) <= 1e-5
    assert asked == [("max-autotune-no-cudagraphs", False)] * len(cases)


# What they hold


def test_it_answers_as_the_seam_wants(opened: Callable[[str], TorchNetworks], base: BaseFiles) -> None:
    networks: DeviceNetworks = opened("float16")
    assert all(name in networks and f"{name}_float32" in networks for name in NAMES) and "asuka" not in networks
    assert "unet_float32" not in opened("float32")
    assert networks.facts == BaseFacts(64, 32, 0.13025, 32, {})
    assert networks.frames() is None and networks.most_pictures is None
    assert networks.workspace_bytes("unet", SIDES) == 0
    slots, told = networks.slots("unet"), networks.slots("unet_kv")
    assert (len(slots), len(told)) == (66, 22) and networks.slots("vae_encoder") == networks.slots("none") == ()
    assert [spec.name for spec in networks.inputs("unet")][-len(slots) :] == [slot.weight for slot in slots]
    numbers = sum(math.prod(shape) for shape in shapes_of("unet", base.configs["unet"]).values())
    own = numbers - sum(slot.inputs * slot.outputs for slot in (*slots, *told))
    assert networks.weight_bytes("unet") == 2 * own and networks.weight_bytes("unet_kv") == 0
    assert networks.weight_bytes("unet_float32") == 4 * own


@pytest.mark.parametrize("dtype", BOUNDS)
def test_weights_come_when_they_are_asked_for(base: BaseFiles, plain: dict[str, Network], dtype: str) -> None:
    """Before that their size is known, and they can be bound."""
    wide = {"vae_decoder": ("mid.0",)}
    inputs = plain["vae_decoder"].draw_example(SIZES)
    with TorchNetworks.of(base, device="cpu", dtype=dtype, wide=wide, resident=()) as networks:
        sizes = {name: networks.weight_bytes(name) for name in networks._made}
        assert networks.loaded == () and len(sizes) == (9 if dtype == "float32" else 18)
        held = Held(networks, "vae_decoder", SIDES, inputs)
        with pytest.raises(EngineError, match="vae_decoder cannot run: load it first"):
            held.run()
        for name in sizes:
            networks.load(name)
        assert set(networks.loaded) == set(sizes)
        for name, size in sizes.items():
            assert size == sum(each.nbytes for each in networks._made[name].module.network.parameters())
        with TorchNetworks.of(base, device="cpu", dtype=dtype, wide=wide, names=["vae_decoder"]) as usual:
            assert usual.loaded == ("vae_decoder",)
            np.testing.assert_array_equal(held.run()["image"], Held(usual, "vae_decoder", SIDES, inputs).run()["image"])
    with TorchNetworks.of(base, device="cpu", dtype=dtype, resident=["vae_encoder"]) as networks:
        assert networks.loaded == ("vae_encoder",)
    with pytest.raises(EngineError, match=r"no network 'unet3'"):
        TorchNetworks.of(base, device="cpu", names=["unet"], resident=["unet3"])


def test_unknown_options_are_refused(base: BaseFiles) -> None:
    with pytest.raises(InputError, match="dtype is 'int8'; allowed: float16, bfloat16, float32"):
        TorchNetworks.of(base, device="cpu", dtype="int8")
    with pytest.raises(InputError, match="names: unet3; this base has text_encoder"):
        TorchNetworks.of(base, device="cpu", names=["unet3"])
    with pytest.raises(InputError, match="device is 'gpu0'"):
        TorchNetworks.of(base, device="gpu0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_said(base: BaseFiles) -> None:
    with pytest.raises(EngineError, match="torch finds no CUDA device"):
        TorchNetworks.of(base)


def test_lack_of_memory_is_a_memory_error(base: BaseFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    with TorchNetworks.of(base, device="cpu", dtype="float32", names=["vae_decoder"]) as networks:
        held = Held(networks, "vae_decoder", SIDES, {"latent": np.zeros((2, 4, 8, 12), np.float32)})

        def full(*_: Any) -> Any:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")

        monkeypatch.setattr(networks._made["vae_decoder"].module, "forward", full)
        with pytest.raises(MemoryError, match="vae_decoder: tried to allocate 20 GiB"):
            held.run()
        monkeypatch.undo()
        assert held.run()["image"].any(), "usable afterwards"


def test_a_load_that_finds_no_memory_leaves_nothing(base: BaseFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    placed, made = torch_resident._put_weight, []

    def short(*given: Any) -> Any:
        if len(made) == 3:
            raise RuntimeError("CUDA error: out of memory")
        value = placed(*given)
        made.append(weakref.ref(value))
        return value

    with TorchNetworks.of(base, device="cpu", names=["vae_decoder"], wide={}, resident=()) as networks:
        monkeypatch.setattr(torch_resident, "_put_weight", short)
        with pytest.raises(MemoryError, match="vae_decoder: CUDA error: out of memory") as caught:
            networks.load("vae_decoder")
        assert networks.loaded == () and [each() for each in made] == [None] * 3, "the error keeps them"
        assert caught.value.__cause__ is not None
        monkeypatch.undo()
        networks.load("vae_decoder")
        assert networks.loaded == ("vae_decoder",)


def test_other_errors_stay_what_they_are(base: BaseFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    with TorchNetworks.of(base, device="cpu", names=["vae_decoder"], wide={}, resident=()) as networks:
        monkeypatch.setattr(torch_resident, "_put_weight", lambda *_: torch.zeros(2) @ torch.zeros(3))
        with pytest.raises(RuntimeError, match="size"):
            networks.load("vae_decoder")
        assert networks.loaded == ()


def test_memory_is_given_back_between_passes(base: BaseFiles, plain: dict[str, Network]) -> None:
    """While one thread enqueues a pass, another may not close a pool."""
    with TorchNetworks.of(base, device="cpu", names=["inpaint_head"]) as networks:
        held = Held(networks, "inpaint_head", SIDES, plain["inpaint_head"].draw_example(SIZES))
        closing = threading.Thread(target=held.bound.close)
        with torch_resident.turn:
            closing.start()
            closing.join(0.05)
            assert closing.is_alive()
        closing.join()


# Random weights


def test_random_networks_are_finite_and_repeatable(base: BaseFiles, plain: dict[str, Network]) -> None:
    configs = small_configs()
    found = {}
    for label, seed, dtype in (
        ("a", 0, "float16"),
        ("same", 0, "float16"),
        ("b", 1, "float16"),
        ("wide", 0, "float32"),
    ):
        with TorchNetworks.random(configs, device="cpu", dtype=dtype, seed=seed) as networks:
            assert networks.facts.feature_channels == 32
            for name in NAMES:
                specs = (networks.inputs(name), networks.outputs(name))
                made = Network(name, name, "", *specs, networks.slots(name), _config_of(name, configs))
                results = Held(networks, name, SIDES, made.draw_example(SIZES)).run()
                for key, value in results.items():
                    assert np.isfinite(value).all() and 0.01 < value.std() < 30, (name, key, value.std())
                    found[label, name, key] = value.astype(np.float32)
    for name, key in {(name, key) for _, name, key in found}:
        np.testing.assert_array_equal(found["a", name, key], found["same", name, key])
        assert difference(found["b", name, key], found["a", name, key]) > 0.1
        assert difference(found["a", name, key], found["wide", name, key]) < 0.05
    assert difference(found["a", "unet_raw", "eps"], found["a", "unet", "eps"]) > 0.1


def _config_of(name: str, configs: dict[str, Any]) -> dict[str, Any]:
    return {name: configs[name]} if name.startswith("text") else {"unet": configs["unet"]}


def test_a_full_size_sdxl_is_described_without_memory() -> None:
    configs = sdxl_configs()
    facts = object()
    with TorchNetworks.random(configs, facts, device="meta") as networks:
        assert networks.facts is facts
        for name, component in (("unet", "unet"), ("unet_raw", "unet"), ("text_encoder_2", "text_encoder_2")):
            slots = networks.slots(name) + (networks.slots(f"{name}_kv") if component == "unet" else ())
            weights = {f"{slot.module}.weight" for slot in slots}
            shapes = {
                key: shape for key, shape in shapes_of(component, configs[component]).items() if key not in weights
            }
            found = {key: tuple(each.shape) for key, each in networks._made[name].module.network.named_parameters()}
            assert found == shapes
            assert networks.weight_bytes(name) == 2 * sum(map(math.prod, shapes.values()))
        assert 3.2e9 < networks.weight_bytes("unet") < 3.3e9
        assert (len(networks.slots("unet")), len(networks.slots("unet_kv"))) == (420, 140)
        arrays = {
            spec.name: Array(256, SIDES.shape(spec), spec.dtype)
            for spec in (*networks.inputs("vae_decoder"), *networks.outputs("vae_decoder"))
        }
        with pytest.raises(EngineError, match="'meta' are sizes alone"):
            networks.bind("vae_decoder", SIDES, arrays)
    with TorchNetworks.random(configs, device="meta", slots=False, patched=False, names=["unet"]) as networks:
        assert "unet_raw" not in networks and networks.slots("unet") == ()


# On a GPU


@pytest.fixture
def device(gpu: None) -> Iterator[Any]:
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA here")
    cuda = pytest.importorskip("dreammix_trt.engine.drivers.cuda")
    device = cuda.CudaDevice()
    yield device
    device.close()


class OnDevice:
    """A network bound to memory of a `CudaDevice`."""

    def __init__(
        self, device: Any, networks: TorchNetworks, name: str, sides: Sides, inputs: dict[str, np.ndarray]
    ) -> None:
        self.device, self.stream, self.outputs = device, device.make_stream(), networks.outputs(name)
        specs = (*networks.inputs(name), *self.outputs)
        self.arrays, self.memory = {}, []
        for spec in specs:
            empty = Array(0, sides.shape(spec), spec.dtype)
            self.memory.append(device.allocate(empty.nbytes))
            self.arrays[spec.name] = Array(self.memory[-1].pointer, empty.shape, empty.dtype)
        self.give(inputs)
        self.bound = networks.bind(name, sides, self.arrays)

    def give(self, inputs: dict[str, np.ndarray]) -> None:
        for name, value in inputs.items():
            held = np.ascontiguousarray(value.astype(self.arrays[name].dtype))
            self.device.upload(self.arrays[name], held, self.stream)
            self.device.synchronize(self.stream)

    def taken(self) -> np.ndarray:
        place = self.arrays[self.outputs[0].name]
        host = np.empty(place.shape, place.dtype)
        self.device.download(host, place, self.stream)
        self.device.synchronize(self.stream)
        return host.astype(np.float32)


@pytest.mark.parametrize("compile", [False, "default"])
@pytest.mark.parametrize("name", ["unet", "vae_decoder"])
def test_a_captured_pass_follows_its_inputs_and_nobody_takes_its_memory(
    device: Any, base: BaseFiles, truth: TorchEngineSet, plain: dict[str, Network], name: str, compile: bool | str
) -> None:
    first, second = (plain[name].draw_example(SIZES, seed) for seed in (0, 1))
    (key,) = (spec.name for spec in plain[name].outputs)
    with TorchNetworks.of(base, names=[name], compile=compile) as networks:
        held = OnDevice(device, networks, name, SIDES, first)
        assert held.bound.capturable
        with pytest.raises(EngineError, match="run it once before a capture"):
            device.capture(held.stream, lambda: held.bound.enqueue(held.stream))
        held.bound.enqueue(held.stream)
        plainly = held.taken()
        assert difference(plainly, truth.run(name, **first)[key]) < 2e-2
        graph = device.capture(held.stream, lambda: held.bound.enqueue(held.stream))
        sizes = {"rows": 2, "pictures": 1, "h": 8, "w": 16, "H": 64, "W": 128}
        other = OnDevice(device, networks, name, Sides(2, 1, 8, 16), plain[name].draw_example(sizes))
        for _ in range(3):  # other work must not touch the graph's memory, nor the graph the memory of others
            torch.randn(1 << 22, device="cuda").mul_(torch.inf)
            torch.cuda.empty_cache()
            other.bound.enqueue(other.stream)
            alone = other.taken()
            graph.launch(held.stream)
            np.testing.assert_array_equal(held.taken(), plainly)
        held.give(second)
        graph.launch(held.stream)
        assert difference(held.taken(), truth.run(name, **second)[key]) < 2e-2
        other.bound.enqueue(other.stream)
        np.testing.assert_array_equal(other.taken(), alone)
        graph.close()
        held.bound.close()


def test_weights_leave_the_device_and_come_back(device: Any, base: BaseFiles, plain: dict[str, Network]) -> None:
    with TorchNetworks.of(base, names=["unet"]) as networks:
        held = OnDevice(device, networks, "unet", SIDES, plain["unet"].draw_example(SIZES))
        held.bound.enqueue(held.stream)
        before = held.taken()
        taken = torch.cuda.memory_allocated()
        for _ in range(2):
            networks.unload("unet")
            assert torch.cuda.memory_allocated() <= taken - networks.weight_bytes("unet")
            networks.load("unet")
            held.bound.enqueue(held.stream)
            np.testing.assert_array_equal(held.taken(), before)


def test_a_twin_comes_while_another_thread_captures(device: Any, base: BaseFiles, plain: dict[str, Network]) -> None:
    with TorchNetworks.of(base, names=["unet"]) as networks:
        held = OnDevice(device, networks, "unet", SIDES, plain["unet"].draw_example(SIZES))
        held.bound.enqueue(held.stream)
        before = held.taken()

        def record() -> None:
            held.bound.enqueue(held.stream)
            loading = threading.Thread(target=networks.load, args=["unet_float32"])
            loading.start()
            loading.join()
            held.bound.enqueue(held.stream)

        graph = device.capture(held.stream, record)
        assert networks.loaded == ("unet", "unet_float32")
        graph.launch(held.stream)
        np.testing.assert_array_equal(held.taken(), before)
        graph.close()
        held.bound.close()
