"""`dreammix-trt inpaint`: an engine, a picture, a mask and a prompt become a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dreammix_trt.core.errors import InputError
from dreammix_trt.terminal import AsJson, Store, Threads, say, show_progress

if TYPE_CHECKING:
    from dreammix_trt.core.request import Request
    from dreammix_trt.engine.dreammix import DreamMix
    from dreammix_trt.engine.result import Result

Engine = Annotated[Path, typer.Argument(help="An engine directory.")]
Out = Annotated[Path, typer.Option(help="The picture to write (.png, .jpg, .webp); a count adds -1, -2, ...")]
Image = Annotated[Path | None, typer.Option(help="The picture.")]
Mask = Annotated[Path | None, typer.Option(help="The mask: white is repainted.")]
MaskFromAlpha = Annotated[
    bool, typer.Option("--mask-from-alpha", help="No mask: repaint what is transparent in the picture.")
]
Prompt = Annotated[str | None, typer.Option(help='For example "a red sks mug".')]
NegativePrompt = Annotated[str | None, typer.Option()]
Subject = Annotated[str | None, typer.Option(help="Which subject, when the engine has several.")]
Substitute = Annotated[list[str] | None, typer.Option(help="Attribute words to take out of the subject.")]
SubjectScale = Annotated[float | None, typer.Option(help="Strength of the subject, 0 to 2; default: 1.")]
Seed = Annotated[
    int | None,
    typer.Option(parser=lambda text: parse_seed(text), metavar="N", help="Default: 0; `random` draws one and says it."),
]
Steps = Annotated[int | None, typer.Option(min=1)]
Sampler = Annotated[str | None, typer.Option(help="dpmpp_2m_sde, euler or lcm.")]
Count = Annotated[int | None, typer.Option(min=1, help="Pictures; the k-th has seed + k.")]
GuidanceScale = Annotated[float | None, typer.Option()]
Feather = Annotated[
    int | None, typer.Option(min=0, help="Pixels over which the result fades into the picture; 0: a hard edge.")
]
Mode = Annotated[str | None, typer.Option(help="native or reference.")]
FromRequest = Annotated[Path | None, typer.Option("--from", help="A request: a JSON file or a picture made here.")]
SetFields = Annotated[
    list[str] | None, typer.Option("--set", help="Any other field of a request as NAME=VALUE (JSON).")
]
SaveStages = Annotated[Path | None, typer.Option(help="Also write a sheet of what each stage did.")]
NoMetadata = Annotated[bool, typer.Option("--no-metadata", help="Do not store in the picture how it was made.")]
Verify = Annotated[bool, typer.Option("--verify", help="Hash every engine file again before loading.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda: the whole request runs on the GPU.")]
Residency = Annotated[
    str | None,
    typer.Option(help="On a GPU: resident, one-unet or swap; default: the first that fits into its memory."),
]


def inpaint(
    engine: Engine,
    out: Out,
    image: Image = None,
    mask: Mask = None,
    mask_from_alpha: MaskFromAlpha = False,
    prompt: Prompt = None,
    negative_prompt: NegativePrompt = None,
    subject: Subject = None,
    subject_scale: SubjectScale = None,
    substitute: Substitute = None,
    seed: Seed = None,
    steps: Steps = None,
    sampler: Sampler = None,
    count: Count = None,
    guidance_scale: GuidanceScale = None,
    feather: Feather = None,
    mode: Mode = None,
    from_request: FromRequest = None,
    set_field: SetFields = None,
    save_stages: SaveStages = None,
    no_metadata: NoMetadata = False,
    verify: Verify = False,
    device: Device = "cpu",
    residency: Residency = None,
    threads: Threads = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Put the subject into the marked region of a picture."""
    from dreammix_trt.core.passport import Passport
    from dreammix_trt.engine.dreammix import DreamMix

    image = _need("--image", image)
    mask = _choose_mask(mask, mask_from_alpha)
    base = Passport.read(engine).base
    request = _read_request(
        from_request,
        base.get("defaults", {}),
        _parse_fields(set_field or []),
        prompt=prompt,
        negative_prompt=negative_prompt,
        subject=subject,
        subject_scale=subject_scale,
        substitute=substitute,
        seed=seed,
        num_inference_steps=steps,
        sampler=sampler,
        num_images_per_prompt=count,
        guidance_scale=guidance_scale,
        feather=feather,
        mode=mode,
    )
    _check_outputs(out, save_stages)
    options: dict[str, Any] = {} if residency is None else {"residency": residency}
    if device == "cuda":
        options |= _make_room(request, image, base)
    with DreamMix.load(engine, threads=threads, verify=verify, store=store, device=device, **options) as dm:
        result = _paint(dm, image, mask, request, keep_stages=save_stages is not None)
    names = _save(result, out, save_stages, metadata=not no_metadata)
    _report(result, names, as_json)


