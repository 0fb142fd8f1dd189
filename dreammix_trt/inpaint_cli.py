"""`dreammix-trt inpaint`: an engine, a picture, a mask and a prompt become a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dreammix_trt.core.errors import InputError
from dreammix_trt.endpoint_options import (
    PANEL,
    Deadline,
    Endpoint,
    KeyVariable,
    Model,
    Timeout,
    open_chat,
    tell_tokens,
)
from dreammix_trt.terminal import (
    AsJson,
    Force,
    SetFields,
    Store,
    Threads,
    parse_fields,
    print_json,
    say,
    show_progress,
)

if TYPE_CHECKING:
    from dreammix_trt.core.chat import Chat
    from dreammix_trt.core.request import Request
    from dreammix_trt.engine.dreammix import DreamMix
    from dreammix_trt.engine.result import Result

Engine = Annotated[Path, typer.Argument(help="An engine directory.")]
Out = Annotated[
    Path,
    typer.Option(
        "--out", "-o", help="The picture to write (.png, .jpg, .webp; - is a PNG on stdout); a count adds -1, -2, ..."
    ),
]
Image = Annotated[Path | None, typer.Option("--image", "-i", help="The picture; - reads it from stdin.")]
Mask = Annotated[Path | None, typer.Option("--mask", "-m", help="The mask: white is repainted; - reads it from stdin.")]
MaskFromAlpha = Annotated[
    bool, typer.Option("--mask-from-alpha", help="No mask: repaint what is transparent in the picture.")
]
Prompt = Annotated[str | None, typer.Option("--prompt", "-p", help='For example "a red sks mug".')]
NegativePrompt = Annotated[str | None, typer.Option(help="What is not to be there.")]
Subject = Annotated[str | None, typer.Option(help="Which subject, when the engine has several.")]
Substitute = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WORD",
        help="Attribute word to take out of the subject; auto: those of its attributes that the prompt contradicts.",
    ),
]
SubjectScale = Annotated[float | None, typer.Option(help="Strength of the subject, 0 to 2; default: 1.")]
Seed = Annotated[
    int | None,
    typer.Option(parser=lambda text: parse_seed(text), metavar="N", help="Default: 0; `random` draws one and says it."),
]
Preset = Annotated[
    Literal["fast", "balanced", "best"] | None,
    typer.Option(help="Steps that suit the engine's base: 12, 20, 30; of a few-step base 4, 6, 8."),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps; default: the engine's, else 30.")]
Sampler = Annotated[
    Literal["dpmpp_2m_sde", "euler", "lcm"] | None, typer.Option(help="Default: the engine's, else dpmpp_2m_sde.")
]
Count = Annotated[int | None, typer.Option("--count", "-n", min=1, help="Pictures; the k-th has seed + k.")]
GuidanceScale = Annotated[
    float | None, typer.Option(help="How closely the prompt is followed; default: the engine's, else 4.")
]
Feather = Annotated[
    int | None, typer.Option(min=0, help="Pixels over which the result fades into the picture; 0: a hard edge.")
]
Mode = Annotated[
    Literal["native", "reference"] | None,
    typer.Option(help="reference follows the authors' arithmetic; default: native."),
]
FromRequest = Annotated[
    Path | None, typer.Option("--from", help="A request: a JSON file or a picture made here; - reads it from stdin.")
]
SaveStages = Annotated[Path | None, typer.Option(help="Also write a sheet of what each stage did.")]
NoMetadata = Annotated[bool, typer.Option("--no-metadata", help="Do not store in the picture how it was made.")]
Verify = Annotated[bool, typer.Option("--verify", help="Hash every engine file again before loading.")]
Device = Annotated[
    str,
    typer.Option(
        metavar="cpu|cuda|NAME",
        help="cuda: the whole request runs on the GPU; NAME: OpenVINO's, for its engines (GPU, AUTO).",
    ),
]
Residency = Annotated[
    Literal["resident", "one-unet", "swap"] | None,
    typer.Option(help="Which weights stay on a GPU; default: the first way that fits into its memory."),
]

EXAMPLES = """
Examples:

dreammix-trt inpaint engines/mug -i table.png -m mask.png -p "a red sks mug" --substitute blue -o out.png

dreammix-trt inpaint engines/mug -i table.png -m mask.png --from out.png --seed 8 -o again.png

