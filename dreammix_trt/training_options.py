"""Options of the commands that train: `train`, `distill`, `train-asuka`, `train-tokens`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from dreammix_trt.terminal import choose_messages

if TYPE_CHECKING:
    from dreammix_trt.trainer.events import Events
    from dreammix_trt.trainer.hardware import Hardware

_Recipe = TypeVar("_Recipe")

Steps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps; default fits the base.")]
LearningRate = Annotated[float | None, typer.Option(min=0.0, help="Default fits the base.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Pictures in memory at a time; default fits the base.")]
Accumulate = Annotated[int | None, typer.Option(min=1, help="Such batches in a step; default fits the base.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or one GPU of several: cuda:1.")]
Precision = Annotated[
    Literal["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"] | None,
    typer.Option(
        metavar="fp32|bf16|fp16",
        help="Of the frozen base; the LoRA stays float32. Default: bfloat16 on a GPU, float32 on a CPU.",
    ),
]
Optimizer = Annotated[
    Literal["adamw", "adamw8bit"], typer.Option(help="adamw8bit: state in 8 bits, on a GPU, by bitsandbytes.")
]
CheckpointEvery = Annotated[
    int | None, typer.Option(min=0, help="Steps between two checkpoints; 0: none; default fits the base.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint, with the same options.")]
Tensorboard = Annotated[
    Path | None,
    typer.Option(help="Folder for TensorBoard: loss and learning rate of every step, validation pictures of `train`."),
]
#: panels of `distill`, `train-asuka` and `train-tokens`
PANELS = {
    "The base": ("base", "patch", "head", "vae", "tokenizer", "patch_biases"),
    "What it runs on": ("device", "precision", "optimizer", "threads"),
    "While it runs": ("checkpoint_every", "resume", "work", "tensorboard"),
    "What is written": ("out", "force", "as_json"),
}
_PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def choose_hardware(device: Device, precision: Precision, optimizer: Optimizer) -> Hardware:
    """What these options ask for; short words for a precision mean the long ones."""
    from dreammix_trt.trainer.hardware import Hardware

    return Hardware(device, _PRECISIONS.get(precision or "", precision), optimizer)  # type: ignore[arg-type]


def hush_followers(as_json: bool) -> bool:
    """Let only the leading one of several processes speak. Returns whether this one prints JSON.

    as_json: whether JSON was asked for.
    """
    from dreammix_trt.trainer.processes import is_leading

    if is_leading():
        return as_json
    choose_messages(quiet=True)
    return False


def open_events(folder: Path | None) -> Events | None:
    """What tells TensorBoard; None where nobody asks for it. Raises MissingExtraError without the package."""
    from dreammix_trt.trainer.events import Events

    return None if folder is None else Events(folder)


def change(recipe: _Recipe, given: Mapping[str, Any]) -> _Recipe:
    """The recipe with the options that were given in the place of its own. given: by field; None: not given."""
    return replace(recipe, **{name: value for name, value in given.items() if value is not None})  # type: ignore[type-var]
