"""LoRA files of all common dialects, read into one form: module -> (A, B) with alpha / rank folded in.

Dialects: diffusers and the reference (`unet.<module>.lora.down.weight`, and the older `...processor.to_k_lora.down`),
PEFT (`unet.<module>.lora_A.weight`, or its own `base_model.model.<module>.lora_A.weight`, scaled by the
adapter_config.json beside it), kohya, LyCORIS, OneTrainer and ComfyUI with diffusers or sgm block names, with dots or
underscores; see docs/algorithm.md, 12.2. LoHa, LoKr, DoRA, OFT, GLoRA, (IA)3, whole differences and embeddings are
refused by name.

A LoRA is used in two ways: as a subject's factors in an engine's slots (`core/subject.py`), or merged into the base's
weights (`weight_changes`). Only the latter takes convolutions and feed-forward layers.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.core.files import explain_read_errors
from dreammix_trt.core.hub_cache import find_snapshot
from dreammix_trt.core.lora_names import (
    adapters_of,
    family_of,
    find_foreign_kind,
    flat_modules,
    is_idle,
    join_first,
    place_of,
)
from dreammix_trt.core.lora_parts import PEFT_CONFIG, PEFT_FILES, AdapterScales, make_pair, read_tensors
from dreammix_trt.core.lora_words import add_card
from dreammix_trt.core.networks import kind_of
from dreammix_trt.core.recognise import recognise_file

log = logging.getLogger(__name__)

Floats = NDArray[np.float32]
Factors = dict[str, dict[str, tuple[Floats, Floats]]]
Target = Literal["patched", "raw", "both"]
TARGETS: tuple[Target, ...] = get_args(Target)
FILE_NAME = "pytorch_lora_weights.safetensors"
_USUAL = (FILE_NAME, PEFT_FILES[0], FILE_NAME.replace(".safetensors", ".bin"), *PEFT_FILES[1:])

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_SUFFIX = r"\.(?:safetensors|bin|pth?|ckpt)"
_FORM = "FILE[:scale[:target]]"


@dataclass(frozen=True)
class Lora:
    """A LoRA: `y += x @ A @ B`.

    factors: network ("unet", "text_encoder", "text_encoder_2") -> module by its diffusers name
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "text_model.encoder.layers.0.self_attn.q_proj") -> (A float32 (in, r), B float32 (r, out)), with alpha / rank
        folded into B. The A of a convolution is (in * kh * kw, r).
    rank: the largest r.
    source_path: the file.
    metadata: of the safetensors file, and what a card beside it adds (`lora_words.add_card`).
    kernels: "<network>.<module>" -> (kh, kw) of each convolution that is not 1x1.
    """

    factors: Factors
    rank: int
    source_path: Path
    metadata: dict[str, str]
    kernels: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA as a user asks for it.

    file: the file or its folder.
    scale: its strength.
    target: the UNet weights that it is applied to.
    """

    file: Path
    scale: float = 1.0
    target: Target = "patched"


def parse_lora(text: str, default_target: Target = "patched") -> LoraSpec:
    """Parse `FILE[:scale[:target]]`.

    text: scale is any finite number, target is "patched", "raw" or "both". Parsed from the right, so FILE may contain
        colons.
    default_target: used when the text names none.

    Raises InputError that names the invalid scale or target.
    """
    file, scale, target = text, "", str(default_target)
    parts = text.rsplit(":", 2)
    if len(parts) == 3 and _is_number(parts[1]) and not re.search(rf"[/\\]|{_SUFFIX}$", parts[2]):
        file, scale, target = parts
    elif len(parts) > 1 and _is_number(parts[-1]):
        file, scale = text.rsplit(":", 1)
    else:
        found = re.search(rf"{_SUFFIX}:(.*)", text)
        if found or parts[-1] in TARGETS:
            rest = found[1] if found else parts[-1]
            raise InputError(f"{text!r}: no scale in {rest!r}; give {_FORM}, for example FILE:0.8:both")
    if target not in TARGETS:
        raise InputError(f"{text!r}: unknown target {target!r}; allowed: {', '.join(TARGETS)} ({_FORM})")
    strength = float(scale or 1)
    if not math.isfinite(strength):
        raise InputError(f"{text!r}: scale is {scale}; it must be a finite number ({_FORM})")
    if not file:
        raise InputError(f"{text!r} names no file; give {_FORM}")
    return LoraSpec(Path(file), strength, target)


