"""ASUKA's networks exported: described where a base has them, equal to torch, float16 where that is enough."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs it: pip install dreammix-trt[export]")
pytest.importorskip("onnxslim", reason="exporting needs it: pip install dreammix-trt[export]")

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.networks import Network, describe_networks, kind_of
from dreammix_trt.export.onnx_export import export_network, write_graph
from dreammix_trt.export.parity import BOUNDS, OnnxNetwork
from dreammix_trt.export.units import split_chains
from dreammix_trt.export.vae_range import find_wide_units
from tests.export.test_vae_range import SIZES, difference, export_unchecked, infinite_values
from tests.support.asuka import Change, write_small_asuka
from tests.support.tiny_model import write_tiny_model

NAMES = ("asuka_prior", "asuka_decoder")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", half=False).folder


@pytest.fixture(scope="module")
def base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseFiles:
    folder = tmp_path_factory.mktemp("asuka") / "asuka"
    write_small_asuka(folder, BaseFiles.open(tiny))
    return BaseFiles.open(tiny, asuka=folder)


def network_of(base: BaseFiles, name: str, **form: Any) -> Network:
    return next(network for network in describe_networks(base, **form) if network.name == name)


def times(factor: float) -> Change:
    return lambda value: value * np.float32(factor)


def test_a_base_without_them_has_neither(tiny: Path, base: BaseFiles) -> None:
    assert not {*NAMES} & {network.name for network in describe_networks(BaseFiles.open(tiny))}
    names = [network.name for network in describe_networks(base, precision="float16")]
    assert {*NAMES, "asuka_decoder_float32"} <= {*names} and "asuka_prior_float32" not in names
    assert not any(kind_of(name).required for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", [{}, {"precision": "float16", "fused": "attention"}], ids=["float32", "float16"])
def test_the_graph_is_torch(base: BaseFiles, name: str, form: dict[str, Any], tmp_path: Path) -> None:
    network = network_of(base, name, **form)
    for part in ("graph", "out"):
        (tmp_path / part).mkdir()
    write_graph(network, tmp_path / "graph")
    entry = export_network(base, network, tmp_path / "graph", tmp_path / "out", verify=True)
    assert entry["parity"]["max_rel"] <= BOUNDS[network.precision]
    assert [each["name"] for each in entry["inputs"]][-2:] == ["image", "mask"]


def test_nothing_visible_is_finite_in_the_graph_too(base: BaseFiles, tmp_path: Path) -> None:
    network = network_of(base, "asuka_prior", precision="float16", fused="attention")
    session = OnnxNetwork(export_unchecked(base, network, tmp_path), threads=1)
    image = np.ones((1, 3, 16, 16), np.float16)
    found = session.run(image=image, mask=np.ones((1, 1, 16, 16), np.float16))
    other = session.run(image=-image, mask=np.ones((1, 1, 16, 16), np.float16))
    assert all(np.isfinite(value).all() for value in found.values())
    assert all((found[name] == other[name]).all() for name in found)


def test_tensorrts_form_has_single_operators(base: BaseFiles, tmp_path: Path) -> None:
    """Only the encoder's attention, whose keys are masked, is written out."""
    import onnx

    counts = {}
    for name in NAMES:
        graph = export_unchecked(base, network_of(base, name, precision="float16", fused=True), tmp_path / name)
        counts[name] = Counter(node.op_type for node in onnx.load(graph, load_external_data=False).graph.node)
    assert (counts["asuka_prior"]["Attention"], counts["asuka_prior"]["Softmax"]) == (3 + 2, 2)
    assert counts["asuka_decoder"]["GroupNormalization"] > 15 and "InstanceNormalization" not in counts["asuka_decoder"]
    assert not counts["asuka_prior"]["Shape"], "batches are the only free axis"


TALL = {
    **{f"decoder.up_blocks.1.resnets.0.{name}": times(300) for name in ("norm2.weight", "norm2.bias", "conv2.weight")},
    "decoder.up_blocks.1.resnets.0.conv2.bias": times(9e4),
    "decoder.up_blocks.1.upsamplers.0.conv.weight": times(1 / 9e4),
}
CONDITION = {
    **{f"condition.layers.3.{part}": times(3e6) for part in ("weight", "bias")},
    "condition.layers.4.weight": times(1 / 3e6),
    "decoder.up_blocks.1.upsamplers.0.conv.weight": times(1 / 3e6),
}


def test_units_that_float16_is_too_narrow_for_are_found_and_widened(tiny: Path, tmp_path: Path) -> None:
    write_small_asuka(tmp_path / "asuka", BaseFiles.open(tiny), changes=TALL)
    base = BaseFiles.open(tiny, asuka=tmp_path / "asuka")
    report = find_wide_units(base, "asuka_decoder")
    assert report.units == ("blocks.1.0.resnets", "blocks.1.1.resnets", "blocks.1.2.upsamplers")
    assert report.samples == {"drawn": 8, "noise": 2, "latents": 4}
    network = replace(network_of(base, "asuka_decoder", precision="float16"), wide=report.units)
    graph = export_unchecked(base, network, tmp_path / "net")
    assert 0 < difference(base, network, graph) < 5e-3
    assert not infinite_values(graph, network.draw_example(SIZES))


def test_a_condition_beyond_float16_widens_both_streams_where_they_meet(tiny: Path, tmp_path: Path) -> None:
    write_small_asuka(tmp_path / "asuka", BaseFiles.open(tiny), changes=CONDITION)
    base = BaseFiles.open(tiny, asuka=tmp_path / "asuka")
    report = find_wide_units(base, "asuka_decoder")
    assert [*split_chains(report.units)] == [
        ["condition.3", "condition.4"],
        ["injections.1", "blocks.1.0.resnets", "blocks.1.1.resnets", "blocks.1.2.upsamplers"],
    ]
    network = replace(network_of(base, "asuka_decoder", precision="float16"), wide=report.units)
    graph = export_unchecked(base, network, tmp_path / "net")
    assert 0 < difference(base, network, graph) < BOUNDS["float16"]
    assert not infinite_values(graph, network.draw_example(SIZES))


def test_a_benign_decoder_stays_float16(base: BaseFiles) -> None:
    report = find_wide_units(base, "asuka_decoder")
    assert report.units == () and {"condition.0", "injections.4", "conv_out"} <= report.peaks.keys()


@pytest.mark.parametrize("name", NAMES)
def test_tensorrt_builds_it(base: BaseFiles, name: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install dreammix-trt[rtx]")
    from dreammix_trt.engine.backends.tensorrt.builder import build_engine
    from dreammix_trt.engine.backends.tensorrt.profiles import profiles_for

    network = network_of(base, name, precision="float16", fused=True)
    graph, plan = export_unchecked(base, network, tmp_path / "net"), tmp_path / "plan"
    call = network.kind.call
    profiles = profiles_for(network.describe()["inputs"], pictures=1, shapes="static", latent_side=8, call=call)
    report = build_engine(graph, plan, backend="tensorrt-rtx", profiles=profiles, targets=("sm_89",))
    assert len(profiles) == 1 and report.engine_bytes == plan.stat().st_size > 0
    assert {tensor.dtype for tensor in (*report.inputs, *report.outputs)} == {"float16"}
