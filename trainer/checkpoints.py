"""Where a training stands, kept so that it can go on to the bit: what is learnt, optimizer, random numbers, losses.

`WORK/checkpoint/` is replaced whole: a kill or a full disk leaves the former one. A LoRA in it can be built like a
finished one. Tensors are in safetensors files and the rest is JSON, so reading one runs no code.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreammix_trt.core.errors import BuildError, FileFormatError, InputError
from dreammix_trt.core.files import atomic_directory, check_place, hold_alone, read_json, write_json
from dreammix_trt.core.lora import FILE_NAME
from dreammix_trt.trainer.events import Events
from dreammix_trt.trainer.folder import write_tensor_file
from dreammix_trt.trainer.state_files import read_state, write_state
from dreammix_trt.trainer.task import explain_difference

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

FOLDER, RECORD, STATE = "checkpoint", "checkpoint.json", "state.safetensors"
_SCHEMA = 1


def find_work(out: str | Path) -> Path:
    """The folder beside `out` where a training keeps what it goes on from, unless another is named."""
    place = Path(out).resolve()
    return place.parent / f"{place.name}.work"


def has_checkpoint(work: Path) -> bool:
    """Whether a work folder holds a training that was stopped."""
    return (work / FOLDER / RECORD).exists()


def check_places(out: Path, work: Path, marker: str, events: Events | None = None) -> None:
    """Raise InputError for places that would lose what is trained.

    out: the folder that is written at the end, and replaced if it has `marker`.
    work: the folder of the checkpoint.
    """
    check_place(out, marker)
    check_place(work)
    places = {"work folder": work} | ({"folder of TensorBoard's events": events.folder} if events else {})
    for what, place in places.items():
        if place.resolve().is_relative_to(out.resolve()):
            raise InputError(f"the {what} {place} lies in {out}, which is replaced at the end; name one outside it")


@contextmanager
def hold_places(out: Path, work: Path, busy: str) -> Iterator[None]:
    """Keep other programs out of both places for the block; `busy` is for `hold_alone`, which raises InputError."""
    with hold_alone(out, busy), hold_alone(work, busy):
        yield


@dataclass(frozen=True)
class Learner:
    """What changes while it learns.

    tensors: the parameters themselves, by their names in the file.
    dice: None: nothing is drawn from one.
    """

    tensors: Mapping[str, Tensor]
    optimizer: Any
    scaler: torch.amp.GradScaler
    dice: torch.Generator | None = None

    @property
    def trained(self) -> list[Tensor]:
        """The parameters in the optimizer's order."""
        return [each for group in self.optimizer.param_groups for each in group["params"]]


@dataclass(frozen=True)
class Progressed:
    """Losses of the steps that are done, the seconds that they took, and how many of them float16 left out."""

    history: Sequence[float]
    seconds: float
    skipped: int = 0

    def find_ends(self) -> tuple[float, float]:
        """The mean loss of the first tenth of the steps, and of the last."""
        history, tenth = list(self.history), max(1, len(self.history) // 10)
        first, last = (sum(part) / tenth for part in (history[:tenth], history[-tenth:]))
        return first, last


class Checkpoints:
    """The checkpoint in a work folder.

    metadata: of the file with what is learnt. settings: with "steps". every: steps between two of them; 0: none are
        written. file: the name of what is learnt.
    """

    def __init__(
        self, work: Path, metadata: Mapping[str, str], settings: Mapping[str, Any], every: int, file: str = FILE_NAME
    ) -> None:
        self._folder, self._metadata, self._settings, self.every = work / FOLDER, metadata, settings, every
        self._file = file

    def check(self, *, resume: bool) -> None:
        """Raise InputError where there is nothing to go on from, or a training with other settings, which it names."""
        there = (self._folder / RECORD).exists()
        if not resume:
            if there:
                log.warning("%s: a training that was stopped is begun anew; with --resume it goes on", self._folder)
            return
        if not there:
            raise InputError(f"{self._folder}: there is no checkpoint to go on from; leave --resume")
        record = self._read_record()
        difference = explain_difference(record["settings"], self._settings)
        if difference:
            raise InputError(
                f"{self._folder}: the training that is to go on had other settings ({difference}); give those of then, "
                "or leave --resume to begin anew"
            )

    def keep(self, learner: Learner, done: Progressed) -> None:
        """Write the checkpoint if the step is one for it. Raises BuildError for a full disk."""
        step = len(done.history)
        if not self.every or step % self.every or step == self._settings["steps"]:
            return
        try:
            with atomic_directory(self._folder, marker=RECORD) as folder:
                self._write(folder, learner, done)
        except BuildError as error:
            raise BuildError(f"{error}; {self.describe() or 'no checkpoint was written before'}") from error

    def _write(self, folder: Path, learner: Learner, done: Progressed) -> None:
        import torch

        learnt = {name: value.detach().cpu().contiguous() for name, value in learner.tensors.items()}
        write_tensor_file(folder / self._file, learnt, self._metadata)
        tensors = {"history": torch.tensor(done.history, dtype=torch.float64)}
        if learner.dice is not None:
            tensors["dice"] = learner.dice.get_state()
        numbers: dict[str, Any] = {}
        for index, state in learner.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                place = tensors if isinstance(value, torch.Tensor) else numbers
                place[f"optimizer.{index}.{name}"] = value
        write_state(folder / STATE, tensors)
        record = {"schema": _SCHEMA, "step": len(done.history), "seconds": done.seconds, "numbers": numbers}
        record |= {"skipped": done.skipped, "scaler": learner.scaler.state_dict(), "settings": dict(self._settings)}
        write_json(folder / RECORD, record)

    def restore(self, learner: Learner) -> Progressed:
        """Put the learner where the checkpoint stands. Raises FileFormatError for a damaged one."""
        record, held = self._read_record(), read_state(self._folder / STATE)
        learnt = read_state(self._folder / self._file)
        try:
            for name, value in learner.tensors.items():
                value.detach().copy_(learnt[name])
            self._restore_optimizer(learner.optimizer, {**held, **record["numbers"]})
            learner.scaler.load_state_dict(record["scaler"])
            if learner.dice is not None:
                learner.dice.set_state(held["dice"])
            return Progressed(held["history"].tolist(), float(record["seconds"]), int(record.get("skipped", 0)))
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise FileFormatError(f"{self._folder}: damaged ({error}); remove it and begin anew") from error

    def _restore_optimizer(self, optimizer: Any, values: Mapping[str, Tensor | float]) -> None:
        states: dict[int, dict[str, Any]] = {}
        for name, value in values.items():
            kind, *rest = name.split(".", 2)
            if kind == "optimizer":
                states.setdefault(int(rest[0]), {})[rest[1]] = value
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})

    def describe(self) -> str:
        """Which checkpoint is kept, for messages; "" where there is none."""
        with suppress(FileFormatError, KeyError):
            return f"the checkpoint of step {self._read_record()['step']} is kept in {self._folder}"
        return ""

    def remove(self) -> None:
        """Remove the checkpoint of a training that is finished."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with suppress(OSError):
            self._folder.parent.rmdir()  # where nothing else is kept

    def _read_record(self) -> dict[str, Any]:
        record = read_json(self._folder / RECORD)
        if record.get("schema") != _SCHEMA or not isinstance(record.get("settings"), dict):
            raise FileFormatError(f"{self._folder}: not a checkpoint of this version; remove it and begin anew")
        return record
