"""`dreammix-trt remove`: what a mask marks is taken out of a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dreammix_trt.core.errors import InputError
from dreammix_trt.painting_cli import (
    Count,
    Device,
    Engine,
    Feather,
    Image,
    Mask,
    MaskFromAlpha,
    NoMetadata,
    Out,
    Residency,
    SaveStages,
    Seed,
    Steps,
    Verify,
    check_outputs,
    choose_mask,
    choose_options,
    follow,
    join_fields,
    need_image,
    read_standard_input,
    report,
    save_pictures,
)
from dreammix_trt.terminal import AsJson, Force, SetFields, Store, Threads, parse_fields, show_progress

PriorImage = Annotated[
    Path | None,
    typer.Option(
        help="What the prior sees in place of the picture, of its size: a picture without a neighbour that would be "
        "copied into the hole, or blank paper."
    ),
]
EXAMPLES = """
Examples:

dreammix-trt remove engines/clean -i table.png -m mask.png -o empty.png

dreammix-trt remove engines/clean -i table.png -m mask.png --prior-image paper.png --seed 3 -o empty.png
"""
PANELS = {
    "What is taken out": ("image", "mask", "mask_from_alpha", "prior_image", "seed", "count"),
    "How it is painted": ("steps", "feather", "set_field"),
    "What is written": ("out", "force", "save_stages", "no_metadata", "as_json"),
    "What it runs on": ("device", "residency", "threads", "store", "verify"),
}


def remove(
    engine: Engine,
    out: Out,
    image: Image = None,
    mask: Mask = None,
    mask_from_alpha: MaskFromAlpha = False,
    prior_image: PriorImage = None,
    seed: Seed = None,
    count: Count = None,
    steps: Steps = None,
    feather: Feather = None,
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
    """Take what a mask marks out of a picture: a clean plate, with ASUKA's prior and decoder."""
    from dreammix_trt.core.passport import Passport
    from dreammix_trt.core.removal import REMOVAL
    from dreammix_trt.core.request import Request
    from dreammix_trt.engine.dreammix import DreamMix

    image, mask = need_image(image, None), choose_mask(mask, mask_from_alpha)
    image, mask, _ = read_standard_input(image, mask, None)
    base = Passport.read(engine).base
    options = {"seed": seed, "num_images_per_prompt": count, "num_inference_steps": steps, "feather": feather}
    fields = join_fields(parse_fields(set_field or []), options)
    request = Request("").replace(**{**base.get("defaults", {}), **REMOVAL, **fields})
    if request.prompt:
        raise InputError(f"prompt is {request.prompt!r}: a removal has none; inpaint paints what a prompt says")
    check_outputs(out, save_stages, request.num_images_per_prompt, force=force, as_json=as_json)
    given = choose_options(device, residency, request, image, base)
    with (
        DreamMix.load(engine, threads=threads, verify=verify, store=store, device=device, **given) as dm,
        show_progress("removing") as update,
    ):
        keep = save_stages is not None
        result = follow(dm.iterate(image, mask, request, prior_image=prior_image, keep_stages=keep), update)
    report(result, save_pictures(result, out, save_stages, metadata=not no_metadata), as_json)
