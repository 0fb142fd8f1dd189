"""What a user holds of a base model: an SDXL checkpoint in diffusers' folder layout, a Fooocus patch and its head.

Nothing here needs torch: weights are read as numpy arrays. Single-file checkpoints join here as a second reader of
`configs` and `state`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreammix_trt.core import fooocus, keymap
from dreammix_trt.core.errors import FileFormatError
from dreammix_trt.core.files import sha256_of

Floats = NDArray[np.float32]
State = dict[str, Floats]

EMBEDDED = Path(__file__).parents[1] / "models" / "micro-sdxl"
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}


@dataclass(frozen=True)
class BaseFiles:
    """A base model on disk, checked; weights are read when asked for. Made by `BaseFiles.open`.

    folder: the diffusers folder; patch, head: their files, or None for a base without inpainting patch;
    patch_biases: whether the patch's `.bias` deltas count (Fooocus does, the reference does not);
    configs: component name -> its config.json.
    """

    folder: Path
    patch: Path | None
    head_file: Path | None
    patch_biases: bool
    configs: Mapping[str, dict[str, Any]] = field(repr=False)

    @classmethod
    def open(
        cls,
        path: str | Path | None = None,
        patch: str | Path | None = None,
        head: str | Path | None = None,
        patch_biases: bool = False,
    ) -> BaseFiles:
        """The base in `path` (None: the embedded model), with the patch and head given or lying in the folder.

        Raises `FileFormatError` when the folder is not an epsilon-predicting 4-channel SDXL in diffusers' layout, a
        part is missing, or only one of patch and head is there.
        """
        folder = EMBEDDED if path is None else Path(path)
        if not (folder / "model_index.json").is_file():
            if path is None:
                raise FileFormatError(
                    f"the embedded model is not installed ({folder}); name a diffusers folder instead"
                )
            kind = "is a single file" if folder.is_file() else "has no model_index.json"
            raise FileFormatError(
                f"{folder}: not a diffusers folder ({kind}); give the folder that holds unet/, vae/, ..."
            )
        configs = {name: _read_json(folder / name / "config.json") for name in COMPONENTS}
        scheduler = folder / "scheduler" / "scheduler_config.json"
        if scheduler.is_file():
            configs["scheduler"] = _read_json(scheduler)
        _check_sdxl(folder, configs)
        for name in COMPONENTS:
            _weight_files(folder, name)
        for name in TOKENIZERS:
            if not (folder / name).is_dir():
                raise FileFormatError(f"{folder}: {name}/ is missing")
        patch_file = _given_or_beside(patch, folder, "*.fooocus.patch")
        head_file = _given_or_beside(head, folder, "*inpaint_head.*")
        if (patch_file is None) != (head_file is None):
            there, absent = ("patch", "head") if head_file is None else ("head", "patch")
            raise FileFormatError(
                f"{patch_file or head_file}: an inpaint {there} without its {absent}; patch and head belong together"
            )
        return cls(folder, patch_file, head_file, patch_biases, configs)

    @property
    def native_side(self) -> int:
        """The picture side in pixels the base was trained for (SDXL: 1024)."""
        return int(self.configs["unet"]["sample_size"]) * 8

    @property
    def latent_channels(self) -> int:
        return int(self.configs["vae"]["latent_channels"])

    @property
    def feature_channels(self) -> int:
        """Channels of the UNet's first convolution, which the head's feature is added to (SDXL: 320)."""
        return int(self.configs["unet"]["block_out_channels"][0])

    @property
    def divisor(self) -> int:
        """Picture sides must be multiples of this many pixels (SDXL: 32)."""
        return int(8 * 2 ** (len(self.configs["unet"]["block_out_channels"]) - 1))

    @property
    def scaling_factor(self) -> float:
        return float(self.configs["vae"]["scaling_factor"])

    def content_hashes(self) -> dict[str, str]:
        """Every file that decides what the base computes -> sha256; paths relative to the folder where inside it."""
        files = [file for name in COMPONENTS for file in _weight_files(self.folder, name)]
        files += [self.folder / name / "config.json" for name in COMPONENTS]
        files += [file for name in TOKENIZERS for file in sorted((self.folder / name).iterdir()) if file.is_file()]
        named = {file.relative_to(self.folder).as_posix(): file for file in files}
        named |= {key: file for key, file in (("patch", self.patch), ("inpaint_head", self.head_file)) if file}
        return {key: sha256_of(file) for key, file in sorted(named.items())}

    def state(self, component: str) -> State:
        """A component's weights as float32 under diffusers' and transformers' classic names (`text_model....`).

        component: "text_encoder", "text_encoder_2", "vae" or "unet" (unpatched).
        """
        state: State = {}
        for file in _weight_files(self.folder, component):
            state.update(_read_safetensors(file))
        if component.startswith("text_encoder"):
            return {_classic_text_name(name): value for name, value in state.items() if "position_ids" not in name}
        return state

    def unet_patched_state(self) -> State:
        """The UNet with the inpainting patch, float32 (without a patch: the raw UNet)."""
        raw = self.state("unet")
        if self.patch is None:
            return raw
        names = keymap.sgm_to_diffusers(self.configs["unet"])
        try:
            return fooocus.apply_patch(raw, fooocus.read_patch(self.patch), names, biases=self.patch_biases)
        except FileFormatError as error:
            raise FileFormatError(f"{self.patch} on {self.folder}: {error}") from error

    def head(self) -> Floats:
        """The inpainting head, float32 (feature channels, 5, 3, 3)."""
        if self.head_file is None:
            raise FileFormatError(f"{self.folder}: this base has no inpaint head; give one with its patch")
        head = fooocus.read_head(self.head_file)
        if head.shape[0] != self.feature_channels:
            raise FileFormatError(
                f"{self.head_file}: a head of {head.shape[0]} channels does not fit the base's {self.feature_channels}"
            )
        return head


def _check_sdxl(folder: Path, configs: Mapping[str, dict[str, Any]]) -> None:
    unet = configs["unet"]
    if unet.get("addition_embed_type") != "text_time":
        raise FileFormatError(
            f"{folder}/unet: not an SDXL UNet (addition_embed_type is {unet.get('addition_embed_type')!r}, "
            "expected 'text_time'); SD 1.5 and 2.x bases cannot be used"
        )
    if unet.get("in_channels") != 4:
        raise FileFormatError(
            f"{folder}/unet: takes {unet.get('in_channels')} input channels, expected 4; use a text-to-image SDXL "
            "checkpoint, the inpainting comes from the Fooocus patch"
        )
    width = sum(int(configs[name]["hidden_size"]) for name in ("text_encoder", "text_encoder_2"))
    if unet.get("cross_attention_dim") != width:
        raise FileFormatError(
            f"{folder}/unet: cross_attention_dim is {unet.get('cross_attention_dim')}, but both text encoders together "
            f"give {width} (an SDXL refiner, or mixed components?)"
        )
    prediction = configs.get("scheduler", {}).get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise FileFormatError(f"{folder}/scheduler: prediction_type is {prediction!r}; only epsilon models can be used")
    keymap.attention_depths(unet)


def _weight_files(folder: Path, component: str) -> list[Path]:
    """The safetensors of a component: one file or shards, full precision before fp16."""
    for variant in ("", ".fp16"):
        single = folder / component / f"{_STEMS[component]}{variant}.safetensors"
        if single.is_file():
            return [single]
        index = folder / component / f"{_STEMS[component]}.safetensors.index{variant}.json"
        if index.is_file():
            shards = [index.parent / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
            absent = [shard.name for shard in shards if not shard.is_file()]
            if absent:
                raise FileFormatError(f"{index.parent}: shards {', '.join(absent)} are missing")
            return shards
    raise FileFormatError(f"{folder}: {component}/{_STEMS[component]}.safetensors is missing")


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
    except TypeError as error:
        raise FileFormatError(f"{path}: {error}; save the weights as fp16 or fp32") from error
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{path}: truncated, or not a safetensors file ({error})") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileFormatError(f"{path}: missing; a diffusers SDXL folder has it")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{path}: expected a JSON object")
    return value


def _given_or_beside(given: str | Path | None, folder: Path, pattern: str) -> Path | None:
    if given is not None:
        if not Path(given).is_file():
            raise FileFormatError(f"{given}: no such file")
        return Path(given)
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        raise FileFormatError(f"{folder}: several files match {pattern}; say which one to use")
    return found[0] if found else None


def _classic_text_name(name: str) -> str:
    """transformers 5 saves some text encoders without the leading `text_model.`; one spelling is enough for us."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"
