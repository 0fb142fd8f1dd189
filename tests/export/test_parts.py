"""A network's part as a file for other tools, what decides its graph, and how little memory its export takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from benchmarks import _sdxl_files as files  # noqa: E402
from dreammix_trt.core.checkpoint import BaseFiles  # noqa: E402
from dreammix_trt.core.network_weights import weights_of  # noqa: E402
from dreammix_trt.core.networks import Network, describe_networks, is_twin  # noqa: E402
from dreammix_trt.core.tensors import map_tensors, read_places  # noqa: E402
from dreammix_trt.export.onnx_export import export_network, find_shipped_graph, graph_digest, write_graph  # noqa: E402
from dreammix_trt.export.onnx_graph import trace_graph  # noqa: E402
from dreammix_trt.export.parity import BOUNDS, OnnxNetwork  # noqa: E402
from dreammix_trt.export.torch_module import make_torch_module  # noqa: E402
from tests.export.conftest import Exported  # noqa: E402
from tests.support.mini_sdxl import small_configs  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    *("text_encoder", "text_encoder_2", "vae_encoder", "inpaint_head"),
    *("unet_kv", "unet", "unet_raw_kv", "unet_raw", "vae_decoder"),
]


# Parts as files


@pytest.mark.parametrize("name", NAMES)
def test_a_part_is_plain_onnx_wherever_it_lies(exported: Exported, tmp_path: Path, name: str) -> None:
    """onnx.checker accepts it with its data, onnx.load finds every weight, ONNX Runtime gives the same numbers."""
    network = next(each for each in describe_networks(exported.base) if each.name == name)
    inputs = network.draw_example({"pictures": 1, "rows": 2, "h": 8, "w": 12, "H": 64, "W": 96})
    before = OnnxNetwork(exported.graph(name), threads=1).run(**inputs)
    moved = Path(shutil.move(shutil.copytree(exported.folder / name, tmp_path / "copy"), tmp_path / "elsewhere"))
    file = moved / exported.graph(name).name
    onnx.checker.check_model(str(file), full_check=True)
    loaded = {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(file).graph.initializer}
    truth, turned = weights_of(exported.base, name), exported.table[name]["initializers"]
    assert turned.keys() <= loaded.keys()
    for key, transposed in turned.items():
        np.testing.assert_array_equal(loaded[key], truth[key].T if transposed else truth[key])
    after = OnnxNetwork(file, threads=1).run(**inputs)
    assert before.keys() == after.keys() and all(np.array_equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ["unet", "vae_decoder"])
def test_places_in_the_graph_are_those_of_the_weight_file(exported: Exported, name: str) -> None:
    """The file is a normal safetensors file. Tensors of 64 bytes or more are aligned for fast copies."""
    model = onnx.load(exported.graph(name), load_external_data=False)
    places = read_places(exported.weights(name))
    for item in model.graph.initializer:
        if item.data_location == onnx.TensorProto.EXTERNAL:
            told = {entry.key: entry.value for entry in item.external_data}
            _, shape, offset, length = places[item.name]
            assert told["location"] == exported.weights(name).name
            assert (int(told["offset"]), int(told["length"])) == (offset, length)
            assert shape == tuple(item.dims)
            assert offset % 64 == 0 or length % 64
    with safe_open(exported.weights(name), "numpy") as opened:
        assert set(opened.keys()) == set(places)


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "unet_kv", "unet"])
def test_the_bases_own_weights_give_the_bits_of_a_graph_without_slots(small: Any, tmp_path: Path, name: str) -> None:
    outputs = {}
    for slots in (False, True):
        network, out = describe(small, name, slots), tmp_path / f"{slots}"
        out.mkdir()
        write_graph(network, out)
        entry = export_network(small, network, out, out, verify=False)
        assert bool(entry["slots"]) == ("slot_weights" in entry) == slots
        held = map_tensors(out / entry["slot_weights"]) if slots else {}
        inputs = network.without_slots().draw_example({"pictures": 1, "rows": 2, "h": 8, "w": 6})
        session = OnnxNetwork(out / entry["graph"], threads=1)
        outputs[slots] = session.run(**inputs, **held)
        if slots:
            other = session.run(**inputs, **{each: 0.9 * array for each, array in held.items()})
            assert all(np.abs(other[key] - value).max() > 1e-4 for key, value in outputs[True].items())
    assert outputs[False].keys() == outputs[True].keys()
    for key, value in outputs[False].items():
        np.testing.assert_array_equal(outputs[True][key], value)


@pytest.mark.slow
def test_sdxl_at_a_fifth_of_its_width_agrees_with_torch(tmp_path: Path) -> None:
    """UNet 64/128/256 with heads of 64 and all of SDXL's layers but the repeated transformers, VAE at a quarter."""
    base = BaseFiles.open(files.write_folder(tmp_path / "base", files.sdxl_configs(0.2, depth=1, side=64)))
    for name in ("unet", "vae_encoder", "vae_decoder"):
        (tmp_path / name).mkdir()
        network = describe(base, name)
        write_graph(network, tmp_path / name)
        parity = export_network(base, network, tmp_path / name, tmp_path / name, verify=True)["parity"]
        assert parity["max_rel"] < BOUNDS["float32"] / 4 and len(parity["sizes"]) == 3


