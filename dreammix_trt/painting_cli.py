"""What the commands that paint share: options, files in and out, what is said of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dreammix_trt.core.errors import InputError
from dreammix_trt.terminal import print_json, say

if TYPE_CHECKING:
    from dreammix_trt.core.request import Request
    from dreammix_trt.engine.result import Result, StepEvent

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
Seed = Annotated[
    int | None,
    typer.Option(parser=lambda text: parse_seed(text), metavar="N", help="Default: 0; `random` draws one and says it."),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps; default: the engine's, else 30.")]
Count = Annotated[int | None, typer.Option("--count", "-n", min=1, help="Pictures; the k-th has seed + k.")]
Feather = Annotated[
    int | None, typer.Option(min=0, help="Pixels over which the result fades into the picture; 0: a hard edge.")
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
STANDARD = Path("-")  # stdin or stdout
_STARTS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp"}  # of pictures made here


def parse_seed(text: str) -> int:
    """A seed as a number, or drawn for the word `random`."""
    from dreammix_trt.core.request import draw_seed

    if text == "random":
        return draw_seed()
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a whole number nor `random`") from None


def join_fields(assigned: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A request's fields: those of --set, and of the options `given` (None: not given). Raises InputError for both."""
    options = {name: value for name, value in given.items() if value is not None}
    twice = sorted(assigned.keys() & options.keys())
    if twice:
        raise InputError(f"{', '.join(twice)}: given by --set and by an option of its own; leave one of them")
    return {**assigned, **options}


def need_image(image: Path | None, request: Path | None) -> Path:
    if image is None:
        why = "; the request of --from holds no pictures" if request else ""
        raise InputError(f"--image is missing: give the picture and a mask of the same size (white is repainted){why}")
    return image


def choose_mask(mask: Path | None, from_alpha: bool) -> Path | None:
    """The mask's file; None: the picture's own transparency."""
    if from_alpha and mask is not None:
        raise InputError("--mask and --mask-from-alpha exclude each other; leave one of them")
    if not from_alpha and mask is None:
        raise InputError(
            "--mask is missing: give a mask of the picture's size (white is repainted), or --mask-from-alpha to "
            "repaint what is transparent in the picture"
        )
    return mask


def choose_options(
    device: str, residency: str | None, request: Request, image: Path, base: Mapping[str, Any]
) -> dict[str, Any]:
    """The runtime's options; those of a GPU set aside its memory for one request and no more.

    base: of a passport. A request has one subject and frames of two sizes, one a stage; its own prompts always have
    room. On a GPU its pictures are painted one after the other.
    """
    from dreammix_trt.core.asuka import PriorConfig
    from dreammix_trt.core.pictures import read_image
    from dreammix_trt.core.remarks import keep_remarks
    from dreammix_trt.engine import Options

    asked: dict[str, Any] = {} if residency is None else {"residency": residency}
    if device != "cuda":
        return asked
    if request.mode == "reference":  # the picture is stretched
        height, width = request.reference_resize or (base["native_side"], base["native_side"])
    else:
        with keep_remarks(tell=False):  # painting reads it again, and tells them
            height, width = read_image(image).size
    if request.prior == "concat":  # its rows stand beside as many of the text's as else have room
        asked["context"] = Options().context + PriorConfig().tokens
    return asked | {"largest_picture": height * width, "subjects": 1, "texts": 1, "shapes": 2}


def read_standard_input(image: Path, mask: Path | None, request: Path | None) -> tuple[Path, Path | None, Path | None]:
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


def check_outputs(out: Path, stages: Path | None, count: int, *, force: bool, as_json: bool) -> None:
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


def save_pictures(result: Result, out: Path, stages: Path | None, *, metadata: bool) -> list[Path]:
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


def follow(events: Iterable[StepEvent], update: Callable[[str, float, str], None]) -> Result:
    """The result of a request; its steps are told to `update` as they end."""
    result = None
    for event in events:
        update(event.stage, (event.index + 1) / event.total, "")
        result = event.result or result
    assert result is not None
    return result


def report(result: Result, names: list[Path], as_json: bool) -> None:
    """Say what was made and what that took."""
    if as_json:
        record = {
            "images": [str(name) for name in names],
            "seeds": list(result.seeds),
            "substitute": list(result.request.substitute_words),
            "subject": result.origin.subject,
            "token_subject": result.origin.token_subject,
            "timings": result.timings,
            "warnings": list(result.warnings),
        }
        print_json(record)
        return
    spent = sum(result.timings.values())
    written = ", ".join("stdout" if name == STANDARD else str(name) for name in names)
    say(f"{written} ({spent:.2f} s, seed {result.seeds[0]})")
