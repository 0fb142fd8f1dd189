"""Layers in E4M3: the quantised graph against torch that rounds the same values, and what is stored."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")

from dreammix_trt.core.axes import FLOAT8  # noqa: E402
from dreammix_trt.core.errors import BuildError  # noqa: E402
from dreammix_trt.core.float8 import HEADROOM, from_e4m3, scale_for  # noqa: E402
from dreammix_trt.core.network_weights import weights_of  # noqa: E402
from dreammix_trt.core.networks import Network, describe_networks  # noqa: E402
from dreammix_trt.core.slots import slots_of  # noqa: E402
from dreammix_trt.core.tensors import map_tensors, read_places  # noqa: E402
from dreammix_trt.export.calibrating import compare, emulate_float8, list_layers, watch_inputs  # noqa: E402
from dreammix_trt.export.onnx_export import export_network, graph_digest, write_graph  # noqa: E402
from dreammix_trt.export.parity import OnnxNetwork, run_torch  # noqa: E402
from dreammix_trt.export.torch_module import make_torch_module  # noqa: E402

SIZES = {"pictures": 1, "rows": 2, "h": 8, "w": 8}
CODE = onnx.TensorProto.FLOAT8E4M3FN


def describe_unet(base: Any, slots: bool = True, **form: Any) -> Network:
    return next(each for each in describe_networks(base, slots, **form) if each.name == "unet")


@pytest.fixture(scope="module")
def module(small: Any) -> Any:
    """The small base's UNet in torch, with all weights in it."""
    return make_torch_module(describe_unet(small, slots=False), weights_of(small, "unet"))


@pytest.fixture(scope="module")
def scales(small: Any, module: Any) -> dict[str, tuple[float, float]]:
    """Scales of every layer between the first and the last, from one pass."""
    network, peaks = describe_unet(small, slots=False), {}
    with watch_inputs(module.network, peaks):
        run_torch(module, network, network.draw_example(SIZES))
    layers = list_layers(module.network)
    assert peaks.keys() == layers.keys()
    return {
        name: (scale_for(float(peaks[name])), scale_for(float(layer.weight.abs().max()), HEADROOM))
        for name, layer in layers.items()
        if name not in ("conv_in", "conv_out") and "emb" not in name
    }