def read_lora(path: str | Path, unet_config: Mapping[str, Any] | None = None) -> Lora:
    """Read a LoRA. Its numbers may be float16, bfloat16 or float32.

    path: the file, or a directory as training leaves it (see `find_lora_file`).
    unet_config: the base's diffusers `unet/config.json`, needed to resolve names with underscores; None: SDXL's.

    Raises `FileFormatError` for a missing or truncated file, for names that are not a LoRA's (it lists them, and the
    model family if they reveal it), for half a pair, for values that are not finite, and for every kind of adapter that
    is not a LoRA.
    """
    path = find_lora_file(path)
    tensors, metadata = read_tensors(path)
    foreign = find_foreign_kind(tensors)
    if foreign:
        kind, remedy, names = foreign
        raise FileFormatError(f"{path}: {kind} ({join_first(names, 3)}); {remedy}")
    modules = _group_by_module(path, tensors, flat_modules(unet_config))
    scales = AdapterScales.of(path, metadata)
    factors: Factors = {}
    kernels: dict[str, tuple[int, int]] = {}
    for (network, module), parts in sorted(modules.items()):
        pair, kernel = make_pair(path, network, module, parts, scales)
        factors.setdefault(network, {})[module] = pair
        if kernel != (1, 1):
            kernels[f"{network}.{module}"] = kernel
    scales.tell_unused(path)
    rank = max(a.shape[1] for by_module in factors.values() for a, _ in by_module.values())
    return Lora(factors, rank, path, add_card(path, metadata), kernels)


def find_lora_file(path: str | Path) -> Path:
    """Find the LoRA file that a path means.

    path: the file, or a directory with `pytorch_lora_weights.safetensors`, PEFT's `adapter_model.safetensors`, one of
        these as `.bin`, or one other safetensors file. A directory without any of them may have folders
        `checkpoint-N/`, as accelerate leaves them, of which the highest N is used; or one folder of a PEFT adapter; or
        it may be a model's folder in the hub's cache.

    Raises `FileFormatError` when there is no such file, or several.
    """
    path = Path(path)
    with explain_read_errors(path):
        return _find_file(path)


def _find_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileFormatError(f"{path}: no such LoRA file or directory")
    path = find_snapshot(path)
    inside = sorted(each for each in path.iterdir() if each.is_dir())
    checkpoints = [(int(found[1]), each) for each in inside if (found := _CHECKPOINT.fullmatch(each.name))]
    adapters = [each for each in inside if (each / PEFT_CONFIG).is_file()]
    if len(adapters) > 1 and not (path / PEFT_CONFIG).is_file():
        names = ", ".join(each.name for each in adapters)
        raise FileFormatError(f"{path}: holds {len(adapters)} adapters of PEFT ({names}); name the folder of one")
    for folder in (path, *(each for _, each in sorted(checkpoints, reverse=True)), *adapters):
        usual = [folder / name for name in _USUAL if (folder / name).is_file()]
        files = usual[:1] or sorted(folder.glob("*.safetensors"))
        if len(files) == 1:
            return files[0]
        if files:
            raise FileFormatError(f"{folder}: holds no {FILE_NAME} but {len(files)} others; name the LoRA file itself")
    raise FileFormatError(f"{path}: holds no {FILE_NAME}; name the LoRA file itself")


def weight_changes(lora: Lora, network: str, scale: float) -> dict[str, Callable[[Floats], Floats]]:
    """The changes that merge a LoRA into a network.

    network: "unet" or "unet_raw" (both take the LoRA's UNet part), "text_encoder" or "text_encoder_2".
    scale: strength of the LoRA.

    Returns "<module>.weight" -> the function W -> W + scale * (A B)^T on float32 W (out, in) or (out, in, kh, kw). It
    returns a new array and raises `FileFormatError` for a W of another shape. `check_weights` checks beforehand that
    every module has a weight.
    """
    changes: dict[str, Callable[[Floats], Floats]] = {}
    for module, (a, b) in lora.factors.get(network_part(network), {}).items():
        shape = _weight_shape(lora, network, module)
        changes[f"{module}.weight"] = _Merge(f"{lora.source_path}: {network}.{module}", a, b, shape, scale)
    return changes


