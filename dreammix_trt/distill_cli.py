"""`dreammix-trt distill`: a base becomes a few-step LoRA for itself."""

from __future__ import annotations

from contextlib import nullcontext
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
    open_events,
)

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for lcm_lora.safetensors and distill.json, its card.")]
Pictures = Annotated[
    Path | None,
    typer.Option(
        help="Folder of pictures with masks and captions, laid out as `regularize` does; default: rendered scenes, for "
        "the embedded base alone."
    ),
]
Rank = Annotated[int | None, typer.Option(min=1, max=256, help="Of the LoRA's factors; default fits the base.")]
Guidance = Annotated[
    str | None,
    typer.Option(metavar="W | LOW,HIGH", help="Guidance that is distilled, or drawn between two; default 4."),
]
Skip = Annotated[
    int | None, typer.Option(min=1, max=50, help="Of 50 timesteps, how many the teacher leaps; default fits the base.")
]
Views = Annotated[int | None, typer.Option(min=1, help="Pictures that are encoded; default fits the base.")]
Work = Annotated[Path | None, typer.Option(help="Folder of checkpoints and encoded pictures; default: OUT.work.")]

EXAMPLES = """
Examples:

dreammix-trt distill -o lcm/ && dreammix-trt build --base-lora lcm/lcm_lora.safetensors --lora lora/ -o engines/fast

dreammix-trt distill -o lcm/ --base sdxl/ --pictures regular/ --device cuda
"""
PANELS = {
    **SHARED_PANELS,
    "What is distilled": ("pictures", "views", "guidance", "skip"),
    "How it is learnt": ("rank", "steps", "learning_rate", "batch", "accumulate", "seed"),
}


def distill(
    out: Out,
    base: Base = None,
    patch: Patch = None,
    head: Head = None,
    vae: Vae = None,
    tokenizer: Tokenizer = None,
    patch_biases: PatchBiases = False,
    pictures: Pictures = None,
    views: Views = None,
    guidance: Guidance = None,
    skip: Skip = None,
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
    """Distil a base into an LCM-style LoRA: few steps without guidance."""
    from dreammix_trt.building import BaseSources
    from dreammix_trt.core.extras import require_training
    from dreammix_trt.trainer.distill import FILE_NAME, RECORD, distill_lora, recipe_for

    require_training()
    if (out / RECORD).exists() and not force:
        raise InputError(f"--out {out} holds a LoRA that was distilled before; --force replaces it, or name another")
    events = open_events(tensorboard)
    files = BaseSources(base, patch, head, vae, tokenizer, patch_biases).open()
    given: dict[str, Any] = {"views": views, "skip": skip, "rank": rank, "steps": steps, "learning_rate": learning_rate}
    given |= {"batch": batch, "accumulate": accumulate, "checkpoint_every": checkpoint_every}
    given |= {"guidance": None if guidance is None else _parse_guidance(guidance)}
    recipe = change(recipe_for(files.native_side), given)
    with events or nullcontext(), show_progress("distilling") as update:
        done = distill_lora(
            out,
            base=files,
            pictures=pictures,
            recipe=recipe,
            hardware=choose_hardware(device, precision, optimizer),
            seed=seed,
            threads=threads,
            work=work,
            resume=resume,
            events=events,
            progress=update,
        )
    file = out / FILE_NAME
    if as_json:
        print_json({"lora": str(file), "steps": done.steps, "loss": done.loss, "bytes": done.bytes})
    say(f"{done.steps} steps in {done.seconds:.0f} s, loss {done.first_loss:.4f} -> {done.loss:.4f}")
    say(f"next: dreammix-trt build --base-lora {file} -o ENGINE; its requests take 8 steps of lcm without guidance")


def _parse_guidance(text: str) -> tuple[float, float]:
    """W, or LOW,HIGH."""
    try:
        low, high = (float(part) for part in (text.split(",") if "," in text else (text, text)))
    except ValueError:
        raise InputError(f"--guidance is {text!r}; give a number, or two with a comma such as 3,6") from None
    return low, high
