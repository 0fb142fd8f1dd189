from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import BuildError, FileFormatError
from dreammix_trt.core.subject import pack, slots_of
from dreammix_trt.export.networks import networks_of, torch_module, weights_of
from dreammix_trt.export.onnx_export import export_base, make_shipped_graphs
from dreammix_trt.export.parity import BOUND, OnnxNetwork, check_parity, check_sizes
from tests.export.conftest import Exported
from tests.support.tiny_model import random_factors, write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["text_encoder", "text_encoder_2", "unet", "unet_raw", "inpaint_head", "vae_encoder", "vae_decoder"]


def opened(exported: Exported, name: str) -> OnnxNetwork:
    entry = exported.table["networks"][name]
    return OnnxNetwork(exported.folder / entry["graph"], exported.folder / entry["weights"], threads=1)


def test_the_set_is_complete(exported: Exported) -> None:
    entries = exported.table["networks"]
    assert list(entries) == NAMES
    assert entries["unet"]["graph"] == entries["unet_raw"]["graph"] != entries["vae_decoder"]["graph"]
    assert entries["unet"]["weights"] != entries["unet_raw"]["weights"]
    assert json.loads((exported.folder / "networks.json").read_text()) == exported.table
    facts = json.loads((exported.folder / "base.json").read_text())
    assert facts["pad_tokens"] == {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}
    assert (facts["native_side"], facts["divisor"], facts["feature_channels"], facts["patched"]) == (64, 32, 32, True)
    for name in ("tokenizer", "tokenizer_2"):
        source = exported.base.folder / name
        assert (exported.folder / name / "merges.txt").read_bytes() == (source / "merges.txt").read_bytes()
    assert sum(path.stat().st_size for path in (exported.folder / "graphs").iterdir()) < 1_200_000


@pytest.mark.parametrize("name", NAMES)
def test_every_graph_agrees_with_torch(exported: Exported, name: str) -> None:
    parity = exported.table["networks"][name]["parity"]
    assert 0 <= parity["max_rel"] <= BOUND == parity["bound"]
    assert parity["checked"] == "at build"
    sizes = {(case["pictures"], case["h"] == case["w"]) for case in parity["sizes"]}
    assert {1, 2} == {pictures for pictures, _ in sizes} and {True, False} == {square for _, square in sizes}


@pytest.mark.parametrize("name", NAMES)
def test_weights_stand_outside_under_their_torch_names(exported: Exported, name: str) -> None:
    import onnx

    entry = exported.table["networks"][name]
    model = onnx.load(exported.folder / entry["graph"], load_external_data=False)
    external = {item.name for item in model.graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL}
    weights, truth = load_file(exported.folder / entry["weights"]), weights_of(exported.base, name)
    assert external == weights.keys() == entry["initializers"].keys()
    for key, stored in weights.items():
        expected = truth[key].T if entry["initializers"][key]["transposed"] else truth[key]
        assert np.array_equal(stored, expected)
    inside = sum(len(item.raw_data) for item in model.graph.initializer)
    assert inside < 40_000, "a weight was baked into the graph"


def test_zero_lora_is_no_lora_and_one_unet_differs_from_the_other(exported: Exported) -> None:
    network = {network.name: network for network in networks_of(exported.base)}["unet"]
    patched, raw = opened(exported, "unet"), opened(exported, "unet_raw")
    inputs = network.example({"pictures": 1, "rows": 2, "h": 8, "w": 8})
    inputs["lora"][:] = 0
    off = patched.run(**inputs)["eps"]
    assert np.abs(off - raw.run(**inputs)["eps"]).max() > 1e-3
    factors = random_factors({slot.module: (slot.inputs, slot.outputs) for slot in network.slots})
    inputs["lora"] = pack(factors, slots_of(exported.table["networks"]["unet"]))[None]
    on = patched.run(**inputs)["eps"]
    assert np.abs(on - off).max() > 1e-3
    inputs["lora"] = 0 * inputs["lora"]
    assert np.array_equal(patched.run(**inputs)["eps"], off)


def test_packed_factors_equal_merged_weights(exported: Exported) -> None:
    """The engine's `x @ A @ B` is the W + (A B)^T that a merge would give, in every slot."""
    import torch

    network = {network.name: network for network in networks_of(exported.base)}["unet"]
    factors = random_factors({slot.module: (slot.inputs, slot.outputs) for slot in network.slots}, rank=3)
    weights = weights_of(exported.base, "unet")
    for module, (a, b) in factors.items():
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + (a @ b).T
    merged = torch_module(network, weights)
    inputs = network.example({"pictures": 1, "rows": 2, "h": 8, "w": 12})
    inputs["lora"] = pack(factors, network.slots)[None]
    found = opened(exported, "unet").run(**inputs)["eps"]
    inputs["lora"][:] = 0
    with torch.inference_mode():
        truth = merged(*(torch.from_numpy(value) for value in inputs.values())).numpy()
    assert np.abs(found - truth).max() <= BOUND * np.abs(truth).max()


