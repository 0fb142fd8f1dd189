"""SDXL in diffusers' folder layout: one folder a component, each with a config.json and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dreammix_trt.core.clip_names import classic_text_name
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.files import read_json
from dreammix_trt.core.recognise import foreign_folder
from dreammix_trt.core.single_file import modern_vae, odd_tensors
from dreammix_trt.core.tensors import Weights, open_tensors

Config = dict[str, Any]
_STEMS = {
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "text_encoder": ("model", "pytorch_model"),
    "text_encoder_2": ("model", "pytorch_model"),
}
#: in order of preference; {} is the stem. Both spellings of a variant's index are in the wild.
_SPELLINGS = {
    ".safetensors": (
        "{}.safetensors", "{}.safetensors.index.json",
        "{}.fp16.safetensors", "{}.safetensors.index.fp16.json", "{}.fp16.safetensors.index.json",
    ),
    ".bin": (
        "{}.bin", "{}.bin.index.json",
        "{}.fp16.bin", "{}.bin.index.fp16.json", "{}.fp16.bin.index.json",
    ),
}  # fmt: skip


def read_configs(folder: Path, components: tuple[str, ...]) -> dict[str, Config]:
    """Component -> its config.json, with the scheduler's where there is one.

    Raises `FileFormatError` when the folder is no SDXL pipeline, saying what it is instead.
    """
    if not (folder / "model_index.json").is_file():
        raise FileFormatError(f"{folder}: not a diffusers folder ({_instead(folder)})")
    kind = foreign_folder(read_json(folder / "model_index.json"))
    if kind:
        raise FileFormatError(f"{folder}: this is {kind}")
    configs = {name: read_config(folder / name) for name in components}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        configs["scheduler"] = read_json(scheduler)
    return configs


def read_config(folder: Path) -> Config:
    """A component's config.json; `FileFormatError` when it is missing or no JSON object."""
    if not (folder / "config.json").is_file():
        raise FileFormatError(f"{folder / 'config.json'}: missing; a diffusers SDXL folder has it")
    return read_json(folder / "config.json")


def read_state(folder: Path, component: str) -> Weights:
    """A component's weights by diffusers' and transformers' classic names; folder: the component's own."""
    weights = Weights.join([open_tensors(file) for file in weight_files(folder, component)])
    try:
        if component == "vae":
            return modern_vae(weights)
        return weights.rename(classic_text_name) if component.startswith("text_encoder") else weights
    except ValueError as error:
        raise odd_tensors(folder, error) from error


def weight_files(folder: Path, component: str) -> list[Path]:
    """The files of a component's weights: one or shards; safetensors before .bin, full precision before fp16."""
    for stem, (kind, spellings) in zip(_STEMS[component], _SPELLINGS.items(), strict=True):
        for spelling in spellings:
            file = folder / spelling.format(stem)
            if file.is_file():
                return _shards(file, kind) if file.suffix == ".json" else [file]
    raise FileFormatError(f"{folder.parent}: {folder.name}/{_STEMS[component][0]}.safetensors is missing")


def _shards(index: Path, kind: str) -> list[Path]:
    placed = read_json(index).get("weight_map")
    names = sorted({str(name) for name in placed.values()}) if isinstance(placed, dict) else []
    if not names or any(Path(name).name != name or not name.endswith(kind) or "\0" in name for name in names):
        raise FileFormatError(f"{index}: its weight_map does not name {kind} files beside it")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise FileFormatError(f"{index.parent}: shards {', '.join(absent)} are missing")
    return [index.parent / name for name in names]


def _instead(folder: Path) -> str:
    """What a folder without model_index.json is, and what to give."""
    if not folder.exists():
        return "it does not exist"
    if (folder / "config.json").is_file():
        return "it is one component of a model; give the folder above it"
    files = sorted(file.name for pattern in ("*.safetensors", "*.ckpt") for file in folder.glob(pattern))
    if files:
        return f"it has no model_index.json; to use a single file in it, name the file: {', '.join(files[:3])}"
    return "it has no model_index.json; give the folder that holds unet/, vae/, ..."
