"""SDXL under sgm names, as single files hold it: made from diffusers' names by counting, apart from what it tests."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Names = dict[str, str]
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0",
    "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
_VAE = {
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k",
    "to_v": "v", "to_out.0": "proj_out", "downsamplers.0": "downsample", "upsamplers.0": "upsample",
}  # fmt: skip
_OPEN_CLIP = {
    "text_model.embeddings.token_embedding": "token_embedding", "text_model.final_layer_norm": "ln_final",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers": "transformer.resblocks", "layer_norm": "ln_", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj", "self_attn": "attn",
}  # fmt: skip


def sgm_state(states: Mapping[str, Mapping[str, Any]], layers: int, join: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """A whole checkpoint under sgm names from its four states under diffusers' (values: anything with torch's methods).

    layers: the UNet's layers_per_block; join: concatenates along the first axis.
    """
    attentions = {name.split(".attentions")[0] for name in states["unet"] if ".attentions" in name}
    out = {f"model.diffusion_model.{rename_unet(name, layers, attentions)}": v for name, v in states["unet"].items()}
    out |= {f"conditioner.embedders.0.transformer.{name}": v for name, v in states["text_encoder"].items()}
    blocks = 1 + max(int(name.split(".")[2]) for name in states["vae"] if name.startswith("decoder.up_blocks"))
    for name, value in states["vae"].items():
        projection = re.search(r"attentions.*(to_q|to_k|to_v|to_out\.0)\.weight", name)
        out[f"first_stage_model.{_rename_vae(name, blocks)}"] = value[:, :, None, None] if projection else value
    second, place = states["text_encoder_2"], "conditioner.embedders.1.model"
    for name, value in second.items():
        if ".q_proj." in name:
            three = [second[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            stacked = _replace_words(name, _OPEN_CLIP).replace("q_proj.", "in_proj_")
            out[f"{place}.{stacked}"] = join(three)
        elif name == "text_projection.weight":
            out[f"{place}.text_projection"] = value.T
        elif ".k_proj." not in name and ".v_proj." not in name:
            out[f"{place}.{_replace_words(name, _OPEN_CLIP)}"] = value
    return out


def write_header(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16", size: int = 2) -> Path:
    """A safetensors file of zeros that takes no room on disk: its header, and a hole as long as its tensors."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        count = size
        for side in shape:
            count *= side
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + count]}
        end += count
    text = json.dumps(entries).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return path


def rename_unet(name: str, layers: int, attentions: set[str]) -> str:
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.", name)
    if match is None:
        name = _replace_words(name, _UNET)
        return _replace_words(name, _RESNET) if name.startswith(("middle_block.0", "middle_block.2")) else name
    side, block, kind, layer = match[1], int(match[2]), match[3], int(match[4])
    rest = name[match.end() :]
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if f'up_blocks.{block}' in attentions else 1}.{rest}"
    place = (
        f"input_blocks.{1 + block * (layers + 1) + layer}"
        if side == "down"
        else f"output_blocks.{block * (layers + 1) + layer}"
    )
    return f"{place}.0.{_replace_words(rest, _RESNET)}" if kind == "resnets" else f"{place}.1.{rest}"


def _rename_vae(name: str, blocks: int) -> str:
    name = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", name)
    name = re.sub(r"up_blocks\.(\d+)\.", lambda match: f"up.{blocks - 1 - int(match[1])}.", name)
    return _replace_words(re.sub(r"(down|up)\.(\d+)\.resnets\.", r"\1.\2.block.", name), _VAE)


def _replace_words(name: str, words: Names) -> str:
    for old, new in words.items():
        name = re.sub(rf"(?<![a-z_]){re.escape(old)}(?=\d?(\.|$))", new, name)
    return name
