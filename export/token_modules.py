"""The networks of a token adapter as the engine calls them."""

# mypy: disallow-subclassing-any=False

from __future__ import annotations

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from dreammix_trt.core.attention_layers import KEY
from dreammix_trt.core.networks import Network
from dreammix_trt.core.subject_tokens import TokenConfig
from dreammix_trt.core.torch_modules import subject_tokens
from dreammix_trt.export.modules import leave_text_to_others, use_own_operators
from dreammix_trt.export.operators import narrow


class SubjectFeatures(nn.Module):
    """A reference's latent -> its features: the UNet's down stack, keys and values of the text given."""

    @classmethod
    def of(cls, network: Network) -> SubjectFeatures:
        """The module of a described network."""
        return cls(network)

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.block = TokenConfig.of_dict(network.configs["tokens"]).block
        unet = UNet2DConditionModel.from_config(dict(network.configs["unet"]))
        del unet.mid_block, unet.up_blocks, unet.conv_norm_out, unet.conv_out, unet.down_blocks[self.block + 1 :]
        unet.down_blocks[self.block].downsamplers = None
        use_own_operators(unet)
        layers = [tensor.name.removesuffix(KEY) for tensor in network.inputs if tensor.name.endswith(KEY)]
        self.crossing = [leave_text_to_others(unet.get_submodule(layer)) for layer in layers]
        for embedding in (unet.time_proj, unet.add_time_proj):  # angles up to 1000 need float32
            embedding.register_forward_hook(lambda _module, _inputs, out: narrow(out))
        self.network = unet

    def forward(self, sample: Tensor, text_embeds: Tensor, time_ids: Tensor, *text: Tensor) -> Tensor:
        """text: key and value (B, T, C) of every cross-attention layer of the stack."""
        for number, attention in enumerate(self.crossing):
            attention.given = text[2 * number], text[2 * number + 1]
        features = subject_tokens.run_down_stack(self.network, sample, None, text_embeds, time_ids, self.block)
        for attention in self.crossing:
            attention.given = None
        return features


class TokenSelection(nn.Module):
    """Features -> those that are least like the others, and their numbers. It has no weights."""

    @classmethod
    def of(cls, network: Network) -> TokenSelection:
        """The module of a described network."""
        return cls(TokenConfig.of_dict(network.configs["tokens"]).tokens)

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.network = count, nn.Module()

    def forward(self, features: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        return subject_tokens.select_tokens(features, inside, self.count)


class TokenProjection(nn.Module):
    """Tokens -> rows of the text condition."""

    @classmethod
    def of(cls, network: Network) -> TokenProjection:
        """The module of a described network."""
        return cls(TokenConfig.of_dict(network.configs["tokens"]))

    def __init__(self, config: TokenConfig) -> None:
        super().__init__()
        self.network = subject_tokens.TokenProjection(config)

    def forward(self, tokens: Tensor) -> Tensor:
        rows: Tensor = self.network(tokens)
        return rows
