"""Compares a graph in ONNX Runtime with its torch module on random inputs, using Polygraphy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.axes import FACTOR
from dreammix_trt.core.config_fields import TOKENS
from dreammix_trt.core.errors import BuildError, MissingExtraError
from dreammix_trt.core.networks import Network
from dreammix_trt.core.onnx_runtime import KEEP_QUANTIZERS, import_onnxruntime

#: largest allowed difference, as a share of an output's largest value; torch always computes in float32
BOUNDS = {"float32": 1e-4, "float16": 2e-2}
Arrays = dict[str, NDArray[Any]]


class OnnxNetwork:
    """A graph and the weights beside it in ONNX Runtime, on the CPU."""

    def __init__(self, graph: Path, threads: int = 0, light: bool = False) -> None:
        """graph: the ONNX file.

        threads: 0: all cores.
        light: whether to use the graph unoptimised and the weights in place. This is slower, but a float16 network of
            5 GB, which a CPU computes in float32, then needs little more memory than its size.
        """
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        if light:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry(*KEEP_QUANTIZERS)
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(graph, options, ["CPUExecutionProvider"])

    def run(self, **inputs: NDArray[Any]) -> Arrays:
        """Run the graph and return outputs by name. Inputs that it does not need are ignored."""
        wanted = {item.name for item in self._session.get_inputs()}
        names = [item.name for item in self._session.get_outputs()]
        used = {name: value for name, value in inputs.items() if name in wanted}
        return dict(zip(names, self._session.run(names, used), strict=True))


def run_torch(module: Any, network: Network, inputs: Mapping[str, NDArray[Any]], device: str = "cpu") -> Arrays:
    """Run a torch module in float32, whatever the precision of the inputs.

    module: from `make_torch_module`.
    inputs: by name.
    device: where the module's parameters are.

    Returns outputs by name.
    """
    import torch

    def tensor(value: NDArray[Any]) -> Any:
        wide = value.astype(np.float32) if value.dtype == np.float16 else value
        return torch.from_numpy(np.ascontiguousarray(wide)).to(device)

    with torch.inference_mode():
        result = module(*(tensor(inputs[spec.name]) for spec in network.inputs))
    tensors = result if isinstance(result, tuple) else (result,)
    return {spec.name: tensor.contiguous().cpu().numpy() for spec, tensor in zip(network.outputs, tensors, strict=True)}


def choose_sizes(divisor: int) -> tuple[dict[str, int], ...]:
    """Choose sizes to compare at: square and not, one and two pictures, two rows per picture and one, the usual
    condition and a longer one.

    divisor: of picture sides, in pixels.
    """
    step = divisor // FACTOR
    cases = ((1, 2, 4, 4, TOKENS), (2, 4, 4, 6, TOKENS), (2, 2, 5, 4, 101))
    return tuple(
        {"pictures": n, "rows": rows, "context": context, "h": h * step, "w": w * step}
        | {"H": FACTOR * h * step, "W": FACTOR * w * step}
        for n, rows, h, w, context in cases
    )


def check_parity(
    network: Network,
    graph: Path,
    module: Any,
    sizes: Sequence[Mapping[str, int]],
    bound: float | None = None,
    given: Mapping[str, NDArray[Any]] | None = None,
) -> dict[str, Any]:
    """Compare a graph with its torch module. The weights of slots are random.

    graph: the ONNX file.
    module: from `make_torch_module`.
    sizes: of the named axes, one entry per comparison.
    bound: the largest allowed difference; None: that of the network's precision.
    given: inputs of the graph that the module does not have.

    Returns the largest differences over all outputs and sizes: {"max_abs", "max_rel" (of the output's largest value),
    "bound", "sizes"}. Raises `BuildError` naming the network when a difference exceeds the bound.
    """
    bound = BOUNDS[network.precision] if bound is None else bound
    session = OnnxNetwork(graph)
    worst = (0.0, 0.0)
    for seed, case in enumerate(sizes):
        inputs = network.draw_example(case, seed)
        found = compare_outputs(run_torch(module, network, inputs), session.run(**inputs, **(given or {})), bound)
        for name, (absolute, relative, passed) in found.items():
            if not passed:
                raise BuildError(
                    f"{network.name}: the exported graph differs from torch by {relative:.2e} of the maximum of "
                    f"'{name}' (bound {bound:.0e}) at {dict(case)}"
                )
            worst = max(worst[0], absolute), max(worst[1], relative)
    return {"max_abs": worst[0], "max_rel": worst[1], "bound": bound, "sizes": [dict(case) for case in sizes]}


def compare_outputs(truth: Arrays, found: Arrays, bound: float) -> dict[str, tuple[float, float, bool]]:
    """Compare outputs by name.

    truth, found: the arrays; `found` may be float16.
    bound: the largest allowed difference, as a share of the truth's largest value.

    Returns output -> (largest difference, the same as a share of the truth's largest value, whether within the bound).
    """
    try:
        from polygraphy.comparator import IterationResult, SimpleCompareFunc
        from polygraphy.logger import G_LOGGER
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed, comparing needs it: pip install 'dreammix-trt[export]'"
        ) from error
    largest = {name: max(float(np.abs(value).max()), 1e-12) for name, value in truth.items()}
    compare = SimpleCompareFunc(
        check_error_stat="max", rtol=0.0, atol={name: bound * value for name, value in largest.items()}
    )
    wide = {name: value.astype(np.float32) for name, value in found.items()}
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = compare(IterationResult(outputs=dict(truth)), IterationResult(outputs=wide))
    return {
        name: (float(result.max_absdiff), float(result.max_absdiff) / largest[name], bool(result))
        for name, result in results.items()
    }
