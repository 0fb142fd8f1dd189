"""What a training writes: the LoRA in two formats, the merged UNet where it is wanted, the subject's card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.core.files import read_json, sha256_of, write_json
from dreammix_trt.core.lora import FILE_NAME
from dreammix_trt.core.network_weights import whole_weights_of
from dreammix_trt.trainer.kohya import kohya_file_name, kohya_metadata, kohya_tensors
from dreammix_trt.trainer.task import Task, explain_difference

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "subject.json"
SCHEMA = 1
Factors = Mapping[str, tuple["Tensor", "Tensor"]]
_NAMES = ("class_name", "token", "prompt", "captions", "attributes")
_PERIOD = 100  # steps that one loss of the card is the mean of


@dataclass(frozen=True)
class TrainRecord:
    """What a training did; `subject.json` is made of it.

    loss, first_loss: means of the last and first tenth of the steps; losses: of every 100 steps.
    skipped: steps that changed nothing, since their gradients overflowed float16.
    seconds: wall, of all runs together. parameters: how many numbers were trained.
    attributes: kind -> values, of the subject. photographs: their file names.
    base, base_hashes: the base's name, and the hashes of its files.
    recipe: what suits the base, as far as it was not chosen.
    settings: all that decides the LoRA's numbers but the threads, as `Task.settings` gives them.
    """

    steps: int
    seconds: float
    loss: float
    first_loss: float
    losses: tuple[float, ...]
    skipped: int
    learning_rate: float
    rank: int
    loss_name: str
    token: str
    class_name: str
    prompt: str
    captions: tuple[str, ...]
    attributes: Mapping[str, Sequence[str]]
    photographs: tuple[str, ...]
    seed: int
    threads: int
    parameters: int
    base: str
    base_hashes: dict[str, str]
    recipe: dict[str, Any]
    settings: Mapping[str, Any]

    @property
    def kohya_file(self) -> str:
        """The name of the LoRA's file in kohya's format."""
        return kohya_file_name(self.token, self.class_name)

    @classmethod
    def of(
        cls,
        task: Task,
        settings: Mapping[str, Any],
        history: Sequence[float],
        seconds: float,
        threads: int,
        parameters: int,
        skipped: int,
    ) -> TrainRecord:
        """history: the loss of every step; threads: that were used."""
        tenth = max(1, len(history) // 10)
        return cls(
            steps=task.steps,
            seconds=round(seconds, 2),
            loss=float(np.mean(history[-tenth:])),
            first_loss=float(np.mean(history[:tenth])),
            losses=tuple(float(np.mean(history[n : n + _PERIOD])) for n in range(0, len(history), _PERIOD)),
            skipped=skipped,
            learning_rate=task.learning_rate,
            rank=task.rank,
            loss_name=task.loss,
            token=task.names.token,
            class_name=task.names.class_name,
            prompt=task.names.prompt,
            captions=task.names.captions,
            attributes=_list_attributes(settings),
            photographs=tuple(photograph.name for photograph in task.photographs),
            seed=task.seed,
            threads=threads,
            parameters=parameters,
            base=task.base.name,
            base_hashes=dict(settings["base"]),
            recipe=asdict(task.recipe),
            settings=settings,
        )

    def to_card(self) -> dict[str, Any]:
        """The subject's card, without its files, as plain JSON values."""
        told = {name: value for name, value in self.settings.items() if name not in (*_NAMES, "base", "base_loras")}
        return {
            "schema": SCHEMA,
            **{name: getattr(self, name) for name in _NAMES},
            "base": {"name": self.base, "hashes": self.base_hashes, "loras": self.settings["base_loras"]},
            "settings": {**told, "threads": self.threads},
            "losses": {"first": self.first_loss, "last": self.loss, f"every_{_PERIOD}_steps": list(self.losses)},
            "skipped_steps": self.skipped,
            "seconds": self.seconds,
            "parameters": self.parameters,
        }


