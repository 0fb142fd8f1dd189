"""The torch form of every network, with the engine's inputs and outputs. It is exported, the export is compared with
it, and `torch_backend` runs it on a GPU.

Outside a trace nothing here waits for a device, copies from the host or depends on a tensor's values, in any precision.
So a pass can be captured as a CUDA graph. Imports torch and diffusers: reach it through `make_torch_module`.
"""

# mypy: disallow-subclassing-any=False

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from dreammix_trt.core.attention_layers import KEY, VALUE
from dreammix_trt.core.networks import Network
from dreammix_trt.core.slots import Slot, names_of_weights
from dreammix_trt.export.operators import attend, group_norm, narrow, reshape_like_onnx, widen
from dreammix_trt.export.units import convert_units, vae_units


class UNet(nn.Module):
    """SDXL's UNet. Keys and values of the text, the inpaint feature and the weights of its slots are inputs."""

    @classmethod
    def of(cls, network: Network) -> UNet:
        """The module of a described network."""
        return cls(network)

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = UNet2DConditionModel.from_config(dict(network.configs["unet"]))
        use_own_operators(self.network)
        layers = [tensor.name.removesuffix(KEY) for tensor in network.inputs if tensor.name.endswith(KEY)]
        self.crossing = [leave_text_to_others(self.network.get_submodule(layer)) for layer in layers]
        self.slots = SlotWeights(self.network, network.slots)
        self._feature: Tensor | None = None
        self.network.conv_in.register_forward_hook(self._add_feature)
        for embedding in (self.network.time_proj, self.network.add_time_proj):  # angles up to 1000 need float32
            embedding.register_forward_hook(lambda _module, _inputs, out: narrow(out))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        inpaint_feature: Tensor,
        *more: Tensor,
    ) -> Tensor:
        """more: key and value (rows, context, C) of every cross-attention layer, then the weights of the slots."""
        self._feature = inpaint_feature
        for number, attention in enumerate(self.crossing):
            attention.given = more[2 * number], more[2 * number + 1]
        self.slots.take(more[2 * len(self.crossing) :])
        conditions = {"text_embeds": text_embeds, "time_ids": time_ids}
        eps: Tensor = self.network(sample, timestep, None, added_cond_kwargs=conditions, return_dict=False)[0]
        self._drop()
        return eps

    def _drop(self) -> None:
        """Forget what was given for a pass: its memory belongs to the caller."""
        self._feature = None
        self.slots.drop()
        for attention in self.crossing:
            attention.given = None

    def _add_feature(self, _module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        """Add the feature after conv_in, so that it enters the first skip, too. All rows of a picture share it."""
        assert self._feature is not None
        return out + _to_rows(self._feature, out)


class KeysAndValues(nn.Module):
    """What a UNet's cross-attention layers make of the text: the key and value of each, which no step changes."""

    @classmethod
    def of(cls, network: Network) -> KeysAndValues:
        """The module of a described network."""
        return cls(network)

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = nn.Module()
        width = network.inputs[0].shape[-1]
        self.layers = []  # in the order of the outputs
        for tensor in network.outputs:
            layer, _, part = tensor.name.rpartition(".")
            name = layer + {KEY: ".to_k", VALUE: ".to_v"}[f".{part}"]
            _place(self.network, name, nn.Linear(int(width), int(tensor.shape[-1]), bias=False))
            self.layers.append(name)
        self.slots = SlotWeights(self.network, network.slots)

    def forward(self, encoder_hidden_states: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        self.slots.take(weights)
        found = tuple(self.network.get_submodule(name)(encoder_hidden_states) for name in self.layers)
        self.slots.drop()
        return found


class TextEncoder(nn.Module):
    """A CLIP text encoder (Radford et al. 2021, text transformer), causal, no padding mask.

    Its outputs are the penultimate layer's states without final norm and, if the encoder has a projection, the
    projected, final-normed state of the end mark. Parameter names are those of transformers.
    """

    @classmethod
    def of(cls, network: Network) -> TextEncoder:
        """The module of a described network."""
        (config,) = network.configs.values()
        return cls(dict(config), network.slots, pooled=len(network.outputs) > 1)

    def __init__(self, config: dict[str, Any], slots: Sequence[Slot], pooled: bool) -> None:
        super().__init__()
        self.network = nn.Module()
        self.network.text_model = _ClipText(config)
        if pooled:
            self.network.text_projection = nn.Linear(config["hidden_size"], config["projection_dim"], bias=False)
        self.pooled = pooled
        self.end = config.get("eos_token_id", 2)
        self.slots = SlotWeights(self.network, slots)

    def forward(self, input_ids: Tensor, *weights: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        self.slots.take(weights)
        text: Any = self.network.text_model
        hidden, last = text(input_ids)
        self.slots.drop()
        if not self.pooled:
            return hidden
        # as in transformers: with old configs (a wrong eos_token_id of 2) the end mark is the largest id
        marks = input_ids if self.end == 2 else input_ids == self.end
        place = marks.to(torch.int32).argmax(-1, keepdim=True).unsqueeze(-1).expand(-1, 1, last.shape[-1])
        return hidden, self.network.text_projection(reshape_like_onnx(torch.gather(last, 1, place), (0, -1)))


class InpaintHead(nn.Module):
    """Fooocus' head: a 3x3 convolution of [mask, masked latent].

    Its padding is "replicate", or "zeros" for a head that was part of a 9-channel UNet's first convolution.
    """

    @classmethod
    def of(cls, network: Network) -> InpaintHead:
        """The module of a described network."""
        return cls(**network.configs["inpaint_head"])

    def __init__(self, channels: int, latent_channels: int, padding: str) -> None:
        super().__init__()
        self.mode = {"replicate": "replicate", "zeros": "constant"}[padding]
        self.network = nn.Module()
        self.network.head = nn.Conv2d(1 + latent_channels, channels, 3, bias=False)

    def forward(self, mask: Tensor, masked_latent: Tensor) -> Tensor:
        both = torch.cat([mask, masked_latent], 1)
        feature: Tensor = self.network.head(nn.functional.pad(both, (1, 1, 1, 1), mode=self.mode))
        return feature


class VaeEncoder(nn.Module):
    """Image in [-1, 1] -> mean and standard deviation of the latent, both unscaled."""

    @classmethod
    def of(cls, network: Network) -> VaeEncoder:
        """The module of a described network."""
        return cls(dict(network.configs["vae"]), network.wide)

    def __init__(self, config: dict[str, Any], wide: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.network: Any = AutoencoderKL.from_config(config)
        del self.network.decoder, self.network.post_quant_conv
        use_own_operators(self.network)
        convert_units(vae_units("vae_encoder", self.network), wide, widen, narrow)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        moments = self.network.encoder(image)
        if self.network.quant_conv is not None:
            moments = self.network.quant_conv(moments)
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))


class VaeDecoder(nn.Module):
    """Latent, already divided by the scaling factor -> image in about [-1, 1]."""

    @classmethod
    def of(cls, network: Network) -> VaeDecoder:
        """The module of a described network."""
        return cls(dict(network.configs["vae"]), network.wide)

    def __init__(self, config: dict[str, Any], wide: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.network: Any = AutoencoderKL.from_config(config)
        del self.network.encoder, self.network.quant_conv
        use_own_operators(self.network)
        convert_units(vae_units("vae_decoder", self.network), wide, widen, narrow)

    def forward(self, latent: Tensor) -> Tensor:
        if self.network.post_quant_conv is not None:
            latent = self.network.post_quant_conv(latent)
        image: Tensor = self.network.decoder(latent)
        return image


class SlotWeights:
    """Gives the linear layers of slots their weights, which are inputs of the network. They have none of their own."""

    def __init__(self, network: nn.Module, slots: Sequence[Slot]) -> None:
        self._names, self._given = names_of_weights(slots), dict[str, Tensor]()
        for slot in slots:
            layer: Any = network.get_submodule(slot.module)
            layer.weight = None
            layer.forward = partial(self._apply, slot, layer)

    def take(self, given: Sequence[Tensor]) -> None:
        """Take the weights for the next pass, in the order of the inputs."""
        self._given = dict(zip(self._names, given, strict=True))

    def drop(self) -> None:
        """Forget the weights after the pass: their memory belongs to the caller."""
        self._given = {}

    def _apply(self, slot: Slot, layer: nn.Linear, x: Tensor) -> Tensor:
        weight = self._given[slot.weight]
        if not torch.jit.is_tracing():
            return nn.functional.linear(x, weight.T, layer.bias)  # multiplies and adds in one kernel
        out = x @ weight
        return out if layer.bias is None else out + layer.bias


class PlainAttention:
    """diffusers' attention written out, so that the graph has few nodes and no shape arithmetic.

    given: key and value, in place of those that the layer would make.
    """

    given: tuple[Tensor, Tensor] | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        assert attention_mask is None and encoder_hidden_states is None, (
            "SDXL attends everywhere; the text is in `given`"
        )
        picture, x = hidden_states, hidden_states
        if picture.ndim == 4:
            x = reshape_like_onnx(picture, (0, picture.shape[1], -1)).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        key, value = self.given or (attn.to_k(x), attn.to_v(x))
        x = attn.to_out[0](attend(attn.to_q(x), key, value, attn.heads))
        if picture.ndim == 4:
            x = x.transpose(1, 2).reshape_as(picture)
        x = x + picture if attn.residual_connection else x
        if attn.rescale_output_factor == 1 and not torch.jit.is_tracing():
            return x  # torch would divide by 1, a needless pass over the memory
        return x / attn.rescale_output_factor


def _to_rows(x: Tensor, batch: Tensor) -> Tensor:
    """Repeat x (N, ...) to the k*N rows of `batch`, k neighbouring rows per picture."""
    repeats = batch.shape[0] // x.shape[0]
    shape = x.shape[1:]
    wide = x.unsqueeze(1).expand(x.shape[0], repeats, *shape)
    return wide.reshape(-1, *shape)


def leave_text_to_others(attention: nn.Module) -> PlainAttention:
    """Take the projections of the text out of a cross-attention layer; returns what then needs their results."""
    attention.to_k = attention.to_v = None
    processor: PlainAttention = attention.processor
    return processor


def _place(root: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer below `root` at a dotted name."""
    *way, last = name.split(".")
    for part in way:
        if part not in dict(root.named_children()):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, layer)


def use_own_operators(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, Attention):
            module.set_processor(PlainAttention())
        elif isinstance(module, nn.GroupNorm):
            module.forward = partial(group_norm, module)
        elif isinstance(module, GEGLU):
            module.forward = partial(_geglu, module)


def _geglu(layer: GEGLU, x: Tensor) -> Tensor:
    """Gate one half of the projection with the other: one Split, where `chunk` leaves shape arithmetic."""
    half = layer.proj.out_features // 2
    value, gate = torch.split(layer.proj(x), [half, half], dim=-1)
    result: Tensor = value * nn.functional.gelu(gate)
    return result


class _ClipText(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, length = config["hidden_size"], config["max_position_embeddings"]
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(config["vocab_size"], width),
                "position_embedding": nn.Embedding(length, width),
            }
        )
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(_ClipLayer(config) for _ in range(config["num_hidden_layers"]))
        self.final_layer_norm = nn.LayerNorm(width, eps=config.get("layer_norm_eps", 1e-5))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, 77) -> penultimate states and final-normed last states, both (B, 77, width)."""
        x = self.embeddings["token_embedding"](input_ids) + self.embeddings["position_embedding"].weight
        layers: Any = self.encoder.layers
        penultimate = x
        for layer in layers:
            penultimate = x
            x = layer(x)
        return penultimate, self.final_layer_norm(x)


class _ClipLayer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, wide, eps = config["hidden_size"], config["intermediate_size"], config.get("layer_norm_eps", 1e-5)
        self.heads = config["num_attention_heads"]
        self.quick = {"quick_gelu": True, "gelu": False}[config["hidden_act"]]
        self.self_attn = nn.ModuleDict({f"{part}_proj": nn.Linear(width, width) for part in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, wide), "fc2": nn.Linear(wide, width)})
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        y, attn = self.layer_norm1(x), self.self_attn
        y = attn["out_proj"](attend(attn["q_proj"](y), attn["k_proj"](y), attn["v_proj"](y), self.heads, causal=True))
        x = x + y
        wide = self.mlp["fc1"](self.layer_norm2(x))
        act = wide * torch.sigmoid(1.702 * wide) if self.quick else nn.functional.gelu(wide)
        result: Tensor = x + self.mlp["fc2"](act)
        return result
