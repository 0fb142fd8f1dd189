"""The two naming schemes of UNet and VAE: sgm (single-file checkpoints, Fooocus patches) and diffusers.

sgm numbers everything that ends in a skip connection: `input_blocks.<i>` is the first convolution, then each resnet
(`.0`, with its attention `.1`), then each downsampler. `output_blocks.<i>` has one resnet, its attention, and in the
last entry of a block the upsampler. The VAE's names follow the blocks in both schemes; sgm counts the decoder's blocks
from the picture inwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dreammix_trt.core.errors import FileFormatError

PREFIX = "diffusion_model."

_OUTER = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}
_BLOCKS = (
    "down_block_types", "mid_block_type", "up_block_types", "block_out_channels", "layers_per_block",
    "transformer_layers_per_block", "reverse_transformer_layers_per_block",
)  # fmt: skip
_MIDDLE = "UNetMidBlock2DCrossAttn"
_WITHOUT_BIAS = ("to_q", "to_k", "to_v")
_VAE_RESNET = ("norm1", "conv1", "norm2", "conv2")
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
Pairs = Iterator[tuple[str, str]]


def sgm_to_diffusers(unet_config: Mapping[str, Any]) -> dict[str, str]:
    """The names of all tensors of the UNet: `diffusion_model.<sgm name>.weight|bias` -> diffusers name.

    unet_config: the diffusers `unet/config.json`, with any number of blocks, layers and transformer depths. SDXL's own
        gives 1680 names.

    Raises `FileFormatError` for block types that SDXL does not have.
    """
    names = {}
    for sgm, diffusers in _modules(unet_config):
        names[f"{PREFIX}{sgm}.weight"] = f"{diffusers}.weight"
        if not diffusers.endswith(_WITHOUT_BIAS):
            names[f"{PREFIX}{sgm}.bias"] = f"{diffusers}.bias"
    return names


def blocks_of(unet_config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a `unet/config.json` that decides its names: all that `sgm_to_diffusers` needs.

    What is left at its default is omitted, as some configs name it and others do not.
    """
    found = {name: unet_config.get(name) for name in _BLOCKS}
    return {name: value for name, value in found.items() if value not in (None, _MIDDLE)}


def vae_to_diffusers(vae_config: Mapping[str, Any]) -> dict[str, str]:
    """The names of all tensors of the VAE: `<sgm name>.weight|bias` (without `first_stage_model.`) -> diffusers name.

    vae_config: the diffusers `vae/config.json`. SDXL's own gives 248 names.

    The weights of the attention's four projections are 1x1 convolutions (C, C, 1, 1) under sgm names and matrices
    (C, C) in diffusers.
    """
    modules = _vae_modules(list(vae_config["block_out_channels"]), int(vae_config.get("layers_per_block", 1)))
    return {f"{sgm}.{part}": f"{ours}.{part}" for sgm, ours in modules for part in ("weight", "bias")}


def attention_depths(config: Mapping[str, Any]) -> tuple[list[list[int]], list[list[int]], int]:
    """The number of transformer layers after each resnet; 0 means no attention.

    config: the diffusers `unet/config.json`.

    Returns (per down block, per up block, in the middle). Raises `FileFormatError` for block types that SDXL does not
    have.
    """
    downs, ups = list(config["down_block_types"]), list(config["up_block_types"])
    known = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
    middle = config.get("mid_block_type", _MIDDLE)
    strange = sorted({*downs, *ups} - known) + ([] if middle == "UNetMidBlock2DCrossAttn" else [str(middle)])
    if strange:
        raise FileFormatError(f"unet/config.json: block types {', '.join(strange)} are not those of an SDXL UNet")
    layers = _per_block(config.get("layers_per_block", 2), len(downs))
    depths = _per_block(config.get("transformer_layers_per_block", 1), len(downs))
    backwards = config.get("reverse_transformer_layers_per_block")
    up_depths = depths[::-1] if backwards is None else list(backwards)
    up_layers = [n + 1 for n in layers[::-1]]
    return (
        [_per_layer(d, n, kind) for d, n, kind in zip(depths, layers, downs, strict=True)],
        [_per_layer(d, n, kind) for d, n, kind in zip(up_depths, up_layers, ups, strict=True)],
        depths[-1] if isinstance(depths[-1], int) else depths[-1][-1],
    )


