"""`dreammix-trt train`: photographs of a subject become its LoRA."""

from __future__ import annotations

from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dreammix_trt.core.errors import InputError
from dreammix_trt.terminal import (
    AsJson,
    Base,
    BaseLoras,
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
    warn,
)
from dreammix_trt.training_options import (
    Accumulate,
    Batch,
    Device,
    LearningRate,
    Optimizer,
    Precision,
    Steps,
    Tensorboard,
    change,
    choose_hardware,
    hush_followers,
    open_events,
)

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
        "subject.json, its card.",
    ),
]
Token = Annotated[str, typer.Option(help="The word that will mean this subject.")]
Prompt = Annotated[str | None, typer.Option(help='Caption of the photographs; default "a photo of a TOKEN CLASS".')]
Rank = Annotated[int | None, typer.Option(min=1, max=128, help="Of the LoRA's factors; default fits the base.")]
Loss = Annotated[Literal["paper", "reference"], typer.Option(help="paper (eq. 7) or reference (the authors' code).")]
Attributes = Annotated[
    Path | None, typer.Option(help="attributes.json: the subject in words, as `attributes` or a person writes it.")
]
Captions = Annotated[
    Literal["plain", "attributes"] | None,
    typer.Option(help="attributes: further captions with the words of --attributes (default with it); plain: none."),
]
Regular = Annotated[
    Path | None,
    typer.Option(help="Folder of regular pictures, as `regularize` makes it; default: the base paints some first."),
]
Beta = Annotated[float | None, typer.Option(min=0.0, help="Weight of the regular pictures; default fits the base.")]
BetaAs = Annotated[
    Literal["loss", "probability"],
    typer.Option(help="loss: both losses are summed (eq. 8); probability: a sample is regular with beta / (1 + beta)."),
]
CropShare = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Share of views that are crops, as the local stage makes them; default 0.6."),
]
Checkpointing = Annotated[
    Literal["on", "off"] | None,
    typer.Option(
        "--gradient-checkpointing",
        help="Compute inner values twice instead of keeping them; default: on for bases above 256 pixels.",
    ),
]
CheckpointEvery = Annotated[
    int | None,
    typer.Option(min=0, help="Steps between two checkpoints; 0: none. Default: 250 above 256 pixels, else none."),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on from the last checkpoint, with the same options; a LoRA that they made before stays."
    ),
]
Work = Annotated[Path | None, typer.Option(help="Folder of checkpoints and encoded photographs; default: OUT.work.")]
ValidateEvery = Annotated[int, typer.Option(min=0, help="Steps between pictures of what it can do; 0: none.")]
ValidatePrompt = Annotated[
    list[str] | None, typer.Option(help="What those pictures show; default: the prompt, and the subject in red.")
]
ValidateEngine = Annotated[Path | None, typer.Option(help="An engine of the same base, which paints them.")]
ValidationImage = Annotated[
    Path | None, typer.Option(help="The picture that they are painted into; default: the first photograph, or rooms.")
]
ValidationMask = Annotated[
    Path | None, typer.Option(help="Its mask: white is repainted; default: what is transparent in it.")
]
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

dreammix-trt train photos/ --class-name mug -o lora/ --base sdxl/ --device cuda --attributes attributes.json

