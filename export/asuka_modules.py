"""ASUKA's networks as the engine calls them: those that the trainer trains, with operators that export well."""

# mypy: disallow-subclassing-any=False

from __future__ import annotations

from torch import Tensor, nn

from dreammix_trt.core.asuka import DecoderConfig, PriorConfig
from dreammix_trt.core.networks import Network
from dreammix_trt.core.torch_modules import asuka_decoder, asuka_prior
from dreammix_trt.core.torch_modules.attention import Attending
from dreammix_trt.export.modules import use_own_operators
from dreammix_trt.export.operators import attend, narrow, widen
from dreammix_trt.export.units import convert_units, vae_units


class AsukaPrior(nn.Module):
    """Picture and mask at the prior's own side -> context, pooled, the auto-encoder's picture."""

    @classmethod
    def of(cls, network: Network) -> AsukaPrior:
        """The module of a described network."""
        return cls(PriorConfig(**network.configs["asuka_prior"]))

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.network = asuka_prior.AsukaPrior(config)
        for part in self.network.modules():
            if isinstance(part, Attending):
                part.attend = attend
            elif isinstance(part, asuka_prior.RootMeanSquareNorm):  # squares of a few hundred leave float16
                part.register_forward_pre_hook(lambda _part, given: (widen(given[0]),))
                part.register_forward_hook(lambda _part, _given, out: narrow(out))

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = self.network(image, mask)
        return found


class AsukaDecoder(nn.Module):
    """Latent, already divided by the scaling factor, picture and mask -> picture in about [-1, 1]."""

    @classmethod
    def of(cls, network: Network) -> AsukaDecoder:
        """The module of a described network."""
        return cls(DecoderConfig(**network.configs["asuka_decoder"]), network.wide)

    def __init__(self, config: DecoderConfig, wide: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.network = asuka_decoder.AsukaDecoder(config)
        use_own_operators(self.network)
        convert_units(vae_units("asuka_decoder", self.network), wide, widen, narrow)

    def forward(self, latent: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        picture: Tensor = self.network(latent, image, mask)
        return picture