def read_finished(folder: Path, task: Task, settings: Mapping[str, Any]) -> TrainRecord:
    """What made the LoRA in a folder, by its card.

    settings: those of the training that is asked for, which must be the same.

    Raises InputError for a LoRA of other settings, FileFormatError where its files or its card are damaged.
    """
    card = read_json(folder / RECORD)
    try:
        losses, known = card["losses"], (card["settings"]["threads"], card["parameters"], card["skipped_steps"])
        record = TrainRecord.of(task, settings, [losses["last"]], card["seconds"], *known)
        record = replace(record, first_loss=losses["first"], losses=tuple(losses[f"every_{_PERIOD}_steps"]))
        now = json.loads(json.dumps(record.to_card()))
        difference = explain_difference(_gather_settings(card), _gather_settings(now))
        files = {str(name): digest for name, digest in card["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{folder / RECORD}: damaged ({error!r}); train anew with --force") from error
    if difference:
        raise InputError(
            f"{folder} holds a LoRA of other settings ({difference}); give those of then, train anew with --force, or "
            "name another folder"
        )
    for name, digest in files.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != digest:
            raise FileFormatError(f"{folder / name}: not as it was trained; train anew with --force")
    return record


def _gather_settings(card: Mapping[str, Any]) -> dict[str, Any]:
    """All on a card that decides the LoRA's numbers but the threads."""
    told = {name: value for name, value in card["settings"].items() if name != "threads"}
    base = {"base": card["base"]["hashes"], "base_loras": card["base"]["loras"]}
    return base | {name: card[name] for name in _NAMES} | told


def _list_attributes(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = settings["attributes"].get("attributes", {})
    return found


def lora_tensors(factors: Factors) -> dict[str, Tensor]:
    """The tensors of a LoRA file under diffusers' names.

    factors: module by its diffusers name -> (down (rank, in), up (out, rank)), float32.
    """
    tensors = {}
    for name, (down, up) in factors.items():
        tensors[f"unet.{name}.lora.down.weight"] = down.detach()
        tensors[f"unet.{name}.lora.up.weight"] = up.detach()
    return tensors


def lora_metadata(base: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a LoRA file.

    base: its name. settings: as `Task.settings` gives them.
    """
    return {
        "format": "pt",
        "token": settings["token"],
        "class_name": settings["class_name"],
        "prompt": settings["prompt"],
        "captions": json.dumps(settings["captions"]),
        "attributes": json.dumps(_list_attributes(settings)),
        "rank": str(settings["rank"]),
        "steps": str(settings["steps"]),
        "loss": settings["loss"],
        "base": base,
        "base_hashes": json.dumps(settings["base"]),
    }


def write_folder(folder: Path, record: TrainRecord, factors: Factors, task: Task, *, merged: bool) -> None:
    """Write everything: the LoRA in diffusers' format and once more in kohya's, and the card.

    merged: whether to write the base's UNet with the LoRA in its weights, too.
    """
    metadata, base = lora_metadata(record.base, record.settings), task.base
    write_tensor_file(folder / FILE_NAME, lora_tensors(factors), metadata)
    twin = folder / record.kohya_file
    kohya = kohya_tensors(factors, record.rank, base.configs["unet"])
    write_tensor_file(twin, kohya, lambda digest: metadata | kohya_metadata(record, base.native_side, digest))
    if merged:
        _write_merged(folder / "unet", task, factors)
    files = {file.name: sha256_of(file) for file in (folder / FILE_NAME, twin)}
    write_json(folder / RECORD, record.to_card() | {"files": files})


def write_tensor_file(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | Callable[[str], Mapping[str, str]]
) -> None:
    """Write a safetensors file with its metadata in order; the library writes them in a different order each time.

    metadata: or what gives it: sha256 of what stands behind the header -> metadata.
    """
    from safetensors.torch import save

    content = save(dict(tensors))
    size = 8 + int.from_bytes(content[:8], "little")
    if callable(metadata):
        metadata = metadata(hashlib.sha256(content[size:]).hexdigest())
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(content[8:size])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[size:])


def _write_merged(folder: Path, task: Task, factors: Factors) -> None:
    """The patched UNet with the LoRA added to its weights, float32, in diffusers' layout."""
    from safetensors.numpy import save_file

    state = dict(whole_weights_of(task.base, "unet", task.merged))
    for name, (down, up) in factors.items():
        key = f"{name}.weight"
        state[key] = state[key] + (up @ down).numpy()
    folder.mkdir()
    save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", dict(task.base.configs["unet"]))
