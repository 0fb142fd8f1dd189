"""The folder that a training writes: the LoRA, the merged UNet where it is wanted, and a record of the training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.files import sha256_of, write_json
from dreammix_trt.core.lora import FILE_NAME
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
            base=task.base.folder.name,
            base_hashes=task.base.hash_contents(),
            recipe=asdict(task.recipe),
        )


def write_folder(folder: Path, record: TrainRecord, factors: Factors, merge_into: BaseFiles | None) -> None:
    """Write everything.

    factors: module by its diffusers name -> (down (rank, in), up (out, rank)), float32.
    merge_into: the base whose UNet is written with the LoRA in its weights; None: not wanted.
    """
    from safetensors.torch import save

    tensors = {}
    for name, (down, up) in factors.items():
        tensors[f"unet.{name}.lora.down.weight"] = down
        tensors[f"unet.{name}.lora.up.weight"] = up
    metadata = {
        "format": "pt",
        "token": record.token,
        "class_name": record.class_name,
        "prompt": record.prompt,
        "rank": str(record.rank),
        "steps": str(record.steps),
        "loss": record.loss_name,
        "base": record.base,
        "base_hashes": json.dumps(record.base_hashes),
    }
    (folder / FILE_NAME).write_bytes(_order_metadata(save(tensors, metadata)))
    if merge_into is not None:
        _write_merged(folder / "unet", merge_into, factors)
    write_json(folder / RECORD, asdict(record) | {"lora_sha256": sha256_of(folder / FILE_NAME)})


def _order_metadata(file: bytes) -> bytes:
    """A safetensors file with its metadata in order; the library writes them in a different order each time."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


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
