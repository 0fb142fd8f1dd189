"""`dreammix-trt attributes`: photographs of a subject become the dictionary of its attributes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from dreammix_trt.terminal import AsJson, Force, print_json, print_line, print_table, say, show_progress
from dreammix_trt.train_cli import InvertMasks, LargeMasks

if TYPE_CHECKING:
    from dreammix_trt.core.attributes import AttributeDictionary
    from dreammix_trt.core.chat import Chat
    from dreammix_trt.trainer.attributes import Describer

Photos = Annotated[Path | None, typer.Argument(help="The subject's photographs, with masks, as `train` takes them.")]
ClassName = Annotated[str | None, typer.Option(help="What the subject is, in a word: mug, teapot, dog.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="The file to write, for example attributes.json.")]
Check = Annotated[Path | None, typer.Option(help="Look at a file instead, and show the captions that it gives.")]
Photographs = Annotated[int, typer.Option(min=1, max=32, help="How many are looked at, at most.")]
Side = Annotated[
    int | None, typer.Option(min=64, max=4096, help="Longer side in pixels of what it is shown; default: 768.")
]
Clip = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Ask a CLIP: a local folder of transformers' files, offline.")
]
UseJudge = Annotated[bool, typer.Option("--judge", help="Ask the embedded model's judge; it knows that world alone.")]
Threshold = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=1.0, help="What is less probable is left out; default: 0.4 with --clip, 0.5 with --judge."
    ),
]

EXAMPLES = """
Examples:

dreammix-trt attributes photos/ --class-name teapot -o attributes.json --endpoint http://localhost:8000/v1 --model NAME

dreammix-trt attributes photos/ --class-name teapot -o attributes.json --clip clip-vit-large-patch14/

dreammix-trt attributes --check attributes.json
"""
PANELS = {
    "What is described": ("class_name", "photographs", "invert_masks", "large_masks"),
    "By a model behind an endpoint": (*PANEL, "side"),
    "Offline": ("clip", "judge", "threshold"),
    "What is written": ("out", "check", "force", "as_json"),
}
_SOURCES = (
    "say who describes the subject: --endpoint URL --model NAME (a vision-language model), --clip FOLDER (offline), "
    "--judge (things of the embedded model's world); or write the file by hand and --check it"
)
_SIDE = 768
_SHOWN = 6  # captions of each sort


def attributes(
    photos: Photos = None,
    class_name: ClassName = None,
    out: Out = None,
    check: Check = None,
    photographs: Photographs = 6,
    invert_masks: InvertMasks = False,
    large_masks: LargeMasks = False,
    endpoint: Endpoint = None,
    model: Model = None,
    key_variable: KeyVariable = None,
    side: Side = None,
    timeout: Timeout = None,
    deadline: Deadline = None,
    clip: Clip = None,
    judge: UseJudge = False,
    threshold: Threshold = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Name what is seen of a subject: its colours, material, parts, for `regularize` and `train`."""
    from dreammix_trt.core.attributes import AttributeDictionary
    from dreammix_trt.core.files import check_file
    from dreammix_trt.trainer.attributes import read_pictures

    if check is not None:
        if any(each is not None for each in (photos, class_name, out, endpoint, clip)) or judge:
            raise InputError("--check looks at a file and writes none; give it alone")
        return _report(AttributeDictionary.read(check), check, as_json)
    photos, class_name, out = _need(photos, class_name, out)
    if out.exists() and not force:
        raise InputError(
            f"--out {out} is there already, perhaps edited by hand; --force replaces it, or name another file"
        )
    check_file(out)
    asked = {"model": model, "key_variable": key_variable, "timeout": timeout, "deadline": deadline}
    if endpoint is None:
        asked["side"] = side  # is refused with the others
    chat = open_chat(endpoint, **asked)
    describer = _choose(chat, side or _SIDE, clip, judge, threshold)
    masks = {"invert_masks": invert_masks, "large_masks": large_masks}
    pictures = read_pictures(photos, photographs, need_masks=chat is None, **masks)
    if all(picture.subject.all() for picture in pictures):
        say(f"no photograph of {photos} has a mask, so the whole photographs are shown")
    with show_progress("describing") as update:
        update("attributes", 0.0, f"{len(pictures)} photographs")
        try:
            found = describer.describe(pictures, class_name)
        finally:
            tell_tokens(chat)
    found.write(out)
    return _report(found, out, as_json, chat)


def _need(photos: Path | None, class_name: str | None, out: Path | None) -> tuple[Path, str, Path]:
    if photos is None:
        raise InputError("PHOTOS is missing: give the folder of the subject's photographs, or --check FILE")
    if class_name is None or not class_name.strip():
        raise InputError("--class-name is missing: say what the subject is, for example: mug")
    if out is None:
        raise InputError("--out is missing: name the file to write, for example attributes.json")
    return photos, class_name.strip(), out


def _choose(chat: Chat | None, side: int, clip: Path | None, judge: bool, threshold: float | None) -> Describer:
    """Who describes the subject. Nothing is guessed."""
    named = [name for name, given in (("--endpoint", chat), ("--clip", clip), ("--judge", judge)) if given]
    if len(named) != 1:
        raise InputError(f"{' and '.join(named)} exclude each other: {_SOURCES}" if named else _SOURCES)
    if chat is not None:
        if threshold is not None:
            raise InputError("--threshold is of --clip and --judge; a model behind an endpoint gives no probabilities")
        from dreammix_trt.trainer.attributes.endpoint import EndpointDescriber

        return EndpointDescriber(chat, side)
    given = {} if threshold is None else {"threshold": threshold}
    if clip is not None:
        from dreammix_trt.trainer.attributes.clip import ClipDescriber

        return ClipDescriber(clip, **given)
    from dreammix_trt.core.checkpoint import BaseFiles
    from dreammix_trt.trainer.attributes.judge import JudgeDescriber

    return JudgeDescriber(BaseFiles.open().folder, **given)


def _list_captions(found: AttributeDictionary) -> list[str]:
    """Those that `train` gives the subject: its own, and the first that name attributes."""
    from dreammix_trt.trainer.captions import subject_captions

    return [f"a photo of a sks {found.class_name}", *subject_captions("sks", found.class_name, found)][:_SHOWN]


def _report(found: AttributeDictionary, file: Path, as_json: bool, chat: Chat | None = None) -> None:
    """What is known of the subject, and captions that are made of it."""
    from dreammix_trt.trainer.attributes import combine_prompts

    captions = {
        "the subject's": _list_captions(found),
        "regular": combine_prompts(found, _SHOWN, 0),
    }
    if as_json:
        tokens = None if chat is None else {"read": chat.tokens[0], "written": chat.tokens[1]}
        shown = {name: list(texts) for name, texts in zip(("subject", "regular"), captions.values(), strict=True)}
        return print_json({"file": str(file), **found.to_dict(), "tokens": tokens, "captions": shown})
    rows = [[kind, ", ".join(values)] for kind, values in found.attributes.items()]
    print_table(rows or [["none"]], title=f"attributes of the {found.class_name}, by {found.source} ({file})")
    for name, texts in captions.items():
        print_line("\n  ".join((f"{name} captions, for example", *texts)))
    return None