@pytest.fixture(scope="module")
def traces(small: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The graphs without quantised layers: fused or not -> folder."""
    folder, found = tmp_path_factory.mktemp("graphs"), {}
    for fused, precision in ((False, "float32"), (True, "float16")):
        found[fused] = folder / precision
        found[fused].mkdir()
        write_graph(describe_unet(small, precision=precision, fused=fused), found[fused])
    return found


def export(small: Any, network: Network, graph: Path, out: Path) -> tuple[Any, dict[str, Any]]:
    out.mkdir()
    entry = export_network(small, network, graph, out)
    return onnx.load(out / entry["graph"], load_external_data=False), entry


def test_onnx_runtime_computes_what_torch_computes_with_rounded_values(
    small: Any, module: Any, scales: dict[str, tuple[float, float]], traces: dict[bool, Path], tmp_path: Path
) -> None:
    network = describe_unet(small).with_float8(scales)
    _, entry = export(small, network, traces[False], tmp_path / "part")
    assert entry["parity"]["checked"] == "not" and entry["float8"] == {k: list(v) for k, v in scales.items()}
    constant = network.without_slots()
    inputs, own = constant.draw_example(SIZES), map_tensors(tmp_path / "part" / entry["slot_weights"])
    plain = run_torch(module, constant, inputs)["eps"]
    with emulate_float8(module.network, scales):
        rounded = run_torch(module, constant, inputs)["eps"]
    found = OnnxNetwork(tmp_path / "part" / entry["graph"]).run(**inputs, **own)["eps"]
    np.testing.assert_array_equal(run_torch(module, constant, inputs)["eps"], plain)  # emulation leaves no trace
    hurt = compare(rounded, plain)
    assert 1e-5 < hurt < 0.1, "the layers do compute in E4M3"
    assert compare(found, rounded) < hurt / 20, "a value on an edge may round the other way, no more"


def test_a_graph_for_a_gpu_has_codes_in_the_order_of_torch(
    small: Any, scales: dict[str, tuple[float, float]], traces: dict[bool, Path], tmp_path: Path
) -> None:
    network = describe_unet(small, precision="float16", fused=True).with_float8(scales)
    model, entry = export(small, network, traces[True], tmp_path / "part")
    external = {item.name: item for item in model.graph.initializer if item.external_data}
    coded = {name for name, item in external.items() if item.data_type == CODE}
    slots = {slot.module: slot for slot in network.slots}
    assert coded == {f"{module}.weight" for module in scales.keys() - slots.keys()}
    places = read_places(tmp_path / "part" / entry["weights"])
    content = (tmp_path / "part" / entry["weights"]).read_bytes()
    weights = weights_of(small, "unet")
    for name in coded:
        dtype, shape, offset, size = places[name]
        said = {item.key: item.value for item in external[name].external_data}
        assert (dtype, shape, str(offset), str(size)) == (FLOAT8, weights.shape(name), said["offset"], said["length"])
        codes = np.frombuffer(content[offset : offset + size], np.uint8).reshape(shape)
        scale = scales[name.removesuffix(".weight")][1]
        difference = np.abs(from_e4m3(codes) * scale - weights[name])
        assert (difference <= np.maximum(np.abs(weights[name]) / 16, scale * 2.0**-10) * 1.000001).all(), name


def test_slots_for_a_gpu_are_codes_and_their_own_weights_halves(
    small: Any, scales: dict[str, tuple[float, float]], traces: dict[bool, Path], tmp_path: Path
) -> None:
    network = describe_unet(small, precision="float16", fused=True).with_float8(scales)
    model, entry = export(small, network, traces[True], tmp_path / "part")
    inputs = {item.name: item.type.tensor_type for item in model.graph.input}
    described = {spec["name"]: spec for spec in entry["inputs"]}
    kept, weights = map_tensors(tmp_path / "part" / entry["slot_weights"]), weights_of(small, "unet")
    assert slots_of(entry) == network.slots and len(network.slots) > 10
    for slot in network.slots:
        name, shape = slot.weight, (slot.outputs, slot.inputs)
        assert (slot.flipped, slot.stride, slot.scale) == (True, slot.inputs, scales[slot.module][1])
        assert inputs[name].elem_type == CODE
        assert tuple(side.dim_value for side in inputs[name].shape.dim) == tuple(described[name]["shape"]) == shape
        assert described[name]["dtype"] == FLOAT8
        assert kept[name].dtype == np.float16
        np.testing.assert_array_equal(kept[name], weights[f"{slot.module}.weight"].astype(np.float16))
        np.testing.assert_array_equal(slot.view(np.asarray(kept[name])), kept[name].T)
    assert network.plain == describe_unet(small, precision="float16", fused=True)


def test_layers_that_share_an_input_share_its_rounding(
    small: Any, scales: dict[str, tuple[float, float]], traces: dict[bool, Path], tmp_path: Path
) -> None:
    network = describe_unet(small, precision="float16", fused=True).with_float8(scales)
    model, _ = export(small, network, traces[True], tmp_path / "part")
    rounded = Counter(node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear")
    assert set(rounded.values()) == {1}
    makers = {name: node for node in model.graph.node for name in node.output}
    joint = {}
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv") and makers.get(node.input[0], node).op_type == "DequantizeLinear":
            joint.setdefault(node.input[0], []).append(node.name)
    assert sum(map(len, joint.values())) == len(scales)
    assert max(map(len, joint.values())) >= 3, "q, k and v of self-attention take one"
    numbers = {item.name: item.data_type for item in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert numbers[node.input[1]] == onnx.TensorProto.FLOAT16, "DequantizeLinear gives the type of its scale"


def test_a_scale_for_a_layer_that_is_not_there_is_refused(small: Any, traces: dict[bool, Path], tmp_path: Path) -> None:
    network = describe_unet(small).with_float8({"mid_block.attentions.7.proj_in": (1.0, 1.0)})
    with pytest.raises(BuildError, match=r"unet: no linear .* takes mid_block\.attentions\.7\.proj_in\.weight"):
        export(small, network, traces[False], tmp_path / "part")


def test_quantised_networks_share_the_trace(small: Any, scales: dict[str, tuple[float, float]]) -> None:
    network = describe_unet(small)
    assert graph_digest(network.with_float8(scales).plain) == graph_digest(network)
    assert graph_digest(network.with_float8(scales)) != graph_digest(network)
    assert replace(network.with_float8(scales), float8={}) == network
