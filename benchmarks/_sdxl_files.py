"""SDXL files with random weights, in the formats users hold and at any width: checkpoints, patch, head, LoRA.

Values depend on (seed, component, diffusers name) alone, so a folder and a single file of one seed hold the same model.
Every tensor is drawn anew: repeated data would de-duplicate and flatter file and engine sizes. Tensors are made and
written one at a time, so a full SDXL (7 GB) needs the memory of its largest tensor. Independent of the readers in
dreammix_trt.core but for the UNet's names; the tests hold the formats against diffusers' own converters.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.checkpoint import EMBEDDED
from dreammix_trt.core.keymap import PREFIX, sgm_to_diffusers

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
Config = dict[str, Any]
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
TOKENIZERS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}  # name -> padding token
VOCABULARY = 49408

_CODES = {"float16": "F16", "float32": "F32", "bfloat16": "BF16", "int64": "I64"}
_KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
_SINGLE = {
    "unet": "model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
    "vae": "first_stage_model.",
}
# What ends a residual branch is scaled down, so that a stream through some hundred branches stays of order one.
_BRANCH_ENDS = ("proj_out", "conv2", "to_out.0", "ff.net.2", "mlp.fc2", "self_attn.out_proj")
# Time, text and attention would hardly be heard at gain 1: SiLU gives back a third of its input's mean square, and
# attention averages over tokens.
_LOUD = ("linear_1", "linear_2", "time_emb_proj", "to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "mlp.fc1", "mlp.fc2")
_TEXT_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj")
_CHUNK = 1 << 16


@dataclass(frozen=True)
class FileTensor:
    """A tensor to be written: dtype "float16", "float32", "bfloat16" (made as its bits, uint16), "uint8" or "int64"."""

    dtype: str
    shape: Shape
    make: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _numpy_type(self.dtype).itemsize


# Configurations


def sdxl_configs(width: float = 1.0, *, depth: int | None = None, side: int = 1024) -> dict[str, Config]:
    """The config.json of unet, vae, text_encoder, text_encoder_2 and scheduler, as SDXL base 1.0 has them.

    width: 1 is SDXL itself; 0.2 has UNet channels 64/128/256, VAE 32/64/128/128, text 128 and 256; 0.1, the smallest,
    32/64/128, 32/64/128/128, 64 and 128. Heads stay 64 wide and norms keep 32 groups, as readers of single files
    expect. Below 1 the vocabulary is the embedded model's, and the text encoders have 6 and 12 layers.
    depth: at most this many transformer layers a block, and depth + 1 layers in a text encoder. side: native pixels.
    """
    full, most = width == 1, depth or 32
    first, vae = (32 * max(1, round(n * width)) for n in (10, 4))
    channels = [first, 2 * first, 4 * first]
    text = [64 * max(1, round(heads * width)) for heads in (12, 20)]
    vocabulary = VOCABULARY if full else len(_embedded_tokenizer()[0])
    layers = [min(n, most + 1) for n in ((12, 32) if full else (6, 12))]
    unet = {
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.19.0.dev0", "act_fn": "silu",
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "attention_head_dim": [max(1, n // 64) for n in channels], "block_out_channels": channels,
        "center_input_sample": False, "cross_attention_dim": sum(text), "conv_in_kernel": 3, "conv_out_kernel": 3,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
        "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-05,
        "norm_num_groups": 32, "out_channels": 4, "projection_class_embeddings_input_dim": text[1] + 6 * 256,
        "resnet_time_scale_shift": "default", "sample_size": side // 8, "time_embedding_type": "positional",
        "transformer_layers_per_block": [min(n, most) for n in (1, 2, 10)], "upcast_attention": None,
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": True,
    }  # fmt: skip
    return {
        "unet": unet,
        "vae": _vae_config(vae, side),
        "text_encoder": _text_config("CLIPTextModel", text[0], layers[0], "quick_gelu", vocabulary),
        "text_encoder_2": _text_config("CLIPTextModelWithProjection", text[1], layers[1], "gelu", vocabulary),
        "scheduler": {
            "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", "beta_end": 0.012,
            "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
            "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
            "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
            "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False,
        },
    }  # fmt: skip


def _vae_config(first: int, side: int) -> Config:
    return {
        "_class_name": "AutoencoderKL", "_diffusers_version": "0.20.0.dev0", "act_fn": "silu",
        "block_out_channels": [first, 2 * first, 4 * first, 4 * first], "down_block_types": ["DownEncoderBlock2D"] * 4,
        "force_upcast": True, "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
        "out_channels": 3, "sample_size": side, "scaling_factor": 0.13025, "up_block_types": ["UpDecoderBlock2D"] * 4,
    }  # fmt: skip


def _text_config(kind: str, width: int, layers: int, act: str, vocabulary: int) -> Config:
    # The token ids 0, 1, 2 are SDXL's own and wrong: transformers takes eos 2 as "the largest id ends the text".
    return {
        "architectures": [kind], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
        "hidden_act": act, "hidden_size": width, "initializer_factor": 1.0, "initializer_range": 0.02,
        "intermediate_size": 4 * width, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
        "model_type": "clip_text_model", "num_attention_heads": width // 64, "num_hidden_layers": layers,
        "pad_token_id": 1, "projection_dim": width, "torch_dtype": "float16", "vocab_size": vocabulary,
    }  # fmt: skip


def shapes_of(component: str, config: Mapping[str, Any]) -> dict[str, Shape]:
    """Every tensor of a component: diffusers' (transformers' classic `text_model.`) name -> shape. Needs torch.

    The models are built on torch's meta device and take no memory.
    """
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        if component in ("unet", "vae"):
            kind = UNet2DConditionModel if component == "unet" else AutoencoderKL
            model = kind.from_config(dict(config))
        else:
            kind = CLIPTextModel if component == "text_encoder" else CLIPTextModelWithProjection
            model = kind(CLIPTextConfig(**config))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if component in ("unet", "vae"):
        return shapes
    heads = ("text_model.", "text_projection.")
    return {name if name.startswith(heads) else f"text_model.{name}": shape for name, shape in shapes.items()}


# Values


def spread_of(name: str, shape: Shape) -> tuple[float, float]:
    """(mean, standard deviation) of a weight, such that activations stay of order one through the whole network."""
    if len(shape) == 1:
        return (0.0, 0.02) if name.endswith("bias") else (1.0, 0.05)
    module = name.removesuffix(".weight")
    if module.endswith("embedding"):
        return 0.0, 0.02
    gain = 1.0
    if module.endswith(_BRANCH_ENDS):
        gain = 0.3
    elif module.endswith(_LOUD):
        gain = 1.7
    elif module.endswith("conv_out"):  # pictures lie in [-1, 1]
        gain = 0.6 if module.startswith("decoder") else 1.7
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))


def draw(seed: int, component: str, name: str, shape: Shape, dtype: str = "float16") -> Array:
    """A tensor's values, normal about `spread_of`, the same for the same arguments; float16 is float32 rounded.

    Every value is one of 65536 equally likely quantiles: a table look-up, near the speed of a disk.
    """
    if name == "conv_in.weight" and shape[1] == 9:  # inpainting UNets: the same four channels and five more
        extra = draw(seed, component, "conv_in.inpaint.weight", (shape[0], 5, *shape[2:]), dtype)
        plain = draw(seed, component, name, (shape[0], 4, *shape[2:]), dtype)
        return np.concatenate([plain, extra], 1)
    mean, spread = spread_of(name, shape)
    table = _as_stored(mean + spread * _quantiles(), dtype)
    source, values = _generator(seed, component, name), np.empty(math.prod(shape), table.dtype)
    for start in range(0, values.size, _CHUNK):
        part = values[start : start + _CHUNK]
        np.take(table, _raw(source, 2 * part.size).view(np.uint16), out=part, mode="wrap")
    return values.reshape(shape)


@cache
def _quantiles() -> Array:
    normal = NormalDist()
    upper = np.array([normal.inv_cdf((n + 0.5) / 65536) for n in range(32768, 65536)], np.float32)
    return np.concatenate([-upper[::-1], upper])


def _generator(seed: int, *names: str) -> np.random.SFC64:
    digest = hashlib.sha256("/".join([str(seed), *names]).encode()).digest()
    return np.random.SFC64(int.from_bytes(digest[:16], "little"))


def _raw(source: np.random.SFC64, count: int) -> npt.NDArray[np.uint8]:
    return np.asarray(source.random_raw(-(-count // 8))).view(np.uint8)[:count]


def _normal(shape: Shape, *names: str, seed: int) -> npt.NDArray[np.float32]:
    return np.random.Generator(_generator(seed, *names)).standard_normal(shape, dtype=np.float32)


def _numpy_type(dtype: str) -> np.dtype[Any]:
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def _as_stored(values: Array, dtype: str) -> Array:
    """As `dtype`; bfloat16, which numpy lacks, as its bits, rounded to nearest."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _weights(component: str, config: Mapping[str, Any], seed: int, dtype: str) -> dict[str, FileTensor]:
    def entry(name: str, shape: Shape) -> FileTensor:
        return FileTensor(dtype, shape, lambda: draw(seed, component, name, shape, dtype))

    return {name: entry(name, shape) for name, shape in shapes_of(component, config).items()}


