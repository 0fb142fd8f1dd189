"""Parts of the tiny model: graphs against torch, weights outside, slots, reuse of graphs, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import BuildError, FileFormatError
from dreammix_trt.core.merging import list_changes, merge_weights
from dreammix_trt.core.network_weights import weights_of
from dreammix_trt.core.networks import Network, describe_networks
from dreammix_trt.core.slots import slots_of
from dreammix_trt.core.tensors import Weights
from dreammix_trt.export import onnx_export
from dreammix_trt.export.onnx_export import export_network, find_shipped_graph
from dreammix_trt.export.parity import BOUNDS, OnnxNetwork, check_parity, choose_sizes
from dreammix_trt.export.torch_module import make_torch_module
from tests.export.conftest import Exported
from tests.support.tiny_model import random_factors, write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    *("text_encoder", "text_encoder_2", "vae_encoder", "inpaint_head"),
    *("unet_kv", "unet", "unet_raw_kv", "unet_raw", "vae_decoder"),
]
SLOTTED = [name for name in NAMES if name.startswith(("text", "unet"))]


def open_network(exported: Exported, name: str) -> OnnxNetwork:
    return OnnxNetwork(exported.graph(name), threads=1)


def network_of(exported: Exported, name: str) -> Network:
    return next(network for network in describe_networks(exported.base) if network.name == name)


def test_the_set_is_complete(exported: Exported) -> None:
    table = exported.table
    assert list(table) == NAMES
    assert sorted(path.name for path in exported.folder.iterdir()) == sorted([*NAMES, "base"])
    for name, entry in table.items():
        graph = name.replace("_raw", "")
        held = {path.name for path in (exported.folder / name).iterdir()}
        slots = {f"{graph}.slots.safetensors"} if name in SLOTTED else set()
        assert held == {"network.json", f"{graph}.onnx", f"{graph}.safetensors", *slots}
        assert json.loads((exported.folder / name / "network.json").read_text()) == entry
    assert exported.graph("unet").read_bytes() == exported.graph("unet_raw").read_bytes()
    assert exported.weights("unet").read_bytes() != exported.weights("unet_raw").read_bytes()
    facts = json.loads((exported.folder / "base/base.json").read_text())
    assert facts["pad_tokens"] == {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}
    assert (facts["native_side"], facts["divisor"], facts["feature_channels"], facts["patched"]) == (64, 32, 32, True)
    assert (facts["head"], facts["slots"], facts["defaults"]) == ("replicate", True, {})
    for name in ("tokenizer", "tokenizer_2"):
        source = exported.base.folder / name
        assert (exported.folder / "base" / name / "merges.txt").read_bytes() == (source / "merges.txt").read_bytes()
    assert sum(exported.graph(name).stat().st_size for name in NAMES if "raw" not in name) < 1_200_000


@pytest.mark.parametrize("name", NAMES)
def test_every_graph_agrees_with_torch(exported: Exported, name: str) -> None:
    parity = exported.table[name]["parity"]
    assert 0 <= parity["max_rel"] <= BOUNDS["float32"] == parity["bound"]
    assert parity["checked"] == "at build"
    sizes = {(case["pictures"], case["h"] == case["w"]) for case in parity["sizes"]}
    assert {1, 2} == {pictures for pictures, _ in sizes} and {True, False} == {square for _, square in sizes}


@pytest.mark.parametrize("name", NAMES)
def test_weights_stand_outside_under_their_torch_names(exported: Exported, name: str) -> None:
    import onnx

    model = onnx.load(exported.graph(name), load_external_data=False)
    external = {item.name for item in model.graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL}
    weights, truth = load_file(exported.weights(name)), weights_of(exported.base, name)
    transposed = exported.table[name]["initializers"]
    assert external == weights.keys() == transposed.keys()
    for key, stored in weights.items():
        assert np.array_equal(stored, truth[key].T if transposed[key] else truth[key])
    inside = sum(len(item.raw_data) for item in model.graph.initializer if item.name not in external)
    assert inside < 40_000, "a weight was baked into the graph"


@pytest.mark.parametrize("name", SLOTTED)
def test_weights_of_slots_are_the_last_inputs_and_lie_beside_the_graph(exported: Exported, name: str) -> None:
    import onnx

    entry, network = exported.table[name], network_of(exported, name)
    held, truth = load_file(exported.slot_weights(name)), weights_of(exported.base, name)
    graph = onnx.load(exported.graph(name), load_external_data=False).graph
    listed = [spec["name"] for spec in entry["inputs"]]
    assert listed == [item.name for item in graph.input] and listed[-len(held) :] == sorted(held, key=listed.index)
    assert slots_of(entry) == network.slots
    last = f".layers.{exported.base.configs[name]['num_hidden_layers'] - 1}." if name == "text_encoder" else "none"
    assert held.keys() == {slot.weight for slot in network.slots if last not in slot.weight}
    for slot in network.slots:
        if slot.weight in held:
            np.testing.assert_array_equal(slot.view(held[slot.weight]), truth[f"{slot.module}.weight"].T)
    assert not held.keys() & load_file(exported.weights(name)).keys(), "no weight is stored twice"


def test_keys_and_values_are_those_of_the_text(exported: Exported) -> None:
    """text W^T in float64, for each cross-attention layer of both UNets."""
    for name in ("unet_kv", "unet_raw_kv"):
        network, truth = network_of(exported, name), weights_of(exported.base, name)
        text = network.draw_example({"rows": 2, "context": 101})["encoder_hidden_states"]
        found = open_network(exported, name).run(encoder_hidden_states=text, **load_file(exported.slot_weights(name)))
        assert list(found) == [tensor.name for tensor in network.outputs] and len(found) == len(network.slots) == len(
            truth
        )
        for output, value in found.items():
            layer, _, part = output.rpartition(".")
            weight = truth[f"{layer}.to_{part[0]}.weight"].astype(np.float64)
            assert value.shape == (2, 101, len(weight))
            np.testing.assert_allclose(value, text @ weight.T, atol=1e-5)


def pristine(exported: Exported, name: str) -> dict[str, np.ndarray]:
    return load_file(exported.slot_weights(name))


def test_another_subject_is_another_set_of_weights(exported: Exported) -> None:
    network = network_of(exported, "unet")
    patched, raw = open_network(exported, "unet"), open_network(exported, "unet_raw")
    inputs = network.draw_example({"pictures": 1, "rows": 2, "h": 8, "w": 8})
    off = patched.run(**inputs | pristine(exported, "unet"))["eps"]
    assert np.abs(off - raw.run(**inputs | pristine(exported, "unet_raw"))["eps"]).max() > 1e-3
    factors = random_factors({slot.module: (slot.inputs, slot.outputs) for slot in network.slots})
    merged = merge_weights(pristine(exported, "unet"), list_changes(factors, network.slots))
    on = patched.run(**inputs | pristine(exported, "unet") | merged)["eps"]
    assert np.abs(on - off).max() > 1e-3
    assert np.array_equal(patched.run(**inputs | pristine(exported, "unet"))["eps"], off)


@pytest.mark.parametrize("rank", [3, 40])
def test_weights_as_inputs_equal_merged_weights(exported: Exported, rank: int) -> None:
    """The graph with W + A B in its inputs equals torch with the W + (A B)^T of a merge, in every slot."""
    import torch

    network = network_of(exported, "unet")
    factors = random_factors({slot.module: (slot.inputs, slot.outputs) for slot in network.slots}, rank=rank)
    weights = dict(weights_of(exported.base, "unet"))
    for module, (a, b) in factors.items():
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + (a @ b).T
    plain = network.without_slots()
    inputs = plain.draw_example({"pictures": 1, "rows": 2, "h": 8, "w": 12})
    held = pristine(exported, "unet")
    found = open_network(exported, "unet").run(
        **inputs, **held | merge_weights(held, list_changes(factors, network.slots))
    )["eps"]
    with torch.inference_mode():
        merged = make_torch_module(plain, Weights.of(weights))
        truth = merged(*(torch.from_numpy(value) for value in inputs.values())).numpy()
    assert np.abs(found - truth).max() <= BOUNDS["float32"] * np.abs(truth).max()


def test_pictures_of_a_batch_do_not_see_each_other(exported: Exported) -> None:
    """Rows [neg0, pos0, neg1, pos1] with a feature for each picture: as if the pictures ran alone."""
    network = network_of(exported, "unet")
    session = open_network(exported, "unet")
    both = network.draw_example({"pictures": 2, "rows": 4, "h": 8, "w": 8})
    together = session.run(**both)["eps"]
    by_row = {tensor.name for tensor in network.inputs if tensor.shape[0] == "rows"}
    for picture in range(2):
        rows, one = slice(2 * picture, 2 * picture + 2), slice(picture, picture + 1)
        alone = {key: value[rows] if key in by_row else value for key, value in both.items()}
        alone["inpaint_feature"] = both["inpaint_feature"][one]
        np.testing.assert_allclose(session.run(**alone)["eps"], together[rows], atol=2e-5)


REUSE = """
import sys
from pathlib import Path
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.networks import describe_networks
from dreammix_trt.export.onnx_export import export_network
base, graphs, out = BaseFiles.open(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
for network in describe_networks(base):
    (out / network.name).mkdir(parents=True)
    export_network(base, network, graphs / network.graph, out / network.name, verify=False)
sys.exit(bool({"torch", "diffusers", "transformers", "onnx"} & sys.modules.keys()))
"""


def test_graphs_are_reused_without_torch(exported: Exported, graphs: Path, tmp_path: Path) -> None:
    """Another checkpoint of the same shape: its parts are the shared graphs and its own weights."""
    other = write_tiny_model(tmp_path / "other", seed=5)
    command = [sys.executable, "-c", REUSE, str(other.folder), str(graphs), str(tmp_path / "out")]
    subprocess.run(command, check=True, cwd=ROOT)
    base = BaseFiles.open(other.folder)
    for network in describe_networks(base):
        part = tmp_path / "out" / network.name
        entry = json.loads((part / "network.json").read_text())
        assert entry["parity"]["checked"] == "not", "what was found for another checkpoint says nothing of this one"
        assert (part / entry["graph"]).read_bytes() == exported.graph(network.name).read_bytes()
        module = make_torch_module(network, weights_of(base, network.name))
        check_parity(network, part / entry["graph"], module, choose_sizes(base.divisor)[:1])


def test_verify_compares_reused_graphs_anew(exported: Exported, graphs: Path, tmp_path: Path) -> None:
    network = network_of(exported, "vae_encoder")
    entry = export_network(exported.base, network, graphs / network.graph, tmp_path, verify=True)
    assert entry["parity"]["checked"] == "at build"


def test_large_networks_are_not_compared_unless_asked(
    exported: Exported, graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "CHECKED_PARAMETERS", 10)
    network = network_of(exported, "vae_encoder")
    size = sum(value.size for value in load_file(exported.weights("vae_encoder")).values())
    entry = export_network(exported.base, network, graphs / network.graph, tmp_path)
    assert entry["parity"] == {"checked": "not", "parameters": size}


def test_the_embedded_base_carries_the_figures_of_its_making(tmp_path: Path) -> None:
    base = BaseFiles.open()
    network = next(network for network in describe_networks(base) if network.name == "vae_encoder")
    graph = find_shipped_graph(network)
    assert graph is not None
    entry = export_network(base, network, graph, tmp_path, verify=False)
    recorded = json.loads((graph / "graph.json").read_text())["parity"]["vae_encoder"]
    assert entry["parity"] == {**recorded, "checked": "at export"} and recorded["max_rel"] < BOUNDS["float32"]


def test_every_network_of_the_embedded_base_has_its_graph_and_figures() -> None:
    """Wheels build it where torch is not installed."""
    for network in describe_networks(BaseFiles.open().find_own_extras()):
        graph = find_shipped_graph(network)
        assert graph is not None, network.name
        recorded = json.loads((graph / "graph.json").read_text())["parity"]
        assert recorded[network.name]["max_rel"] < BOUNDS["float32"], network.name


@pytest.fixture(scope="module")
def graphs(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's graphs as a base ships them, with the parity that was found."""
    folder = tmp_path_factory.mktemp("shipped") / "graphs"
    folder.mkdir()
    (folder / "stale.onnx").write_bytes(b"")

    def copy_graph(network: Network, out: Path) -> None:  # tracing takes seconds and is done
        shutil.copytree(exported.traces / network.graph, out, dirs_exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "write_graph", copy_graph)
        onnx_export.make_shipped_graphs(exported.base, folder)
    return folder


def test_shipped_graphs_hold_no_weights(exported: Exported, graphs: Path) -> None:
    assert sorted(path.name for path in graphs.iterdir()) == sorted(name for name in NAMES if "raw" not in name)
    assert [path.name for path in graphs.parent.iterdir()] == ["graphs"]
    for folder in graphs.iterdir():
        assert {path.name for path in folder.iterdir()} == {"graph.json", "graph.onnx"}
        assert (folder / "graph.onnx").stat().st_size < 800_000
    assert set(json.loads((graphs / "unet/graph.json").read_text())["parity"]) == {"unet", "unet_raw"}


def test_a_shipped_graph_is_used_only_while_it_fits(
    exported: Exported, graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found by its configuration, for any base. A changed file is not used."""
    assert find_shipped_graph(network_of(exported, "vae_decoder")) is None
    shutil.copytree(graphs, tmp_path / "graphs")
    monkeypatch.setattr(onnx_export, "EMBEDDED", tmp_path)
    base = exported.base
    assert find_shipped_graph(network_of(exported, "vae_decoder")) == tmp_path / "graphs/vae_decoder"
    halves = {network.name: network for network in describe_networks(base, precision="float16")}
    assert find_shipped_graph(halves["vae_decoder"]) is None
    assert find_shipped_graph(halves["vae_decoder_float32"]) == tmp_path / "graphs/vae_decoder"
    unets = {
        slots: next(each for each in describe_networks(base, slots) if each.name == "unet") for slots in (True, False)
    }
    assert find_shipped_graph(unets[True]) == tmp_path / "graphs/unet" and find_shipped_graph(unets[False]) is None
    (tmp_path / "graphs/vae_decoder/graph.onnx").write_bytes(b"changed")
    assert find_shipped_graph(network_of(exported, "vae_decoder")) is None


def test_graphs_beside_a_users_checkpoint_are_not_taken(exported: Exported, graphs: Path, tmp_path: Path) -> None:
    """They could compute anything, and the part would have the key of an honest one."""
    base = BaseFiles.open(shutil.copytree(exported.base.folder, tmp_path / "model"))
    shutil.copytree(graphs, base.folder / "graphs")
    assert [find_shipped_graph(network) for network in describe_networks(base)] == [None] * len(NAMES)


def test_a_graph_that_computes_something_else_is_refused(exported: Exported, tmp_path: Path) -> None:
    network = network_of(exported, "vae_encoder")
    part = Path(shutil.copytree(exported.folder / "vae_encoder", tmp_path / "part"))
    weights = dict(weights_of(exported.base, "vae_encoder"))
    weights["quant_conv.bias"] = weights["quant_conv.bias"] + np.float32(0.01)
    module = make_torch_module(network, Weights.of(weights))
    with pytest.raises(BuildError, match=r"vae_encoder.*differs from torch by .*'mean'"):
        check_parity(network, part / "vae_encoder.onnx", module, choose_sizes(32)[:1])


def test_weights_that_do_not_fit_their_config_are_listed(exported: Exported, graphs: Path, tmp_path: Path) -> None:
    base = BaseFiles.open(shutil.copytree(exported.base.folder, tmp_path / "model"))
    file = base.folder / "text_encoder/model.safetensors"
    weights = load_file(file)
    del weights["text_model.final_layer_norm.bias"]
    weights["text_model.embeddings.position_embedding.weight"] = np.zeros((70, 16), np.float16)
    del weights["text_model.encoder.layers.0.mlp.fc1.bias"]
    save_file(weights, file)
    network = network_of(exported, "text_encoder")
    listed = r"layers\.0\.mlp\.fc1\.bias is missing.*is \(70, 16\), expected \(77, 16\)"
    with pytest.raises(FileFormatError, match=r"final_layer_norm\.bias is missing"):
        make_torch_module(network, weights_of(base, "text_encoder"))
    with pytest.raises(FileFormatError, match=listed):
        export_network(base, network, graphs / "text_encoder", tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_base_without_patch_has_one_unet(tmp_path: Path) -> None:
    tiny = write_tiny_model(tmp_path / "tiny")
    tiny.patch.unlink()
    tiny.head.unlink()
    names = [network.name for network in describe_networks(BaseFiles.open(tiny.folder))]
    assert names == [name for name in NAMES if "raw" not in name and name != "inpaint_head"]
