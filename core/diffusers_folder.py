"""SDXL in diffusers' folder layout: one folder per component, each with a config.json and weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dreammix_trt.core.clip_names import classic_text_name
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.files import read_json
from dreammix_trt.core.hub_cache import find_broken_links
from dreammix_trt.core.recognise import recognise_folder
from dreammix_trt.core.single_file import explain_odd_tensors, modernise_vae
from dreammix_trt.core.tensors import Weights, open_tensors

Config = dict[str, Any]
_STEMS = {
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "text_encoder": ("model", "pytorch_model"),
    "text_encoder_2": ("model", "pytorch_model"),
}
#: variants in order of preference, "" first; others follow by name, and those that are not averaged come last
_VARIANTS = ("", "fp32", "fp16", "bf16")


def read_configs(folder: Path, components: tuple[str, ...]) -> dict[str, Config]:
    """Read the config.json of each component, and the scheduler's if there is one.

    Returns component -> config. Raises `FileFormatError` when the folder is not an SDXL pipeline; the message says what
    it is.
    """
    if not (folder / "model_index.json").is_file():
        raise FileFormatError(f"{folder}: not a diffusers folder ({_describe_instead(folder)})")
    kind = recognise_folder(read_json(folder / "model_index.json"))
    if kind:
        raise FileFormatError(f"{folder}: this is {kind}")
    configs = {name: read_config(folder / name) for name in components}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        configs["scheduler"] = read_json(scheduler)
    return configs


def read_config(folder: Path) -> Config:
    """Read a component's config.json. Raises `FileFormatError` when it is missing or not a JSON object."""
    if not (folder / "config.json").is_file():
        raise FileFormatError(f"{folder / 'config.json'}: missing; a diffusers SDXL folder has it")
    return read_json(folder / "config.json")


def read_state(folder: Path, component: str) -> Weights:
    """Open the weights of a component, under the classic names of diffusers and transformers.

    folder: of the component itself.
    """
    weights = Weights.join([open_tensors(file) for file in find_weight_files(folder, component)])
    try:
        if component == "vae":
            return modernise_vae(weights)
        return weights.rename(classic_text_name) if component.startswith("text_encoder") else weights
    except ValueError as error:
        raise explain_odd_tensors(folder, error) from error


def find_weight_files(folder: Path, component: str) -> list[Path]:
    """The files with a component's weights: one, or shards.

    safetensors is preferred to .bin; among variants full precision, then fp16, bf16, others by name, and weights that
    are no moving average (`non_ema`, for further training) last. Raises `FileFormatError` when there are none.
    """
    kind, found = _find_variants(folder, component)
    if not found:
        missing = f"{folder.parent}: {folder.name}/{_STEMS[component][0]}.safetensors is missing"
        raise FileFormatError(f"{missing}{_describe_broken(folder)}")
    file = next(iter(found.values()))
    return _find_shards(file, kind) if file.suffix == ".json" else [file]


def describe_choice(folder: Path, component: str) -> str:
    """Say which of several variants of a component's weights is used; "" where there is no choice to know of."""
    _, found = _find_variants(folder, component)
    if not found:
        return ""
    chosen, *others = found
    if others and (chosen or set(others) != {"fp16"}):  # a plain file beside its half is what the hub's folders hold
        return f"{folder}: {found[chosen].name} is used; beside it {', '.join(others)} is not"
    if "non_ema" in chosen:
        return f"{folder}: holds only {found[chosen].name}, weights for further training; pictures may be worse"
    return ""


def _find_variants(folder: Path, component: str) -> tuple[str, dict[str, Path]]:
    """(".safetensors" or ".bin", variant -> its file or index in order of preference) of a component's weights."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    for stem, kind in zip(_STEMS[component], (".safetensors", ".bin"), strict=True):
        variant = r"([\w-]+)"
        spellings = (  # the index of a variant is spelled in two ways
            rf"{stem}(?:\.{variant})?\{kind}",
            rf"{stem}\{kind}\.index(?:\.{variant})?\.json",
            rf"{stem}\.{variant}\{kind}\.index\.json",
        )
        found: dict[str, Path] = {}
        for spelling in spellings:
            for name in names:
                match = re.fullmatch(spelling, name)
                if match and not re.search(r"-\d+-of-\d+", name):
                    found.setdefault(match[1] or "", folder / name)
        if found:
            return kind, dict(sorted(found.items(), key=lambda item: _rank(item[0])))
    return "", {}


def _rank(variant: str) -> tuple[bool, int, str]:
    known = _VARIANTS.index(variant) if variant in _VARIANTS else len(_VARIANTS)
    return "non_ema" in variant, known, variant


def _find_shards(index: Path, kind: str) -> list[Path]:
    placed = read_json(index).get("weight_map")
    names = sorted({str(name) for name in placed.values()}) if isinstance(placed, dict) else []
    if not names or any(Path(name).name != name or not name.endswith(kind) or "\0" in name for name in names):
        raise FileFormatError(f"{index}: its weight_map does not name {kind} files beside it")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        missing = f"{index.parent}: shards {', '.join(absent)} are missing"
        raise FileFormatError(f"{missing}{_describe_broken(index.parent)}")
    return [index.parent / name for name in names]


def _describe_broken(folder: Path) -> str:
    broken = find_broken_links(folder) if folder.is_dir() else []
    return f" ({', '.join(broken)} lead nowhere: the download is not complete, start it again)" if broken else ""


def _describe_instead(folder: Path) -> str:
    """Say what a folder without model_index.json is, and what to give instead."""
    if not folder.exists():
        if len(folder.parts) == 2 and not folder.is_absolute():
            return (
                "it does not exist; names of the hub are not looked up: download it with "
                f"`hf download {folder} --local-dir DIR` and give DIR"
            )
        return "it does not exist"
    models = sorted(each.name for each in folder.glob("models--*") if each.is_dir())
    if models:
        return f"it is the hub's cache; give the folder of one model in it: {', '.join(models[:3])}"
    if (folder / "config.json").is_file():
        return "it is one component of a model; give the folder above it"
    files = sorted(file.name for pattern in ("*.safetensors", "*.ckpt") for file in folder.glob(pattern))
    if files:
        return f"it has no model_index.json; to use a single file in it, name the file: {', '.join(files[:3])}"
    return "it has no model_index.json; give the folder that holds unet/, vae/, ..."
