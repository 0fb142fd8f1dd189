"""Does a graph compute what its torch module computes? ONNX Runtime against torch on random inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.errors import BuildError
from dreammix_trt.export.networks import Network

BOUND = 1e-4
Arrays = dict[str, NDArray[Any]]


class OnnxNetwork:
    """A graph and its weight file in ONNX Runtime, on the CPU."""

    def __init__(self, graph: Path, weights: Path, threads: int = 0) -> None:
        import onnxruntime
        from safetensors.numpy import load_file

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        state = load_file(weights)
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in state.values()]
        options.add_external_initializers(list(state), values)
        self._session = onnxruntime.InferenceSession(graph, options, ["CPUExecutionProvider"])

    def run(self, **inputs: NDArray[Any]) -> Arrays:
        """Outputs by name; inputs the graph does not need are left out."""
        wanted = {item.name for item in self._session.get_inputs()}
        names = [item.name for item in self._session.get_outputs()]
        used = {name: value for name, value in inputs.items() if name in wanted}
        return dict(zip(names, self._session.run(names, used), strict=True))


def run_torch(module: Any, network: Network, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """Outputs by name of `networks.torch_module`."""
    import torch

    with torch.inference_mode():
        result = module(*(torch.from_numpy(np.ascontiguousarray(inputs[spec.name])) for spec in network.inputs))
    tensors = result if isinstance(result, tuple) else (result,)
    return {spec.name: tensor.numpy() for spec, tensor in zip(network.outputs, tensors, strict=True)}


def check_sizes(divisor: int) -> tuple[dict[str, int], ...]:
    """Square and not, one picture and two, two rows a picture and one. divisor: of picture sides, in pixels."""
    step = divisor // 8
    cases = ((1, 2, 4, 4), (2, 4, 4, 6), (2, 2, 5, 4))
    return tuple(
        {"pictures": n, "rows": rows, "h": h * step, "w": w * step, "H": 8 * h * step, "W": 8 * w * step}
        for n, rows, h, w in cases
    )


def check_parity(
    network: Network, graph: Path, weights: Path, module: Any, sizes: Sequence[Mapping[str, int]], bound: float = BOUND
) -> dict[str, Any]:
    """The largest differences over all outputs and sizes; `BuildError` naming the network when over the bound.

    Gives {"max_abs", "max_rel" (of the output's largest value), "bound", "sizes"}. LoRA inputs are not zero.
    """
    session = OnnxNetwork(graph, weights)
    worst_abs = worst_rel = 0.0
    for seed, case in enumerate(sizes):
        inputs = network.example(case, seed)
        truth, found = run_torch(module, network, inputs), session.run(**inputs)
        for name, expected in truth.items():
            difference = float(np.abs(found[name] - expected).max())
            relative = difference / max(float(np.abs(expected).max()), 1e-12)
            if not relative <= bound:
                raise BuildError(
                    f"{network.name}: the exported graph differs from torch by {relative:.2e} of the maximum of "
                    f"'{name}' (bound {bound:.0e}) at {dict(case)}"
                )
            worst_abs, worst_rel = max(worst_abs, difference), max(worst_rel, relative)
    return {"max_abs": worst_abs, "max_rel": worst_rel, "bound": bound, "sizes": [dict(case) for case in sizes]}