# What decides a graph


def describe(base: Any, name: str, slots: bool = True, **options: Any) -> Network:
    return next(network for network in describe_networks(base, slots, **options) if network.name == name)


def change_config(base: Any, component: str, **entries: Any) -> Any:
    return replace(base, configs={**base.configs, component: {**base.configs[component], **entries}})


CHANGES_NOTHING: dict[str, tuple[str, dict[str, Any]]] = {
    "text_encoder": (
        "text_encoder",
        {
            "torch_dtype": "bfloat16",
            "dtype": "bfloat16",
            "transformers_version": "9",
            "_name_or_path": "elsewhere",
            "initializer_range": 3.0,
            "initializer_factor": 9.0,
            "attention_dropout": 0.5,
            "bos_token_id": 5,
            "pad_token_id": 6,
            "architectures": ["Other"],
        },
    ),
    "vae_decoder": (
        "vae",
        {
            "sample_size": 512,
            "scaling_factor": 0.2,
            "force_upcast": False,
            "_diffusers_version": "9",
        },
    ),
}


@pytest.mark.parametrize("name", CHANGES_NOTHING)
def test_the_digest_ignores_what_does_not_change_the_graph(small: Any, name: str) -> None:
    """The graph is indeed the same, byte for byte."""
    component, entries = CHANGES_NOTHING[name]
    one, other = describe(small, name), describe(change_config(small, component, **entries), name)
    assert graph_digest(one) == graph_digest(other)
    assert trace_graph(one).proto.SerializeToString() == trace_graph(other).proto.SerializeToString()


def test_both_unets_and_every_checkpoint_of_a_shape_share_a_graph(small: Any, tmp_path: Path) -> None:
    assert graph_digest(describe(small, "unet")) == graph_digest(describe(small, "unet_raw"))
    other = files.write_single_file(tmp_path / "other.safetensors", small_configs(), seed=9)
    base = BaseFiles.open(other, tokenizer=small.tokenizer)
    assert [graph_digest(describe(base, name)) for name in NAMES if "raw" not in name and name != "inpaint_head"] == [
        graph_digest(describe(small, name)) for name in NAMES if "raw" not in name and name != "inpaint_head"
    ]


def test_the_digest_tells_apart_what_the_graph_does(small: Any) -> None:
    unets = [
        describe(small, "unet"),
        describe(small, "unet", False),
        describe(small, "unet_kv"),
        describe(small, "unet_kv", False),
        describe(small, "unet", precision="float16"),
        describe(small, "unet", fused=True),
        describe(small, "unet", precision="float16", fused=True),
        describe(change_config(small, "unet", norm_eps=1e-4), "unet"),
        describe(change_config(small, "unet", norm_num_groups=16), "unet"),
    ]
    heads = [describe(small, "inpaint_head"), describe(replace(small, nine_channels=True), "inpaint_head")]
    vaes = [describe(small, "vae_decoder", precision="float16"), describe(small, "vae_encoder", precision="float16")]
    vaes.append(replace(vaes[0], wide=("mid.0",)))
    texts = [
        describe(small, "text_encoder"),
        describe(change_config(small, "text_encoder", hidden_act="gelu"), "text_encoder"),
    ]
    texts += [
        describe(change_config(small, "text_encoder_2", eos_token_id=7), "text_encoder_2"),
        describe(small, "text_encoder_2"),
    ]
    digests = [graph_digest(network) for network in (*unets, *heads, *vaes, *texts)]
    assert len(set(digests)) == len(digests)


def test_a_float16_vae_s_twins_are_the_float32_vae(small: Any) -> None:
    """They have graph and weights of a float32 base, whatever the form of the float16 one. Only a VAE has twins."""
    plain = {network.name: network for network in describe_networks(small)}
    assert [name for name in plain if is_twin(name)] == []
    for fused in (False, True):
        half = {network.name: network for network in describe_networks(small, precision="float16", fused=fused)}
        assert half.keys() - plain.keys() == {"vae_encoder_float32", "vae_decoder_float32"}
        for name in ("vae_encoder", "vae_decoder"):
            twin = half[f"{name}_float32"]
            assert (twin.graph, twin.precision, twin.fused, twin.wide) == (name, "float32", False, ())
            assert graph_digest(twin) == graph_digest(plain[name]) != graph_digest(half[name])
            weights, truth = weights_of(small, twin.name), weights_of(small, name)
            assert set(weights) == set(truth)
            assert all(np.array_equal(weights[key], truth[key]) for key in truth)


