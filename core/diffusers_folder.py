"""SDXL in diffusers' folder layout: one folder per component, each with a config.json and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dreammix_trt.core.clip_names import classic_text_name
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.files import read_json
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
#: file names in order of preference; {} is the stem. The index of a variant is spelled in two ways.
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

    safetensors is preferred to .bin, full precision to fp16. Raises `FileFormatError` when there are none.
    """
    for stem, (kind, spellings) in zip(_STEMS[component], _SPELLINGS.items(), strict=True):
        for spelling in spellings:
            file = folder / spelling.format(stem)
            if file.is_file():
                return _find_shards(file, kind) if file.suffix == ".json" else [file]
    raise FileFormatError(f"{folder.parent}: {folder.name}/{_STEMS[component][0]}.safetensors is missing")


def _find_shards(index: Path, kind: str) -> list[Path]:
    placed = read_json(index).get("weight_map")
    names = sorted({str(name) for name in placed.values()}) if isinstance(placed, dict) else []
    if not names or any(Path(name).name != name or not name.endswith(kind) or "\0" in name for name in names):
        raise FileFormatError(f"{index}: its weight_map does not name {kind} files beside it")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise FileFormatError(f"{index.parent}: shards {', '.join(absent)} are missing")
    return [index.parent / name for name in names]


def _describe_instead(folder: Path) -> str:
    """Say what a folder without model_index.json is, and what to give instead."""
    if not folder.exists():
        return "it does not exist"
    if (folder / "config.json").is_file():
        return "it is one component of a model; give the folder above it"
    files = sorted(file.name for pattern in ("*.safetensors", "*.ckpt") for file in folder.glob(pattern))
    if files:
        return f"it has no model_index.json; to use a single file in it, name the file: {', '.join(files[:3])}"
    return "it has no model_index.json; give the folder that holds unet/, vae/, ..."
