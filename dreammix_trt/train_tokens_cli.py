"""`dreammix-trt train-tokens`: many objects become an adapter, with which one picture of a subject is enough."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dreammix_trt.core.errors import InputError
from dreammix_trt.terminal import (
    AsJson,
    Base,
    Force,
    Head,
    Patch,
    PatchBiases,
    Seed,
    Threads,
    Tokenizer,
    Vae,
    print_json,
    say,
    show_progress,
)
from dreammix_trt.training_options import PANELS as SHARED_PANELS
from dreammix_trt.training_options import (
    Accumulate,
    Batch,
    CheckpointEvery,
    Device,
    LearningRate,
    Optimizer,
    Precision,
    Resume,
    Steps,
    Tensorboard,
    change,
    choose_hardware,
    hush_followers,
    open_events,
)

Data = Annotated[
    Path | None,
    typer.Argument(
        help="Folder of objects: CLASS/OBJECT/ with photographs and masks as `train` takes them, or what `regularize` "
        "writes; default: rendered objects, for the embedded base alone."
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for token_adapter.safetensors.")]
Objects = Annotated[
    int | None, typer.Option(min=1, help="Rendered objects, where no DATA is given; default fits the base.")
]
Views = Annotated[
    int | None,
    typer.Option(min=1, help="Of each object: pictures to paint it in, and as many references; default fits the base."),
]
Decoupling = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Share of the rows of which the whole picture is painted as its caption says; default 0.5.",
    ),
]
Words = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Share of the rows that learn from the base told of the object in words, instead of from the noise; "
        "default fits the base.",
    ),
]
Rank = Annotated[int | None, typer.Option(min=1, max=256, help="Of the LoRA's factors; default fits the base.")]
Start = Annotated[
    Path | None, typer.Option(help="Adapter of this base to begin with, file or folder; default: begin anew.")
]
Work = Annotated[Path | None, typer.Option(help="Folder of checkpoints and encoded objects; default: OUT.work.")]

EXAMPLES = """
Examples:

dreammix-trt train-tokens -o adapter/ && dreammix-trt build --tokens adapter/ -o engines/any

dreammix-trt train-tokens objects/ -o adapter/ --base sdxl/ --device cuda
"""
PANELS = {
    **SHARED_PANELS,
    "What is learnt": ("objects", "views", "decoupling", "words"),
    "How it is learnt": ("start", "rank", "steps", "learning_rate", "batch", "accumulate", "seed"),
}


def train_tokens(
    out: Out,
    data: Data = None,
    base: Base = None,
    patch: Patch = None,
    head: Head = None,
    vae: Vae = None,
    tokenizer: Tokenizer = None,
    patch_biases: PatchBiases = False,
    objects: Objects = None,
    views: Views = None,
    decoupling: Decoupling = None,
    words: Words = None,
    start: Start = None,
    rank: Rank = None,
    steps: Steps = None,
    learning_rate: LearningRate = None,
    batch: Batch = None,
    accumulate: Accumulate = None,
    seed: Seed = 0,
    device: Device = "cpu",
    precision: Precision = None,
    optimizer: Optimizer = "adamw",
    threads: Threads = None,
    checkpoint_every: CheckpointEvery = None,
    resume: Resume = False,
    work: Work = None,
    tensorboard: Tensorboard = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train a base once, on many objects, to draw a subject from one picture without further training."""
    from dreammix_trt.building import BaseSources
    from dreammix_trt.core.extras import require_training
    from dreammix_trt.core.token_adapter import FILE_NAME
    from dreammix_trt.trainer.tokens import training
    from dreammix_trt.trainer.tokens.recipes import recipe_for

    require_training()
    as_json = hush_followers(as_json)
    file = out / FILE_NAME
    if file.exists() and not force:
        raise InputError(f"--out {out} holds an adapter that was trained before; --force replaces it, or name another")
    if data is not None and objects is not None:
        raise InputError("--objects is how many are rendered where no DATA is given; leave it, or DATA")
    events = open_events(tensorboard)
    files = BaseSources(base, patch, head, vae, tokenizer, patch_biases).open()
    given: dict[str, Any] = {"objects": objects, "views": views, "decoupling": decoupling, "rank": rank, "steps": steps}
    given |= {"learning_rate": learning_rate, "batch": batch, "accumulate": accumulate}
    given |= {"checkpoint_every": checkpoint_every, "words": words}
    with events or nullcontext(), show_progress("training") as update:
        done = training.train_tokens(
            out,
            data,
            base=files,
            recipe=change(recipe_for(files.native_side), given),
            start=start,
            hardware=choose_hardware(device, precision, optimizer),
            seed=seed,
            threads=threads,
            work=work,
            resume=resume,
            events=events,
            progress=update,
        )
    if as_json:
        print_json({"adapter": str(file), **asdict(done)})
    say(f"{done.steps} steps in {done.seconds:.0f} s, loss {done.first_loss:.4f} -> {done.loss:.4f}; in {file}")
    say(f"next: dreammix-trt build --tokens {file} -o ENGINE")
