"""One torch module -> one ONNX graph whose weights stand outside, under their torch names.

The graph depends on the configuration only, never on the weights' values: during all clean-up the weights are graph
inputs, so nothing can be folded into them, merged because two happen to be equal, or lost.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from dreammix_trt.core.errors import BuildError, MissingExtraError
from dreammix_trt.export.networks import Network, torch_module

if TYPE_CHECKING:
    import onnx

log = logging.getLogger(__name__)

OPSET = 20
#: sizes while tracing; every dynamic axis differs from the others and from all widths that matter
TRACE_SIZES = {"pictures": 2, "rows": 4, "h": 16, "w": 24, "H": 128, "W": 192}


@dataclass(frozen=True)
class Graph:
    """proto: the ONNX model, weights external; transposed: torch name of each weight in it -> stored transposed?"""

    proto: onnx.ModelProto
    transposed: dict[str, bool]


def graph_of(network: Network) -> Graph:
    """Export a network's graph. Seconds for the embedded model; needs torch, diffusers, onnx and onnxslim."""
    module = torch_module(network)
    try:
        import onnx
        import onnxslim
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed, exporting needs it: pip install dreammix-trt[export]"
        ) from error
    model = onnx.load_from_string(_traced(module, network))
    transposed = _weights_to_inputs(model.graph)
    model = onnxslim.slim(model)
    for item in model.graph.initializer:  # one way to hold constants, so that equal ones can be found
        item.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(item), item.name))
    onnx.checker.check_model(model, full_check=True)  # here, as later it would look for the weights' files
    _weights_to_external(model.graph, transposed, f"{network.graph}.safetensors")
    _shorten_names(model.graph, network)
    _strip(model)
    return Graph(model, transposed)


def exporter_versions() -> dict[str, str]:
    """What decides a graph besides the configuration."""
    return {"opset": str(OPSET), **{name: version(name) for name in ("torch", "diffusers", "onnx", "onnxslim")}}


def _traced(module: Any, network: Network) -> bytes:
    """The one place that knows torch's exporter.

    The TorchScript-based one: on a small UNet it takes seconds where `dynamo=True` takes minutes, and its graphs are
    as good (reference/toolchain.md). It runs the module once, in float32.
    """
    import torch

    example = {name: torch.from_numpy(value) for name, value in network.example(TRACE_SIZES).items()}
    axes = {
        spec.name: {axis: side for axis, side in enumerate(spec.shape) if isinstance(side, str)}
        for spec in (*network.inputs, *network.outputs)
    }
    out = io.BytesIO()
    with _expected_warnings():
        torch.onnx.export(
            module,
            tuple(example.values()),
            out,
            input_names=[spec.name for spec in network.inputs],
            output_names=[spec.name for spec in network.outputs],
            dynamic_axes=axes,
            opset_version=OPSET,
            do_constant_folding=False,
            dynamo=False,
        )
    return out.getvalue()


@contextmanager
def _expected_warnings() -> Iterator[None]:
    """Silence what tracing is known to say: the exporter's own age, Python values it takes as constants, and that it
    leaves a padding's shape arithmetic to the clean-up."""
    from torch.jit import TracerWarning

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.onnx|dreammix_trt\.export")
        warnings.filterwarnings("ignore", message=".*legacy TorchScript-based ONNX export.*")
        warnings.filterwarnings("ignore", message="Constant folding - Only steps=1")
        yield


def _weights_to_inputs(graph: onnx.GraphProto) -> dict[str, bool]:
    """Rename the weights to their torch names, swallow the Transpose that linear layers put before them, and turn
    them from initializers into graph inputs. Gives torch name -> transposed; weights without effect (a text encoder's
    last layer) are not among them."""
    import onnx

    prefix = "network."
    weights = {item.name: item.name.removeprefix(prefix) for item in graph.initializer if item.name.startswith(prefix)}
    dims = {weights[item.name]: list(item.dims) for item in graph.initializer if item.name in weights}
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
    constants = [item for item in graph.initializer if item.name not in weights]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(constants)
    for name, shape in dims.items():
        stored = shape[::-1] if name in flipped else shape
        graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, stored))
    return {name: name in flipped for name in sorted(dims)}


def _weights_to_external(graph: onnx.GraphProto, weights: Mapping[str, bool], location: str) -> None:
    """Turn the weight inputs back into initializers that say where their data is instead of holding it."""
    import onnx

    shapes = {
        item.name: [d.dim_value for d in item.type.tensor_type.shape.dim]
        for item in graph.input
        if item.name in weights
    }
    inputs = [item for item in graph.input if item.name not in weights]
    del graph.input[:]
    graph.input.extend(inputs)
    for name in sorted(shapes):
        tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=shapes[name])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        graph.initializer.append(tensor)


def _shorten_names(graph: onnx.GraphProto, network: Network) -> None:
    """Give values between nodes short names, equal constants one; nodes keep the name of the module they came from."""
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
    kept = [_renamed(item, short.get(item.name, item.name)) for item in kept]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for node in graph.node:
        node.input[:] = [short.get(name, name) for name in node.input]
        node.output[:] = [short.get(name, name) for name in node.output]
        node.name = node.name.removeprefix("/network/")


def _renamed(item: onnx.TensorProto, name: str) -> onnx.TensorProto:
    item.name = name
    return item


def _strip(model: onnx.ModelProto) -> None:
    """Drop inferred shapes, doc strings and metadata: they name source files and double the size."""
    del model.graph.value_info[:], model.metadata_props[:]
    model.doc_string = model.graph.doc_string = ""
    model.graph.name = "dreammix"
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