dreammix-trt train photos/ --class-name mug -o lora/ --segment --segmenter u2net.onnx
"""
PANELS = {
    "What is learnt": ("class_name", "token", "prompt", "attributes", "captions", "regular"),
    "The base": ("base", "patch", "head", "vae", "tokenizer", "base_lora", "patch_biases"),
    "Masks": ("invert_masks", "large_masks", "segment", "segmenter", "segmenter_style", "yes"),
    "How it is learnt": (*("rank", "steps", "learning_rate", "loss", "beta", "beta_as", "crop_share", "seed"),),
    "What it runs on": ("device", "precision", "threads"),
    "What it takes of memory": ("batch", "accumulate", "gradient_checkpointing", "optimizer"),
    "While it runs": (
        *("checkpoint_every", "resume", "work", "tensorboard", "validate_every", "validate_prompt", "validate_engine"),
        *("validation_image", "validation_mask"),
    ),
    "What is written": ("out", "merged", "force", "as_json"),
}


def train(
    photos: Photos,
    class_name: ClassName,
    out: Out,
    base: Base = None,
    patch: Patch = None,
    head: Head = None,
    vae: Vae = None,
    tokenizer: Tokenizer = None,
    base_lora: BaseLoras = None,
    patch_biases: PatchBiases = False,
    token: Token = "sks",
    prompt: Prompt = None,
    attributes: Attributes = None,
    captions: Captions = None,
    regular: Regular = None,
    rank: Rank = None,
    steps: Steps = None,
    learning_rate: LearningRate = None,
    loss: Loss = "reference",
    beta: Beta = None,
    beta_as: BetaAs = "probability",
    crop_share: CropShare = None,
    batch: Batch = None,
    accumulate: Accumulate = None,
    device: Device = "cpu",
    precision: Precision = None,
    optimizer: Optimizer = "adamw",
    gradient_checkpointing: Checkpointing = None,
    checkpoint_every: CheckpointEvery = None,
    resume: Resume = False,
    work: Work = None,
    tensorboard: Tensorboard = None,
    validate_every: ValidateEvery = 0,
    validate_prompt: ValidatePrompt = None,
    validate_engine: ValidateEngine = None,
    validation_image: ValidationImage = None,
    validation_mask: ValidationMask = None,
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
    as_json = hush_followers(as_json)
    from dreammix_trt.trainer.checkpoints import find_work, has_checkpoint

    place = work or find_work(out)
    _check_out(out, force=force or (resume and not has_checkpoint(place)))
    events = open_events(tensorboard)
    if segment:
        if invert_masks:
            raise InputError(
                "--invert-masks excludes --segment, whose masks are white on the subject; leave one of them"
            )
        _make_masks(photos, segmenter, segmenter_style, threads=threads, approved=yes, as_json=as_json)
    elif segmenter is not None or segmenter_style is not None or yes:
        raise InputError("--segmenter, --segmenter-style and --yes need --segment")
    if captions == "attributes" and attributes is None:
        raise InputError("--captions attributes needs --attributes FILE, which has the words")
    from dreammix_trt.building import BaseSources
    from dreammix_trt.train_watch import TrainWatch
    from dreammix_trt.trainer.lora import train_lora
    from dreammix_trt.trainer.recipes import recipe_for

    files = BaseSources(base, patch, head, vae, tokenizer, patch_biases).open()
    given = {"beta": beta, "beta_as": beta_as, "crop_share": crop_share, "batch": batch, "accumulate": accumulate}
    inner = None if gradient_checkpointing is None else gradient_checkpointing == "on"
    given |= {"gradient_checkpointing": inner, "checkpoint_every": checkpoint_every}
    recipe = change(recipe_for(files.native_side), given)
    options: dict[str, Any] = {"token": token, "prompt": prompt, "rank": rank, "steps": steps, "seed": seed}
    options |= {"learning_rate": learning_rate, "loss": loss, "merged": merged, "threads": threads, "resume": resume}
    options |= {"attributes": attributes, "attribute_captions": captions != "plain", "regular": regular, "work": place}
    prompts, spot = tuple(validate_prompt or ()), (validation_image, validation_mask)
    watch = TrainWatch(place, validate_every, prompts, validate_engine, *spot, threads, events)
    with closing(watch), events or nullcontext(), show_progress("training") as update:
        record = train_lora(
            photos,
            class_name,
            out,
            base=files,
            base_loras=base_lora or (),
            recipe=recipe,
            hardware=choose_hardware(device, precision, optimizer),
            watch=watch,
            events=events,
            invert_masks=invert_masks,
            large_masks=large_masks,
            progress=update,
            notice=say,
            **options,
        )
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
