"""`dreammix-trt train-asuka`: pictures become ASUKA's prior, its alignment with a base, and its decoder."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

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

PartOf = Annotated[
    Literal["prior", "align", "decoder"],
    typer.Argument(help="prior first, then align, which needs it; decoder at any time."),
]
Images = Annotated[
    Path | None,
    typer.Argument(help="Folder of pictures of any sizes; default: rendered rooms, for the embedded base alone."),
]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="Folder for config.json, prior.safetensors and decoder.safetensors.")
]
Objects = Annotated[
    Path | None,
    typer.Option(help="Folder of silhouettes, white on black, for holes in the shape of things; default: made up."),
]
Start = Annotated[
    Path | None,
    typer.Option(
        help="What the part begins with: a folder like --out, or mae_300.pth, vit-mae-base, asuka_alignment_*.pt, "
        "asuka_decoder.ckpt."
    ),
]
Side = Annotated[int | None, typer.Option(min=64, help="Of the training pictures in pixels; default fits the base.")]
Revealed = Annotated[
    str | None,
    typer.Option(
        metavar="FIRST,LAST",
        help="align: how often the prior is told of an empty hole, at first and at last; default fits the base.",
    ),
]
RevealSteps = Annotated[int | None, typer.Option(min=1, help="align: steps from FIRST to LAST; default fits the base.")]
Perceptual = Annotated[
    Path | None,
    typer.Option(help="decoder: VGG-16's weights (vgg16-397923af.pth), for LPIPS; default: slopes at three scales."),
]
Work = Annotated[Path | None, typer.Option(help="Folder of checkpoints and rendered rooms; default: OUT.work.")]

EXAMPLES = """
Examples:

dreammix-trt train-asuka prior -o asuka/ && dreammix-trt train-asuka align -o asuka/

dreammix-trt train-asuka decoder -o asuka/

dreammix-trt train-asuka prior photos/ -o asuka/ --base sdxl/ --device cuda --objects silhouettes/
"""
PANELS = {
    **SHARED_PANELS,
    "What is learnt": ("objects", "side", "revealed", "reveal_steps", "perceptual", "start"),
    "How it is learnt": ("steps", "learning_rate", "batch", "accumulate", "seed"),
}


def train_asuka(
    part: PartOf,
    out: Out,
    images: Images = None,
    base: Base = None,
    patch: Patch = None,
    head: Head = None,
    vae: Vae = None,
    tokenizer: Tokenizer = None,
    patch_biases: PatchBiases = False,
    objects: Objects = None,
    side: Side = None,
    revealed: Revealed = None,
    reveal_steps: RevealSteps = None,
    perceptual: Perceptual = None,
    start: Start = None,
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
    """Train one part of ASUKA for a base: what keeps it from inventing things in a hole, and from seams around it."""
    from dreammix_trt.building import BaseSources
    from dreammix_trt.core.extras import require_training
    from dreammix_trt.trainer.asuka import training
    from dreammix_trt.trainer.asuka.recipes import recipe_for

    require_training()
    as_json = hush_followers(as_json)
    if not force:
        _check_new(part, out)
    events = open_events(tensorboard / part if tensorboard else None)
    files = BaseSources(base, patch, head, vae, tokenizer, patch_biases).open()
    given: dict[str, Any] = {
        "steps": steps,
        "learning_rate": learning_rate,
        "batch": batch,
        "accumulate": accumulate,
        "side": side,
    }
    given |= {"reveal_steps": reveal_steps, "checkpoint_every": checkpoint_every}
    given |= {"revealed": None if revealed is None else _parse_revealed(revealed)}
    if part != "align" and (revealed is not None or reveal_steps is not None):
        raise InputError("--revealed and --reveal-steps are of the alignment; leave them, or train the part align")
    with events or nullcontext(), show_progress("training") as update:
        done = training.train_asuka(
            part,
            out,
            images=images,
            objects=objects,
            base=files,
            recipe=change(recipe_for(part, files.native_side), given),
            start=start,
            perceptual=perceptual,
            hardware=choose_hardware(device, precision, optimizer),
            seed=seed,
            threads=threads,
            work=work,
            resume=resume,
            events=events,
            progress=update,
        )
    if as_json:
        print_json({"asuka": str(out), **asdict(done)})
    say(f"{part}: {done.steps} steps in {done.seconds:.0f} s, loss {done.first_loss:.4f} -> {done.loss:.4f}; in {out}")
    if part != "align":
        _tell_next(out)


def _tell_next(out: Path) -> None:
    """Say so where a prior waits for its alignment."""
    from dreammix_trt.core.asuka_folder import AsukaFolder
    from dreammix_trt.trainer.asuka.task import is_trained

    folder = AsukaFolder.open(out)
    if "prior" in folder.parts and not is_trained("align", folder):
        say(f"next: dreammix-trt train-asuka align -o {out}; no engine can be built with a prior that is not aligned")


def _check_new(part: Literal["prior", "align", "decoder"], out: Path) -> None:
    """Refuse to train again what took long to train."""
    from dreammix_trt.core.asuka_folder import CONFIG, AsukaFolder
    from dreammix_trt.trainer.asuka.task import is_trained

    if not (out / CONFIG).is_file() or not is_trained(part, AsukaFolder.open(out)):
        return
    lost = " and removes the alignment made for it" if part == "prior" else ""
    raise InputError(
        f"--out {out} holds this part ({part}) already; --force trains it again{lost}, or name another folder"
    )


def _parse_revealed(text: str) -> tuple[float, float]:
    """FIRST,LAST."""
    try:
        first, last = map(float, text.split(","))
    except ValueError:
        raise InputError(f"--revealed is {text!r}; give two shares with a comma, such as 1,0.1") from None
    return first, last
