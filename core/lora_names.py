"""The names of tensors in LoRA files: from a tensor's name to network, module and role.

Trainers write a module's diffusers name (`unet.down_blocks.1...to_k.lora_A.weight`) or sgm's, with dots or flattened to
underscores (kohya: `lora_unet_input_blocks_4_1_..._to_k.lora_down.weight`), below a prefix for the network. There is no
rule to turn underscores back into dots, so modules of the UNet are looked up in a table of all of them by their flat
names.
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

#: the end of a tensor's name; PEFT puts the name of the adapter in: `lora_A.default.weight`, `lora_A.mine.weight`
_ROLE = re.compile(
    r"(?:[._]lora(?:_linear_layer)?[._](?P<side>down|up|mid|A|B)(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?"
    r"|(?:[._]lora(?:_linear_layer)?)?\.alpha)$"
)
_SIDES: dict[str | None, Role] = {"down": "down", "A": "down", "up": "up", "B": "up", "mid": "mid", None: "alpha"}
#: what stands before the module: kohya's, LyCORIS', ComfyUI's, OneTrainer's, diffusers', whole checkpoints'
_PREFIX = re.compile(
    r"(?P<unet>lora_unet|lycoris_unet|lycoris|model\.diffusion_model|diffusion_model|unet)[._]"
    r"|(?P<text_encoder_2>lora_te2|te2|text_encoder_2|(text_encoders\.)?clip_g(\.transformer)?)[._]"
    r"|(?P<text_encoder>lora_te1?|te1?|text_encoder|(text_encoders\.)?clip_l(\.transformer)?)[._]"
)
#: what PEFT, torch.compile and parallel training wrap modules in
_WRAPPERS = re.compile(r"(?<![^.])(?:base_model\.model|_orig_mod|module)\.")
_TEXT = re.compile(
    r"(?:text_model_)?encoder_layers_(\d+)_(self_attn|mlp)_([qkv]_proj|out_proj|fc1|fc2|to_[qkv]|to_out(?:_0)?)"
)
_TEXT_PARTS = ("text_model.", "encoder.layers.", "text_projection")
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj", "to_out_0": "out_proj"}

_ONLY_LORA = "only plain LoRA can be used: merge it into a checkpoint with its own tool and give that as the base"
_LYCORIS = f"{_ONLY_LORA}, or train with LyCORIS' algo=lora (or locon)"
#: a tensor's name -> what has such tensors, and what to do
_FOREIGN = {
    r"\.hada_": ("a LoHa file of LyCORIS", _LYCORIS),
    r"\.lokr_": ("a LoKr file of LyCORIS", _LYCORIS),
    r"\.dora_scale$|\.lora_magnitude_vector": ("a DoRA file", f"{_ONLY_LORA}, or train without it (use_dora, dora_wd)"),
    r"\.oft_": ("an OFT file", _ONLY_LORA),
    r"\.[ab][12]\.weight$": ("a GLoRA file of LyCORIS", _LYCORIS),
    r"\.on_input$": ("an (IA)3 file of LyCORIS", _LYCORIS),
    r"\.diff(_b)?$": ("a full-difference file (LyCORIS' full, or ComfyUI's LoraSave)", _ONLY_LORA),
    r"\.[wb]_norm$": ("a norm-training file of LyCORIS", f"{_ONLY_LORA}, or train with train_norm off"),
    r"\.(lora_B|lora_up|lora\.up)\.bias$": ("a LoRA-with-biases file", f"{_ONLY_LORA}, or extract it without biases"),
    r"\.lora_embedding_": ("an embedding-LoRA file of PEFT", f"{_ONLY_LORA}, or leave embeddings out"),
    r"^bundle_emb\.": (
        "a LoRA of OneTrainer with textual inversion embeddings bundled in it",
        "embeddings cannot be used, and the LoRA needs them: train it in OneTrainer without an additional embedding "
        "('bundle additional embeddings' off)",
    ),
    r"^(clip_[gl]|emb_params|text_encoders_[01]|string_to_param\..*)$": (
        "a textual inversion embedding",
        "embeddings cannot be used; train a LoRA",
    ),
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


def kohya_names(unet_config: Mapping[str, Any]) -> dict[str, str]:
    """The modules of a UNet by their diffusers names -> kohya's names for SDXL, which are sgm's.

    "down_blocks.1.attentions.0.proj_in" -> "lora_unet_input_blocks_4_1_proj_in".
    """
    return {
        name.removesuffix(".weight"): f"lora_unet_{sgm.removeprefix(PREFIX).removesuffix('.weight').replace('.', '_')}"
        for sgm, name in sgm_to_diffusers(unet_config).items()
        if name.endswith(".weight")
    }


def place_of(key: str, flat: Mapping[str, str]) -> LoraKey | None:
    """The place of a tensor; None when its name is not a LoRA's.

    key: the tensor's name.
    flat: from `flat_modules`.
    """
    end = _ROLE.search(key)
    if end is None:
        return None
    name, role = _WRAPPERS.sub("", key[: end.start()]), _SIDES[end["side"]]
    prefix = _PREFIX.match(name)
    if prefix is None:  # PEFT's own files do not name the network; the modules of text encoders reveal it
        network, rest = "text_encoder" if name.startswith(_TEXT_PARTS) else "unet", name
    else:
        network, rest = next(each for each in NETWORKS if prefix[each]), name[prefix.end() :]
    module = _find_module(network, rest, flat)
    if module is None and prefix is not None and prefix[0] == f"{network}.":
        module = _normalise(rest)  # diffusers' own spelling is taken at its word; the base decides
    return None if module is None else LoraKey(network, module, role)


def adapters_of(keys: Iterable[str]) -> list[str]:
    """The names of the adapters that PEFT wrote into the names of tensors."""
    found = (_ROLE.search(key) for key in keys)
    return sorted({end["adapter"] for end in found if end and end["adapter"]})


def is_idle(place: LoraKey) -> bool:
    """Whether SDXL does not have what a factor changes: its first text encoder has no projection."""
    return (place.network, place.module) == ("text_encoder", "text_projection")


def find_foreign_kind(keys: Iterable[str]) -> tuple[str, str, list[str]] | None:
    """Find out whether a file has something other than LoRA pairs: LoHa, LoKr, DoRA, embeddings, ...

    keys: the names of its tensors.

    Returns (what it is, what to do, the names that show it), or None.
    """
    keys = list(keys)
    for pattern, (kind, remedy) in _FOREIGN.items():
        named = [key for key in keys if re.search(pattern, key)]
        if named:
            return kind, remedy, named
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


def _find_module(network: str, name: str, flat: Mapping[str, str]) -> str | None:
    """A module by its diffusers name; None where the table does not have it."""
    name = _normalise(name).replace(".", "_")
    if network == "unet":
        return flat.get(name)
    match = _TEXT.fullmatch(name)
    if match:
        layer, part, which = match.groups()
        return f"text_model.encoder.layers.{layer}.{part}.{_OLD_TEXT.get(which, which)}"
    return name if name == "text_projection" else None


def _normalise(module: str) -> str:
    """Bring a name to one spelling: no `processor`, and `to_out.0`."""
    module = module.replace(".processor.", ".")
    return re.sub(r"([._])to_out$", r"\1to_out\g<1>0", module)
