"""ASUKA's two networks as configurations: a prior of the known pixels, and a decoder that sees them.

The torch forms are in `core/torch_modules/`; `core/asuka_folder.py` has their files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import numpy as np

from dreammix_trt.core.axes import Tensor
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.stored import Floats

#: what the pictures of a masked auto-encoder are normalised with, for values from 0 to 1
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEVELS = 4  # of a VAE whose cells are 8 pixels wide


@dataclass(frozen=True)
class PriorConfig:
    """A masked auto-encoder, and the alignment that turns its feature into a condition. Default: SDXL's.

    side, patch: of its pictures and of their patches, in pixels.
    width, layers, heads: of the encoder.
    decoder_width, decoder_layers, decoder_heads: of the decoder.
    feature_layer: how many blocks of the decoder the feature has passed.
    align_width, align_layers, align_head: of the alignment, and the width of one of its heads.
    context_width, pooled_width: of the base's condition: its UNet's text rows and its pooled text.
    """

    side: int = 256
    patch: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    decoder_width: int = 512
    decoder_layers: int = 8
    decoder_heads: int = 16
    feature_layer: int = 6
    align_width: int = 2048
    align_layers: int = 4
    align_head: int = 64
    context_width: int = 2048
    pooled_width: int = 1280

    _whole: ClassVar = (
        ("side", "patch"),
        ("width", "heads"),
        ("decoder_width", "decoder_heads"),
        ("align_width", "align_head"),
    )

    def __post_init__(self) -> None:
        _check_numbers(self)
        for large, small in self._whole:
            if getattr(self, large) % getattr(self, small):
                raise FileFormatError(
                    f"prior: {large} is {getattr(self, large)}, which is no multiple of {small} {getattr(self, small)}"
                )
        for name in ("width", "decoder_width"):
            if getattr(self, name) % 4:
                raise FileFormatError(f"prior: {name} is {getattr(self, name)}, expected a multiple of 4")
        if self.feature_layer > self.decoder_layers:
            raise FileFormatError(
                f"prior: feature_layer is {self.feature_layer}, but the decoder has {self.decoder_layers} layers"
            )

    @property
    def grid(self) -> int:
        """Patches in a row of the picture."""
        return self.side // self.patch

    @property
    def tokens(self) -> int:
        """Patches of a picture, which are the rows of the condition."""
        return self.grid**2


@dataclass(frozen=True)
class DecoderConfig:
    """A VAE decoder that sees the known pixels and the mask. Default: SDXL's.

    All fields are those of the base's VAE, in diffusers' names.
    """

    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    use_post_quant_conv: bool = True

    def __post_init__(self) -> None:
        _check_numbers(self)
        if len(self.block_out_channels) != LEVELS:
            raise FileFormatError(
                f"decoder: block_out_channels has {len(self.block_out_channels)} entries, expected {LEVELS}"
            )

    @classmethod
    def of_vae(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """The decoder for a base, by its VAE's config.json (diffusers' names; what is absent is SDXL's)."""
        known = {each.name: config[each.name] for each in fields(cls) if each.name in config}
        return _from_fields(cls, "decoder", known)


