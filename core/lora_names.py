"""The names of tensors in LoRA files: from a tensor's name to network, module and role.

Trainers write a module's diffusers name (`unet.down_blocks.1...to_k.lora_A.weight`), or flatten its dots to underscores
(kohya: `lora_unet_down_blocks_1_..._to_k.lora_down.weight`), with diffusers' or sgm's module names. There is no
rule to turn underscores back into dots, so flat names are looked up in a table of all modules of the base's UNet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from dreammix_trt.core.keymap import PREFIX, sgm_to_diffusers

Role = Literal["down", "up", "mid", "alpha"]
NETWORKS = ("unet", "text_encoder", "text_encoder_2")
SDXL: dict[str, Any] = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
}

_ROLES: dict[str, Role] = {
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid", ".alpha": "alpha",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
}  # fmt: skip
_DOTTED = {f"{network}.": network for network in NETWORKS}
_FLAT = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
}
_PEFT, _TEXT_PARTS = "base_model.model.", ("text_model.", "encoder.layers.", "text_projection")
_FLAT_TEXT = re.compile(r"text_model_encoder_layers_(\d+)_(self_attn|mlp)_([qkv]_proj|out_proj|fc1|fc2)")
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}

_FOREIGN = {
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.dora_scale$|\.lora_magnitude_vector": "DoRA",
    r"\.oft_": "OFT",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.on_input$": "(IA)3",
    r"\.diff(_b)?$": "full-difference",
    r"\.[wb]_norm$": "norm-training",
    r"\.(lora_B|lora_up|lora\.up)\.bias$": "LoRA-with-biases",
    r"\.lora_embedding_": "embedding-LoRA",
}
_CONTEXTS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "the SDXL refiner", 2048: "SDXL"}
_OTHER_MODELS = {
    "double_blocks": "Flux",
    "single_transformer_blocks": "Flux",
    "joint_blocks": "Stable Diffusion 3",
    "transformer.transformer_blocks": "Stable Diffusion 3 or Flux",
    "down_blocks.0.attentions.": "Stable Diffusion 1.x or 2.x",
    "input_blocks.1.1.": "Stable Diffusion 1.x or 2.x",
}


class LoraKey(NamedTuple):
    """The place of a tensor in a LoRA.

    network: one of `NETWORKS`.
    module: by its diffusers name.
    role: its part in the pair of factors.
    """

    network: str
    module: str
    role: Role


def flat_modules(unet_config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """All modules of a UNet by their flat names in both naming schemes.

    unet_config: the base's diffusers `unet/config.json`; None: SDXL's topology.

    Returns flat name -> diffusers name: `input_blocks_4_1_proj_in` and `down_blocks_1_attentions_0_proj_in` both lead
    to `down_blocks.1.attentions.0.proj_in`.
    """
    table = {}
    for sgm, name in sgm_to_diffusers(SDXL if unet_config is None else unet_config).items():
        module, kind = name.rsplit(".", 1)
        if kind == "weight":
            table[module.replace(".", "_")] = module
            table[sgm.removeprefix(PREFIX).removesuffix(".weight").replace(".", "_")] = module
    return table


def place_of(key: str, flat: Mapping[str, str]) -> LoraKey | None:
    """The place of a tensor; None when its name is not a LoRA's.

    key: the tensor's name.
    flat: from `flat_modules`.
    """
    ending = next((each for each in _ROLES if key.endswith(each)), None)
    if ending is None:
        return None
    name, role = key.removesuffix(ending), _ROLES[ending]
    for prefix, network in _FLAT.items():
        if name.startswith(prefix):
            module = _from_flat(network, name[len(prefix) :], flat)
            return LoraKey(network, module, role) if module else None
    if name.startswith(_PEFT):  # PEFT's files do not name the network; the modules of text encoders reveal it
        name = name.removeprefix(_PEFT)
        if name.startswith(_TEXT_PARTS):
            return LoraKey("text_encoder", _normalise("text_encoder", name), role)
    if name.startswith(PREFIX):  # sgm names with their dots
        module = flat.get(name[len(PREFIX) :].replace(".", "_"))
        return LoraKey("unet", module, role) if module else None
    for prefix, network in _DOTTED.items():
        if name.startswith(prefix):
            return LoraKey(network, _normalise(network, name[len(prefix) :]), role)
    module = _normalise("unet", name)
    return LoraKey("unet", module, role) if flat.get(module.replace(".", "_")) == module else None


def find_foreign_kind(keys: Iterable[str]) -> tuple[str, list[str]] | None:
    """Find out whether a file has something other than LoRA pairs: LoHa, LoKr, DoRA, ...

    keys: the names of its tensors.

    Returns (kind, the names that show it), or None.
    """
    keys = list(keys)
    for pattern, kind in _FOREIGN.items():
        named = [key for key in keys if re.search(pattern, key)]
        if named:
            return kind, named
    return None


def family_of(inputs: Mapping[str, int]) -> str:
    """The model family that a LoRA was trained on; "" when its modules do not show it.

    inputs: module or tensor name, dotted or flat -> the module's number of inputs. The width of the text that cross
        attention reads decides (768: Stable Diffusion 1.x), else names that only one family has.
    """
    names = {name.replace("_", "."): width for name, width in inputs.items()}
    for name, width in names.items():
        if (".attn2.to.k" in name or ".attn2.to.v" in name) and width in _CONTEXTS:
            return _CONTEXTS[width]
    for mark, family in _OTHER_MODELS.items():
        if any(mark.replace("_", ".") in name for name in names):
            return family
    return ""


def join_first(items: list[str], most: int = 6) -> str:
    """Join the first items in order and say how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(sorted(items)[:most]) + more


def _from_flat(network: str, name: str, flat: Mapping[str, str]) -> str | None:
    if network == "unet":
        return flat.get(name)
    match = _FLAT_TEXT.fullmatch(name)
    if match:
        return "text_model.encoder.layers.{}.{}.{}".format(*match.groups())
    return name if name == "text_projection" else None


def _normalise(network: str, module: str) -> str:
    """Bring a name to one spelling: no `processor`, `to_out.0`; in text encoders `text_model.` first, `q_proj`."""
    module = module.replace(".processor.", ".")
    if module.endswith(".to_out"):
        module = f"{module}.0"
    if network == "unet":
        return module
    if module.startswith("encoder.layers."):
        module = f"text_model.{module}"
    for old, new in _OLD_TEXT.items():
        if module.endswith(f".{old}"):
            return f"{module.removesuffix(old)}{new}"
    return module
