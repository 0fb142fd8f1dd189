"""The command line: photographs -> LoRA -> engine -> picture, one command each.

Errors raised on purpose become one message on stderr and an exit code here, and only here.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from dreammix_trt import __version__
from dreammix_trt.build_cli import build
from dreammix_trt.core.errors import Cancelled, DreamMixError, InputError
from dreammix_trt.doctor_cli import doctor
from dreammix_trt.inpaint_cli import inpaint
from dreammix_trt.store_cli import store_app
from dreammix_trt.terminal import AsJson, Base, Store, Threads, err_console, escape, out_console, show_progress

app = typer.Typer(
    name="dreammix-trt",
    help="Put a subject you have photographs of into a marked region of any picture, edited by text.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Run the command line; the one place where errors become exit codes."""
    try:
        app()
    except DreamMixError as error:
        err_console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        err_console.print("stopped")
        sys.exit(Cancelled.exit_code)


app.add_typer(store_app, name="store")
app.command("doctor")(doctor)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "WARNING",
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    """Options of every command."""
    if log_level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise InputError(f"--log-level {log_level!r} is none of DEBUG, INFO, WARNING, ERROR")
    logging.basicConfig(level=log_level.upper(), format="%(levelname)s %(name)s: %(message)s")


@app.command()
def train(
    photos: Annotated[
        Path,
        typer.Argument(help="Folder with image/NN.jpg and mask/NN.png, or NN.jpg with NN_mask.png beside it."),
    ],
    class_name: Annotated[str, typer.Option(help="What the subject is, in a word: mug, teapot, dog.")],
    out: Annotated[Path, typer.Option(help="Folder for pytorch_lora_weights.safetensors and train.json.")],
    base: Base = None,
    token: Annotated[str, typer.Option(help="The word that will mean this subject.")] = "sks",
    prompt: Annotated[
        str | None, typer.Option(help='Caption of the photographs; default "a photo of a TOKEN CLASS".')
    ] = None,
    rank: Annotated[int, typer.Option(min=1, max=128)] = 4,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; default fits the base.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0)] = None,
    loss: Annotated[str, typer.Option(help="paper (eq. 7) or reference (the authors' code).")] = "reference",
    merged: Annotated[bool, typer.Option("--merged", help="Also write the merged UNet weights.")] = False,
    invert_masks: Annotated[bool, typer.Option("--invert-masks", help="The subject is black in the masks.")] = False,
    large_masks: Annotated[
        bool, typer.Option("--large-masks", help="The subject does fill most of every photograph.")
    ] = False,
    segment: Annotated[bool, typer.Option("--segment", help="Make the masks that are missing, and show them.")] = False,
    segmenter: Annotated[
        Path | None, typer.Option(help="For --segment: the ONNX file of a U²-Net or ISNet, such as rembg's.")
    ] = None,
    segmenter_style: Annotated[
        str | None, typer.Option(help="u2net or isnet: how it normalises; default: by the file's name, then its size.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Train on new masks without showing them first.")] = False,
    seed: int = 0,
    threads: Threads = None,
) -> None:
    """Train a LoRA of one subject from a handful of photographs."""
    if segment:
        if invert_masks:
            raise InputError(
                "--invert-masks excludes --segment, whose masks are white on the subject; leave one of them"
            )
        from dreammix_trt.segment_cli import make_masks

        make_masks(photos, segmenter, segmenter_style, approved=yes, threads=threads)
    elif segmenter is not None or segmenter_style is not None:
        raise InputError("--segmenter and --segmenter-style need --segment")
    from dreammix_trt.trainer.lora import train_lora

    with show_progress("training") as update:
        record = train_lora(
            photos,
            class_name,
            out,
            base=base,
            token=token,
            prompt=prompt,
            rank=rank,
            steps=steps,
            learning_rate=learning_rate,
            loss=loss,
            merged=merged,
            invert_masks=invert_masks,
            large_masks=large_masks,
            seed=seed,
            threads=threads,
            progress=update,
        )
    err_console.print(f"{record.steps} steps in {record.seconds:.0f} s; LoRA in {out}", markup=False)


app.command()(build)


@app.command()
def inspect(
    engine: Annotated[Path, typer.Argument(help="An engine directory.")],
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file again.")] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Print what an engine was made from."""
    from rich.table import Table

    from dreammix_trt.core.passport import Passport
    from dreammix_trt.engine.directory import check_engine

    passport = Passport.read(engine)
    if verify:
        check_engine(engine, verify=True, store=store)
    if as_json:
        typer.echo(json.dumps(passport.to_dict(), indent=2))
        return
    for title, rows in passport.describe():
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 2))
        for row in rows:
            table.add_row(*(escape(str(cell)) for cell in row))
        out_console.print(table)
    if verify:
        out_console.print("every file agrees with its hash")


app.command()(inpaint)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where pictures, LoRA, engine and report go.")] = Path("demo"),
    threads: Threads = None,
    seed: int = 7,
) -> None:
    """Render a subject, train it, build its engine, inpaint with it: one contact sheet and a report."""
    from dreammix_trt.demo import run_demo

    with show_progress("demo") as update:
        pages = run_demo(out, seed=seed, threads=threads, progress=update)
    out_console.print(f"contact sheet: {pages.sheet}\nreport:        {pages.report}", markup=False, highlight=False)


@app.command("train-base", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train_base(context: typer.Context) -> None:
    """Train the embedded micro-SDXL again from nothing (see docs/model-card.md)."""
    from dreammix_trt.trainer.micro.__main__ import main as train_micro

    train_micro(context.args)
