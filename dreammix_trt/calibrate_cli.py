"""`dreammix-trt calibrate`: what a base's UNets need to compute in E4M3."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.lora_names import join_first
from dreammix_trt.terminal import AsJson, Threads, print_json, say, show_progress

BasePath = Annotated[
    Path | None,
    typer.Argument(help="The base: diffusers folder or single-file checkpoint; default: the embedded micro-SDXL."),
]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="The file. A run that was stopped goes on with it; more requests add to it.")
]
Patch = Annotated[
    Path | None, typer.Option(help="*.fooocus.patch; default: the one in the base's folder, or beside its file.")
]
Head = Annotated[Path | None, typer.Option(help="inpaint_head.pth; default: like the patch.")]
Vae = Annotated[Path | None, typer.Option(help="Another VAE: folder or file.")]
Tokenizer = Annotated[Path | None, typer.Option(help="Another tokenizer's folder; default: the base's, or CLIP's.")]
PatchBiases = Annotated[bool, typer.Option("--patch-biases", help="Apply the patch's biases too (Fooocus).")]
Prompts = Annotated[Path | None, typer.Option(help="A file of prompts, one per line; default: a built-in set.")]
Images = Annotated[Path | None, typer.Option(help="A folder of pictures to paint into; default: drawn ones.")]
Count = Annotated[int, typer.Option(min=1, help="Requests.")]
Steps = Annotated[int, typer.Option(min=6, help="Steps of each request.")]
Probes = Annotated[
    int,
    typer.Option(
        min=0,
        help="Calls of each UNet on which every layer's error is measured, one layer at a time; 0: none.",
    ),
]
Side = Annotated[
    int | None, typer.Option(min=64, help="Side of the pictures in pixels; default: the base's native side.")
]
Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="What torch runs on.")]

EXAMPLES = """
Examples:

dreammix-trt calibrate sdxl.safetensors --out calibration.json --device cuda

dreammix-trt build --base sdxl.safetensors --target sm_89 --precision fp8 --calibration calibration.json -o engines/base
"""
PANELS = {
    "The base": ("base", "patch", "head", "vae", "tokenizer", "patch_biases"),
    "What is run": ("prompts", "images", "count", "steps", "probes", "side", "device", "threads"),
    "What is written": ("out", "as_json"),
}


def calibrate(
    out: Out,
    base: BasePath = None,
    patch: Patch = None,
    head: Head = None,
    vae: Vae = None,
    tokenizer: Tokenizer = None,
    patch_biases: PatchBiases = False,
    prompts: Prompts = None,
    images: Images = None,
    count: Count = 16,
    steps: Steps = 10,
    probes: Probes = 2,
    side: Side = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Run a base's own requests in torch, to find what its UNets need to compute in E4M3 (`build --precision fp8`)."""
    from dreammix_trt.building import BaseSources
    from dreammix_trt.calibration import CalibrationOptions, list_pictures
    from dreammix_trt.calibration import calibrate as run

    options = CalibrationOptions(
        prompts=_read_prompts(prompts) if prompts else (),
        images=list_pictures(images) if images else (),
        count=count,
        steps=steps,
        probes=probes,
        side=side,
        device=device,
        threads=threads,
    )
    with show_progress("calibrating") as update:
        found = run(BaseSources(base, patch, head, vae, tokenizer, patch_biases).open(), out, options, update)
    kept = {name: list(found.kept(name)) for name in found.layers}
    if as_json:
        print_json({"calibration": str(out), "requests": len(found.runs), "kept_in_float16": kept})
    for name, layers in kept.items():
        hurt = found.hurt(name)
        say(
            f"{name}: {len(found.scales(name))} layers compute in E4M3, {len(layers)} stay float16, {len(hurt)} of "
            f"these for their error{': ' if hurt else ''}{join_first(list(hurt))}"
        )
    say(f"next: dreammix-trt build --precision fp8 --calibration {out} --target sm_89 --out ENGINE")


def _read_prompts(file: Path) -> list[str]:
    """The lines of a file that hold something. Raises InputError where there are none."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {file}: cannot be read as text ({error})") from error
    found = [line for line in lines if line]
    if not found:
        raise InputError(f"--prompts {file}: holds no prompt; write one per line")
    return found
