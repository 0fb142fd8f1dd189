"""The four networks in SDXL's topology: fewer, narrower layers, the same block types and conditioning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

SCALING_FACTOR = 0.13025
TEXT_WIDTHS = (64, 96)
POOLED = 96
TIME_IDS_WIDTH = 32


def build_vae(native_size: int = 256) -> AutoencoderKL:
    """f8, four channels, one layer a block; 1.72 M parameters."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        scaling_factor=SCALING_FACTOR,
        sample_size=native_size,
        force_upcast=True,
    )


def build_unet(native_size: int = 256) -> UNet2DConditionModel:
    """(48, 96, 128) channels, one layer a block, one transformer layer, heads of 32; 5.44 M parameters."""
    return UNet2DConditionModel(
        sample_size=native_size // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(3, 3, 4),  # SDXL's misnomer: the number of heads
        norm_num_groups=16,
        cross_attention_dim=sum(TEXT_WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_IDS_WIDTH,
        projection_class_embeddings_input_dim=POOLED + 6 * TIME_IDS_WIDTH,
    )


def _text_config(width: int, activation: str, vocabulary: int, bos: int, eos: int, pad: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        max_position_embeddings=77,
        projection_dim=POOLED if activation == "gelu" else width,
        hidden_act=activation,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )


class TextEncoders(torch.nn.Module):  # type: ignore[misc]
    """Both CLIP encoders as SDXL uses them."""

    def __init__(self, vocabulary: int, bos: int, eos: int) -> None:
        super().__init__()
        self.one = CLIPTextModel(_text_config(TEXT_WIDTHS[0], "quick_gelu", vocabulary, bos, eos, eos))
        self.two = CLIPTextModelWithProjection(_text_config(TEXT_WIDTHS[1], "gelu", vocabulary, bos, eos, 0))

    def forward(self, ids_one: torch.Tensor, ids_two: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids int64 (N, 77) each -> penultimate states (N, 77, 160), pooled projection (N, 96)."""
        one = self.one(ids_one, output_hidden_states=True)
        two = self.two(ids_two, output_hidden_states=True)
        return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1), two.text_embeds


class TrainedHead(torch.nn.Module):  # type: ignore[misc]
    """Fooocus' head: 3x3 convolution of [mask, masked latent], replicate padding, no bias, for conv_in's output."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = torch.nn.Parameter(torch.zeros(channels, 5, 3, 3))

    def forward(self, mask: torch.Tensor, masked_latent: torch.Tensor) -> torch.Tensor:
        """mask (N, 1, h, w) in {0, 1}, masked latent (N, 4, h, w) scaled -> feature (N, C, h, w)."""
        stacked = torch.nn.functional.pad(torch.cat([mask, masked_latent], 1), (1, 1, 1, 1), mode="replicate")
        return torch.nn.functional.conv2d(stacked, self.head.to(stacked.dtype))


@dataclass
class NoiseNetwork:
    """A UNet that can take the head's feature: it is added to conv_in's output, before the first skip."""

    unet: UNet2DConditionModel

    def __post_init__(self) -> None:
        self._feature: torch.Tensor | None = None
        self.unet.conv_in.register_forward_hook(self._add)

    def _add(self, _module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output if self._feature is None else output + self._feature

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        states: torch.Tensor,
        pooled: torch.Tensor,
        time_ids: torch.Tensor,
        feature: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noise prediction; every argument has one row per sample."""
        self._feature = feature
        conditions = {"text_embeds": pooled, "time_ids": time_ids}
        out: torch.Tensor = self.unet(sample, timestep, states, added_cond_kwargs=conditions, return_dict=False)[0]
        self._feature = None
        return out


def noise_table() -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (1000,) each: sqrt(alpha-bar) and sqrt(1 - alpha-bar) of SDXL's scaled-linear betas."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    return alphas.sqrt().float(), (1 - alphas).sqrt().float()