# Checkpoints


def write_folder(
    path: Path,
    configs: Mapping[str, Config],
    *,
    seed: int = 0,
    dtype: str = "float16",
    variant: str = "",
    shards: int = 1,
    format: str = "safetensors",
    in_channels: int = 4,
) -> Path:
    """A checkpoint in diffusers' layout. variant: "" or "fp16" (in the file names); format: "safetensors" or "bin";
    shards: files a component, with an index where more than one; in_channels: 4, or 9 for an inpainting UNet."""
    configs = _with_channels(configs, in_channels)
    for name in COMPONENTS:
        folder = path / name
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "config.json", configs[name])
        _write_component(folder, _weights(name, configs[name], seed, dtype), variant, shards, format)
    (path / "scheduler").mkdir(exist_ok=True)
    _write_json(path / "scheduler" / "scheduler_config.json", configs["scheduler"])
    write_tokenizers(path, configs)
    kinds = {name: ["transformers", "CLIPTokenizer"] for name in TOKENIZERS}
    kinds |= {name: ["transformers", configs[name]["architectures"][0]] for name in COMPONENTS[2:]}
    kinds |= {name: ["diffusers", configs[name]["_class_name"]] for name in ("unet", "vae", "scheduler")}
    index = {"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.19.0.dev0"}
    _write_json(path / "model_index.json", {**index, "force_zeros_for_empty_prompt": True, **kinds})
    return path


