"""The folder that a training writes: the LoRA in two formats, the merged UNet where it is wanted, and a record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.files import sha256_of, write_json
from dreammix_trt.core.lora import FILE_NAME
from dreammix_trt.trainer.kohya import kohya_file_name, kohya_metadata, kohya_tensors
from dreammix_trt.trainer.task import Task

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "train.json"
Factors = Mapping[str, tuple["Tensor", "Tensor"]]


@dataclass(frozen=True)
class TrainRecord:
    """What a training did; `train.json` holds the same. loss: mean of the last tenth of the steps; seconds: wall."""

    steps: int
    seconds: float
    loss: float
    first_loss: float
    learning_rate: float
    rank: int
    loss_name: str
    token: str
    class_name: str
    prompt: str
    captions: tuple[str, ...]
    photographs: tuple[str, ...]
    seed: int
    threads: int
    parameters: int
    base: str
    base_hashes: dict[str, str]
    recipe: dict[str, Any]

    @property
    def kohya_file(self) -> str:
        """The name of the LoRA's file in kohya's format."""
        return kohya_file_name(self.token, self.class_name)

    @classmethod
    def of(cls, task: Task, history: Sequence[float], seconds: float, threads: int, parameters: int) -> TrainRecord:
        """history: the loss of every step; threads: that were used; parameters: how many were trained."""
        tenth = max(1, len(history) // 10)
        return cls(
            steps=task.steps,
            seconds=round(seconds, 2),
            loss=float(np.mean(history[-tenth:])),
            first_loss=float(np.mean(history[:tenth])),
            learning_rate=task.learning_rate,
            rank=task.rank,
            loss_name=task.loss,
            token=task.names.token,
            class_name=task.names.class_name,
            prompt=task.names.prompt,
            captions=task.names.captions,
            photographs=tuple(photograph.name for photograph in task.photographs),
            seed=task.seed,
            threads=threads,
            parameters=parameters,
            base=task.base.name,
            base_hashes=task.base.hash_contents(),
            recipe=asdict(task.recipe),
        )


def write_folder(folder: Path, record: TrainRecord, factors: Factors, base: BaseFiles, *, merged: bool) -> None:
    """Write everything: the LoRA in diffusers' format and once more in kohya's, and the record.

    factors: module by its diffusers name -> (down (rank, in), up (out, rank)), float32.
    base: that was trained on.
    merged: whether to write its UNet with the LoRA in its weights, too.
    """
    tensors = {}
    for name, (down, up) in factors.items():
        tensors[f"unet.{name}.lora.down.weight"] = down
        tensors[f"unet.{name}.lora.up.weight"] = up
    metadata = {
        "format": "pt",
        "token": record.token,
        "class_name": record.class_name,
        "prompt": record.prompt,
        "captions": json.dumps(record.captions),
        "rank": str(record.rank),
        "steps": str(record.steps),
        "loss": record.loss_name,
        "base": record.base,
        "base_hashes": json.dumps(record.base_hashes),
    }
    _write(folder / FILE_NAME, tensors, lambda _: metadata)
    twin = folder / record.kohya_file
    kohya = kohya_tensors(factors, record.rank, base.configs["unet"])
    _write(twin, kohya, lambda digest: metadata | kohya_metadata(record, base.native_side, digest))
    if merged:
        _write_merged(folder / "unet", base, factors)
    hashes = {"lora_sha256": sha256_of(folder / FILE_NAME), "kohya_file": twin.name, "kohya_sha256": sha256_of(twin)}
    write_json(folder / RECORD, asdict(record) | hashes)


def _write(file: Path, tensors: Mapping[str, Tensor], describe: Callable[[str], Mapping[str, str]]) -> None:
    """Write a safetensors file with its metadata in order; the library writes them in a different order each time.

    describe: sha256 of what stands behind the header -> metadata.
    """
    from safetensors.torch import save

    content = save(dict(tensors))
    size = 8 + int.from_bytes(content[:8], "little")
    metadata = describe(hashlib.sha256(content[size:]).hexdigest())
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(content[8:size])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[size:])


def _write_merged(folder: Path, base: BaseFiles, factors: Factors) -> None:
    """The patched UNet with the LoRA added to its weights, float32, in diffusers' layout."""
    from safetensors.numpy import save_file

    state = dict(base.unet_patched_state())
    for name, (down, up) in factors.items():
        key = f"{name}.weight"
        state[key] = state[key] + (up @ down).numpy()
    folder.mkdir()
    save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", dict(base.configs["unet"]))
