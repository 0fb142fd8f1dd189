"""`dreammix-trt regularize`: a subject's attributes become regular pictures for `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dreammix_trt.core.errors import InputError
from dreammix_trt.inpaint_cli import GuidanceScale
from dreammix_trt.painting_cli import Device, Engine, Steps
from dreammix_trt.terminal import AsJson, Force, Seed, Store, Threads, print_json, say, show_progress
from dreammix_trt.train_cli import InvertMasks, LargeMasks, Segmenter, SegmenterStyle

AttributesFile = Annotated[
    Path, typer.Argument(metavar="ATTRIBUTES", help="attributes.json: of `dreammix-trt attributes`, or by hand.")
]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="Folder for regular_CLASS/PROMPT/SEED-image.png, masks and sheet.png.")
]
Count = Annotated[int, typer.Option("--count", "-n", min=1, max=10_000, help="Pictures.")]
Photos = Annotated[
    Path | None,
    typer.Option(help="The subject's photographs, with masks: painted where it stands in them. Default: drawn rooms."),
]
Contrast = Annotated[
    float,
    typer.Option(min=0.0, max=1.0, help="Share of the prompts with words that the subject does not have."),
]
Segment = Annotated[
    bool, typer.Option("--segment", help="Find the thing in each picture; else its mask is all that was painted.")
]
Batch = Annotated[int, typer.Option(min=1, max=64, help="Pictures painted at once, with --device cuda.")]

EXAMPLES = """
Examples:

dreammix-trt regularize engines/base attributes.json -o regular/ --photos photos/ --count 24

dreammix-trt regularize engines/base attributes.json -o regular/ --segment --segmenter u2net.onnx --device cuda
"""
PANELS = {
    "What is painted": ("count", "contrast", "photos", "invert_masks", "large_masks", "seed"),
    "How it is painted": ("steps", "guidance_scale"),
    "Masks": ("segment", "segmenter", "segmenter_style"),
    "What is written": ("out", "force", "as_json"),
    "What it runs on": ("device", "batch", "threads", "store"),
}


def regularize(
    engine: Engine,
    attributes: AttributesFile,
    out: Out,
    count: Count = 24,
    contrast: Contrast = 0.5,
    photos: Photos = None,
    invert_masks: InvertMasks = False,
    large_masks: LargeMasks = False,
    seed: Seed = 0,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    segment: Segment = False,
    segmenter: Segmenter = None,
    segmenter_style: SegmenterStyle = None,
    force: Force = False,
    device: Device = "cpu",
    batch: Batch = 1,
    threads: Threads = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Paint other things of a subject's class, with its attributes and others, for `train --regular`."""
    from dreammix_trt.core.attributes import AttributeDictionary
    from dreammix_trt.core.passport import Passport
    from dreammix_trt.engine.dreammix import DreamMix
    from dreammix_trt.regularize import Regular, paint_regular
    from dreammix_trt.trainer.photographs import read_photographs
    from dreammix_trt.trainer.segment import open_segmenter

    if (segmenter is not None or segmenter_style is not None) and not segment:
        raise InputError("--segmenter and --segmenter-style need --segment")
    if photos is None and (invert_masks or large_masks):
        raise InputError("--invert-masks and --large-masks need --photos")
    if batch > 1 and device != "cuda":
        raise InputError(f"--batch {batch} needs --device cuda; the CPU paints one picture after the other")
    dictionary = AttributeDictionary.read(attributes)
    fields = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    masks = {"invert_masks": invert_masks, "large_masks": large_masks}
    order = Regular(
        dictionary,
        count,
        seed,
        contrast,
        tuple(read_photographs(photos, **masks)) if photos is not None else (),
        Passport.read(engine).base_key,
        tuple((name, value) for name, value in fields.items() if value is not None),
    )
    network = open_segmenter(segmenter, segmenter_style, threads) if segment else None
    options: dict[str, Any] = {"pictures": batch} if device == "cuda" else {}
    with (
        DreamMix.load(engine, threads=threads, store=store, device=device, **options) as dm,
        show_progress("painting") as update,
    ):
        done = paint_regular(dm, order, out, segmenter=network, batch=batch, force=force, progress=update)
    if as_json:
        print_json({"regular": str(out), "sheet": str(done.sheet), "painted": done.new, "kept": done.kept})
    how = "each mask is all that was painted (--segment finds the thing itself)" if network is None else "masks by "
    how += "" if network is None else network.file.name
    say(f"{done.new} pictures painted, {done.kept} were there; {how}; look at {done.sheet}, delete what is wrong")
