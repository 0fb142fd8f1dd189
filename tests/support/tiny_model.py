"""A complete SDXL in miniature with random weights: folder, patch, head, LoRA, written in a second."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTHS = (32, 32, 32)
TEXT_WIDTHS = (16, 24)
POOLED = 16
WORDS = ("a", "photo", "of", "sks", "mug", "on", "the", "table", "red", "blue", "clay", "an", "empty", "large")
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TinyModel:
    """folder: the diffusers folder; patch, head: their files inside it."""

    folder: Path
    patch: Path
    head: Path


def write_tiny_model(folder: Path, *, half: bool = True, seed: int = 0, native: int = 64) -> TinyModel:
    """Write the model; equal arguments give equal weights. Needs torch and diffusers (for shapes and `torch.save`)."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config(native))
        vae = AutoencoderKL(**vae_config(native))
    shapes = {
        "unet": {name: tuple(value.shape) for name, value in unet.state_dict().items()},
        "vae": {name: tuple(value.shape) for name, value in vae.state_dict().items()},
    }
    configs = {"unet": dict(unet.config), "vae": dict(vae.config)}
    vocabulary, merges = make_tiny_vocabulary()
    for number, name in enumerate(("text_encoder", "text_encoder_2")):
        configs[name] = text_config(number, len(vocabulary))
        shapes[name] = dict(list_text_shapes(configs[name]))
    for name, config in configs.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config, default=list))
        state = {key: random_weight(rng, key, shape) for key, shape in shapes[name].items()}
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        dtype = np.float16 if half else np.float32
        save_file({key: value.astype(dtype) for key, value in state.items()}, folder / name / f"{stem}.safetensors")
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        (folder / name).mkdir()
        (folder / name / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / name / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        end = "<|endoftext|>"
        special = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": pad}
        (folder / name / "special_tokens_map.json").write_text(json.dumps(special))
        tokenizer = {**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "epsilon"}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    patch, head = folder / "tiny.fooocus.patch", folder / "inpaint_head.pth"
    torch.save(make_tiny_patch(rng, shapes["unet"], configs["unet"], torch.from_numpy), patch)
    wide = torch.from_numpy(rng.standard_normal((WIDTHS[0], 9, 3, 3)).astype(np.float16) * np.float16(0.1))
    torch.save(OrderedDict(head=wide[:, 4:]), head)
    return TinyModel(folder, patch, head)


def unet_config(native: int) -> dict[str, Any]:
    return {
        "sample_size": native // 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": WIDTHS,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 2, 4),
        "norm_num_groups": 8,
        "cross_attention_dim": sum(TEXT_WIDTHS),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": POOLED + 6 * 8,
    }


def vae_config(native: int) -> dict[str, Any]:
    return {
        "block_out_channels": (8, 8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "scaling_factor": 0.13025,
        "sample_size": native,
    }


def text_config(number: int, vocabulary: int) -> dict[str, Any]:
    """The first encoder is a CLIPTextModel, the second has a projection; both end a text at the last token id."""
    return {
        "hidden_size": TEXT_WIDTHS[number],
        "intermediate_size": 2 * TEXT_WIDTHS[number],
        "num_hidden_layers": (2, 3)[number],
        "num_attention_heads": (2, 4)[number],
        "max_position_embeddings": 77,
        "vocab_size": vocabulary,
        "hidden_act": ("quick_gelu", "gelu")[number],
        "layer_norm_eps": 1e-5,
        "projection_dim": POOLED,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0,
        "architectures": [("CLIPTextModel", "CLIPTextModelWithProjection")[number]],
        "model_type": "clip_text_model",
    }


def list_text_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, wide = config["hidden_size"], config["intermediate_size"]
    yield "text_model.embeddings.token_embedding.weight", (config["vocab_size"], width)
    yield "text_model.embeddings.position_embedding.weight", (77, width)
    linears = {f"self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (wide, width), "mlp.fc2": (width, wide)}
    for layer in range(config["num_hidden_layers"]):
        here = f"text_model.encoder.layers.{layer}"
        for name, shape in linears.items():
            yield f"{here}.{name}.weight", shape
            yield f"{here}.{name}.bias", shape[:1]
        for norm in ("layer_norm1", "layer_norm2"):
            yield f"{here}.{norm}.weight", (width,)
            yield f"{here}.{norm}.bias", (width,)
    yield "text_model.final_layer_norm.weight", (width,)
    yield "text_model.final_layer_norm.bias", (width,)
    if config["architectures"] == ["CLIPTextModelWithProjection"]:
        yield "text_projection.weight", (config["projection_dim"], width)


def random_weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Floats:
    """Variance-keeping matrices, norms about one, small biases that still show when they go missing."""
    if len(shape) >= 2:
        spread = 0.5 if name.startswith("text_model.embeddings") else int(np.prod(shape[1:])) ** -0.5
        return (rng.standard_normal(shape) * spread).astype(np.float32)
    centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
    return (centre + 0.1 * rng.standard_normal(shape)).astype(np.float32)


def make_tiny_patch(
    rng: np.random.Generator,
    shapes: dict[str, tuple[int, ...]],
    config: dict[str, Any],
    tensor_of: Callable[[NDArray[Any]], Any],
) -> dict[str, Any]:
    """Two tensors in three, biases too, ranges by turns one number and one per output channel."""
    from dreammix_trt.core.keymap import sgm_to_diffusers

    patch = {}
    for number, (key, name) in enumerate(sorted(sgm_to_diffusers(config).items())):
        if number % 3 == 2:
            continue
        shape = shapes[name]
        range_shape = (shape[0],) + (1,) * (len(shape) - 1) if number % 2 and len(shape) > 1 else ()
        reach = 0.3 * int(np.prod(shape[1:])) ** -0.5
        low, high = (np.asarray(sign * reach * (0.5 + rng.random(range_shape)), np.float16) for sign in (-1, 1))
        patch[key] = tuple(tensor_of(part) for part in (rng.integers(0, 256, shape, np.uint8), low, high))
    return patch


def random_factors(
    modules: dict[str, tuple[int, int]], *, rank: int = 4, seed: int = 1, size: float = 0.3
) -> dict[str, tuple[Floats, Floats]]:
    """module -> (A (in, rank), B (rank, out)) for modules given as name -> (in, out)."""
    rng = np.random.default_rng(seed)
    return {
        name: (
            (rng.standard_normal((inputs, rank)) * inputs**-0.5).astype(np.float32),
            (rng.standard_normal((rank, outputs)) * size).astype(np.float32),
        )
        for name, (inputs, outputs) in modules.items()
    }


def write_tiny_lora(
    path: Path, factors: dict[str, tuple[Floats, Floats]], *, dialect: str = "diffusers", alpha: float | None = None
) -> Path:
    """A LoRA file of UNet factors in the "diffusers", "peft" or "kohya" dialect; alpha: kohya's."""
    from safetensors.numpy import save_file

    sides = {"diffusers": ("lora.down", "lora.up"), "peft": ("lora_A", "lora_B"), "kohya": ("lora_down", "lora_up")}
    down, up = sides[dialect]
    tensors = {}
    for module, (a, b) in factors.items():
        name = f"lora_unet_{module.replace('.', '_')}" if dialect == "kohya" else f"unet.{module}"
        scale = 1.0 if alpha is None else alpha / a.shape[1]
        tensors[f"{name}.{down}.weight"] = np.ascontiguousarray(a.T)
        tensors[f"{name}.{up}.weight"] = np.ascontiguousarray(b.T / np.float32(scale))
        if alpha is not None:
            tensors[f"{name}.alpha"] = np.full((), alpha, np.float32)
    save_file(tensors, path, {"format": "pt"})
    return path


def unet_attention_modules(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """name -> (in, out) of to_k, to_v, to_out.0 of every attention, as the reference trains them."""
    from dreammix_trt.core.keymap import sgm_to_diffusers

    channels, cross = tuple(config["block_out_channels"]), config["cross_attention_dim"]
    modules = {}
    for name in sgm_to_diffusers(config).values():
        module = name.removesuffix(".weight")
        if not module.endswith(("to_k", "to_v", "to_out.0")):
            continue
        block = int(module.split(".")[1]) if not module.startswith("mid_block") else -1
        width = channels[::-1][block] if module.startswith("up_blocks") else channels[block]
        modules[module] = (cross if "attn2.to_k" in module or "attn2.to_v" in module else width, width)
    return modules


def make_tiny_vocabulary() -> tuple[dict[str, int], list[str]]:
    """A CLIP-style byte-level BPE in which every word of `WORDS` is one token; id 0 is "!"."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + n for n in range(256 - len(printable))]
    letters = [chr(code) for code in printable + others]
    merges: list[str] = []
    for word in WORDS:
        left = word[0] if len(word) > 1 else f"{word}</w>"
        for place, letter in enumerate(word[1:], start=2):
            right = f"{letter}</w>" if place == len(word) else letter
            if f"{left} {right}" not in merges:
                merges.append(f"{left} {right}")
            left += right
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    return {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, merges
