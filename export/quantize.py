"""Quantises layers of a graph to E4M3: explicit QuantizeLinear and DequantizeLinear around linears and convolutions.

It works on a finished graph, before its weights are written: the graph of the same network without quantisation. So
all bases of a shape still share one trace, and scales, which differ from base to base, are put in afterwards.

Before a layer its input is quantised and dequantised with a fixed scale (layers that share an input and its scale share
the pair). Its weight is stored as codes with a DequantizeLinear behind. TensorRT makes one kernel of such a layer and
multiplies the codes. ONNX Runtime computes the same numbers in float32, which is the emulation.

Linear weights are stored (outputs, inputs), the order that products of E4M3 want; a Transpose stands behind. Weights
that are inputs of the graph (LoRA slots) are codes in that order too where the graph is for a GPU; otherwise they stay
as they are, and the graph rounds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dreammix_trt.core.axes import FLOAT8
from dreammix_trt.core.errors import BuildError
from dreammix_trt.core.networks import Network
from dreammix_trt.export.onnx_graph import Weight
from dreammix_trt.export.precision import code_of

if TYPE_CHECKING:
    import onnx

#: increase it when a change here makes another graph of the same
REVISION = 1
_LINEAR, _CODES = ("MatMul", "Gemm"), "_e4m3"


def quantize_graph(
    model: onnx.ModelProto, network: Network, weights: Mapping[str, Weight]
) -> tuple[onnx.ModelProto, dict[str, Weight]]:
    """Quantise the layers of a graph for which the network has scales.

    model: the network's graph without quantisation; stays as it is.
    network: its `float8` names the layers.
    weights: torch name -> the form in which the graph needs it.

    Returns the new graph, in which weights have no places yet (`place_weights`), and the forms that it needs. Raises
    `BuildError` naming layers that are not in the graph.
    """
    made = type(model)()
    made.CopyFrom(model)
    quantizer = _Quantizer(made.graph, network, dict(weights))
    quantizer.run()
    return made, quantizer.weights


class _Quantizer:
    def __init__(self, graph: onnx.GraphProto, network: Network, weights: dict[str, Weight]) -> None:
        self.graph, self.network, self.weights = graph, network, weights
        self.inputs = {item.name: item for item in graph.input}
        self.constants = {item.name: item for item in graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        self.made: dict[tuple[str, float], str] = {}  # (value, scale) -> the same, quantised and dequantised

    def run(self) -> None:
        layers = {f"{module}.weight": scales for module, scales in self.network.float8.items()}
        self._add_constant("e4m3", np.zeros((), np.uint8), eight=True)
        for node in self.graph.node:
            weight = node.input[1] if len(node.input) > 1 else ""
            if weight in layers and node.op_type in (*_LINEAR, "Conv"):
                self._quantize(node, weight, *layers.pop(weight))
            self.nodes.append(node)
        if layers:
            raise BuildError(
                f"{self.network.name}: no linear or convolution to quantise takes {', '.join(sorted(layers)[:4])}; "
                "the calibration belongs to another network"
            )
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)

    def _quantize(self, node: onnx.NodeProto, weight: str, of_input: float, of_weight: float) -> None:
        node.input[0] = self._round_trip(node.input[0], of_input)
        linear = node.op_type in _LINEAR
        if weight in self.inputs and not self.network.fused:
            node.input[1] = self._round_trip(weight, of_weight)
            return
        item = self.inputs.get(weight)
        if item is not None:
            kind, dims = item.type.tensor_type, [side.dim_value for side in item.type.tensor_type.shape.dim]
            kind.elem_type = code_of(FLOAT8)
            for side, value in zip(kind.shape.dim, dims[::-1] if linear else dims, strict=True):
                side.dim_value = value
        else:
            form = self.weights[weight]
            stored = form.shape[::-1] if form.transposed else form.shape
            self.weights[weight] = Weight(FLOAT8, stored, False)
            tensor = self.constants[weight]
            tensor.data_type = code_of(FLOAT8)
            tensor.dims[:] = stored
            linear = linear and form.transposed
        value = self._add("DequantizeLinear", [weight, self._scale(of_weight)], f"{weight}_wide")
        if linear:
            value = self._add("Transpose", [value], f"{weight}_turned", perm=[1, 0])
        node.input[1] = value

    def _round_trip(self, value: str, scale: float) -> str:
        """The value rounded to E4M3 and back."""
        if (value, scale) not in self.made:
            number = self._scale(scale)
            codes = self._add("QuantizeLinear", [value, number, "e4m3"], f"{value}_{number}{_CODES}")
            self.made[value, scale] = self._add("DequantizeLinear", [codes, number], f"{value}_{number}")
        return self.made[value, scale]

    def _scale(self, scale: float) -> str:
        """The name of a scale as a constant of the network's own type: DequantizeLinear gives values of that type."""
        name = f"scale_{np.log2(scale):g}"
        return self._add_constant(name, np.asarray(scale, self.network.precision))

    def _add_constant(self, name: str, value: np.ndarray[tuple[()], np.dtype[np.generic]], eight: bool = False) -> str:
        import onnx

        if name not in self.constants:
            if eight:
                made = onnx.helper.make_tensor(name, code_of(FLOAT8), [], value.tobytes(), raw=True)
            else:
                made = onnx.numpy_helper.from_array(value, name)
            self.graph.initializer.append(made)
            self.constants[name] = made
        return name

    def _add(self, operator: str, inputs: list[str], output: str, **attributes: object) -> str:
        import onnx

        self.nodes.append(onnx.helper.make_node(operator, inputs, [output], output, **attributes))
        return output