def write_single_file(
    path: Path, configs: Mapping[str, Config], *, seed: int = 0, dtype: str = "float16", in_channels: int = 4
) -> Path:
    """The same checkpoint as one `.safetensors` under the names that SDXL was published with (sgm, OpenCLIP, ldm)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = single_file_entries(_with_channels(configs, in_channels), seed, dtype)
    write_safetensors(path, entries, {"format": "pt"})
    return path


def single_file_entries(configs: Mapping[str, Config], seed: int, dtype: str) -> dict[str, FileTensor]:
    """The tensors of `write_single_file` (SDXL: 2515), nothing drawn yet."""
    unet = {ours: theirs for theirs, ours in sgm_to_diffusers(configs["unet"]).items()}
    tensors = {name: _weights(name, configs[name], seed, dtype) for name in COMPONENTS}
    positions = FileTensor("int64", (1, 77), lambda: np.arange(77, dtype=np.int64)[None])
    renamed = {
        "unet": {unet[name]: entry for name, entry in tensors["unet"].items()},
        "vae": _ldm_vae(tensors["vae"], len(configs["vae"]["block_out_channels"])),
        "text_encoder": {**tensors["text_encoder"], "text_model.embeddings.position_ids": positions},
        "text_encoder_2": _open_clip(tensors["text_encoder_2"]),
    }
    return {_SINGLE[part] + name: entry for part, entries in renamed.items() for name, entry in entries.items()}


def write_tokenizers(path: Path, configs: Mapping[str, Config]) -> None:
    """tokenizer/ and tokenizer_2/ with exactly the text encoders' vocabulary: the embedded model's words and, for a
    larger one, pairs of letters."""
    end = "<|endoftext|>"
    vocabulary, merges = _tokenizer(int(configs["text_encoder"]["vocab_size"]))
    for name, pad in TOKENIZERS.items():
        (path / name).mkdir(parents=True, exist_ok=True)
        _write_json(path / name / "vocab.json", vocabulary)
        (path / name / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        special = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": pad}
        _write_json(path / name / "special_tokens_map.json", special)
        told = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
        _write_json(path / name / "tokenizer_config.json", {**special, **told})


def _with_channels(configs: Mapping[str, Config], in_channels: int) -> dict[str, Config]:
    return {**configs, "unet": {**configs["unet"], "in_channels": in_channels}}


def _write_component(folder: Path, tensors: dict[str, FileTensor], variant: str, shards: int, format: str) -> None:
    bin_text = format == "bin" and folder.name.startswith("text")
    stem = "pytorch_model" if bin_text else "model" if folder.name.startswith("text") else "diffusion_pytorch_model"
    dotted = f".{variant}" if variant else ""
    total, before, place = sum(entry.nbytes for entry in tensors.values()), 0, {}
    for name, entry in tensors.items():
        number = min(shards, 1 + before * shards // total)
        part = f"-{number:05d}-of-{shards:05d}" if shards > 1 else ""
        place[name] = f"{stem}{dotted}{part}.{format}"
        before += entry.nbytes
    for file in sorted(set(place.values())):
        held = {name: entry for name, entry in tensors.items() if place[name] == file}
        if format == "bin":
            _torch_save(folder / file, {name: (entry,) for name, entry in held.items()})
        else:
            write_safetensors(folder / file, held, {"format": "pt"})
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": place}
        _write_json(folder / f"{stem}.{format}.index{dotted}.json", index)


def _ldm_vae(tensors: Mapping[str, FileTensor], levels: int) -> dict[str, FileTensor]:
    """ldm counts the decoder's blocks from the picture inwards and has the attention's matrices as 1x1 convolutions."""

    def level(match: re.Match[str]) -> str:
        return f"up.{levels - 1 - int(match[1])}."

    renamed = {}
    for name, entry in tensors.items():
        attention = ".attentions." in name
        name = re.sub(r"up_blocks\.(\d+)\.", level, name).replace("down_blocks.", "down.")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
        name = re.sub(r"mid_block\.attentions\.0", "mid.attn_1", name)
        name = name.replace(".resnets.", ".block.").replace("samplers.0.", "sample.").replace("conv_norm_", "norm_")
        name = name.replace("conv_shortcut", "nin_shortcut")
        if attention:
            name = name.replace("group_norm", "norm").replace("to_out.0", "proj_out").replace(".to_", ".")
            if len(entry.shape) == 2:
                entry = _change(entry, (*entry.shape, 1, 1), lambda value: value[:, :, None, None])
        renamed[name] = entry
    return renamed


def _open_clip(tensors: Mapping[str, FileTensor]) -> dict[str, FileTensor]:
    """OpenCLIP has query, key and value in one matrix and the projection transposed."""
    outer = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    inner = {
        "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }  # fmt: skip
    dtype = tensors["text_projection.weight"].dtype
    renamed = {"logit_scale": FileTensor(dtype, (), lambda: _as_stored(np.array(math.log(100)), dtype))}
    for name, entry in tensors.items():
        match = re.match(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", name)
        if name == "text_projection.weight":
            renamed["text_projection"] = _change(entry, entry.shape[::-1], np.transpose)
        elif match is None:
            renamed[outer[name]] = entry
        elif match[2] in inner:
            renamed[f"transformer.resblocks.{match[1]}.{inner[match[2]]}.{match[3]}"] = entry
        elif match[2] == "self_attn.q_proj":
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            renamed[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"] = _join(parts)
    return renamed


def _change(entry: FileTensor, shape: Shape, change: Callable[[Array], Array]) -> FileTensor:
    return FileTensor(entry.dtype, shape, lambda: change(entry.make()))


def _join(parts: Sequence[FileTensor]) -> FileTensor:
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return FileTensor(parts[0].dtype, shape, lambda: np.concatenate([part.make() for part in parts]))


@cache
def _embedded_tokenizer() -> tuple[dict[str, int], list[str]]:
    folder = EMBEDDED / "tokenizer"
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    return json.loads((folder / "vocab.json").read_text(encoding="utf-8")), [merge for merge in merges if merge]


def _tokenizer(size: int) -> tuple[dict[str, int], list[str]]:
    """CLIP's order: 256 letters, the same as word ends, one token a merge, two marks."""
    known, merges = _embedded_tokenizer()
    tokens, merges = sorted(known, key=known.__getitem__)[:-2], list(merges)
    pairs = ((left, right) for right in tokens[511::-1] for left in tokens[:256])
    there = set(tokens)
    for left, right in itertools.takewhile(lambda _: len(tokens) < size - 2, pairs):
        if left + right not in there:
            tokens.append(left + right)
            merges.append(f"{left} {right}")
    return {token: n for n, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, merges


# Patch, head and LoRA


def patch_keys(unet_config: Mapping[str, Any], keys: str = "v26") -> dict[str, str]:
    """sgm -> diffusers names of a patch's tensors: "all", or "v26", which omits 36 of SDXL's 60 deepest blocks.

    Which 36 is not known; here they are all but the first four of every ten (docs/algorithm.md, 11.1).
    """
    names = sgm_to_diffusers(unet_config)
    if keys == "all":
        return names
    deepest = len(unet_config["block_out_channels"]) - 1
    kept = round(0.4 * unet_config["transformer_layers_per_block"][-1])
    place = re.compile(rf"(?:down_blocks\.{deepest}|mid_block|up_blocks\.0)\..*transformer_blocks\.(\d+)\.")
    layer = {key: match for key, name in names.items() if (match := place.match(name))}
    return {key: name for key, name in names.items() if key not in layer or int(layer[key][1]) < kept}


def write_patch(path: Path, configs: Mapping[str, Config], *, seed: int = 1, keys: str = "v26") -> Path:
    """A `*.fooocus.patch`: sgm name -> (uint8 tensor, min, max float16), ranges by output channel (out, 1, ...).

    The deltas have about a hundredth of the weights' standard deviation.
    """
    shapes = shapes_of("unet", configs["unet"])
    named = patch_keys(configs["unet"], keys)
    _torch_save(path, {key: _delta(seed, name, shapes[name]) for key, name in named.items()})
    return path


def write_head(path: Path, configs: Mapping[str, Config], *, seed: int = 2) -> Path:
    """The inpaint head's `.pth`: "head", half (C, 5, 3, 3), a slice of a (C, 9, 3, 3) tensor that is saved whole."""
    import torch

    wide = _normal((configs["unet"]["block_out_channels"][0], 9, 3, 3), "head", seed=seed) * np.float32(0.3 / 81**0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"head": torch.from_numpy(wide).half()[:, 4:]}, path)
    return path


