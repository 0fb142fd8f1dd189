"""float16 graphs: the type of every value, float32 only where it was marked, and how close they stay to torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

onnx = pytest.importorskip("onnx")

from dreammix_trt.core.axes import Tensor  # noqa: E402
from dreammix_trt.core.errors import BuildError  # noqa: E402
from dreammix_trt.core.network_weights import weights_of  # noqa: E402
from dreammix_trt.core.networks import Fused, Network, describe_networks  # noqa: E402
from dreammix_trt.core.tensors import Weights, read_places  # noqa: E402
from dreammix_trt.export.onnx_export import export_network, write_graph  # noqa: E402
from dreammix_trt.export.parity import BOUNDS, OnnxNetwork, choose_sizes, compare_outputs, run_torch  # noqa: E402
from dreammix_trt.export.precision import NARROW, WIDE, assign_types  # noqa: E402
from dreammix_trt.export.torch_module import make_torch_module  # noqa: E402

FLOAT, HALF, BRAIN = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16
NAMES = ["text_encoder", "text_encoder_2", "unet_kv", "unet", "inpaint_head", "vae_encoder", "vae_decoder"]
FORMS: dict[str, Fused] = {"written out": False, "fused": True, "attention alone": "attention"}


class Half(NamedTuple):
    network: Network
    model: Any
    entry: dict[str, Any]
    file: Path


def export_half(base: Any, network: Network, folder: Path, verify: bool = True) -> Half:
    part, graph = folder / f"{network.name}", folder / f"{network.name}-graph"
    part.mkdir(parents=True)
    graph.mkdir()
    write_graph(network, graph)
    entry = export_network(base, network, graph, part, verify=verify)
    file = part / entry["graph"]
    return Half(network, onnx.load(file, load_external_data=False), entry, file)


@pytest.fixture(scope="module", params=FORMS)
def halves(request: pytest.FixtureRequest, small: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Half]:
    """Every network of the small base in float16, compared with torch as it is exported."""
    folder = tmp_path_factory.mktemp("half")
    networks = describe_networks(small, True, "float16", FORMS[request.param])
    return {network.name: export_half(small, network, folder) for network in networks if network.name in NAMES}


COUNTS = {"ArgMax": onnx.TensorProto.INT64, "Shape": onnx.TensorProto.INT64, "Equal": onnx.TensorProto.BOOL}


def types_of(model: Any) -> dict[str, int]:
    """Value -> element type. Checks that no operator gets floats of two types, since TensorRT is strongly typed."""
    found = {item.name: item.data_type for item in model.graph.initializer}
    found |= {item.name: item.type.tensor_type.elem_type for item in model.graph.input}
    for node in model.graph.node:
        attributes = {item.name: item for item in node.attribute}
        taken = [found[name] for name in node.input if name]
        if node.op_type == "Cast":
            kind = attributes["to"].i
        elif node.op_type == "ConstantOfShape":
            kind = attributes["value"].t.data_type
        else:
            kind = COUNTS.get(node.op_type, taken[1 if node.op_type == "Where" else 0])
            floats = set(taken[:1] if node.op_type == "Resize" else taken) & {FLOAT, HALF, BRAIN}
            assert len(floats) < 2, f"{node.name}: {node.op_type} of {taken}"
        found |= dict.fromkeys(node.output, kind)
    for item in model.graph.output:
        assert found[item.name] == item.type.tensor_type.elem_type, item.name
    return found


def wide_values(half: Half) -> set[str]:
    """The float32 values of a graph that are not constants."""
    constants = {item.name for item in half.model.graph.initializer}
    return {name for name, kind in types_of(half.model).items() if kind == FLOAT and name not in constants}


def casts(half: Half) -> Iterator[tuple[str, str, int]]:
    for node in half.model.graph.node:
        if node.op_type == "Cast":
            yield node.input[0], node.output[0], next(a.i for a in node.attribute if a.name == "to")


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_float16(halves: dict[str, Half], name: str) -> None:
    half = halves[name]
    external = {i.name: i.data_type for i in half.model.graph.initializer if i.data_location == i.EXTERNAL}
    assert len(external) > 0 or name == "unet_kv", "whose weights are all inputs"
    assert set(external.values()) <= {HALF}
    for suffix in (".safetensors", ".slots.safetensors"):
        file = half.file.with_suffix(suffix)
        assert file.is_file() == (suffix == ".safetensors" or bool(half.network.slots))
        held = load_file(file) if file.is_file() else {}
        assert {value.dtype for value in held.values()} <= {np.dtype("float16")}


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_float16_but_for_times_sizes_and_tokens(halves: dict[str, Half], name: str) -> None:
    half = halves[name]
    kinds = {spec.name: spec.dtype for spec in (*half.network.inputs, *half.network.outputs)}
    odd = {key: kind for key, kind in kinds.items() if kind != "float16"}
    assert odd == {
        "unet": {"timestep": "float32", "time_ids": "float32"},
        "text_encoder": {"input_ids": "int64"},
        "text_encoder_2": {"input_ids": "int64"},
    }.get(name, {})
    codes = {"float16": HALF, "float32": FLOAT, "int64": onnx.TensorProto.INT64}
    for item in (*half.model.graph.input, *half.model.graph.output):
        assert item.type.tensor_type.elem_type == codes[kinds[item.name]], item.name


def test_only_times_and_sizes_are_computed_in_float32(halves: dict[str, Half]) -> None:
    """In the UNet these are the values between timestep or time_ids and the two casts; other networks have none."""
    for name, half in halves.items():
        narrowed = [(source, to) for source, _, to in casts(half) if to in (HALF, FLOAT)]  # others count tokens
        if name != "unet":
            assert narrowed == [] and wide_values(half) == set()
            continue
        assert [to for _, to in narrowed] == [HALF, HALF]
        made = {output: node for node in half.model.graph.node for output in node.output}
        above, todo = set(), [source for source, _ in narrowed]
        while todo:
            value = todo.pop()
            above.add(value)
            if value in made and made[value].op_type != "Shape":
                todo += made[value].input
        assert {"timestep", "time_ids"} < above
        assert wide_values(half) <= above
        assert "sample" not in above


@pytest.mark.parametrize("name", NAMES)
def test_it_stays_close_to_torch(halves: dict[str, Half], name: str) -> None:
    parity = halves[name].entry["parity"]
    assert 1e-6 < parity["max_rel"] < BOUNDS["float16"] / 2 and parity["checked"] == "at build"
    assert len(parity["sizes"]) == 3


def test_fused_graphs_hold_single_operators_and_plain_ones_none(halves: dict[str, Half]) -> None:
    for name, half in halves.items():
        count = Counter(node.op_type for node in half.model.graph.node)
        fused = bool(half.network.fused) and name not in ("inpaint_head", "unet_kv")
        whole = half.network.fused is True
        opset = next(item.version for item in half.model.opset_import if item.domain in ("", "ai.onnx"))
        assert opset == (23 if fused else 20)
        assert {item.domain for item in half.model.opset_import} <= {"", "ai.onnx"}
        assert not {node.domain for node in half.model.graph.node} - {"", "ai.onnx"}
        assert (count["GroupNormalization"] > 0) == (fused and whole and not name.startswith("text"))
        assert (count["Attention"] > 0) == fused and (count["Softmax"] == 0 or not fused)


@pytest.mark.parametrize("name", ["unet", "text_encoder", "vae_decoder"])
def test_attention_alone_is_what_it_is_written_out(small: Any, tmp_path: Path, name: str) -> None:
    """In float32, where nothing is rounded on the way; the text encoder's is causal."""
    made = {}
    for fused in (False, "attention"):
        networks = describe_networks(small, False, "float32", fused)  # type: ignore[arg-type]
        network = next(each for each in networks if each.name == name)
        made[fused] = export_half(small, network, tmp_path / str(fused), verify=False)
    inputs = made[False].network.draw_example({"pictures": 1, "rows": 2, "h": 8, "w": 12, "H": 64, "W": 96})
    plain, single = (OnnxNetwork(half.file).run(**inputs) for half in made.values())
    for output, wanted in plain.items():
        np.testing.assert_allclose(single[output], wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("fused", FORMS.values())
def test_a_text_encoder_without_slots_is_float16_too(small: Any, tmp_path: Path, fused: Fused) -> None:
    """Its inputs are only weights and token ids, so no input decides the type of the rest."""
    network = describe_networks(small, False, "float16", fused)[0]
    half = export_half(small, network, tmp_path)
    assert list(casts(half)) == [] and wide_values(half) == set()
    assert half.entry["parity"]["max_rel"] < BOUNDS["float16"] / 2


# float32 in a float16 network


def loud_vae(base: Any) -> Weights:
    """The decoder with activations beyond float16 from its first layer on, until its last norm scales them down."""

    def louder(value: np.ndarray) -> np.ndarray:
        return np.float32(5e4) * value

    weights = weights_of(base, "vae_decoder")
    return weights.change(dict.fromkeys(("decoder.conv_in.weight", "decoder.conv_in.bias"), louder))


@pytest.fixture(scope="module")
def marked(small: Any, tmp_path_factory: pytest.TempPathFactory) -> Half:
    """A float16 decoder whose middle is marked float32."""
    (network,) = (each for each in describe_networks(small, False, "float16") if each.name == "vae_decoder")
    network = replace(network, wide=("mid.0", "mid.2"))
    return export_half(small, network, tmp_path_factory.mktemp("marked"))


def test_marks_become_casts(marked: Half) -> None:
    """One into float32 before the first marked unit and one back behind the last; the weights between are float32."""
    assert [to for _, _, to in casts(marked)] == [FLOAT, HALF]
    stored = {name: value.dtype.name for name, value in load_file(marked.file.with_suffix(".safetensors")).items()}
    wide = {name for name, dtype in stored.items() if dtype == "float32"}
    assert wide == {name for name in stored if name.startswith("decoder.mid_block.")}
    assert {stored[name] for name in stored.keys() - wide} == {"float16"}
    assert marked.entry["wide"] == ["mid.0", "mid.2"]
    assert marked.entry["parity"]["max_rel"] < BOUNDS["float16"] / 2


def test_marked_units_survive_what_float16_does_not(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plain,) = (each for each in describe_networks(small, False, "float16") if each.name == "vae_decoder")
    weights = loud_vae(small)
    monkeypatch.setattr("dreammix_trt.export.onnx_export.weights_of", lambda *_: weights)
    inputs = plain.draw_example(choose_sizes(small.divisor)[0])
    truth = run_torch(make_torch_module(plain, weights), plain, inputs)
    pictures = {}
    for name, network in {"plain": plain, "marked": replace(plain, wide=("conv_in", "conv_norm_out"))}.items():
        made = export_half(small, network, tmp_path / name, verify=False)
        pictures[name] = OnnxNetwork(made.file).run(**inputs)
    assert not np.isfinite(pictures["plain"]["image"]).all()
    (_, relative, passed) = compare_outputs(truth, pictures["marked"], BOUNDS["float16"])["image"]
    assert passed and relative < BOUNDS["float16"] / 2


def make_graph(nodes: list[tuple[str, list[str], str]], inputs: dict[str, str]) -> tuple[Any, Any]:
    """Make a float32 trace of nodes (operator, inputs, output), and its network."""
    helper = onnx.helper
    made = [
        helper.make_node(kind, taken, [given], name=given, domain="dreammix" if kind in (NARROW, WIDE) else "")
        for kind, taken, given in nodes
    ]
    values = [helper.make_tensor_value_info(name, FLOAT, ["n"]) for name in inputs]
    out = [helper.make_tensor_value_info("y", FLOAT, ["n"])]
    specs = tuple(Tensor(name, dtype, ("n",)) for name, dtype in inputs.items() if not name.endswith("weight"))
    network = SimpleNamespace(inputs=specs, outputs=(Tensor("y", "float16", ("n",)),), precision="float16")
    return helper.make_graph(made, "g", values, out), network


def test_types_that_meet_without_a_mark_are_refused() -> None:
    inputs = {"time": "float32", "x": "float16"}
    bad, network = make_graph([("Add", ["time", "x"], "y")], inputs)
    with pytest.raises(BuildError, match=r"y: float16 and float32 meet without a mark"):
        assign_types(bad, network, {})
    good, network = make_graph([(NARROW, ["time"], "narrow"), ("Add", ["narrow", "x"], "y")], inputs)
    assign_types(good, network, {})
    assert [node.op_type for node in good.node] == ["Cast", "Add"]


def test_a_weight_takes_the_type_of_what_it_meets() -> None:
    inputs = {"time": "float32", "x": "float16", "a.weight": "", "b.weight": ""}
    nodes = [
        ("Mul", ["time", "a.weight"], "t"),
        (NARROW, ["t"], "n"),
        ("Mul", ["x", "b.weight"], "u"),
        ("Add", ["n", "u"], "y"),
    ]
    trace, network = make_graph(nodes, inputs)
    assert assign_types(trace, network, {"a.weight": 0, "b.weight": 0}) == {
        "a.weight": "float32",
        "b.weight": "float16",
    }
    twice = [*nodes[:3], ("Mul", ["u", "a.weight"], "v"), ("Add", ["n", "v"], "y")]
    trace, network = make_graph(twice, inputs)
    with pytest.raises(BuildError, match=r"weight a\.weight meets two types"):
        assign_types(trace, network, {"a.weight": 0, "b.weight": 0})


def test_a_mark_that_changes_nothing_leaves_no_cast() -> None:
    trace, network = make_graph([(NARROW, ["x"], "n"), ("Neg", ["n"], "y")], {"x": "float16"})
    assign_types(trace, network, {})
    assert [node.op_type for node in trace.node] == ["Identity", "Neg"]


def test_a_float32_end_is_narrowed_to_the_output_that_was_promised() -> None:
    trace, network = make_graph([(WIDE, ["x"], "w"), ("Neg", ["w"], "y")], {"x": "float16"})
    assign_types(trace, network, {})
    assert [node.op_type for node in trace.node] == ["Cast", "Neg", "Cast"]
    assert trace.node[-1].output[0] == "y" and trace.output[0].type.tensor_type.elem_type == HALF


def test_a_bfloat16_unet_has_float16_inputs_and_outputs(small: Any, tmp_path: Path) -> None:
    network = next(each for each in describe_networks(small, True, "float16", True) if each.name == "unet")
    made = export_half(small, network.with_bfloat16(), tmp_path, verify=False)
    types = types_of(made.model)
    external = {i.name: i.data_type for i in made.model.graph.initializer if i.data_location == i.EXTERNAL}
    assert set(external.values()) == {BRAIN} and BRAIN in types.values()
    given = {item.name: item.type.tensor_type.elem_type for item in made.model.graph.input}
    assert {name for name, kind in given.items() if kind == FLOAT} == {"timestep", "time_ids"}
    assert {kind for name, kind in given.items() if name not in ("timestep", "time_ids")} == {HALF}
    narrowed = {source for source, _, to in casts(made) if to == BRAIN}
    assert {name for name, kind in given.items() if kind == HALF} <= narrowed
    assert [to for _, name, to in casts(made) if name == "eps"] == [HALF]
    stored = made.file.with_suffix(".safetensors").read_bytes()
    dtype, shape, offset, size = read_places(made.file.with_suffix(".safetensors"))["conv_out.weight"]
    numbers = np.frombuffer(stored[offset : offset + size], "<u2").astype(np.uint32) << 16
    exact = weights_of(small, "unet")["conv_out.weight"]
    assert dtype == "bfloat16"
    np.testing.assert_allclose(numbers.view(np.float32).reshape(shape), exact, rtol=2**-8)


def test_tensorrt_reads_unets_in_bfloat16(small: Any, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    network = next(each for each in describe_networks(small, True, "float16", True) if each.name == "unet")
    made = export_half(small, network.with_bfloat16(), tmp_path, verify=False)
    read = parse(trt, made.file)
    assert (read.num_outputs, read.get_output(0).dtype, read.get_input(0).dtype) == (1, trt.float16, trt.float16)


def parse(trt: Any, file: Path) -> Any:
    """The graph as TensorRT's strongly typed network."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse_from_file(str(file)), [parser.get_error(k).desc() for k in range(parser.num_errors)]
    return network
