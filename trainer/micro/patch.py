"""The Fooocus-format patch: the fine-tune's weight delta under sgm names, 8 bits with a range per output channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_OUTER = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def sgm_from_diffusers(name: str, layers_per_block: int, down_blocks: Sequence[str], up_blocks: Sequence[str]) -> str:
    """The sgm name (without ``diffusion_model.``) of a diffusers UNet tensor, for any SDXL-like topology.

    In sgm every resnet (with its attention) and every downsampler takes the next number of ``input_blocks``; in
    ``output_blocks`` the upsampler stands last inside its block's last entry.
    """
    parts = name.split(".")
    for outer, inner in _OUTER.items():
        if name.startswith(outer + "."):
            return inner + name[len(outer) :]
    if parts[0] == "mid_block":
        place = (
            f"middle_block.{2 * int(parts[2])}" if parts[1] == "resnets" else f"middle_block.{1 + 2 * int(parts[2])}"
        )
        return _finish(place, parts[1], parts[3:])
    block, part, layer = int(parts[1]), parts[2], int(parts[3])
    if parts[0] == "down_blocks":
        base = 1 + block * (layers_per_block + 1)
        if part == "downsamplers":
            return f"input_blocks.{base + layers_per_block}.0.op.{parts[-1]}"
        return _finish(f"input_blocks.{base + layer}.{int(part == 'attentions')}", part, parts[4:])
    base = block * (layers_per_block + 1)
    if part == "upsamplers":
        last = 2 if "CrossAttn" in up_blocks[block] else 1
        return f"output_blocks.{base + layers_per_block}.{last}.conv.{parts[-1]}"
    return _finish(f"output_blocks.{base + layer}.{int(part == 'attentions')}", part, parts[4:])


def _finish(place: str, part: str, rest: list[str]) -> str:
    if part == "resnets":
        return ".".join([place, _RESNET[rest[0]], *rest[1:]])
    return ".".join([place, *rest])


Entry = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def quantise_delta(delta: torch.Tensor) -> Entry:
    """(uint8 of delta's shape, fp16 min, fp16 max); ranges are (out, 1, ...) for matrices and convolutions, () else."""
    if delta.ndim >= 2:
        axes = tuple(range(1, delta.ndim))
        low, high = delta.amin(axes, keepdim=True).half(), delta.amax(axes, keepdim=True).half()
    else:
        low, high = delta.min().half(), delta.max().half()
    span = (high - low).float()
    scaled = torch.where(span > 0, (delta - low.float()) / span.clamp_min(1e-12), torch.zeros_like(delta))
    return (scaled * 255).round().clamp_(0, 255).to(torch.uint8).contiguous(), low.contiguous(), high.contiguous()


def dequantise_delta(entry: Entry) -> torch.Tensor:
    """``half(u8 / 255 * (max - min) + min)``, as every loader of this format does."""
    codes, low, high = entry
    return (codes.float() / 255 * (high.float() - low.float()) + low.float()).half()


def make_patch(
    raw: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor], names: Mapping[str, str]
) -> dict[str, Entry]:
    """Quantise tuned - raw for every tensor that changed. names: diffusers name -> sgm name."""
    patch = {}
    for name, weight in raw.items():
        delta = tuned[name].float() - weight.float()
        if name.endswith(".weight") and name in names and bool(delta.abs().max() > 0):
            patch["diffusion_model." + names[name]] = quantise_delta(delta)
    return patch


def apply_patch(
    raw: Mapping[str, torch.Tensor], patch: Mapping[str, Entry], names: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """W + dequantised delta in fp32 for every ``.weight`` key of the patch; the rest unchanged."""
    out = {name: weight.float() for name, weight in raw.items()}
    for name in raw:
        key = "diffusion_model." + names[name]
        if key in patch and key.endswith(".weight"):
            out[name] = out[name] + dequantise_delta(patch[key]).float()
    return out


def save_patch(patch: Mapping[str, Entry], path: Path) -> None:
    torch.save(dict(patch), path)


def load_patch(path: Path) -> dict[str, Entry]:
    loaded: dict[str, Entry] = torch.load(path, weights_only=True)
    return loaded
