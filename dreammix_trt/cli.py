"""The command line: photographs -> LoRA -> engine -> picture, one command each.

Progress goes to stderr, `--json` output and nothing else to stdout. Errors raised on purpose become one message on
stderr and an exit code here, and only here.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dreammix_trt import __version__
from dreammix_trt.core.errors import Cancelled, DreamMixError, InputError
from dreammix_trt.doctor_cli import doctor
from dreammix_trt.store_cli import store_app

if TYPE_CHECKING:
    from rich.progress import Progress

    from dreammix_trt.core.request import Request

app = typer.Typer(
    name="dreammix-trt",
    help="Put a subject you have photographs of into a marked region of any picture, edited by text.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out_console = Console()
err_console = Console(stderr=True)

Threads = Annotated[int | None, typer.Option(help="CPU threads; default: all cores.", min=1, max=1024)]
Store = Annotated[Path | None, typer.Option("--store", help="Where base engines are kept (default: DREAMMIX_HOME).")]
Base = Annotated[
    Path | None,
    typer.Option(help="The base: diffusers folder or single-file checkpoint; default: the embedded micro-SDXL."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


def main() -> None:
    """Run the command line; the one place where errors become exit codes."""
    try:
        app()
    except DreamMixError as error:
        err_console.print(f"[bold red]error:[/] {_escaped(str(error))}", highlight=False, soft_wrap=True)
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
    photos: Annotated[Path, typer.Argument(help="Folder with image/NN.jpg and mask/NN.png.")],
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
    seed: int = 0,
    threads: Threads = None,
) -> None:
    """Train a LoRA of one subject from a handful of photographs."""
    from dreammix_trt.trainer.lora import train_lora

    with _bar("training") as update:
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
            seed=seed,
            threads=threads,
            progress=update,
        )
    err_console.print(f"{record.steps} steps in {record.seconds:.0f} s; LoRA in {out}", markup=False)


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="The engine directory to make.")],
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="LoRA of the subject, FILE[:scale[:target]]; target: patched, raw or both UNets. None: a base alone; "
            "several: they work together."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The subject's name; default: the LoRA folder's.")] = None,
    base: Base = None,
    patch: Annotated[Path | None, typer.Option(help="*.fooocus.patch; default: the one in the base's folder.")] = None,
    head: Annotated[Path | None, typer.Option(help="inpaint_head.pth; default: the one in the base's folder.")] = None,
    vae: Annotated[Path | None, typer.Option(help="Another VAE: folder or file.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Another tokenizer's folder; default: the base's, or CLIP's.")
    ] = None,
    base_lora: Annotated[
        list[str] | None, typer.Option(help="A few-step or style LoRA for the base's weights, FILE[:scale[:target]].")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="What requests use by default: dpmpp_2m_sde, euler (trailing) or lcm.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps that requests use by default.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance that requests use by default.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="onnxruntime, tensorrt-rtx or tensorrt; default: tensorrt-rtx with --target.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="GPU to build for, e.g. sm_89 (RTX 4090); several allowed; no GPU needed.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or float16; default: float16 for TensorRT.")] = None,
    shapes: Annotated[
        str, typer.Option(help="static: the base's native square; dynamic: other aspects of its area, too.")
    ] = "static",
    pictures: Annotated[int, typer.Option(min=1, help="Most pictures in a batch.")] = 1,
    context: Annotated[
        str, typer.Option(help="Lengths of the text condition that engines take, e.g. 77,101; 77 is the text alone.")
    ] = "77",
    workspace: Annotated[
        int | None, typer.Option(min=1, help="Most MiB of scratch memory the engines may take on the GPU.")
    ] = None,
    vae_image: Annotated[
        list[Path] | None, typer.Option(help="A picture on which a float16 VAE is looked at for overflow, too.")
    ] = None,
    no_safe_vae: Annotated[
        bool,
        typer.Option(
            "--no-safe-vae",
            help="Leave out the float32 VAE that goes with a float16 one, for pictures that are too much for that; "
            "saves 334 MB of weights for SDXL.",
        ),
    ] = False,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Compare every network that is exported with torch, or none; default: the small ones.",
        ),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Bake the subject into weights of its own.")] = False,
    slot_rank: Annotated[int, typer.Option(min=0, max=256, help="Largest LoRA rank the base takes; 0: no slots.")] = 8,
    patch_biases: Annotated[
        bool, typer.Option("--patch-biases", help="Apply the patch's biases too (Fooocus).")
    ] = False,
    self_contained: Annotated[bool, typer.Option("--self-contained", help="Copy the base's parts into OUT.")] = False,
    store: Store = None,
) -> None:
    """Turn a base and a subject's LoRA into an engine directory."""
    from dreammix_trt.building import Defaults, EngineOptions
    from dreammix_trt.building import build as build_engine

    options = EngineOptions(
        backend=backend or "",
        precision=precision or "",
        targets=tuple(target or ()),
        shapes=shapes,
        pictures=pictures,
        workspace=workspace * (1 << 20) if workspace else None,
        context=_parse_lengths(context),
        vae_images=tuple(vae_image or ()),
        safe_vae=not no_safe_vae,
    )
    with _bar("building") as update:
        passport = build_engine(
            lora,
            out=out,
            base=base,
            patch=patch,
            head=head,
            vae=vae,
            tokenizer=tokenizer,
            name=name,
            merge=merge,
            slot_rank=slot_rank,
            patch_biases=patch_biases,
            base_loras=base_lora or (),
            engine=options,
            verify=verify,
            defaults=Defaults(sampler, steps, guidance_scale),
            store=store,
            self_contained=self_contained,
            progress=update,
            notice=lambda text: err_console.print(_escaped(text), highlight=False, soft_wrap=True),
        )
    subjects = ", ".join(subject.name for subject in passport.subjects) or "no subject"
    err_console.print(f"{out}: {subjects}", markup=False, highlight=False, soft_wrap=True)


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
            table.add_row(*(_escaped(str(cell)) for cell in row))
        out_console.print(table)
    if verify:
        out_console.print("every file agrees with its hash")