cat table.png | dreammix-trt inpaint engines/mug -i - -m mask.png -p "a sks mug" -o - > out.png
"""
PANELS = {
    "What is painted": (
        *("image", "mask", "mask_from_alpha", "prompt", "negative_prompt", "subject", "subject_scale", "substitute"),
        *("seed", "count", "from_request"),
    ),
    "How it is painted": ("preset", "steps", "sampler", "guidance_scale", "feather", "mode", "set_field"),
    "Who finds the words of --substitute auto": PANEL,
    "What is written": ("out", "force", "save_stages", "no_metadata", "as_json"),
    "What it runs on": ("device", "residency", "threads", "store", "verify"),
}
STANDARD = Path("-")  # stdin or stdout
_STARTS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp"}  # of pictures made here


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
    endpoint: Endpoint = None,
    model: Model = None,
    key_variable: KeyVariable = None,
    timeout: Timeout = None,
    deadline: Deadline = None,
    seed: Seed = None,
    preset: Preset = None,
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
    force: Force = False,
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

    image, mask = _need_image(image, from_request), _choose_mask(mask, mask_from_alpha)
    image, mask, from_request = _read_standard_input(image, mask, from_request)
    chat = open_chat(endpoint, model=model, key_variable=key_variable, timeout=timeout, deadline=deadline)
    base = Passport.read(engine).base
    request = _read_request(
        from_request,
        base.get("defaults", {}),
        preset,
        parse_fields(set_field or []),
        prompt=prompt,
        negative_prompt=negative_prompt,
        subject=subject,
        subject_scale=subject_scale,
        substitute=_choose_substitute(substitute),
        seed=seed,
        num_inference_steps=steps,
        sampler=sampler,
        num_images_per_prompt=count,
        guidance_scale=guidance_scale,
        feather=feather,
        mode=mode,
    )
    if chat is not None and request.substitute != "auto":
        raise InputError("--endpoint finds the words of --substitute auto; give that, too, or leave --endpoint")
    _check_outputs(out, save_stages, request.num_images_per_prompt, force=force, as_json=as_json)
    options = _choose_options(device, residency, request, image, base)
    with DreamMix.load(engine, threads=threads, verify=verify, store=store, device=device, **options) as dm:
        result = _paint(dm, image, mask, request, chat, keep_stages=save_stages is not None)
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


def _choose_substitute(words: list[str] | None) -> list[str] | str | None:
    """The words of --substitute, or `auto`, which goes alone."""
    if words and "auto" in words:
        if len(words) > 1:
            others = " and ".join(repr(word) for word in words if word != "auto") or "another auto"
            raise InputError(f"--substitute auto finds the words itself, but {others} is given, too; leave one of them")
        return "auto"
    return words


def _need_image(image: Path | None, request: Path | None) -> Path:
    if image is None:
        why = "; the request of --from holds no pictures" if request else ""
        raise InputError(f"--image is missing: give the picture and a mask of the same size (white is repainted){why}")
    return image


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


def _choose_options(
    device: str, residency: str | None, request: Request, image: Path, base: Mapping[str, Any]
) -> dict[str, Any]:
    """The runtime's options; those of a GPU set aside its memory for one request and no more.

    base: of a passport. A request has one subject and frames of two sizes, one a stage; its own prompts always have
    room. On a GPU its pictures are painted one after the other.
    """
    from dreammix_trt.core.pictures import read_image
    from dreammix_trt.core.remarks import keep_remarks

    asked: dict[str, Any] = {} if residency is None else {"residency": residency}
    if device != "cuda":
        return asked
    if request.mode == "reference":  # the picture is stretched
        height, width = request.reference_resize or (base["native_side"], base["native_side"])
    else:
        with keep_remarks(tell=False):  # painting reads it again, and tells them
            height, width = read_image(image).size
    return asked | {"largest_picture": height * width, "subjects": 1, "texts": 1, "shapes": 2}


def _read_request(
    source: Path | None, defaults: Mapping[str, Any], preset: str | None, assigned: Mapping[str, Any], **given: Any
) -> Request:
    """The request of a file, or a new one with an engine's `defaults`, overridden by the preset, the `assigned` fields
    (--set) and the options `given` (None: not given)."""
    from dreammix_trt.core.presets import choose_fields
    from dreammix_trt.core.request import Request

    options = {name: value for name, value in given.items() if value is not None}
    twice = sorted(assigned.keys() & options.keys())
    if twice:
        raise InputError(f"{', '.join(twice)}: given by --set and by an option of its own; leave one of them")
    chosen = choose_fields(preset, defaults) if preset else {}
    fields = {**chosen, **assigned, **options}
    if source is not None:
        from dreammix_trt.engine.result import read_request

        return read_request(source).replace(**fields)
    if "prompt" not in fields:
        raise InputError("--prompt is missing: say what to paint, with the subject's token: 'a red sks mug'")
    return Request(fields.pop("prompt")).replace(**{**defaults, **fields})


def _read_standard_input(image: Path, mask: Path | None, request: Path | None) -> tuple[Path, Path | None, Path | None]:
    """The same files; for `-` a temporary one with what stands in stdin, which is removed when the program ends."""
    import atexit
    import shutil
    import sys
    import tempfile

    given = {"--image": image, "--mask": mask, "--from": request}
    names = [option for option, path in given.items() if path == STANDARD]
    if len(names) > 1:
        raise InputError(f"{' and '.join(names)} are both -, but stdin holds one file; name the other")
    if not names:
        return image, mask, request
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError(f"{names[0]} is -, but nothing is piped into stdin; pipe a file or name one")
    data = sys.stdin.buffer.read()
    if not data:
        raise InputError(f"{names[0]} is -, but stdin is empty")
    folder = Path(tempfile.mkdtemp(prefix="dreammix-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    suffix = next((suffix for start, suffix in _STARTS.items() if data.startswith(start)), "")
    file = folder / f"standard-input{suffix}"
    file.write_bytes(data)
    return (
        file if image == STANDARD else image,
        file if mask == STANDARD else mask,
        file if request == STANDARD else request,
    )


def _check_outputs(out: Path, stages: Path | None, count: int, *, force: bool, as_json: bool) -> None:
    """Refuse outputs that could not be written, or that would replace what was not made here."""
    if out == STANDARD:
        _check_standard_output(count, as_json=as_json)
    else:
        for path in _name_pictures(out, count):
            _check_output("--out", path, force=force)
    if stages:
        if stages == STANDARD or stages in _name_pictures(out, count):
            raise InputError(f"--save-stages {stages}: the picture goes there, too; name another file")
        _check_output("--save-stages", stages, force=force)


def _name_pictures(out: Path, count: int) -> list[Path]:
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{k + 1}") for k in range(count)]


def _check_standard_output(count: int, *, as_json: bool) -> None:
    import sys

    if as_json:
        raise InputError("--out - and --json both write to stdout; name a file for one of them")
    if count > 1:
        raise InputError(f"--out - takes one picture, and {count} are asked for; name a file, or --count 1")
    if sys.stdout is None or sys.stdout.isatty():
        raise InputError("--out - would write the picture to the terminal; pipe it on (> out.png), or name a file")


def _check_output(option: str, path: Path, *, force: bool) -> None:
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
    if not force and path.exists() and not _is_ours(path):
        raise InputError(
            f"{option} {path} is there already and is no picture made here (it carries no request); "
            "--force replaces it, or name another file"
        )


def _is_ours(path: Path) -> bool:
    """Whether a file may be replaced: it carries a request, so that it can be made again, or it is empty."""
    from dreammix_trt.engine.result import read_request

    try:
        if path.stat().st_size:
            read_request(path)
    except (InputError, OSError):
        return False
    return True


def _paint(
    dm: DreamMix, image: Path, mask: Path | None, request: Request, chat: Chat | None, *, keep_stages: bool
) -> Result:
    """The request's result, with a bar of its steps. chat: finds the words of substitute="auto"; None: nobody is asked.

    What the model said cost tokens even where it was no answer.
    """
    from dreammix_trt.engine.endpoint_retriever import EndpointRetriever
    from dreammix_trt.engine.retrieval import retrieve

    result, retriever = None, retrieve if chat is None else EndpointRetriever(chat)
    with show_progress("inpainting") as update:
        if dm.studio is not None:
            say(str(dm.studio.plan))
        try:
            events = dm.iterate(image, mask, request, retriever=retriever, keep_stages=keep_stages)
        finally:
            tell_tokens(chat)
        for event in events:
            update(event.stage, (event.index + 1) / event.total, "")
            result = event.result or result
    assert result is not None
    return result


def _save(result: Result, out: Path, stages: Path | None, *, metadata: bool) -> list[Path]:
    """Write the pictures, and the sheet of the stages where it is wanted; returns the pictures' names."""
    from dreammix_trt.engine.result import save, write_picture

    if stages:
        from dreammix_trt.report import stage_sheet

        write_picture(stage_sheet(result), stages, result.pick(0)[1] if metadata else None)
    if out == STANDARD:
        _write_standard(result, metadata=metadata)
        return [out]
    names = _name_pictures(out, len(result.images))
    for index, name in enumerate(names):
        save(result, name, index=index, metadata=metadata)
    return names


def _write_standard(result: Result, *, metadata: bool) -> None:
    """Write the picture as a PNG to stdout."""
    import sys

    sys.stdout.buffer.write(result.to_bytes("png", metadata=metadata))
    sys.stdout.buffer.flush()


def _report(result: Result, names: list[Path], as_json: bool) -> None:
    """Say what was made and what that took."""
    if as_json:
        record = {
            "images": [str(name) for name in names],
            "seeds": list(result.seeds),
            "substitute": list(result.request.substitute_words),
            "timings": result.timings,
            "warnings": list(result.warnings),
        }
        print_json(record)
        return
    spent = sum(result.timings.values())
    written = ", ".join("stdout" if name == STANDARD else str(name) for name in names)
    say(f"{written} ({spent:.2f} s, seed {result.seeds[0]})")
