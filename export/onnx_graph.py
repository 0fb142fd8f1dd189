"""Exports a torch module as an ONNX graph with external weights under their torch names.

The graph depends only on the configuration, never on the values of the weights. The trace has no values, and during the
clean-up the weights are unknown values. So nothing can be folded into them, merged because two are equal, or lost.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dreammix_trt.core.attention_layers import KEY, VALUE
from dreammix_trt.core.errors import BuildError, MissingExtraError
from dreammix_trt.core.networks import Network, kv_name
from dreammix_trt.core.slots import names_of_weights
from dreammix_trt.core.tensors import plan_places
from dreammix_trt.export.precision import assign_types, code_of
from dreammix_trt.export.torch_module import make_torch_module

if TYPE_CHECKING:
    import onnx

#: opset of the trace, and of the graph with single operators for attention and group norm
OPSET, FUSED_OPSET = 20, 23
#: sizes for tracing; every dynamic axis differs from the others and from all relevant widths
TRACE_SIZES = {"pictures": 2, "rows": 4, "context": 83, "h": 16, "w": 24, "H": 128, "W": 192}


class Weight(NamedTuple):
    """The form in which a graph needs a weight.

    dtype: of numpy.
    shape: as stored.
    transposed: whether this is the transpose of torch's weight.
    """

    dtype: str
    shape: tuple[int, ...]
    transposed: bool


@dataclass(frozen=True)
class Graph:
    """A graph with external weights.

    proto: the ONNX model; its weights are in a safetensors file beside it.
    weights: torch name -> its form in that file.
    """

    proto: onnx.ModelProto
    weights: dict[str, Weight]


def trace_graph(network: Network) -> Graph:
    """Export the graph of a network. Needs torch, diffusers, onnx and onnxslim.

    Takes seconds for the embedded model, and about a minute and 5 GB of memory for a full SDXL UNet.
    """
    module = make_torch_module(network)
    try:
        import onnx
        import onnxslim  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed, exporting needs it: pip install 'dreammix-trt[export]'"
        ) from error
    model = onnx.load_from_string(_trace(module, network))
    shapes = {name: tuple(parameter.shape) for name, parameter in module.network.named_parameters()}
    transposed = _name_weights(model.graph, shapes)
    dtypes = assign_types(model.graph, network, transposed)
    _use_standard_operators(model)
    model = _slim(model, _list_whole_inputs(network))
    for item in model.graph.initializer:  # the same encoding for all constants, so that equal ones are found
        item.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(item), item.name))
    onnx.checker.check_model(model, full_check=True)  # now, since later it would look for the files of the weights
    weights = {
        name: Weight(dtypes[name], shapes[name][::-1] if flipped else shapes[name], flipped)
        for name, flipped in transposed.items()
    }
    _make_weights_external(model.graph, weights, f"{network.graph}.safetensors")
    _shorten_names(model.graph, network)
    _strip(model)
    return Graph(model, weights)


def exporter_versions() -> dict[str, str]:
    """The versions that decide a graph besides the configuration."""
    return {"opset": str(OPSET), **{name: version(name) for name in ("torch", "diffusers", "onnx", "onnxslim")}}


def _trace(module: Any, network: Network) -> bytes:
    """Trace a module with torch's exporter; no other code calls it.

    This is the TorchScript-based exporter. Its graphs are as good as those of `dynamo=True`, and it takes seconds
    instead of minutes on a small UNet, and a minute or two instead of six on the full one. It runs the module once, in
    float32, on small pictures; hollow parameters need little memory.
    """
    import torch

    from dreammix_trt.export.operators import DOMAIN, fuse_operators

    example = {
        name: torch.from_numpy(value.astype(np.float32) if value.dtype == np.float16 else value)
        for name, value in network.draw_example(TRACE_SIZES).items()
    }
    axes = {
        spec.name: {axis: side for axis, side in enumerate(spec.shape) if isinstance(side, str)}
        for spec in (*network.inputs, *network.outputs)
    }
    out = io.BytesIO()
    with _silence_expected(), fuse_operators(network.fused), torch.inference_mode():
        torch.onnx.export(
            module,
            tuple(example.values()),
            out,
            input_names=[spec.name for spec in network.inputs],
            output_names=[spec.name for spec in network.outputs],
            dynamic_axes=axes,
            opset_version=OPSET,
            custom_opsets={DOMAIN: 1} if _uses_own_operators(network) else None,
            export_params=False,
            do_constant_folding=False,
            dynamo=False,
        )
    return out.getvalue()


def _list_whole_inputs(network: Network) -> list[str]:
    """The inputs of the whole network; the others are those of single layers, hundreds of them."""
    weights = set(names_of_weights(network.slots))
    return [spec.name for spec in network.inputs if spec.name not in weights and not spec.name.endswith((KEY, VALUE))]


def _uses_own_operators(network: Network) -> bool:
    """Whether the trace has marks or operators of our own (the exporter complains about an unused opset)."""
    if network.graph in ("unet", "asuka_prior", "subject_features") or network.wide:
        return True
    if network.fused == "attention" and network.kind.call == "vae":  # one head as wide as its last layer
        from dreammix_trt.export.operators import WIDEST_HEAD

        (config,) = network.configs.values()
        return int(config["block_out_channels"][-1]) <= WIDEST_HEAD
    return bool(network.fused) and network.graph not in ("inpaint_head", kv_name("unet")) and not network.kind.wide


@contextmanager
def _silence_expected() -> Iterator[None]:
    """Silence known warnings: the exporter is old, Python values become constants, and the shape arithmetic of paddings
    is left to the clean-up."""
    from torch.jit import TracerWarning

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.onnx|dreammix_trt\.export")
        warnings.filterwarnings("ignore", message=".*legacy TorchScript-based ONNX export.*")
        warnings.filterwarnings("ignore", message="Constant folding - Only steps=1")
        yield


def _name_weights(graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, bool]:
    """Rename the weights, which are inputs of the trace, to their torch names. Absorb the Transpose of linear layers.

    Returns torch name -> whether transposed, without weights that have no effect (a text encoder's last layer).
    """
    import onnx

    prefix = "network."
    weights = {item.name: item.name.removeprefix(prefix) for item in graph.input if item.name.startswith(prefix)}
    turned = {node.output[0]: node for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights}
    straight = {name for node in graph.node if node.op_type != "Transpose" for name in node.input if name in weights}
    for node in turned.values():
        if node.input[0] in straight or list(node.attribute[0].ints) != [1, 0]:
            raise BuildError(
                f"weight {node.input[0]} is used both straight and transposed; this is a bug, please report it"
            )
    flipped = {weights[node.input[0]] for node in turned.values()}
    renamed = {**weights, **{output: weights[node.input[0]] for output, node in turned.items()}}
    kept = [node for node in graph.node if node.output[0] not in turned]
    for node in kept:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    inputs = [item for item in graph.input if item.name not in weights]
    del graph.node[:], graph.input[:]
    graph.node.extend(kept)
    graph.input.extend(inputs)
    for name in weights.values():
        stored = shapes[name][::-1] if name in flipped else shapes[name]
        graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, stored))
    return {name: name in flipped for name in sorted(weights.values())}


def _use_standard_operators(model: onnx.ModelProto) -> None:
    """Turn Attention and GroupNormalization of the trace into ONNX's own, which are newer than the trace's opset."""
    from dreammix_trt.export.operators import DOMAIN

    custom = [node for node in model.graph.node if node.domain == DOMAIN]
    for node in custom:
        node.domain = ""
    kept = [item for item in model.opset_import if item.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    if custom:
        next(item for item in model.opset_import if item.domain == "").version = FUSED_OPSET
        model.ir_version = max(model.ir_version, 11)


def _slim(model: onnx.ModelProto, kept_inputs: Collection[str]) -> onnx.ModelProto:
    """Clean up with onnxslim. Meanwhile all inputs except `kept_inputs` come from nodes with an unknown operator.

    Such a node cannot be folded. Also onnxslim compares each graph input with every tensor, and all nodes of an
    operator with each other: this takes minutes for the 1680 weights and 1842 products of a full UNet. So we merge
    equal nodes ourselves.
    """
    import onnx
    import onnxslim

    from dreammix_trt.export.operators import DOMAIN

    declared = list(model.graph.input)
    kept = [item for item in declared if item.name in kept_inputs]
    hidden = [item for item in declared if item.name not in kept_inputs]
    nodes = [
        onnx.helper.make_node(f"Input{number}", [kept[0].name], [item.name], item.name, domain=DOMAIN)
        for number, item in enumerate(hidden)
    ]
    nodes += list(model.graph.node)
    del model.graph.input[:], model.graph.node[:]
    model.graph.input.extend(kept)
    model.graph.value_info.extend(hidden)
    model.graph.node.extend(nodes)
    model.opset_import.add(domain=DOMAIN, version=1)
    _merge_equal_nodes(model.graph)
    slim = onnxslim.slim(model, skip_optimizations=["subexpression_elimination", "weight_tying"])
    _merge_equal_nodes(slim.graph)
    standard = [node for node in slim.graph.node if node.domain != DOMAIN]
    known = [item for item in slim.opset_import if item.domain != DOMAIN]
    del slim.graph.node[:], slim.graph.input[:], slim.opset_import[:]
    slim.graph.node.extend(standard)
    slim.graph.input.extend(declared)
    slim.opset_import.extend(known)
    return slim


def _merge_equal_nodes(graph: onnx.GraphProto) -> None:
    """Keep only the first of nodes with equal operators, inputs and attributes. Constants are compared by content."""
    content = {item.name: (item.data_type, *item.dims, item.raw_data) for item in graph.initializer if item.raw_data}
    outputs = {item.name for item in graph.output}
    first: dict[Any, list[str]] = {}
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        attributes = sorted(attribute.SerializeToString() for attribute in node.attribute)
        what = (node.domain, node.op_type, *(content.get(name, name) for name in node.input), *attributes)
        if what in first and not outputs & set(node.output) and len(first[what]) == len(node.output):
            renamed.update(zip(node.output, first[what], strict=True))
            continue
        first[what] = list(node.output)
        kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _make_weights_external(graph: onnx.GraphProto, weights: Mapping[str, Weight], location: str) -> None:
    """Turn the weight inputs into initializers whose data will be in the file `location`."""
    import onnx

    inputs = [item for item in graph.input if item.name not in weights]
    del graph.input[:]
    graph.input.extend(inputs)
    for name, weight in sorted(weights.items()):
        graph.initializer.append(onnx.TensorProto(name=name, data_type=code_of(weight.dtype), dims=weight.shape))
    place_weights(graph, weights, location)


def place_weights(graph: onnx.GraphProto, weights: Mapping[str, Weight], location: str) -> None:
    """Say of every weight where in the file `location` its data will be."""
    import onnx

    places = plan_places({name: (weight.dtype, weight.shape) for name, weight in weights.items()})
    for tensor in graph.initializer:
        if tensor.name in places:
            _, _, offset, length = places[tensor.name]
            tensor.data_location = onnx.TensorProto.EXTERNAL
            del tensor.external_data[:]
            for key, value in (("location", location), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))


def _shorten_names(graph: onnx.GraphProto, network: Network) -> None:
    """Give values between nodes short names, and equal constants the same name. Nodes keep their module's name."""
    fixed = {spec.name for spec in (*network.inputs, *network.outputs)}
    fixed |= {item.name for item in graph.initializer if item.external_data}
    constants = [item for item in graph.initializer if not item.external_data]
    content = {item.name: (item.data_type, *item.dims, item.raw_data) for item in constants}
    first = {value: name for name, value in reversed(content.items())}
    short = {first[value]: f"c{number}" for number, value in enumerate(dict.fromkeys(content.values()))}
    short |= {name: short[first[value]] for name, value in content.items()}
    produced = [name for node in graph.node for name in node.output if name and name not in fixed]
    short |= {name: f"v{number}" for number, name in enumerate(produced)}
    kept = [item for item in graph.initializer if item.external_data or first[content[item.name]] == item.name]
    kept = [_rename(item, short.get(item.name, item.name)) for item in kept]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for node in graph.node:
        node.input[:] = [short.get(name, name) for name in node.input]
        node.output[:] = [short.get(name, name) for name in node.output]
        node.name = node.name.removeprefix("/network/")


def _rename(item: onnx.TensorProto, name: str) -> onnx.TensorProto:
    item.name = name
    return item


def _strip(model: onnx.ModelProto) -> None:
    """Drop inferred shapes, doc strings and metadata: they contain source paths and double the size."""
    del model.graph.value_info[:], model.metadata_props[:]
    model.doc_string = model.graph.doc_string = ""
    model.graph.name = "dreammix"
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