@app.command()
def inpaint(
    engine: Annotated[Path, typer.Argument(help="An engine directory.")],
    out: Annotated[Path, typer.Option(help="The picture to write (.png, .jpg, .webp); a count adds -1, -2, ...")],
    image: Annotated[Path | None, typer.Option(help="The picture.")] = None,
    mask: Annotated[Path | None, typer.Option(help="The mask: white is repainted.")] = None,
    prompt: Annotated[str | None, typer.Option(help='For example "a red sks mug".')] = None,
    negative_prompt: Annotated[str | None, typer.Option()] = None,
    subject: Annotated[str | None, typer.Option(help="Which subject, when the engine has several.")] = None,
    substitute: Annotated[list[str] | None, typer.Option(help="Attribute words to take out of the subject.")] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    sampler: Annotated[str | None, typer.Option(help="dpmpp_2m_sde, euler or lcm.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Pictures; the k-th has seed + k.")] = None,
    guidance_scale: Annotated[float | None, typer.Option()] = None,
    mode: Annotated[str | None, typer.Option(help="native or reference.")] = None,
    from_request: Annotated[
        Path | None, typer.Option("--from", help="A request: a JSON file or a picture made here.")
    ] = None,
    set_field: Annotated[
        list[str] | None, typer.Option("--set", help="Any other field of a request as NAME=VALUE (JSON).")
    ] = None,
    save_stages: Annotated[Path | None, typer.Option(help="Also write a sheet of what each stage did.")] = None,
    no_metadata: Annotated[bool, typer.Option("--no-metadata", help="Do not store the request in the PNG.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Hash every engine file again before loading.")] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda: the whole request runs on the GPU.")] = "cpu",
    residency: Annotated[
        str | None,
        typer.Option(help="On a GPU: resident, one-unet or swap; default: the first that fits into its memory."),
    ] = None,
    threads: Threads = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Put the subject into the marked region of a picture."""
    from dreammix_trt.core.passport import Passport
    from dreammix_trt.engine.dreammix import DreamMix
    from dreammix_trt.engine.result import save, write_picture

    if image is None or mask is None:
        missing = "--image" if image is None else "--mask"
        raise InputError(f"{missing} is missing: give the picture and a mask of the same size (white is repainted)")
    base = Passport.read(engine).base
    request = _request(
        from_request,
        base.get("defaults", {}),
        _fields(set_field or []),
        prompt=prompt,
        negative_prompt=negative_prompt,
        subject=subject,
        substitute=substitute,
        seed=seed,
        num_inference_steps=steps,
        sampler=sampler,
        num_images_per_prompt=count,
        guidance_scale=guidance_scale,
        mode=mode,
    )
    _check_output(out)
    if save_stages:
        _check_output(save_stages, "--save-stages")
    options: dict[str, Any] = {} if residency is None else {"residency": residency}
    if device == "cuda":
        options |= _room_for(request, image, base)
    with (
        DreamMix.load(engine, threads=threads, verify=verify, store=store, device=device, **options) as dm,
        _bar("inpainting") as update,
    ):
        if dm.studio is not None:
            err_console.print(str(dm.studio.plan), markup=False, highlight=False, soft_wrap=True)
        events = dm.iterate(image, mask, request, keep_stages=save_stages is not None)
        result = None
        for event in events:
            update(event.stage, (event.index + 1) / event.total, "")
            result = event.result or result
    assert result is not None
    names = (
        [out] if len(result.images) == 1 else [out.with_stem(f"{out.stem}-{k + 1}") for k in range(len(result.images))]
    )
    for index, name in enumerate(names):
        save(result, name, index=index, metadata=not no_metadata)
    if save_stages:
        from dreammix_trt.report import stage_sheet

        write_picture(stage_sheet(result), save_stages)
    if as_json:
        record = {"images": [str(name) for name in names], "seeds": list(result.seeds), "timings": result.timings}
        typer.echo(json.dumps(record))
        return
    spent = sum(result.timings.values())
    told = f"{', '.join(str(name) for name in names)} ({spent:.2f} s, seed {result.seeds[0]})"
    err_console.print(told, markup=False, highlight=False, soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where pictures, LoRA, engine and report go.")] = Path("demo"),
    threads: Threads = None,
    seed: int = 7,
) -> None:
    """Render a subject, train it, build its engine, inpaint with it: one contact sheet and a report."""
    from dreammix_trt.demo import run_demo

    with _bar("demo") as update:
        pages = run_demo(out, seed=seed, threads=threads, progress=update)
    out_console.print(f"contact sheet: {pages.sheet}\nreport:        {pages.report}", markup=False, highlight=False)


@app.command("train-base", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train_base(context: typer.Context) -> None:
    """Train the embedded micro-SDXL again from nothing (see docs/model-card.md)."""
    from dreammix_trt.trainer.micro.__main__ import main as train_micro

    train_micro(context.args)


def _parse_lengths(text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--context is {text!r}; give whole numbers separated by commas, such as 77,101") from None


def _room_for(request: Request, image: Path, base: Mapping[str, Any]) -> dict[str, int]:
    """The runtime's options that set aside a GPU's memory for one request and no more.

    base: of a passport. A request has one subject, three prompts at most, and frames of two sizes, one a stage; on a
    GPU its pictures are painted one after the other.
    """
    from dreammix_trt.engine.canvas.pictures import read_image
    from dreammix_trt.engine.prompts import MOST_PROMPTS

    if request.mode == "reference":  # the picture is stretched
        height, width = request.reference_resize or (base["native_side"], base["native_side"])
    else:
        height, width = read_image(image).size
    return {"largest_picture": height * width, "subjects": 1, "texts": MOST_PROMPTS, "shapes": 2}


def _request(source: Path | None, defaults: Mapping[str, Any], assigned: Mapping[str, Any], **given: Any) -> Request:
    """The request of a file, or a new one with an engine's `defaults`, overridden by the `assigned` fields (--set) and
    the options `given` (None: not given)."""
    from dreammix_trt.core.request import Request

    options = {name: value for name, value in given.items() if value is not None}
    twice = sorted(assigned.keys() & options.keys())
    if twice:
        raise InputError(f"{', '.join(twice)}: given by --set and by an option of its own; leave one of them")
    fields = {**assigned, **options}
    if source is not None:
        from dreammix_trt.engine.result import read_request

        return read_request(source).replace(**fields)
    if "prompt" not in fields:
        raise InputError("--prompt is missing: say what to paint, with the subject's token: 'a red sks mug'")
    return Request(fields.pop("prompt")).replace(**{**defaults, **fields})


def _fields(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; the value is JSON, or plain text where it is not."""
    fields: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator:
            raise InputError(f"--set {pair!r} is not of the form NAME=VALUE, such as lcg_fraction=0.5")
        try:
            fields[name] = json.loads(text)
        except (ValueError, RecursionError):  # not JSON, or a number of thousands of digits
            fields[name] = text
    return fields


def _check_output(path: Path, option: str = "--out") -> None:
    """Refuse an output that could not be written, before any work is done."""
    import os

    folder = path.absolute().parent
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"{option} {path}: unknown picture format {path.suffix!r}; use .png, .jpg or .webp")
    if path.is_dir():
        raise InputError(f"{option} {path} is a directory; name a file in it")
    if not folder.is_dir():
        raise InputError(f"{option} {path}: the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{option} {path}: the folder {folder} is not writable; choose another place")


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@contextmanager
def _bar(title: str) -> Iterator[Any]:
    """A progress bar on stderr; yields `update(name, fraction, message)`."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err_console, transient=True) as progress:
        yield _Updater(progress, title)


class _Updater:
    """One line of the progress display a name."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress, self._title = progress, title
        self._tasks: dict[str, Any] = {}

    def __call__(self, name: str, fraction: float, message: str = "") -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(f"{self._title}: {name}", total=1.0, note="")
        self._progress.update(self._tasks[name], completed=fraction, note=_escaped(message))
