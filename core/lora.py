"""LoRA files in the dialects people hold, read into one form: module -> (A, B) with the scale folded in.

Dialects: diffusers and the reference (`unet.<module>.lora.down.weight`, and the older `...processor.to_k_lora.down`),
PEFT (`unet.<module>.lora_A.weight`), kohya with diffusers block names (`lora_unet_<module_with_underscores>.lora_down`,
`.alpha`). See reference/dreammix.md section 5.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core.errors import FileFormatError

Floats = NDArray[np.float32]
Factors = dict[str, dict[str, tuple[Floats, Floats]]]
NETWORKS = ("unet", "text_encoder", "text_encoder_2")
FILE_NAME = "pytorch_lora_weights.safetensors"

_PART = re.compile(
    r"(?P<module>.+?)(?:\.lora\.|\.lora_linear_layer\.|_lora\.|\.)"
    r"(?P<part>down|up|lora_down|lora_up|lora_A|lora_B|alpha)(?:\.default)?(?:\.weight)?$"
)
_ROLE: dict[str, Literal["down", "up", "alpha"]] = {
    "down": "down", "lora_down": "down", "lora_A": "down",
    "up": "up", "lora_up": "up", "lora_B": "up", "alpha": "alpha",
}  # fmt: skip
_FOREIGN = {"hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "oft_": "OFT"}
_KOHYA = {"lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te_": "text_encoder"}
# kohya writes every dot as an underscore; the names that hold underscores themselves are known and finite
_UNDERSCORED = (
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "to_q", "to_k", "to_v", "to_out", "proj_in",
    "proj_out", "text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "time_emb_proj",
    "time_embedding", "add_embedding",
    "linear_1", "linear_2", "conv_shortcut", "conv_in", "conv_out",
)  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """A LoRA: `y += x @ A @ B`.

    factors: network ("unet", "text_encoder", "text_encoder_2") -> module by its diffusers name
    ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0", "text_model.encoder.layers.0.self_attn.q_proj")
    -> A float32 (in, r), B float32 (r, out), with alpha / rank folded into B;
    rank: the largest r; source_path: the file; metadata: its safetensors metadata.
    """

    factors: Factors
    rank: int
    source_path: Path
    metadata: dict[str, str]


def read_lora(path: str | Path) -> Lora:
    """Read a LoRA file, or the one in a directory as training leaves it.

    Raises `FileFormatError` for a missing or truncated file, names that are no LoRA's, half a pair, LoHa, LoKr, DoRA
    and convolution LoRA (the names are listed).
    """
    path = lora_file(path)
    tensors, metadata = _read_tensors(path)
    _refuse_foreign(path, tensors)
    modules: dict[tuple[str, str], dict[str, Floats]] = {}
    unmatched = []
    for key, value in tensors.items():
        place = _place_of(key)
        if place is None:
            unmatched.append(key)
        else:
            network, module, role = place
            modules.setdefault((network, module), {})[role] = value
    if unmatched:
        raise FileFormatError(f"{path}: {len(unmatched)} names are not understood as a LoRA's: {_some(unmatched)}")
    if not modules:
        raise FileFormatError(f"{path}: holds no tensors")
    alphas = _peft_scales(path, metadata)
    factors: Factors = {}
    for (network, module), parts in sorted(modules.items()):
        factors.setdefault(network, {})[module] = _pair(path, f"{network}.{module}", parts, alphas)
    rank = max(a.shape[1] for by_module in factors.values() for a, _ in by_module.values())
    return Lora(factors, rank, path, metadata)


def lora_file(path: str | Path) -> Path:
    """The LoRA file itself: `path`, or in a directory `pytorch_lora_weights.safetensors` (or its only safetensors)."""
    path = Path(path)
    if path.is_dir():
        found = [path / FILE_NAME] if (path / FILE_NAME).is_file() else sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise FileFormatError(f"{path}: holds no {FILE_NAME}; name the LoRA file itself")
        return found[0]
    if not path.is_file():
        raise FileFormatError(f"{path}: no such LoRA file or directory")
    return path


def _read_tensors(path: Path) -> tuple[dict[str, Floats], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name).astype(np.float32) for name in names}, dict(file.metadata() or {})
    except TypeError as error:
        raise FileFormatError(f"{path}: {error}; save the LoRA as fp16 or fp32") from error
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{path}: truncated, or not a safetensors file ({error})") from error


def _refuse_foreign(path: Path, tensors: Mapping[str, Floats]) -> None:
    for mark, kind in _FOREIGN.items():
        named = [key for key in tensors if mark in key]
        if named:
            raise FileFormatError(f"{path}: a {kind} file ({_some(named, 3)}); only plain LoRA can be used")
    conv = [key for key, value in tensors.items() if value.ndim > 2 and max(value.shape[2:]) > 1]
    if conv:
        raise FileFormatError(
            f"{path}: holds LoRA of convolutions ({_some(conv, 3)}), which have no slot in the engine"
        )


def _place_of(key: str) -> tuple[str, str, Literal["down", "up", "alpha"]] | None:
    """(network, diffusers module, role) of a tensor name, or None when it is no LoRA's."""
    match = _PART.match(key)
    if match is None:
        return None
    module, role = match["module"], _ROLE[match["part"]]
    for prefix, network in _KOHYA.items():
        if module.startswith(prefix):
            return network, _normal(_dotted(module.removeprefix(prefix))), role
    for network in ("text_encoder_2", "text_encoder", "unet"):
        if module.startswith(f"{network}."):
            return network, _normal(module.removeprefix(f"{network}.")), role
    return None


