"""Public weights as a start for ASUKA's networks: the authors' own (made for FLUX.1), and plain masked auto-encoders.

Every reader gives weights under the names of `core/torch_modules/`, read when they are needed. What a file lacks is
left to the module's own start, and positions are never taken: ours are fixed. `check_start` compares with a module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from dreammix_trt.core.asuka import LEVELS
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.keymap import vae_to_diffusers
from dreammix_trt.core.single_file import modernise_vae
from dreammix_trt.core.stored import Floats, Stored
from dreammix_trt.core.tensors import Weights, open_tensors

_REMEDY: Final = "leave it out, or train from another start"
#: transformers' names of a block's layers, as the hub has them and as its version 5 calls them -> the authors'
_BLOCK: Final = {
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "attention.q_proj": "attn.q",
    "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
_BLOCKS: Final = re.compile(
    r"(vit\.encoder\.layer|vit\.layers|decoder\.decoder_layers|decoder\.decoder_encoder\.layer)\.(\d+)\.(.+)\.(\w+)"
)
_OUTER: Final = {
    "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "vit.layernorm": "norm",
    "decoder.decoder_embed": "decoder_embed",
    "decoder.decoder_norm": "decoder_norm",
    "decoder.decoder_pred": "decoder_pred",
}
_OURS: Final = re.compile(
    r"(patch_embed|norm|decoder_embed|decoder_patch_embed|decoder_norm|decoder_pred|blocks|decoder_blocks)\..+"
    r"|mask_token|alpha"
)


def read_autoencoder(path: str | Path) -> Weights:
    """Weights of `MaskedAutoencoder` from the authors' `mae_300.pth`, a checkpoint of the original MAE, or a file or
    folder of transformers' ViTMAE (facebook/vit-mae-base).

    Raises `FileFormatError` for what is none of these.
    """
    weights = _open(path)
    if any(name.startswith("vit.embeddings.") for name in weights):
        return _fuse_queries(weights.rename(_name_of_transformers))
    if "patch_embed.proj.weight" not in weights or "decoder_pred.weight" not in weights:
        raise FileFormatError(
            f"{path}: no masked auto-encoder: it has neither patch_embed and decoder_pred, as mae_300.pth, nor "
            f"vit.embeddings, as facebook/vit-mae-base; {_REMEDY}"
        )
    return weights.rename(lambda name: name if _OURS.fullmatch(name) else None)


def read_alignment(path: str | Path) -> Weights:
    """Weights of `Alignment` from the authors' `asuka_alignment_clip.pt` or `asuka_alignment_t5.pt`.

    Raises `FileFormatError` for another file.
    """
    weights = _open(path)
    last = max((int(name.split(".")[0]) for name in weights if re.match(r"\d+\.", name)), default=0)
    if last < 2 or "1.linear1.weight" not in weights or f"{last}.weight" not in weights:
        raise FileFormatError(
            f"{path}: no alignment: it lacks 1.linear1.weight, as asuka_alignment_clip.pt has it; {_REMEDY}"
        )

    def rename(name: str) -> str | None:
        place, _, rest = name.partition(".")
        if not place.isdigit() or rest.startswith("modulation."):  # in the file, but never used
            return None
        return {0: f"embed.{rest}", last: f"norm.{rest}"}.get(int(place), f"blocks.{int(place) - 1}.{rest}")

    return weights.rename(rename)


def read_decoder(path: str | Path) -> Weights:
    """Weights of `AsukaDecoder` from the authors' `asuka_decoder.ckpt` (LDM's names).

    Raises `FileFormatError` for another file, a plain VAE for example.
    """
    weights = _open(path)
    if "decoder.encoder.layers.0.weight" not in weights or "decoder.conv_in.weight" not in weights:
        raise FileFormatError(
            f"{path}: no decoder of ASUKA: it lacks decoder.encoder.layers, as asuka_decoder.ckpt has them; {_REMEDY}"
        )
    blocks = sum(f"decoder.up.0.block.{number}.conv1.weight" in weights for number in range(16))
    firsts = [f"decoder.up.{level}.block.0.conv1.weight" for level in range(LEVELS)]
    absent = [name for name in firsts if name not in weights]
    if absent:
        raise FileFormatError(f"{path}: {absent[0]} is missing: the file is damaged, or no decoder of ASUKA; {_REMEDY}")
    widths = [weights.shape(name)[0] for name in firsts]
    known = vae_to_diffusers({"block_out_channels": widths, "layers_per_block": blocks - 1})

    def rename(name: str) -> str | None:
        if name.startswith("decoder.encoder.layers."):
            return name.replace("decoder.encoder.", "condition.", 1)
        return known.get(name) if name.startswith(("decoder.", "post_quant_conv.")) else None

    return modernise_vae(weights.rename(rename))


def check_start(path: str | Path, weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Check that weights can start a module; returns the names of what they lack.

    path: where they are from, for the message.
    shapes: the module's, by name.

    Raises `FileFormatError` naming a tensor of another shape, or one that the module does not have.
    """
    for name in weights:
        found, expected = weights.shape(name), shapes.get(name)
        if expected is None:
            raise FileFormatError(
                f"{path}: {name} has no place in this network: it is larger or of another kind; {_REMEDY}"
            )
        if tuple(found) != tuple(expected):
            flux = name == "decoder.conv_in.weight" and found[1:2] == (16,)
            hint = "; it is made for FLUX.1, whose latents have 16 channels" if flux else ""
            raise FileFormatError(f"{path}: {name} is {found}, expected {tuple(expected)} here{hint}; {_REMEDY}")
    return tuple(name for name in shapes if name not in weights)


def _open(path: str | Path) -> Weights:
    """The tensors of a file, or of the one file of weights in a folder."""
    place = Path(path)
    if place.is_dir():
        files = [place / name for name in ("model.safetensors", "pytorch_model.bin")]
        place = next((file for file in files if file.is_file()), files[0])
    return open_tensors(place)


def _name_of_transformers(name: str) -> str | None:
    if name == "decoder.mask_token":
        return "mask_token"
    found = _BLOCKS.fullmatch(name)
    if found and found[3] in _BLOCK:
        return f"{'decoder_' if found[1].startswith('decoder') else ''}blocks.{found[2]}.{_BLOCK[found[3]]}.{found[4]}"
    module, _, part = name.rpartition(".")
    return f"{_OUTER[module]}.{part}" if module in _OUTER else None


def _fuse_queries(weights: Weights) -> Weights:
    """Stack the projections of queries, keys and values, which transformers has apart."""
    apart = re.compile(r"(.+\.attn)\.[qkv]\.(\w+)")
    stacks = dict.fromkeys((found[1], found[2]) for name in weights if (found := apart.fullmatch(name)))
    kept = weights.rename(lambda name: None if apart.fullmatch(name) else name)
    return Weights.join([kept, Weights(dict(_stack(weights, *each) for each in stacks))])


def _stack(weights: Weights, module: str, part: str) -> tuple[str, Stored]:
    names = [f"{module}.{which}.{part}" for which in "qkv"]
    first = weights.shape(names[0])

    def read() -> Floats:
        return np.concatenate([weights[name] for name in names])

    return f"{module}.qkv.{part}", Stored(names[0], "float32", (3 * first[0], *first[1:]), read)
