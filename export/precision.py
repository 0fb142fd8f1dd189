"""The types in a graph: the network's precision everywhere, and float32 where the trace is marked so.

A bfloat16 network has float16 inputs and outputs, with casts behind and before them.

TensorRT's networks are strongly typed: the graph gives every value its type. The trace is made in float32, because a
CPU runs it, and has two marks (`operators.narrow`, `operators.widen`). Here the marks become casts, and weights and
constants get the type of the values they meet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.axes import FLOAT8, Tensor
from dreammix_trt.core.errors import BuildError
from dreammix_trt.core.networks import Network

if TYPE_CHECKING:
    import onnx

NARROW, WIDE = "Narrow", "Wide"
_DTYPES = ("float32", "float16", "bfloat16")
_SHAPING = ("Identity", "Reshape", "Shape", "Size", "Squeeze", "Transpose", "Unsqueeze")


def assign_types(graph: onnx.GraphProto, network: Network, weights: Mapping[str, object]) -> dict[str, str]:
    """Give every value of a float32 trace its type.

    graph: changed in place. Its nodes are in topological order.
    network: of the trace.
    weights: their names, which are inputs of the graph.

    Returns the dtype of each weight. Raises `BuildError` when values of two types meet in one operator without a mark,
    which is a bug in the network's torch form.
    """
    marks = {NARROW: network.precision, WIDE: "float32"}
    return _Types(graph, network, set(weights), marks).run()


class _Types:
    def __init__(self, graph: onnx.GraphProto, network: Network, weights: set[str], marks: Mapping[str, str]) -> None:
        self.graph, self.network, self.weights, self.marks = graph, network, weights, marks
        self.known = {spec.name: spec.dtype for spec in network.inputs if spec.dtype in _DTYPES}
        self.free = {item.name for item in graph.initializer if item.data_type == 1} | weights
        self.constants = {item.name: item for item in graph.initializer}
        self.numbers = set(self.constants)
        self.weight_types: dict[str, str] = {}
        self.weight_of: dict[str, str] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.casts: dict[tuple[str, str], str] = {}

    def run(self) -> dict[str, str]:
        nodes = list(self.graph.node)
        if self.network.precision == "bfloat16":
            self._cast_inputs(nodes)
        for node in nodes:
            self._visit(node)
        del self.graph.node[:], self.graph.value_info[:]
        self.graph.node.extend(self.nodes)
        for spec in self.network.outputs:
            self._declare_output(spec)
        for item in self.graph.input:
            dtype = self.known.get(item.name) or self.weight_types.get(item.name)
            if dtype:
                item.type.tensor_type.elem_type = code_of(dtype)
        return {name: self.weight_types.get(name, self.network.precision) for name in self.weights}

    def _cast_inputs(self, nodes: Sequence[onnx.NodeProto]) -> None:
        """Let the nodes read float16 inputs through casts to bfloat16."""
        import onnx

        cast = {name: f"{name}_bfloat16" for name, dtype in self.known.items() if dtype == "float16"}
        for name, inner in cast.items():
            self.nodes.append(onnx.helper.make_node("Cast", [name], [inner], inner, to=code_of("bfloat16")))
            self.known[inner] = "bfloat16"
        for node in nodes:
            node.input[:] = [cast.get(name, name) for name in node.input]

    def _visit(self, node: onnx.NodeProto) -> None:
        if node.op_type in self.marks and node.domain:
            self._cast(node, self.marks[node.op_type])
            return
        if node.op_type == "Constant":
            self.numbers.add(node.output[0])
            if any(a.name == "value" and a.t.data_type == 1 for a in node.attribute):
                self.free.add(node.output[0])
                self.constants[node.output[0]] = next(a.t for a in node.attribute if a.name == "value")
            self.nodes.append(node)
            return
        if node.op_type == "Cast":
            self._keep_cast(node)
            return
        if node.op_type == "ConstantOfShape":
            if any(a.t.data_type == 1 for a in node.attribute):
                self.free.add(node.output[0])
            self.nodes.append(node)
            return
        counted = list(range(1)) if node.op_type == "Resize" else list(range(len(node.input)))
        met = {self.known[node.input[k]] for k in counted if node.input[k] in self.known}
        if len(met) > 1:
            raise BuildError(
                f"{node.name}: {' and '.join(sorted(met))} meet without a mark; this is a bug, please report it"
            )
        if not met and node.op_type not in _SHAPING and any(self._weight(node.input[k]) for k in counted):
            met = {self.network.precision}  # only weights meet: a text encoder's embeddings
        if met:
            dtype = met.pop()
            for k in counted:
                if node.input[k] in self.free:
                    node.input[k] = self._of_type(node.input[k], dtype)
            if node.op_type not in ("Shape", "Size", "ArgMax", "Equal", "Greater", "Less"):
                self.known.update(dict.fromkeys(node.output, dtype))
        elif any(node.input[k] in self.free for k in counted) and node.op_type not in ("Shape", "Size"):
            self.free.update(node.output)
            if node.op_type in _SHAPING:  # a weight in another shape is still that weight
                self.weight_of[node.output[0]] = self.weight_of.get(node.input[0], node.input[0])
        self.nodes.append(node)

    def _cast(self, node: onnx.NodeProto, dtype: str) -> None:
        """Turn a mark into a cast, or into nothing when the type is already right."""
        import onnx

        same = self.known.get(node.input[0]) == dtype
        made = onnx.helper.make_node("Identity" if same else "Cast", node.input, node.output, node.name)
        if not same:
            made.attribute.append(onnx.helper.make_attribute("to", code_of(dtype)))
        self.nodes.append(made)
        self.known[node.output[0]] = dtype

    def _keep_cast(self, node: onnx.NodeProto) -> None:
        """Keep a cast of the trace. From float to float it did nothing there, so it must do nothing here."""
        if next(a.i for a in node.attribute if a.name == "to") == code_of("float32"):
            source = node.input[0]
            if source in self.known or source in self.free:
                node.op_type = "Identity"
                del node.attribute[:]
            if source in self.free or source in self.numbers:
                self.free.add(node.output[0])
            else:
                self.known[node.output[0]] = self.known.get(source, "float32")
        self.nodes.append(node)

    def _of_type(self, name: str, dtype: str) -> str:
        """The name of the weight or constant `name` in the type of the values that it meets."""
        import onnx

        weight = self._weight(name)
        if weight:
            if self.weight_types.setdefault(weight, dtype) != dtype:
                raise BuildError(f"weight {weight} meets two types; this is a bug, please report it")
            return name
        if dtype == "float32":
            return name
        if (name, dtype) not in self.casts:
            new = f"{name}_{dtype}"
            if name in self.constants:
                values = onnx.numpy_helper.to_array(self.constants[name])
                self.graph.initializer.append(onnx.numpy_helper.from_array(_narrow(values, dtype), new))
            else:
                self.nodes.append(onnx.helper.make_node("Cast", [name], [new], new, to=code_of(dtype)))
            self.casts[name, dtype] = new
        return self.casts[name, dtype]

    def _weight(self, name: str) -> str | None:
        """The weight behind a value, perhaps in another shape; None when there is none."""
        weight = self.weight_of.get(name, name)
        return weight if weight in self.weights else None

    def _declare_output(self, spec: Tensor) -> None:
        import onnx

        item = next(item for item in self.graph.output if item.name == spec.name)
        if spec.dtype in _DTYPES:
            item.type.tensor_type.elem_type = code_of(spec.dtype)
            if self.known.get(spec.name, spec.dtype) != spec.dtype:
                for node in self.graph.node:
                    node.output[:] = [f"{spec.name}_wide" if name == spec.name else name for name in node.output]
                cast = onnx.helper.make_node(
                    "Cast", [f"{spec.name}_wide"], [spec.name], spec.name, to=code_of(spec.dtype)
                )
                self.graph.node.append(cast)


def _narrow(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Float32 numbers in a narrower type; what is too large becomes the largest."""
    if dtype == "bfloat16":
        import ml_dtypes  # of onnx; its range is that of float32

        return np.asarray(values.astype(ml_dtypes.bfloat16))
    limit = np.finfo(dtype).max
    return np.asarray(np.clip(values, -limit, limit).astype(dtype))


def code_of(dtype: str) -> int:
    """ONNX's number for a type of floats."""
    return {"float32": 1, "float16": 10, "bfloat16": 16, FLOAT8: 17}[dtype]