@dataclass(frozen=True)
class AsukaConfig:
    """Both networks of one base; config.json of an ASUKA folder. Default: SDXL's."""

    prior: PriorConfig = field(default_factory=PriorConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    schema: ClassVar = 1

    @classmethod
    def micro(cls, vae: Mapping[str, Any], context_width: int, pooled_width: int) -> AsukaConfig:
        """For the embedded base: pictures of 64 pixels, patches of 4, all of it below 4 MB in float16.

        vae: the config.json of its VAE.
        """
        prior = PriorConfig(
            **{"side": 64, "patch": 4, "width": 64, "layers": 4, "heads": 4},
            **{"decoder_width": 48, "decoder_layers": 4, "decoder_heads": 4, "feature_layer": 3},
            **{"align_width": 64, "align_layers": 4, "align_head": 16},
            context_width=context_width,
            pooled_width=pooled_width,
        )
        return cls(prior, DecoderConfig.of_vae(vae))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `of_dict` reads them."""
        return {"schema": self.schema, "prior": asdict(self.prior), "decoder": _listed(asdict(self.decoder))}

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> AsukaConfig:
        """The configuration from `to_dict`'s values. Raises `FileFormatError` naming the field that does not fit."""
        schema = values.get("schema")
        if schema != cls.schema:
            raise FileFormatError(f"schema is {schema!r}, expected {cls.schema}; take config.json of an ASUKA folder")
        parts = {name: values.get(name) for name in ("prior", "decoder")}
        for name, part in parts.items():
            if not isinstance(part, Mapping):
                raise FileFormatError(f"{name} is missing or no object; take config.json of an ASUKA folder")
        prior = _from_fields(PriorConfig, "prior", parts["prior"])
        return cls(prior, _from_fields(DecoderConfig, "decoder", parts["decoder"]))


Tensors = tuple[Tensor, ...]


def describe_prior(config: PriorConfig) -> tuple[Tensors, Tensors]:
    """The inputs and outputs of the prior: a picture at its own side -> condition, and the picture that it expects."""
    side, rows = config.side, config.tokens
    image = Tensor("image", "float32", ("pictures", 3, side, side))
    mask = Tensor("mask", "float32", ("pictures", 1, side, side))
    context = Tensor("context", "float32", ("pictures", rows, config.context_width))
    pooled = Tensor("pooled", "float32", ("pictures", config.pooled_width))
    return (image, mask), (context, pooled, Tensor("picture", "float32", image.shape))


def describe_decoder(config: DecoderConfig) -> tuple[Tensors, Tensors]:
    """The inputs and outputs of the decoder: the latent, unscaled, the picture and the mask -> a picture."""
    latent = Tensor("latent", "float32", ("pictures", config.latent_channels, "h", "w"))
    image, mask = (Tensor(name, "float32", ("pictures", n, "H", "W")) for name, n in (("image", 3), ("mask", 1)))
    return (latent, image, mask), (Tensor("picture", "float32", image.shape),)


def blend_condition(empty: Floats, prior: Floats, weight: float) -> Floats:
    """The prior's condition at a strength: empty + weight * (prior - empty).

    empty, prior: rows of the empty prompt (N, 77, D) and of the prior (N, 256, D), or both pooled (N, Dp). Where the
        prior has more rows, those of the empty prompt are repeated in turn, which attention hardly notices.
    weight: 0: the empty prompt itself, with its own rows; 1: the prior itself.
    """
    if weight in (0, 1):
        return prior if weight else empty
    repeated = empty
    if empty.ndim == 3:
        repeated = np.take(empty, np.arange(prior.shape[1]) % empty.shape[1], 1)
    return repeated + np.float32(weight) * (prior - repeated)


_Config = TypeVar("_Config", PriorConfig, DecoderConfig)


def _listed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _from_fields(kind: type[_Config], part: str, values: Any) -> _Config:
    """Make a configuration of a mapping. Raises `FileFormatError` naming a field that is unknown."""
    known = {each.name for each in fields(kind)}
    for name in values:
        if name not in known:
            raise FileFormatError(f"{part}: {name!r} is unknown; this version knows {', '.join(sorted(known))}")
    given: dict[str, Any] = {name: tuple(it) if isinstance(it, list) else it for name, it in values.items()}
    return kind(**given)


def _check_numbers(config: PriorConfig | DecoderConfig) -> None:
    """Raise `FileFormatError` for a field of another kind than its default: a size, several, or a truth value."""
    part = {PriorConfig: "prior", DecoderConfig: "decoder"}[type(config)]
    for each in fields(config):
        value = getattr(config, each.name)
        if isinstance(each.default, bool):
            fits, expected = isinstance(value, bool), "true or false"
        elif isinstance(each.default, tuple):
            fits, expected = isinstance(value, tuple) and all(map(_is_size, value)), "a list of whole numbers from 1 on"
        else:
            fits, expected = _is_size(value), "a whole number from 1 on"
        if not fits:
            raise FileFormatError(f"{part}: {each.name} is {value!r}, expected {expected}")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1 << 16