def check_weights(lora: Lora, network: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `FileFormatError` listing the LoRA's modules that the network lacks or has in another shape.

    shapes: tensor name -> shape, of the whole network.
    """
    factors = lora.factors.get(network_part(network), {})
    wrong = []
    for module in factors:
        needed, found = _weight_shape(lora, network, module), shapes.get(f"{module}.weight")
        if found is None:
            wrong.append(f"{module} {needed}, which the base lacks")
        elif not _same_shape(found, needed):
            wrong.append(f"{module} {needed}, here {tuple(found)}")
    if wrong:
        here = {name: shape[1] for name, shape in shapes.items() if len(shape) > 1}
        raise FileFormatError(
            f"{lora.source_path}: this LoRA is for {describe_other_base(factors, here)}; "
            f"{len(wrong)} modules of {network} do not fit: {join_first(wrong)}"
        )


def network_part(network: str) -> str:
    """The part of a LoRA that an engine's network takes: "unet" for both UNets and what attends for them."""
    return kind_of(network).factors or network


def describe_other_base(factors: Mapping[str, tuple[Floats, Floats]], here: Mapping[str, int]) -> str:
    """Say for which other base a LoRA is: "another base", with the family if the factors reveal one.

    factors: of the LoRA.
    here: module or weight -> number of inputs, of the present base; its own family is not mentioned.

    Returns a text such as "another base (Stable Diffusion 1.x)".
    """
    family = family_of({module: a.shape[0] for module, (a, _) in factors.items()})
    return f"another base ({family})" if family and family != family_of(here) else "another base"


@dataclass(frozen=True)
class _Merge:
    """W -> W + scale * (A B)^T for one module."""

    name: str
    a: Floats
    b: Floats
    shape: tuple[int, ...]
    scale: float

    def __call__(self, weight: Floats) -> Floats:
        if not _same_shape(weight.shape, self.shape):
            raise FileFormatError(
                f"{self.name} changes a weight of shape {self.shape}, the base's is {weight.shape}; "
                "the LoRA is for another base"
            )
        merged: Floats = (self.b.T @ self.a.T).reshape(weight.shape)
        merged *= np.float32(self.scale)
        merged += weight
        return merged


def _weight_shape(lora: Lora, network: str, module: str) -> tuple[int, ...]:
    part = network_part(network)
    a, b = lora.factors[part][module]
    kernel = lora.kernels.get(f"{part}.{module}", ())
    return (b.shape[1], a.shape[0] // math.prod(kernel), *kernel)


def _same_shape(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether shapes are equal, apart from the 1x1 kernel of a convolution that one file has as a linear layer."""
    return tuple(one) in (other, (*other, 1, 1)) or tuple(other) == (*one, 1, 1)


def _group_by_module(
    path: Path, tensors: Mapping[str, Floats], flat: Mapping[str, str]
) -> dict[tuple[str, str], dict[str, Floats]]:
    """(network, module) -> role -> tensor. Raises for names that are not understood and for duplicates."""
    modules: dict[tuple[str, str], dict[str, Floats]] = {}
    unmatched, twice, idle = [], [], []
    for key, value in tensors.items():
        place = place_of(key, flat)
        if place is None:
            unmatched.append(key)
            continue
        if is_idle(place):
            idle.append(key)
            continue
        parts = modules.setdefault((place.network, place.module), {})
        if place.role in parts:
            twice.append(key)
        parts[place.role] = value
    if unmatched:
        family = family_of({key: value.shape[1] for key, value in tensors.items() if value.ndim > 1})
        raise FileFormatError(
            f"{path}: {len(unmatched)} names are not understood as a LoRA's for this base: {join_first(unmatched)}"
            + (f"; it looks like a LoRA for {family}" if family else _describe_model(tensors))
        )
    if not modules:
        raise FileFormatError(f"{path}: holds nothing that SDXL has: {join_first(idle)}")
    if idle:
        log.warning("%s: %s are not used; SDXL's first text encoder has no projection", path, join_first(idle))
    adapters = adapters_of(tensors)
    if twice:
        what = f"holds {len(adapters)} adapters of PEFT ({', '.join(adapters)}); save each in a file of its own"
        if len(adapters) < 2:
            what = f"{len(twice)} factors appear twice, in two spellings: {join_first(twice)}"
        raise FileFormatError(f"{path}: {what}")
    if len(adapters) > 1:
        log.warning("%s: adapters %s are on different layers and count as one LoRA", path, ", ".join(adapters))
    return modules


def _describe_model(names: Iterable[str]) -> str:
    """What a file without a single LoRA's name is; nothing where that is not known."""
    if any(re.search("lora", name, re.IGNORECASE) for name in names):
        return ""
    kind = recognise_file(names)
    if kind is None:
        return "; this is a whole SDXL checkpoint, give it as the base (--base)"
    return "" if kind.startswith("not a model known here") else f"; this is {kind}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