def write_lora(
    path: Path,
    configs: Mapping[str, Config],
    *,
    rank: int = 4,
    seed: int = 3,
    dialect: str = "reference",
    modules: Sequence[str] = ("to_k", "to_v", "to_out.0"),
    text_encoders: bool = False,
    dtype: str = "float16",
    convs: bool = False,
    feed_forward: bool = False,
) -> Path:
    """A LoRA as `.safetensors` whose change is about 2 % of each weight; equal in every dialect but for its spelling.

    dialect: "reference" (diffusers), "peft" (with adapter metadata), "processor" (diffusers before 0.20; attention
    only), "kohya" and "kohya_sgm" (block names of diffusers and of sgm). peft and kohya have alpha = rank / 2 and
    twice the `up` factor. modules: ends of the UNet's module names; convs and feed_forward add what LCM-LoRA has.
    """
    wanted = (*modules, *(_FEED_FORWARD if feed_forward else ()), *(("time_emb_proj",) if convs else ()))
    sgm = {name: key for key, name in sgm_to_diffusers(configs["unet"]).items()}
    halved = dialect in ("peft", "kohya", "kohya_sgm")
    entries: dict[str, FileTensor] = {}
    adapted: dict[str, set[str]] = {}
    for network in COMPONENTS[:1] + (COMPONENTS[2:] if text_encoders else ()):
        ends = wanted if network == "unet" else (*_TEXT_MODULES, *wanted)
        for module, shape in _lora_modules(network, configs[network], ends, convs):
            target = next((end for end in ends if module.endswith(f".{end}")), module)
            adapted.setdefault(network, set()).add(target)
            down, up = _lora_factors(seed, network, module, shape, rank)
            if halved:  # rounded first: doubling is exact then, and the dialects agree to the last bit
                up = 2 * (up.astype(np.float16) if dtype == "float16" else up)
            key = sgm[f"{module}.weight"] if dialect == "kohya_sgm" and network == "unet" else module
            down_key, up_key, alpha_key = _lora_names(dialect, network, key.removesuffix(".weight"))
            entries |= {down_key: _from_values(down, dtype), up_key: _from_values(up, dtype)}
            if alpha_key:
                entries[alpha_key] = _from_values(np.array(rank / 2), dtype)
    metadata = {"format": "pt"}
    if dialect == "peft":
        told = {
            f"{network}.{key}": value
            for network, names in adapted.items()
            for key, value in {"r": rank, "lora_alpha": rank / 2, "target_modules": sorted(names)}.items()
        }
        metadata["lora_adapter_metadata"] = json.dumps(told, sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, entries, metadata)
    return path