def _dotted(name: str) -> str:
    """`down_blocks_1_attentions_0_..._to_out_0` -> `down_blocks.1.attentions.0....to_out.0`."""
    for word in _UNDERSCORED:
        name = re.sub(rf"(?<![a-z]){word}(?![a-z])", word.replace("_", "\0"), name)
    return name.replace("_", ".").replace("\0", "_")


def _normal(module: str) -> str:
    """One spelling: no `processor`, `to_out.0`, `text_model.` in front of a text encoder's layers."""
    module = module.replace(".processor.", ".")
    if module.startswith("encoder.layers."):
        module = f"text_model.{module}"
    return f"{module}.0" if module.endswith(".to_out") else module


def _pair(path: Path, name: str, parts: Mapping[str, Floats], alphas: Mapping[str, float]) -> tuple[Floats, Floats]:
    missing = {"down", "up"} - parts.keys()
    if missing:
        raise FileFormatError(f"{path}: {name} has no '{missing.pop()}' factor; the file is incomplete")
    down, up = _matrix(parts["down"]), _matrix(parts["up"])
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or 0 in (*down.shape, *up.shape):
        raise FileFormatError(
            f"{path}: {name} has factors of shapes {down.shape} and {up.shape}, which do not multiply"
        )
    if not (np.isfinite(down).all() and np.isfinite(up).all()):
        raise FileFormatError(f"{path}: {name} holds values that are not finite; the training diverged")
    rank = down.shape[0]
    if "alpha" in parts and parts["alpha"].size != 1:
        raise FileFormatError(f"{path}: {name} has an alpha of shape {parts['alpha'].shape}, expected one number")
    alpha = float(parts["alpha"].flat[0]) if "alpha" in parts else alphas.get(name.split(".")[0], 1.0) * rank
    if not math.isfinite(alpha):
        raise FileFormatError(f"{path}: {name} has alpha {alpha}, which is no number to scale with")
    return np.ascontiguousarray(down.T), np.ascontiguousarray(up.T) * np.float32(alpha / rank)


def _matrix(factor: Floats) -> Floats:
    """Without the 1x1 axes that factors of 1x1 convolutions carry."""
    matrix: Floats = factor.reshape(factor.shape[:2])
    return matrix


def _peft_scales(path: Path, metadata: Mapping[str, str]) -> dict[str, float]:
    """network -> alpha / rank from the adapter metadata newer diffusers files carry (absent: 1)."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        fields: dict[str, Any] = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise FileFormatError(f"{path}: its lora_adapter_metadata is not a JSON object ({error})") from error
    if any(fields.get(f"{network}.use_dora") for network in NETWORKS):
        raise FileFormatError(f"{path}: a DoRA file; only plain LoRA can be used, train without use_dora")
    try:
        return {
            network: float(fields[f"{network}.lora_alpha"]) / float(fields[f"{network}.r"])
            for network in NETWORKS
            if fields.get(f"{network}.lora_alpha") and fields.get(f"{network}.r")
        }
    except (ValueError, TypeError) as error:
        raise FileFormatError(f"{path}: its lora_adapter_metadata has no usable alpha and rank ({error})") from error


def _some(items: list[str], most: int = 6) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(sorted(items)[:most]) + more
