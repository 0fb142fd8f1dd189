"""`dreammix-trt enroll`: a photograph of an object becomes a subject's file, without training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dreammix_trt.core.errors import InputError
from dreammix_trt.painting_cli import Engine, Verify
from dreammix_trt.terminal import AsJson, Force, Store, Threads, print_json, say

if TYPE_CHECKING:
    from dreammix_trt.engine.enrolment import Segment

Images = Annotated[
    list[Path],
    typer.Option(
        "--image", "-i", help="A photograph of the object; several of the same one are selected from together."
    ),
]
Masks = Annotated[
    list[Path] | None,
    typer.Option(
        "--mask",
        "-m",
        help="White where the object is, one for each photograph in their order; default: what is opaque in it.",
    ),
]
SegmentFile = Annotated[
    Path | None,
    typer.Option(
        "--segment", help="No mask: the ONNX file of a U²-Net or ISNet that finds the object, such as rembg's."
    ),
]
ClassName = Annotated[str, typer.Option(help="What the object is: mug, dog.")]
Name = Annotated[str | None, typer.Option(help="What requests call it; default: its class.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The subject's file, .safetensors.")]

EXAMPLES = """
Examples:

dreammix-trt enroll engines/any -i photo.png -m mask.png --class-name mug -o mug.safetensors

dreammix-trt inpaint engines/any --subject-file mug.safetensors -i table.png -m hole.png -p "a red mug" -o out.png
"""
PANELS = {
    "What is enrolled": ("image", "mask", "segment", "class_name", "name"),
    "What is written": ("out", "force", "as_json"),
    "What it runs on": ("threads", "store", "verify"),
}


def enroll(
    engine: Engine,
    image: Images,
    class_name: ClassName,
    out: Out,
    mask: Masks = None,
    segment: SegmentFile = None,
    name: Name = None,
    force: Force = False,
    verify: Verify = False,
    threads: Threads = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Make a subject of one photograph, without training. The engine's base needs a token adapter."""
    import time

    from dreammix_trt.core.remarks import keep_remarks
    from dreammix_trt.engine.dreammix import DreamMix

    _check_out(out, force=force)
    if mask and segment is not None:
        raise InputError("--mask and --segment exclude each other; leave one of them")
    finder = _open_finder(segment, threads)
    with DreamMix.load(engine, threads=threads, verify=verify, store=store) as dm, keep_remarks() as warnings:
        begun = time.perf_counter()
        subject = dm.enroll(image, mask or None, class_name=class_name, name=name, segment=finder, out=out)
        seconds = time.perf_counter() - begun
    assert subject.tokens is not None
    count = len(subject.tokens.rows)
    if as_json:
        record = {"file": str(out), "name": subject.name, "class_name": subject.class_name, "kind": subject.kind}
        print_json({**record, "tokens": count, "bytes": out.stat().st_size, "seconds": seconds, "warnings": warnings})
        return
    say(f"subject {subject.name}: {count} tokens in {seconds:.2f} s; in {out}")
    say(f'next: dreammix-trt inpaint {engine} --subject-file {out} -p "a {subject.class_name}" -i IMAGE -m MASK -o OUT')


def _open_finder(file: Path | None, threads: int | None) -> Segment | None:
    if file is None:
        return None
    from dreammix_trt.trainer.segment import open_segmenter

    return open_segmenter(file, threads=threads).find_subject


def _check_out(out: Path, *, force: bool) -> None:
    """Refuse an output that could not be written, or that would replace what is no enrolled subject."""
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out}: a subject's file ends with .safetensors")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: the folder {out.absolute().parent} does not exist; make it first")
    if out.exists() and not force:
        raise InputError(f"--out {out} is there already; --force replaces it, or name another file")