def test_a_batch_carries_two_subjects(exported: Exported) -> None:
    """Rows [neg0, pos0, neg1, pos1] with a LoRA row and a feature each: as if the pictures ran alone."""
    network = {network.name: network for network in networks_of(exported.base)}["unet"]
    session = opened(exported, "unet")
    both = network.example({"pictures": 2, "rows": 4, "h": 8, "w": 8})
    together = session.run(**both)["eps"]
    for picture in range(2):
        rows, one = slice(2 * picture, 2 * picture + 2), slice(picture, picture + 1)
        alone = {key: value[one if key in ("lora", "inpaint_feature") else rows] for key, value in both.items()}
        np.testing.assert_allclose(session.run(**alone)["eps"], together[rows], atol=2e-5)


def test_graphs_are_reused_without_torch(exported: Exported, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", seed=5)
    code = (
        "import sys\n"
        "from dreammix_trt.core.checkpoint import BaseFiles\n"
        "from dreammix_trt.export.onnx_export import export_base\n"
        f"base = BaseFiles.open({str(other.folder)!r})\n"
        f"export_base(base, {str(tmp_path / 'out')!r}, graphs={str(exported.folder / 'graphs')!r})\n"
        "sys.exit(bool({'torch', 'diffusers', 'transformers', 'onnx'} & sys.modules.keys()))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    table = json.loads((tmp_path / "out/networks.json").read_text())
    assert table["networks"]["unet"]["parity"]["checked"] == "at export"
    same = (tmp_path / "out/graphs/unet.onnx").read_bytes() == (exported.folder / "graphs/unet.onnx").read_bytes()
    assert same and table["networks"].keys() == exported.table["networks"].keys()
    base = BaseFiles.open(other.folder)
    for network in networks_of(base):
        entry = table["networks"][network.name]
        check_parity(
            network, tmp_path / "out" / entry["graph"], tmp_path / "out" / entry["weights"],
            torch_module(network, weights_of(base, network.name)), check_sizes(base.divisor)[:1],
        )  # fmt: skip


def test_verify_compares_reused_graphs_anew(exported: Exported, tmp_path: Path) -> None:
    table = export_base(exported.base, tmp_path / "out", graphs=exported.folder / "graphs", verify=True)
    assert table["networks"]["vae_encoder"]["parity"]["checked"] == "at build"


def test_shipped_graphs_hold_no_weights(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreammix_trt.export import onnx_export

    monkeypatch.setattr(onnx_export, "_exported_graphs", lambda networks, out, report: _copied(exported, out))
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs/stale.onnx").write_bytes(b"")
    make_shipped_graphs(exported.base, tmp_path / "graphs")
    found = sorted(path.name for path in (tmp_path / "graphs").iterdir())
    assert found == ["graphs.json", *(f"{name}.onnx" for name in sorted(set(NAMES) - {"unet_raw"}))]
    assert [path.name for path in tmp_path.iterdir()] == ["graphs"]


def _copied(exported: Exported, out: Path) -> dict[str, object]:
    for path in (exported.folder / "graphs").glob("*.onnx"):
        (out / path.name).write_bytes(path.read_bytes())
    table: dict[str, object] = json.loads((exported.folder / "graphs/graphs.json").read_text())
    return table


def test_a_graph_that_computes_something_else_is_refused(exported: Exported, tmp_path: Path) -> None:
    network = next(network for network in networks_of(exported.base) if network.name == "vae_encoder")
    entry = exported.table["networks"]["vae_encoder"]
    weights = load_file(exported.folder / entry["weights"])
    weights["quant_conv.bias"] = weights["quant_conv.bias"] + np.float32(0.01)
    save_file(weights, tmp_path / "wrong.safetensors")
    module = torch_module(network, weights_of(exported.base, "vae_encoder"))
    with pytest.raises(BuildError, match=r"vae_encoder.*differs from torch by .*'mean'"):
        check_parity(
            network, exported.folder / entry["graph"], tmp_path / "wrong.safetensors", module, check_sizes(32)[:1]
        )


def test_weights_that_do_not_fit_their_config_are_listed(exported: Exported) -> None:
    network = next(network for network in networks_of(exported.base) if network.name == "text_encoder")
    weights = weights_of(exported.base, "text_encoder")
    del weights["text_model.final_layer_norm.bias"]
    weights["text_model.embeddings.position_embedding.weight"] = np.zeros((70, 16), np.float32)
    with pytest.raises(
        FileFormatError, match=r"final_layer_norm\.bias is missing, .*is \(70, 16\), expected \(77, 16\)"
    ):
        torch_module(network, weights)


def test_a_base_without_patch_has_one_unet(tmp_path: Path) -> None:
    tiny = write_tiny_model(tmp_path / "tiny")
    tiny.patch.unlink()
    tiny.head.unlink()
    names = [network.name for network in networks_of(BaseFiles.open(tiny.folder))]
    assert names == [name for name in NAMES if name not in ("unet_raw", "inpaint_head")]
