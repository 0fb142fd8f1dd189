"""A subject from one picture: which features of the reference become rows of the text condition.

After DreamInpainter (Xie et al. 2023). What the paper leaves open is decided here and nowhere else, and
docs/algorithm.md, 17 says why:

- The features are the base's alone: its UNet with the inpainting patch, where there is one, and neither a subject nor a
  base LoRA. So they can be made once, in training as well, and do not change when an adapter learns.
- The inpaint feature is zero. A base without a head gives the same kind of features, and what a head would tell of a
  reference, that nothing of it is hidden, is the same for all of them.
- No noise, t = 0; the text is the class's name alone; the sizes are those of a whole picture at `TokenConfig.side`.
- They are taken behind the layers of a down block and before its downsampler, as the paper's 32 x 32 of 512 pixels are.
- The reference stands on white. A cell without any pixel of the object counts in the scores as the paper has it, but
  comes behind all cells of the object.

The torch forms are in `core/torch_modules/subject_tokens.py`; `core/token_adapter.py` has the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.attention_layers import describe_keys_and_values, list_attention_linears
from dreammix_trt.core.axes import FACTOR, Tensor
from dreammix_trt.core.config_fields import MOST_TOKENS, TOKENS
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.stored import Floats

#: added to the score of a cell without the object: no score reaches it, being a sum of N values below e^2 / N
_BEHIND: Final = np.float32(8.0)
#: rows of the matrix of likenesses that are made at once: those of one SDXL reference, 64 MB
_BLOCK: Final = 4096
_LEAST_NORM: Final = np.float32(1e-12)


@dataclass(frozen=True)
class TokenConfig:
    """Where tokens come from and what they become. Default: SDXL's.

    side: of the reference, in pixels.
    block: the UNet's down block whose features are taken.
    width: of a feature: the block's channels.
    context_width: of a row of the base's text condition.
    """

    side: int = 1024
    block: int = 1
    width: int = 640
    context_width: int = 2048

    def __post_init__(self) -> None:
        for each in fields(self):
            value, least = getattr(self, each.name), 0 if each.name == "block" else 1
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= 1 << 16:
                raise FileFormatError(f"tokens: {each.name} is {value!r}, expected a whole number from {least} on")
        if self.side % self.cell:
            raise FileFormatError(
                f"tokens: side is {self.side}, no multiple of {self.cell}, the pixels of a cell of block {self.block}"
            )

    @classmethod
    def of_base(cls, configs: Mapping[str, Mapping[str, Any]], block: int = 1) -> TokenConfig:
        """Of a base, at its native side. configs: its config.json files, by component."""
        unet = configs["unet"]
        channels = unet["block_out_channels"]
        if block >= len(channels):
            raise FileFormatError(f"tokens: block is {block}, but this base's UNet has {len(channels)} down blocks")
        return cls(FACTOR * int(unet["sample_size"]), block, int(channels[block]), int(unet["cross_attention_dim"]))

    @classmethod
    def of_dict(cls, values: Any) -> TokenConfig:
        """The configuration from `to_dict`'s values. Raises `FileFormatError` naming the field that does not fit."""
        if not isinstance(values, Mapping):
            raise FileFormatError(f"tokens: the configuration is {values!r}, expected an object")
        known = {each.name for each in fields(cls)}
        for name in values:
            if name not in known:
                raise FileFormatError(f"tokens: {name!r} is unknown; this version knows {', '.join(sorted(known))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @property
    def cell(self) -> int:
        """Side of a feature's cell, in pixels of the reference."""
        return FACTOR << self.block

    @property
    def grid(self) -> int:
        """Cells in a row of the features."""
        return self.side // self.cell

    @property
    def cells(self) -> int:
        """Features of a reference: N."""
        return self.grid**2

    @property
    def tokens(self) -> int:
        """Features that are selected: 48, or all of fewer."""
        return min(MOST_TOKENS, self.cells)

    def check_fit(self, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise `FileFormatError` naming the number by which this is not for a base.

        configs: the base's, by component.
        """
        own = self.of_base(configs, self.block)
        for name in ("width", "context_width"):
            found, expected = getattr(self, name), getattr(own, name)
            if found != expected:
                raise FileFormatError(f"tokens: {name} is {found}, but this base has {expected}")


Tensors = tuple[Tensor, ...]


def describe_features(
    config: TokenConfig, unet: Mapping[str, Any], latent_channels: int, pooled_width: int
) -> tuple[Tensors, Tensors]:
    """The inputs and outputs of `subject_features`: as the UNet's, without timestep and inpaint feature.

    Keys and values are those that `unet_kv` makes of the class's name; those of other layers are not asked for.

    unet: its config.json.
    """
    side = config.side // FACTOR
    inputs = (
        Tensor("sample", "float32", ("pictures", latent_channels, side, side)),
        Tensor("text_embeds", "float32", ("pictures", pooled_width)),
        Tensor("time_ids", "float32", ("pictures", 6)),
    )
    linears = [slot for slot in list_attention_linears(unet) if is_in_stack(slot.module, config)]
    text = (replace(each, shape=("pictures", TOKENS, each.shape[-1])) for each in describe_keys_and_values(linears))
    features = Tensor("features", "float32", ("pictures", config.cells, config.width))
    return (*inputs, *text), (features,)


def describe_selection(config: TokenConfig) -> tuple[Tensors, Tensors]:
    """The inputs and outputs of `token_select`."""
    features = Tensor("features", "float32", ("pictures", config.cells, config.width))
    inside = Tensor("inside", "float32", ("pictures", config.cells))
    tokens = Tensor("tokens", "float32", ("pictures", config.tokens, config.width))
    return (features, inside), (tokens, Tensor("chosen", "int64", ("pictures", config.tokens)))


def describe_projection(config: TokenConfig) -> tuple[Tensors, Tensors]:
    """The inputs and outputs of `token_proj`."""
    tokens = Tensor("tokens", "float32", ("pictures", config.tokens, config.width))
    return (tokens,), (Tensor("token_rows", "float32", ("pictures", config.tokens, config.context_width)),)


def is_in_stack(name: str, config: TokenConfig) -> bool:
    """Whether a weight or module of a UNet has a part in the features."""
    place = name.split(".")
    if place[0] in ("conv_in", "time_embedding", "add_embedding"):
        return True
    if place[0] != "down_blocks" or int(place[1]) > config.block:
        return False
    return int(place[1]) < config.block or place[2] != "downsamplers"


def score_cells(features: Floats) -> Floats:
    """How much the cells of references are like the others: the lower, the more a cell is unlike all else.

    d_ij = cos(f_i, f_j), p_i = softmax_j(d_i1 .. d_iN), s_i = sum_j p_ji, all in float32.

    features: (N, D); cells of several pictures of one object may stand together.

    Returns s (N,).
    """
    wide = np.asarray(features, np.float32)
    unit = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), _LEAST_NORM)
    scores: Floats = np.zeros(len(unit), np.float32)
    for start in range(0, len(unit), _BLOCK):
        likeness = unit[start : start + _BLOCK] @ unit.T
        shares = np.exp(likeness - likeness.max(1, keepdims=True))
        scores += (shares / shares.sum(1, keepdims=True)).sum(0)
    return scores


def select_tokens(
    features: Floats, inside: NDArray[Any] | None = None, count: int = MOST_TOKENS
) -> tuple[Floats, NDArray[np.int64]]:
    """Select the features that are least like the others, in that order; equal scores by number.

    This is the definition of `token_select`, and pools several pictures.

    features: (N, D).
    inside: (N,), 1 where a cell has any pixel of the object: cells without come last. None: all have.
    count: how many; fewer are given where there are fewer cells.

    Returns tokens float32 (K, D) and their numbers (K,).
    """
    scores = score_cells(features)
    if inside is not None:
        scores = scores + (1 - np.asarray(inside, np.float32)) * _BEHIND
    chosen = np.argsort(scores, kind="stable")[:count].astype(np.int64)
    return np.asarray(features, np.float32)[chosen], chosen


def mark_cells(mask: NDArray[Any], config: TokenConfig) -> Floats:
    """Mark the cells that have any pixel of the object: (N,), 1 or 0.

    mask: (side, side); what is not 0 is object.
    """
    cells = (np.asarray(mask) != 0).reshape(config.grid, config.cell, config.grid, config.cell)
    return np.asarray(cells.any((1, 3)).reshape(-1), np.float32)
