"""`dreammix-trt train`: photographs of a subject become its LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dreammix_trt.core.errors import InputError
from dreammix_trt.terminal import AsJson, Base, Force, Seed, Threads, print_json, say, show_progress, warn

if TYPE_CHECKING:
    from dreammix_trt.trainer.folder import TrainRecord

Photos = Annotated[
    Path, typer.Argument(help="Folder with image/NN.jpg and mask/NN.png, or NN.jpg with NN_mask.png beside it.")
]
ClassName = Annotated[str, typer.Option(help="What the subject is, in a word: mug, teapot, dog.")]
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        help="Folder for pytorch_lora_weights.safetensors, TOKEN_CLASS.safetensors (the same for other programs) and "
        "train.json.",
    ),
]
Token = Annotated[str, typer.Option(help="The word that will mean this subject.")]
Prompt = Annotated[str | None, typer.Option(help='Caption of the photographs; default "a photo of a TOKEN CLASS".')]
Rank = Annotated[int, typer.Option(min=1, max=128, help="Of the LoRA's factors.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps; default fits the base.")]
LearningRate = Annotated[float | None, typer.Option(min=0.0, help="Default fits the base.")]
Loss = Annotated[Literal["paper", "reference"], typer.Option(help="paper (eq. 7) or reference (the authors' code).")]
Merged = Annotated[bool, typer.Option("--merged", help="Also write the merged UNet weights.")]
InvertMasks = Annotated[bool, typer.Option("--invert-masks", help="The subject is black in the masks.")]
LargeMasks = Annotated[bool, typer.Option("--large-masks", help="The subject does fill most of every photograph.")]
Segment = Annotated[bool, typer.Option("--segment", help="Make the masks that are missing, and show them.")]
Segmenter = Annotated[
    Path | None, typer.Option(help="For --segment: the ONNX file of a U²-Net or ISNet, such as rembg's.")
]
SegmenterStyle = Annotated[
    Literal["u2net", "isnet"] | None,
    typer.Option(help="How it normalises; default: by the file's name, then its size."),
]
Yes = Annotated[bool, typer.Option("--yes", help="Train on new masks without showing them first.")]

EXAMPLES = """
Examples:

dreammix-trt train photos/ --class-name mug -o lora/

dreammix-trt train photos/ --class-name mug -o lora/ --base sdxl.safetensors --steps 500 --rank 8

dreammix-trt train photos/ --class-name mug -o lora/ --segment --segmenter u2net.onnx
"""
PANELS = {
    "What is learnt": ("class_name", "token", "prompt", "base"),
    "Masks": ("invert_masks", "large_masks", "segment", "segmenter", "segmenter_style", "yes"),
    "How it is learnt": ("rank", "steps", "learning_rate", "loss", "seed", "threads"),
    "What is written": ("out", "merged", "force", "as_json"),
}


def train(
    photos: Photos,
    class_name: ClassName,
    out: Out,
    base: Base = None,
    token: Token = "sks",
    prompt: Prompt = None,
    rank: Rank = 4,
    steps: Steps = None,
    learning_rate: LearningRate = None,
    loss: Loss = "reference",
    merged: Merged = False,
    invert_masks: InvertMasks = False,
    large_masks: LargeMasks = False,
    segment: Segment = False,
    segmenter: Segmenter = None,
    segmenter_style: SegmenterStyle = None,
    yes: Yes = False,
    seed: Seed = 0,
    threads: Threads = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train a LoRA of one subject from a handful of photographs."""
    from dreammix_trt.core.extras import require_training

    require_training()
    _check_out(out, force=force)
    if segment:
        if invert_masks:
            raise InputError(
                "--invert-masks excludes --segment, whose masks are white on the subject; leave one of them"
            )
        _make_masks(photos, segmenter, segmenter_style, threads=threads, approved=yes, as_json=as_json)
    elif segmenter is not None or segmenter_style is not None or yes:
        raise InputError("--segmenter, --segmenter-style and --yes need --segment")
    from dreammix_trt.trainer.lora import train_lora

    options: dict[str, Any] = {"base": base, "token": token, "prompt": prompt, "rank": rank, "steps": steps}
    options |= {"learning_rate": learning_rate, "loss": loss, "merged": merged, "seed": seed, "threads": threads}
    options |= {"invert_masks": invert_masks, "large_masks": large_masks}
    with show_progress("training") as update:
        record = train_lora(photos, class_name, out, **options, progress=update)
    _report(record, out, as_json)
    if steps is not None and steps < record.recipe["steps"] / 2:
        say(f"{steps} steps are few: {record.recipe['steps']} suit this base, and the subject may not be learnt yet")


def _check_out(out: Path, *, force: bool) -> None:
    """Refuse to replace a LoRA that took long to train."""
    from dreammix_trt.trainer.folder import RECORD

    if (out / RECORD).exists() and not force:
        raise InputError(
            f"--out {out} holds a LoRA that was trained before; --force replaces it, or name another folder"
        )


def _make_masks(
    photos: Path, segmenter: Path | None, style: str | None, *, threads: int | None, approved: bool, as_json: bool
) -> None:
    """Make the missing masks; unless they are approved, leave the program so that the user looks at them."""
    from dreammix_trt.segment_cli import make_masks
    from dreammix_trt.trainer.listing import SHEET

    new, sheet = make_masks(photos, segmenter, style, threads), photos / SHEET
    if approved or not new.made:
        return
    if as_json:
        masks, unseen = ([str(each) for each in files] for files in (new.made, new.unseen))
        print_json({"lora": None, "sheet": str(sheet), "masks": masks, "unseen": unseen})
    warn(
        f"Nothing was trained yet: look at {sheet}. Where a mask is wrong, paint it over or delete the photograph; "
        "then give the same command again. With --yes it does not stop here."
    )
    raise typer.Exit(1)


def _report(record: TrainRecord, out: Path, as_json: bool) -> None:
    twin = out / record.kohya_file
    if as_json:
        made = ("class_name", "token", "prompt", "rank", "steps", "loss", "seconds", "seed")
        print_json({"lora": str(out), "kohya": str(twin), **{name: getattr(record, name) for name in made}})
    say(
        f"{record.steps} steps in {record.seconds:.0f} s; LoRA in {out} for `dreammix-trt build --lora`; "
        f"the same for ComfyUI, A1111 and Fooocus: {twin}"
    )
