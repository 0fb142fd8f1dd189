"""The networks of a token adapter: what `core/networks.py` lists of them.

`subject_features` has weights of its own in a build, the same numbers as the UNet's, so that it serves every precision
and back end. It is cut to what the features need: for SDXL 59 of 2567 million numbers, 117 MB in float16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from dreammix_trt.core import subject_tokens
from dreammix_trt.core.attention_layers import reads_text
from dreammix_trt.core.axes import Tensor
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.tensors import Weights

_MODULES: Final = "dreammix_trt.export.token_modules"


class Described(NamedTuple):
    """What a network of a base is made of, as `Network` has it."""

    module: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    configs: Mapping[str, Mapping[str, Any]]


class Entry(NamedTuple):
    """One network, as `NetworkKind` has it."""

    name: str
    weights: Callable[[BaseFiles], Weights]
    component: str
    wide: bool


def describe(name: str, base: BaseFiles) -> Described | None:
    """A network of a base; None where the base has no adapter."""
    if base.tokens is None:
        return None
    config = base.tokens.config
    configs = {"tokens": config.to_dict()}
    if name == "token_select":
        return Described(f"{_MODULES}:TokenSelection", *subject_tokens.describe_selection(config), configs)
    if name == "token_proj":
        return Described(f"{_MODULES}:TokenProjection", *subject_tokens.describe_projection(config), configs)
    unet, pooled = base.configs["unet"], int(base.configs["text_encoder_2"]["projection_dim"])
    ends = subject_tokens.describe_features(config, unet, base.latent_channels, pooled)
    return Described(f"{_MODULES}:SubjectFeatures", *ends, {"unet": unet, **configs})


def _weights_of_features(base: BaseFiles) -> Weights:
    """Those of the patched UNet's down stack, but for what reads the text, which `unet_kv` has."""
    if base.tokens is None:
        raise KeyError("subject_features")
    config = base.tokens.config

    def keep(name: str) -> str | None:
        return name if subject_tokens.is_in_stack(name, config) and not reads_text(name) else None

    return base.unet_patched_state().rename(keep)


def _weights_of_projection(base: BaseFiles) -> Weights:
    if base.tokens is None:
        raise KeyError("token_proj")
    return base.tokens.projection()


#: in running order
LIST: Final = (
    Entry("subject_features", _weights_of_features, component="unet", wide=False),
    Entry("token_select", lambda _base: Weights.of({}), component="token_select", wide=True),
    Entry("token_proj", _weights_of_projection, component="token_proj", wide=True),
)
