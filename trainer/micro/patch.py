"""The Fooocus-format patch: the fine-tune's weight delta under sgm names, 8 bits with a range per output channel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

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