def test_an_exported_twin_agrees_with_torch_as_float32_does(small: Any, tmp_path: Path) -> None:
    twin = describe(small, "vae_decoder_float32", precision="float16", fused=True)
    (tmp_path / "graph").mkdir()
    (tmp_path / "part").mkdir()
    write_graph(twin, tmp_path / "graph")
    entry = export_network(small, twin, tmp_path / "graph", tmp_path / "part", verify=True)
    assert entry["parity"]["bound"] == BOUNDS["float32"] and entry["parity"]["max_rel"] < BOUNDS["float32"] / 4
    assert (entry["graph"], entry["precision"]) == ("vae_decoder.onnx", "float32")


def test_what_is_known_of_a_shipped_graph_holds_for_the_twin(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without torch for a comparison, the embedded model gets the figures from the making of its graph."""
    base, twin = BaseFiles.open(), describe(BaseFiles.open(), "vae_encoder_float32", precision="float16")
    graph = find_shipped_graph(twin)
    assert graph is not None
    recorded = json.loads((graph / "graph.json").read_text())["parity"]["vae_encoder"]
    parity = export_network(base, twin, graph, tmp_path, verify=False)["parity"]
    assert parity == {**recorded, "checked": "at export"}


# Memory


def full_size() -> BaseFiles:
    configs = files.sdxl_configs()
    return BaseFiles(Path("none"), Path("none.patch"), None, False, {**configs, "scheduler": {}})


@pytest.mark.parametrize("name", ["unet_kv", "unet", "text_encoder_2", "vae_decoder"])
def test_a_hollow_module_of_full_size_holds_next_to_nothing(name: str) -> None:
    """Every parameter has its shape and one number. No two numbers are equal, so none can be merged."""
    module = make_torch_module(describe(full_size(), name, False))
    parameters = dict(module.network.named_parameters())
    sizes = {"unet_kv": 340_787_200, "text_encoder_2": 694_659_840, "vae_decoder": 49_490_199}
    sizes["unet"] = 2_567_463_684 - sizes["unet_kv"]
    assert sum(value.numel() for value in parameters.values()) == sizes[name]
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in parameters.values()}
    stored |= {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in module.buffers()}
    assert sum(stored.values()) < 1_000_000
    assert len({float(value.flatten()[0]) for value in parameters.values()}) == len(parameters)


STREAM = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from dreammix_trt.core.lora import read_lora
from dreammix_trt.core.tensors import open_tensors
from dreammix_trt.engine.hardware import MemoryWatch
from dreammix_trt.core.network_weights import BaseLora
from dreammix_trt.export.onnx_export import export_network
folder = Path(sys.argv[1])
base = SimpleNamespace(folder=folder, state=lambda name: open_tensors(folder / "model.safetensors"))
described = {"inputs": [], "slots": []}
network = SimpleNamespace(
    name="text_encoder", graph="text_encoder", describe=lambda: described, slots=(), float8={}, precision="float32"
)
lora = BaseLora(read_lora(folder / "lora.safetensors"))
with MemoryWatch(0.001) as watch:
    before = watch.anonymous
    export_network(base, network, folder / "graph", folder / "out", loras=[lora], verify=False)
print(watch.anonymous - before, sorted({"torch", "onnx"} & sys.modules.keys()))
"""


def test_weights_stream_from_the_checkpoint_to_the_part(tmp_path: Path) -> None:
    """62 MB of float16 (124 as float32) with a LoRA merged take a few times the largest tensor at any time."""
    module, count, side = "text_model.encoder.layers.{}.self_attn.q_proj", 31, 1024
    entries = {
        f"{module.format(n)}.weight": files.FileTensor(
            "float16", (side, side), lambda: np.ones((side, side), np.float16)
        )
        for n in range(count)
    }
    files.write_safetensors(tmp_path / "model.safetensors", entries, {})
    factors = {
        f"text_encoder.{module.format(n)}.lora.{part}.weight": files.FileTensor(
            "float16", shape, lambda shape=shape: np.ones(shape, np.float16)
        )
        for n in range(count)
        for part, shape in {"down": (4, side), "up": (side, 4)}.items()
    }
    files.write_safetensors(tmp_path / "lora.safetensors", factors, {})
    (tmp_path / "graph").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "graph/graph.onnx").write_bytes(b"")
    wanted = {name: ["float16", list(entry.shape), True] for name, entry in entries.items()}
    facts = {"weights": wanted, "inputs": [], "exporter": {}, "parity": {}}
    (tmp_path / "graph/graph.json").write_text(json.dumps(facts))
    done = subprocess.run(
        [sys.executable, "-c", STREAM, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    peak, heavy = done.stdout.split(" ", 1)
    assert heavy.strip() == "[]"
    assert int(peak) < 32 << 20, f"{int(peak) >> 20} MiB at once"
    with safe_open(tmp_path / "out/text_encoder.safetensors", "numpy") as out:
        assert len(list(out.keys())) == count
        assert set(out.get_tensor(f"{module.format(7)}.weight").ravel()) == {np.float16(5)}