def _modules(config: Mapping[str, Any]) -> Pairs:
    downs, ups, middle = attention_depths(config)
    channels = list(config["block_out_channels"])
    yield from _OUTER.items()
    skips, width, entry = [channels[0]], channels[0], 1
    for block, depths in enumerate(downs):
        for layer, depth in enumerate(depths):
            place, here = f"input_blocks.{entry}", f"down_blocks.{block}"
            yield from _resnet(f"{place}.0", f"{here}.resnets.{layer}", width != channels[block])
            yield from _transformer(f"{place}.1", f"{here}.attentions.{layer}", depth)
            width, entry = channels[block], entry + 1
            skips.append(width)
        if block + 1 < len(downs):
            yield f"input_blocks.{entry}.0.op", f"down_blocks.{block}.downsamplers.0.conv"
            entry += 1
            skips.append(width)
    yield from _resnet("middle_block.0", "mid_block.resnets.0", False)
    yield from _transformer("middle_block.1", "mid_block.attentions.0", middle)
    yield from _resnet("middle_block.2", "mid_block.resnets.1", False)
    entry = 0
    for block, depths in enumerate(ups):
        out = channels[::-1][block]
        for layer, depth in enumerate(depths):
            place, here = f"output_blocks.{entry}", f"up_blocks.{block}"
            yield from _resnet(f"{place}.0", f"{here}.resnets.{layer}", width + skips.pop() != out)
            yield from _transformer(f"{place}.1", f"{here}.attentions.{layer}", depth)
            width, entry = out, entry + 1
        if block + 1 < len(ups):
            yield f"output_blocks.{entry - 1}.{2 if depths[-1] else 1}.conv", f"up_blocks.{block}.upsamplers.0.conv"


def _vae_modules(channels: list[int], layers: int) -> Pairs:
    last = len(channels) - 1
    for side, way, per_block in (("encoder", "down", layers), ("decoder", "up", layers + 1)):
        yield f"{side}.conv_in", f"{side}.conv_in"
        widths = channels if way == "down" else channels[::-1]
        width = widths[0]
        for block, out in enumerate(widths):
            sgm = f"{side}.{way}.{block if way == 'down' else last - block}"
            ours = f"{side}.{way}_blocks.{block}"
            for layer in range(per_block):
                yield from _vae_resnet(f"{sgm}.block.{layer}", f"{ours}.resnets.{layer}", width != out)
                width = out
            if block < last:
                yield f"{sgm}.{way}sample.conv", f"{ours}.{way}samplers.0.conv"
        for number in (0, 1):
            yield from _vae_resnet(f"{side}.mid.block_{number + 1}", f"{side}.mid_block.resnets.{number}", False)
        for theirs, name in _VAE_ATTENTION.items():
            yield f"{side}.mid.attn_1.{theirs}", f"{side}.mid_block.attentions.0.{name}"
        yield f"{side}.norm_out", f"{side}.conv_norm_out"
        yield f"{side}.conv_out", f"{side}.conv_out"
    for name in ("quant_conv", "post_quant_conv"):
        yield name, name


def _vae_resnet(sgm: str, diffusers: str, shortcut: bool) -> Pairs:
    for name in _VAE_RESNET:
        yield f"{sgm}.{name}", f"{diffusers}.{name}"
    if shortcut:
        yield f"{sgm}.nin_shortcut", f"{diffusers}.conv_shortcut"


def _resnet(sgm: str, diffusers: str, shortcut: bool) -> Pairs:
    for theirs, ours in _RESNET.items():
        yield f"{sgm}.{theirs}", f"{diffusers}.{ours}"
    if shortcut:
        yield f"{sgm}.skip_connection", f"{diffusers}.conv_shortcut"


def _transformer(sgm: str, diffusers: str, depth: int) -> Pairs:
    if not depth:
        return
    inner = ["norm", "proj_in", "proj_out"]
    for layer in range(depth):
        inner += [
            f"transformer_blocks.{layer}.{part}" for part in ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2")
        ]
        for attention in ("attn1", "attn2"):
            inner += [f"transformer_blocks.{layer}.{attention}.{part}" for part in (*_WITHOUT_BIAS, "to_out.0")]
    for name in inner:
        yield f"{sgm}.{name}", f"{diffusers}.{name}"


def _per_block(value: Any, blocks: int) -> list[Any]:
    return [value] * blocks if isinstance(value, int) else list(value)


def _per_layer(depth: Any, layers: int, kind: str) -> list[int]:
    if not kind.startswith("CrossAttn"):
        return [0] * layers
    return [depth] * layers if isinstance(depth, int) else list(depth)
