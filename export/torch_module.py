"""Networks of the list as torch modules, hollow for tracing or with a base's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import numpy as np

from dreammix_trt.core.errors import FileFormatError, MissingExtraError
from dreammix_trt.core.networks import Network
from dreammix_trt.core.tensors import Weights


def make_torch_module(network: Network, weights: Weights | None = None) -> Any:
    """Make the torch module of a network, in eval mode and float32. Its `.network` has the parameters by torch name.
    The weights of slots are not among them: they are inputs.

    weights: by torch name; None: make a hollow module for tracing. Each of its parameters has the full shape and one
        number of storage, so a UNet of 2.6 billion parameters takes no memory. No two parameters are equal, so the
        exporter cannot merge them.

    Raises `MissingExtraError` without torch and diffusers, `FileFormatError` when the weights do not fit the config.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed, exporting needs it: pip install 'dreammix-trt[export]'"
        ) from error
    with torch.device("meta"):
        module = _load_class(network.module).of(network).eval().requires_grad_(False)
    if weights is not None:
        shapes = {name: tuple(value.shape) for name, value in module.network.state_dict().items()}
        shapes |= {f"{slot.module}.weight": (slot.outputs, slot.inputs) for slot in network.slots}
        check_fit(network.name, {name: weights.shape(name) for name in weights}, shapes)
    for number, (name, place, part, parameter) in enumerate(_parameters(module.network)):
        if weights is None:
            one = torch.full((1,) * parameter.ndim, 0.02 + 1e-6 * number)
            value = one.expand(parameter.shape)
        else:
            value = torch.from_numpy(np.array(weights[name]))
        setattr(place, part, torch.nn.Parameter(value, requires_grad=False))
    return module


def _load_class(path: str) -> Any:
    """The class that "package.module:Class" names."""
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed, exporting needs it: pip install 'dreammix-trt[export]'"
        ) from error


def _parameters(root: Any) -> Iterator[tuple[str, Any, str, Any]]:
    """(full name, module, its attribute, parameter) of every parameter."""
    for name, parameter in list(root.named_parameters()):
        place, _, part = name.rpartition(".")
        yield name, root.get_submodule(place), part, parameter


def check_fit(network: str, given: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `FileFormatError` naming the tensors that are missing, unknown or of another shape.

    network: its name, for the message.
    given: tensor name -> shape, of the weights.
    shapes: tensor name -> shape, as the network has them.
    """
    wrong = [f"{name} is missing" for name in shapes if name not in given]
    wrong += [f"{name} is not in the network" for name in given if name not in shapes]
    wrong += [
        f"{name} is {given[name]}, expected {shape}"
        for name, shape in shapes.items()
        if name in given and tuple(given[name]) != tuple(shape)
    ]
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise FileFormatError(
            f"{network}: weights and config.json do not belong together: {', '.join(wrong[:6])}{more}"
        )
