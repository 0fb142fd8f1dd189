"""The torch form of every network, with the engine's inputs and outputs: what is exported and what judges the export.

Imports torch and diffusers: reach it through `networks.torch_module`.
"""

# mypy: disallow-subclassing-any=False

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from dreammix_trt.core.subject import Slot


class UNet(nn.Module):
    """SDXL's UNet with the inpaint feature and the packed LoRA as inputs."""

    def __init__(self, config: dict[str, Any], slots: Sequence[Slot]) -> None:
        super().__init__()
        self.network = UNet2DConditionModel.from_config(config)
        _use_plain_attention(self.network)
        self.lora = PackedLora(self.network, slots)
        self._feature: Tensor | None = None
        self.network.conv_in.register_forward_hook(self._add_feature)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        inpaint_feature: Tensor,
        lora: Tensor,
    ) -> Tensor:
        self._feature = inpaint_feature
        self.lora.unpack(lora, sample)
        conditions = {"text_embeds": text_embeds, "time_ids": time_ids}
        eps: Tensor = self.network(
            sample, timestep, encoder_hidden_states, added_cond_kwargs=conditions, return_dict=False
        )[0]
        return eps

    def _add_feature(self, _module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        """The feature enters after conv_in and so also the first skip; one feature serves all rows of its picture."""
        assert self._feature is not None
        return out + _to_rows(self._feature, out)


class TextEncoder(nn.Module):
    """A CLIP text encoder (Radford et al. 2021, text transformer), causal, no padding mask.

    Gives the penultimate layer's states without final norm and, where the encoder has a projection, the projected
    final-normed state of the end mark. Parameter names are transformers'.
    """

    def __init__(self, config: dict[str, Any], slots: Sequence[Slot], pooled: bool) -> None:
        super().__init__()
        self.network = nn.Module()
        self.network.text_model = _ClipText(config)
        if pooled:
            self.network.text_projection = nn.Linear(config["hidden_size"], config["projection_dim"], bias=False)
        self.pooled = pooled
        self.end = config.get("eos_token_id", 2)
        self.lora = PackedLora(self.network, slots)

    def forward(self, input_ids: Tensor, lora: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        self.lora.unpack(lora, input_ids)
        text: Any = self.network.text_model
        hidden, last = text(input_ids)
        if not self.pooled:
            return hidden
        # transformers: configs of old (eos_token_id 2, wrong) find the end mark as the largest id, others by its id
        marks = input_ids if self.end == 2 else input_ids == self.end
        place = marks.to(torch.int32).argmax(-1, keepdim=True).unsqueeze(-1).expand(-1, 1, last.shape[-1])
        return hidden, self.network.text_projection(torch.gather(last, 1, place).squeeze(1))


class InpaintHead(nn.Module):
    """Fooocus' head: a 3x3 convolution of [mask, masked latent] with replicated border."""

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        self.network = nn.Module()
        self.network.head = nn.Conv2d(1 + latent_channels, channels, 3, bias=False)

    def forward(self, mask: Tensor, masked_latent: Tensor) -> Tensor:
        both = torch.cat([mask, masked_latent], 1)
        feature: Tensor = self.network.head(nn.functional.pad(both, (1, 1, 1, 1), mode="replicate"))
        return feature


class VaeEncoder(nn.Module):
    """Image in [-1, 1] -> mean and standard deviation of the latent, both unscaled."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.network: Any = AutoencoderKL.from_config(config)
        del self.network.decoder, self.network.post_quant_conv
        _use_plain_attention(self.network)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        moments = self.network.encoder(image)
        if self.network.quant_conv is not None:
            moments = self.network.quant_conv(moments)
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))


class VaeDecoder(nn.Module):
    """Latent, already divided by the scaling factor -> image in about [-1, 1]."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.network: Any = AutoencoderKL.from_config(config)
        del self.network.encoder, self.network.quant_conv
        _use_plain_attention(self.network)

    def forward(self, latent: Tensor) -> Tensor:
        if self.network.post_quant_conv is not None:
            latent = self.network.post_quant_conv(latent)
        image: Tensor = self.network.decoder(latent)
        return image


class PackedLora:
    """Adds `x @ A @ B` to the output of each slot's linear layer; A and B come from one packed row a picture."""

    def __init__(self, network: nn.Module, slots: Sequence[Slot]) -> None:
        self.slots = tuple(slots)
        self._factors: list[Tensor] = []
        for number, slot in enumerate(self.slots):
            network.get_submodule(slot.module).register_forward_hook(self._hook(number))

    def unpack(self, lora: Tensor, batch: Tensor) -> None:
        """Take the rows for the coming pass. lora (N, P); batch: any tensor whose first axis has k*N rows.

        The row is repeated for the k rows of its picture before it is cut up: one small copy here spares every slot two
        reshapes with shapes known only at run time.
        """
        rows = _to_rows(lora, batch)
        sizes = [size for slot in self.slots for size in (slot.inputs * slot.rank, slot.rank * slot.outputs)]
        heights = [height for slot in self.slots for height in (slot.inputs, slot.rank)]
        parts = torch.split(rows, sizes, dim=1)
        self._factors = [reshaped(part, (0, height, -1)) for part, height in zip(parts, heights, strict=True)]

    def _hook(self, number: int) -> Any:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
            a, b = self._factors[2 * number : 2 * number + 2]
            return out + inputs[0] @ a @ b

        return add


def reshaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`x` in a new shape where 0 keeps an axis and one -1 is what remains, as ONNX's Reshape has it.

    torch's own reshape would put the kept axes into the graph as shape arithmetic.
    """
    result: Tensor = _Reshape.apply(x, tuple(int(side) for side in shape))
    return result


class _Reshape(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return x.reshape([x.shape[axis] if side == 0 else side for axis, side in enumerate(shape)])

    @staticmethod
    def symbolic(g: Any, x: Any, shape: tuple[int, ...]) -> Any:
        return g.op("Reshape", x, g.op("Constant", value_t=torch.tensor(shape, dtype=torch.int64)))


class PlainAttention:
    """diffusers attention written out, so that the graph holds MatMul, Softmax, MatMul and constants only."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        assert attention_mask is None, "SDXL attends everywhere"
        picture, x = hidden_states, hidden_states
        if picture.ndim == 4:
            x = reshaped(picture, (0, picture.shape[1], -1)).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        x = attn.to_out[0](_attend(attn.to_q(x), attn.to_k(context), attn.to_v(context), attn.heads))
        if picture.ndim == 4:
            x = x.transpose(1, 2).reshape_as(picture)
        return (x + picture if attn.residual_connection else x) / attn.rescale_output_factor


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v for q (B, T, C), k and v (B, S, C)."""
    width = int(q.shape[-1]) // heads
    q, k, v = (reshaped(x, (0, 0, heads, -1)).transpose(1, 2) for x in (q, k, v))
    if torch.jit.is_tracing():
        scores = (q * width**-0.5) @ k.transpose(-1, -2)
        x = torch.softmax(scores if mask is None else scores + mask, dim=-1) @ v
    else:  # torch's own kernel: quicker, and an independent judge of the lines above
        x = nn.functional.scaled_dot_product_attention(q, k, v, mask)
    return reshaped(x.transpose(1, 2), (0, 0, -1))


def _to_rows(x: Tensor, batch: Tensor) -> Tensor:
    """x (N, ...) repeated to batch's k*N rows, k neighbouring rows a picture."""
    repeats = batch.shape[0] // x.shape[0]
    shape = x.shape[1:]
    wide = x.unsqueeze(1).expand(x.shape[0], repeats, *shape)
    return wide.reshape(-1, *shape)


def _use_plain_attention(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, Attention):
            module.set_processor(PlainAttention())


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
        self.register_buffer("mask", torch.full((length, length), -1e9).triu(1), persistent=False)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, 77) -> penultimate states, final-normed last states, both (B, 77, width)."""
        x = self.embeddings["token_embedding"](input_ids) + self.embeddings["position_embedding"].weight
        layers: Any = self.encoder.layers
        penultimate = x
        for layer in layers:
            penultimate = x
            x = layer(x, self.mask)
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

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y, attn = self.layer_norm1(x), self.self_attn
        y = attn["out_proj"](_attend(attn["q_proj"](y), attn["k_proj"](y), attn["v_proj"](y), self.heads, mask))
        x = x + y
        wide = self.mlp["fc1"](self.layer_norm2(x))
        act = wide * torch.sigmoid(1.702 * wide) if self.quick else nn.functional.gelu(wide)
        result: Tensor = x + self.mlp["fc2"](act)
        return result