def _delta(seed: int, name: str, shape: Shape) -> tuple[FileTensor, FileTensor, FileTensor]:
    def codes() -> Array:
        return _raw(_generator(seed, "patch", name), math.prod(shape)).reshape(shape)

    def limit(sign: int) -> FileTensor:
        # uniform codes between -r and r have a standard deviation of r / sqrt(3)
        reach = sign * 0.01 * math.sqrt(3) * spread_of(name, shape)[1]
        share = np.random.Generator(_generator(seed, "patch", name, str(sign))).uniform(0.5, 1.5, along)
        return _from_values(reach * share, "float16")

    along = (shape[0],) + (1,) * (len(shape) - 1)
    return FileTensor("uint8", shape, codes), limit(-1), limit(1)


def _lora_modules(network: str, config: Config, ends: Sequence[str], convs: bool) -> Iterator[tuple[str, Shape]]:
    dotted = tuple(f".{end}" for end in ends)
    for name, shape in shapes_of(network, config).items():
        module = name.removesuffix(".weight")
        conv = convs and len(shape) == 4 and module not in ("conv_in", "conv_out")
        if module != name and len(shape) > 1 and (conv or module.endswith(dotted)):
            yield module, shape


def _lora_factors(seed: int, network: str, module: str, shape: Shape, rank: int) -> tuple[Array, Array]:
    """down (rank, in, ...) and up (out, rank, 1, ...), float16-sized: the product's spread is 2 % of the weight's."""
    inputs, ones = math.prod(shape[1:]), (1,) * (len(shape) - 2)
    down = _normal((rank, *shape[1:]), "lora", network, module, "down", seed=seed) * np.float32(inputs**-0.5)
    spread = 0.02 * spread_of(f"{module}.weight", shape)[1] * math.sqrt(inputs / rank)
    up = _normal((shape[0], rank, *ones), "lora", network, module, "up", seed=seed) * np.float32(spread)
    return down, up


