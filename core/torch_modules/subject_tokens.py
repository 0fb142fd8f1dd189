"""Features of a subject's reference, the selection among them, and what makes rows of the condition of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dreammix_trt.core.config_fields import MOST_TOKENS
from dreammix_trt.core.subject_tokens import TokenConfig

_BEHIND, _LEAST_NORM = 8.0, 1e-12  # as in core/subject_tokens.py


def run_down_stack(
    unet: Any, sample: Tensor, context: Tensor | None, text_embeds: Tensor, time_ids: Tensor, block: int
) -> Tensor:
    """Run a UNet's down stack at t = 0, without an inpaint feature. It uses the UNet's own weights.

    unet: diffusers' UNet2DConditionModel, of which blocks after `block` may be missing. Adapters on it count: switch
        them off (`unet.disable_adapters()`) where features of the base alone are wanted.
    sample: (B, 4, h, w), latents of references, times the VAE's scaling factor.
    context: (B, T, C), the text; None: the attention layers know it.
    text_embeds: (B, Dp). time_ids: (B, 6).
    block: the down block whose layers are the last; its downsampler does not run.

    Returns (B, N, D) in the sample's type: cells in rows from the top left.
    """
    start = unet.time_proj(torch.zeros(1, device=sample.device)).to(sample.dtype)
    sizes = unet.add_time_proj(time_ids.flatten()).reshape(-1, 6 * unet.config.addition_time_embed_dim)
    added = torch.cat([text_embeds, sizes.to(text_embeds.dtype)], -1)
    embedding = unet.time_embedding(start) + unet.add_embedding(added)
    x = unet.conv_in(sample)
    for number, each in enumerate(unet.down_blocks[: block + 1]):
        attentions = getattr(each, "attentions", None) or [None] * len(each.resnets)
        for resnet, attention in zip(each.resnets, attentions, strict=True):
            x = resnet(x, embedding)
            if attention is not None:
                x = attention(x, encoder_hidden_states=context, return_dict=False)[0]
        if number < block:
            for sampler in each.downsamplers or ():
                x = sampler(x)
    return x.flatten(2).transpose(1, 2)


def select_tokens(features: Tensor, inside: Tensor, count: int = MOST_TOKENS) -> tuple[Tensor, Tensor]:
    """Select the features that are least like the others; `core/subject_tokens.select_tokens` defines it.

    Computes in float32 under any autocast: in float16 a third of the choices are others.

    features: (B, N, D). inside: (B, N), 1 where a cell has any pixel of the object.
    count: how many; at most N.

    Returns tokens float32 (B, count, D) and their numbers int64 (B, count).
    """
    with torch.autocast(features.device.type, enabled=False):
        wide = features.float()
        unit = wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(_LEAST_NORM)
        scores = torch.softmax(unit @ unit.transpose(-1, -2), -1).sum(-2)
        scores = scores + (1 - inside.float()) * _BEHIND
    if torch.jit.is_tracing():  # ONNX's TopK gives equal values by their number, torch's does not
        chosen = torch.topk(scores, count, -1, largest=False, sorted=True).indices
    else:
        chosen = torch.sort(scores, dim=-1, stable=True).indices[:, :count]
    return torch.gather(wide, 1, chosen.unsqueeze(-1).expand(-1, count, wide.shape[-1])), chosen


class TokenProjection(nn.Module):
    """Tokens -> rows of the text condition: the one part that is trained beside LoRA factors.

    The norm takes away how large a feature is, which differs between cells of one object; one linear layer is enough to
    bring it into the space that the UNet's keys and values, with their LoRA, read.
    """

    def __init__(self, config: TokenConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.linear = nn.Linear(config.width, config.context_width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, K, width) -> (B, K, context_width). Each row depends on its token alone."""
        rows: Tensor = self.linear(self.norm(tokens))
        return rows