def parse_seed(text: str) -> int:
    """A seed as a number, or drawn for the word `random`."""
    from dreammix_trt.core.request import draw_seed

    if text == "random":
        return draw_seed()
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a whole number nor `random`") from None


def _need(option: str, path: Path | None) -> Path:
    if path is None:
        raise InputError(f"{option} is missing: give the picture and a mask of the same size (white is repainted)")
    return path


def _choose_mask(mask: Path | None, from_alpha: bool) -> Path | None:
    """The mask's file; None: the picture's own transparency."""
    if from_alpha and mask is not None:
        raise InputError("--mask and --mask-from-alpha exclude each other; leave one of them")
    if not from_alpha and mask is None:
        raise InputError(
            "--mask is missing: give a mask of the picture's size (white is repainted), or --mask-from-alpha to "
            "repaint what is transparent in the picture"
        )
    return mask


def _make_room(request: Request, image: Path, base: Mapping[str, Any]) -> dict[str, int]:
    """The runtime's options that set aside a GPU's memory for one request and no more.

    base: of a passport. A request has one subject and frames of two sizes, one a stage; its own prompts always have
    room. On a GPU its pictures are painted one after the other.
    """
    from dreammix_trt.core.pictures import read_image

    if request.mode == "reference":  # the picture is stretched
        height, width = request.reference_resize or (base["native_side"], base["native_side"])
    else:
        height, width = read_image(image).size
    return {"largest_picture": height * width, "subjects": 1, "texts": 1, "shapes": 2}


def _read_request(
    source: Path | None, defaults: Mapping[str, Any], assigned: Mapping[str, Any], **given: Any
) -> Request:
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


def _parse_fields(pairs: list[str]) -> dict[str, Any]:
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


def _check_outputs(out: Path, stages: Path | None) -> None:
    _check_output("--out", out)
    if stages:
        _check_output("--save-stages", stages)


def _check_output(option: str, path: Path) -> None:
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


def _paint(dm: DreamMix, image: Path, mask: Path | None, request: Request, *, keep_stages: bool) -> Result:
    """The request's result, with a bar of its steps."""
    result = None
    with show_progress("inpainting") as update:
        if dm.studio is not None:
            say(str(dm.studio.plan))
        for event in dm.iterate(image, mask, request, keep_stages=keep_stages):
            update(event.stage, (event.index + 1) / event.total, "")
            result = event.result or result
    assert result is not None
    return result


def _save(result: Result, out: Path, stages: Path | None, *, metadata: bool) -> list[Path]:
    """Write the pictures, and the sheet of the stages where it is wanted; returns the pictures' names."""
    from dreammix_trt.engine.result import save, write_picture

    count = len(result.images)
    names = [out] if count == 1 else [out.with_stem(f"{out.stem}-{k + 1}") for k in range(count)]
    for index, name in enumerate(names):
        save(result, name, index=index, metadata=metadata)
    if stages:
        from dreammix_trt.report import stage_sheet

        write_picture(stage_sheet(result), stages)
    return names


def _report(result: Result, names: list[Path], as_json: bool) -> None:
    """Say what was made, what that took, and which words of the request do nothing."""
    for warning in result.warnings:
        say(f"warning: {warning}")
    if as_json:
        record = {
            "images": [str(name) for name in names],
            "seeds": list(result.seeds),
            "timings": result.timings,
            "warnings": list(result.warnings),
        }
        typer.echo(json.dumps(record))
        return
    spent = sum(result.timings.values())
    say(f"{', '.join(str(name) for name in names)} ({spent:.2f} s, seed {result.seeds[0]})")