def _lora_names(dialect: str, network: str, module: str) -> tuple[str, str, str]:
    """The names of down, up and alpha ("": none)."""
    if dialect.startswith("kohya"):
        stem = f"{_KOHYA[network]}_{module.removeprefix(PREFIX).replace('.', '_')}"
        return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"
    stem, text = f"{network}.{module}", network != "unet"
    if dialect == "peft":
        return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", ""
    inner = ".lora_linear_layer" if text else ".lora"
    if dialect == "processor" and not text:
        stem, inner = re.sub(r"\.(to_[qkv]|to_out)(?:\.0)?$", r".processor.\1_lora", stem), ""
        if not stem.endswith("_lora"):
            raise ValueError(f"{module}: the processor dialect has names for attention only")
    elif dialect not in ("reference", "processor"):
        raise ValueError(f"dialect {dialect!r}: expected reference, peft, processor, kohya or kohya_sgm")
    return f"{stem}{inner}.down.weight", f"{stem}{inner}.up.weight", ""


def _from_values(values: Array, dtype: str) -> FileTensor:
    return FileTensor(dtype, values.shape, lambda: _as_stored(values, dtype))


# Containers


def write_safetensors(path: Path, entries: Mapping[str, FileTensor], metadata: Mapping[str, str]) -> None:
    """The format from its description: length of the header (8 bytes), JSON, then the tensors without gaps."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    order = sorted(entries, key=lambda name: (-_numpy_type(entries[name].dtype).itemsize, name))
    end = 0
    for name in order:
        entry, start = entries[name], end
        end += entry.nbytes
        header[name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            _make(entries[name]).tofile(file)


def _torch_save(path: Path, tree: Mapping[str, tuple[FileTensor, ...]]) -> None:
    """`torch.save` of name -> tensor, or tuple of tensors; the tensors are in a mapped scratch file, not in memory."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = [-(-entry.nbytes // 64) * 64 for parts in tree.values() for entry in parts]
    with tempfile.TemporaryFile(dir=path.parent) as scratch:
        scratch.truncate(sum(sizes))
        mapped = np.memmap(scratch, np.uint8, "r+")
        places = iter(np.cumsum([0, *sizes]).tolist())

        def tensor(entry: FileTensor) -> Any:
            start = next(places)
            values = (
                np.asarray(mapped[start : start + entry.nbytes]).view(_numpy_type(entry.dtype)).reshape(entry.shape)
            )
            values[...] = _make(entry)
            made = torch.from_numpy(values)
            return made.view(torch.bfloat16) if entry.dtype == "bfloat16" else made

        made = OrderedDict((name, tuple(tensor(entry) for entry in parts)) for name, parts in tree.items())
        torch.save({name: parts if len(parts) > 1 else parts[0] for name, parts in made.items()}, path)


