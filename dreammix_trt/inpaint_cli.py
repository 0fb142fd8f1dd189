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
from dreammix_trt.terminal import (
    AsJson,
    Force,
    SetFields,
    Store,
    Threads,
    parse_fields,
    say,
    show_progress,
)

if TYPE_CHECKING:
    from dreammix_trt.core.chat import Chat
    from dreammix_trt.core.request import Request
    from dreammix_trt.engine.dreammix import DreamMix
    from dreammix_trt.engine.result import Result

Prompt = Annotated[str | None, typer.Option("--prompt", "-p", help='For example "a red sks mug".')]
NegativePrompt = Annotated[str | None, typer.Option(help="What is not to be there.")]
Subject = Annotated[str | None, typer.Option(help="Which subject, when the engine has several.")]
SubjectFile = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]FILE",
        help="Load a subject's file or LoRA beside the engine's subjects; where no --subject is named it is painted.",
    ),
]
TokenSubject = Annotated[
    str | None,
    typer.Option(help="Whose tokens stand beside the LoRA of --subject, to use both; default: that subject's own."),
]
TokenCount = Annotated[
    int | None,
    typer.Option(min=1, max=48, help="Tokens of an enrolled subject: fewer leave more to the text; default: 24."),
]
TokenWeight = Annotated[float | None, typer.Option(help="Strength of its tokens, 0 to 2; default: 1.")]
Substitute = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WORD",
        help="Attribute word to take out of the subject; auto: those of its attributes that the prompt contradicts.",
    ),
]
SubjectScale = Annotated[float | None, typer.Option(help="Strength of the subject, 0 to 2; default: 1.")]
Preset = Annotated[
    Literal["fast", "balanced", "best"] | None,
    typer.Option(help="Steps that suit the engine's base: 12, 20, 30; of a few-step base 4, 6, 8."),
]
Sampler = Annotated[
    Literal["dpmpp_2m_sde", "euler", "lcm"] | None, typer.Option(help="Default: the engine's, else dpmpp_2m_sde.")
]
GuidanceScale = Annotated[
    float | None, typer.Option(help="How closely the prompt is followed; default: the engine's, else 4.")
]
Mode = Annotated[
    Literal["native", "reference"] | None,
    typer.Option(help="reference follows the authors' arithmetic; default: native."),
]
FromRequest = Annotated[
    Path | None, typer.Option("--from", help="A request: a JSON file or a picture made here; - reads it from stdin.")
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
        *("subject_file", "token_subject", "token_count", "token_weight", "seed", "count", "from_request"),
    ),
    "How it is painted": ("preset", "steps", "sampler", "guidance_scale", "feather", "mode", "set_field"),
    "Who finds the words of --substitute auto": PANEL,
    "What is written": ("out", "force", "save_stages", "no_metadata", "as_json"),
    "What it runs on": ("device", "residency", "threads", "store", "verify"),
}


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
    subject_file: SubjectFile = None,
    token_subject: TokenSubject = None,
    token_count: TokenCount = None,
    token_weight: TokenWeight = None,
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

    image, mask = need_image(image, from_request), choose_mask(mask, mask_from_alpha)
    image, mask, from_request = read_standard_input(image, mask, from_request)
    chat = open_chat(endpoint, model=model, key_variable=key_variable, timeout=timeout, deadline=deadline)
    files = [_parse_subject_file(text) for text in subject_file or ()]
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
        token_subject=token_subject,
        token_count=token_count,
        token_weight=token_weight,
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
    check_outputs(out, save_stages, request.num_images_per_prompt, force=force, as_json=as_json)
    options = choose_options(device, residency, request, image, base)
    with DreamMix.load(engine, threads=threads, verify=verify, store=store, device=device, **options) as dm:
        names = [dm.add_subject(file, name) for name, file in files]
        if request.subject is None and names:
            request = request.replace(subject=names[0])
        result = _paint(dm, image, mask, request, chat, keep_stages=save_stages is not None)
    written = save_pictures(result, out, save_stages, metadata=not no_metadata)
    report(result, written, as_json)


def _parse_subject_file(text: str) -> tuple[str | None, str]:
    """(name, file) of [NAME=]FILE; None: as the file says."""
    name, mark, file = text.partition("=")
    if not mark or Path(text).exists():
        return None, text
    if not name or not file:
        raise InputError(f"--subject-file {text!r}: give FILE or NAME=FILE, for example --subject-file mug.safetensors")
    return name, file


def _choose_substitute(words: list[str] | None) -> list[str] | str | None:
    """The words of --substitute, or `auto`, which goes alone."""
    if words and "auto" in words:
        if len(words) > 1:
            others = " and ".join(repr(word) for word in words if word != "auto") or "another auto"
            raise InputError(f"--substitute auto finds the words itself, but {others} is given, too; leave one of them")
        return "auto"
    return words


def _read_request(
    source: Path | None, defaults: Mapping[str, Any], preset: str | None, assigned: Mapping[str, Any], **given: Any
) -> Request:
    """The request of a file, or a new one with an engine's `defaults`, overridden by the preset, the `assigned` fields
    (--set) and the options `given` (None: not given)."""
    from dreammix_trt.core.presets import choose_fields
    from dreammix_trt.core.request import Request

    fields = join_fields(assigned, given)
    if source is not None:
        from dreammix_trt.engine.result import read_request

        request = read_request(source).replace(**fields)
    elif "prompt" in fields:
        request = Request(fields["prompt"]).replace(**{**defaults, **fields})
    else:
        raise InputError(
            "--prompt is missing: say what to paint, with the subject's token: 'a red sks mug'; an enrolled subject "
            "has none: 'a red mug'"
        )
    if preset is None:
        return request
    chosen = choose_fields(preset, {"sampler": request.sampler, "guidance_scale": request.guidance_scale})
    return request.replace(**{**chosen, **fields})


def _paint(
    dm: DreamMix, image: Path, mask: Path | None, request: Request, chat: Chat | None, *, keep_stages: bool
) -> Result:
    """The request's result, with a bar of its steps. chat: finds the words of substitute="auto"; None: nobody is asked.

    What the model said cost tokens even where it was no answer.
    """
    from dreammix_trt.engine.endpoint_retriever import EndpointRetriever
    from dreammix_trt.engine.retrieval import retrieve

    retriever = retrieve if chat is None else EndpointRetriever(chat)
    with show_progress("inpainting") as update:
        if dm.studio is not None:
            say(str(dm.studio.plan))
        try:
            events = dm.iterate(image, mask, request, retriever=retriever, keep_stages=keep_stages)
        finally:
            tell_tokens(chat)
        return follow(events, update)