def _make(entry: FileTensor) -> Array:
    values = np.ascontiguousarray(entry.make()).reshape(entry.shape)
    assert values.dtype == _numpy_type(entry.dtype), (values.dtype, entry.dtype)
    return values


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def summary(path: Path) -> dict[str, int]:
    """{"tensors", "parameters", "bytes"} of a weight file, or of all in a folder; a patch's ranges count as tensors."""
    if path.is_dir():
        kinds = ("safetensors", "bin", "pth", "patch")
        parts = [summary(file) for kind in kinds for file in sorted(path.rglob(f"*.{kind}"))]
        return {key: sum(part[key] for part in parts) for key in ("tensors", "parameters", "bytes")}
    shapes = _safetensors_shapes(path) if path.suffix == ".safetensors" else _torch_shapes(path)
    return {"tensors": len(shapes), "parameters": sum(map(math.prod, shapes)), "bytes": path.stat().st_size}


def _safetensors_shapes(path: Path) -> list[Shape]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [tuple(value["shape"]) for name, value in header.items() if name != "__metadata__"]


def _torch_shapes(path: Path) -> list[Shape]:
    import torch

    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    groups = (value if isinstance(value, tuple) else (value,) for value in loaded.values())
    return [tuple(tensor.shape) for group in groups for tensor in group]
