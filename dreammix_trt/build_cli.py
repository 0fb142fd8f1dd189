"""`dreammix-trt build`: a base and a subject's LoRA become an engine directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.lengths import Length, parse_lengths
from dreammix_trt.terminal import (
    AsJson,
    Base,
    BaseLoras,
    Head,
    Patch,
    PatchBiases,
    Store,
    Tokenizer,
    Vae,
    print_json,
    say,
    show_progress,
)

if TYPE_CHECKING:
    from dreammix_trt.core.passport import Passport

Out = Annotated[Path, typer.Option("--out", "-o", help="The engine directory to make.")]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        help="LoRA of the subject, FILE[:scale[:target]]; target: patched, raw or both UNets. None: a base alone; "
        "several: they work together."
    ),
]
Subjects = Annotated[
    list[str] | None,
    typer.Option(
        "--subject",
        help="NAME=FILE[:scale[:target]], FILE a LoRA or a subject file; several: requests choose by name.",
    ),
]
Name = Annotated[str | None, typer.Option(help="The subject's name; default: its class, else OUT's name.")]
Token = Annotated[
    list[str] | None,
    typer.Option(help="The subject's word in prompts, as its LoRA was trained; of several subjects NAME=WORD."),
]
ClassName = Annotated[
    list[str] | None, typer.Option(help="What the subject is: teapot, dog; of several subjects NAME=CLASS.")
]
Attributes = Annotated[
    list[str] | None,
    typer.Option(
        help="attributes.json of the subject, for --substitute auto; of several NAME=FILE; default: what its LoRA says."
    ),
]
FewStep = Annotated[
    bool,
    typer.Option(
        "--few-step",
        help="Merge the LoRA that comes with the embedded base: 4 to 8 steps without guidance, see --preset.",
    ),
]
Asuka = Annotated[
    Path | None,
    typer.Option(
        help="Folder of ASUKA's prior and decoder, as `train-asuka` writes it; default: asuka/ in the base's folder."
    ),
]
Tokens = Annotated[
    Path | None,
    typer.Option(
        help="Token adapter of the base: adds what makes a subject of one picture (`enroll`), as `train-tokens` writes "
        "it; default: token_adapter.safetensors in the base's folder."
    ),
]
Sampler = Annotated[Literal["dpmpp_2m_sde", "euler", "lcm"] | None, typer.Option(help="What requests use by default.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps that requests use by default.")]
GuidanceScale = Annotated[float | None, typer.Option(help="Guidance that requests use by default.")]
Backend = Annotated[
    Literal["onnxruntime", "openvino", "tensorrt-rtx", "tensorrt"] | None,
    typer.Option(
        help="Default: tensorrt-rtx with --target, else onnxruntime; openvino: faster where the processor has bfloat16."
    ),
]
Targets = Annotated[
    list[str] | None, typer.Option(help="GPU to build for, e.g. sm_89 (RTX 4090); several allowed; no GPU needed.")
]
Precision = Annotated[
    Literal["float32", "float16", "bfloat16", "fp8"] | None,
    typer.Option(
        help="Default: float16 for TensorRT, bfloat16 for OpenVINO where the processor has it, else float32. "
        "fp8: UNets in E4M3, for sm_89 and newer; ONNX Runtime emulates it, slowly."
    ),
]
UnetPrecision = Annotated[
    Literal["bfloat16"] | None,
    typer.Option(help="For UNets whose values are too large for float16 (TensorRT)."),
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(help="For fp8: what `calibrate` wrote about this base; default: calibration.json in its folder."),
]
Shapes = Annotated[
    Literal["static", "dynamic"],
    typer.Option(help="static: the base's native square; dynamic: other aspects of its area, too."),
]
Pictures = Annotated[int, typer.Option(min=1, help="Most pictures in a batch.")]
Context = Annotated[
    str,
    typer.Option(
        help="Lengths of the text condition that engines take, e.g. 77,101; 77 is the text alone; 78-125 is a span."
    ),
]
Workspace = Annotated[
    int | None, typer.Option(min=1, help="Most MiB of scratch memory the engines may take on the GPU.")
]
VaeImages = Annotated[
    list[Path] | None, typer.Option(help="A picture on which a float16 VAE is looked at for overflow, too.")
]
NoSafeVae = Annotated[
    bool,
    typer.Option(
        "--no-safe-vae",
        help="Leave out the float32 VAE that goes with a float16 one, for pictures that are too much for that; "
        "saves 334 MB of weights for SDXL.",
    ),
]
Look = Annotated[
    int | None,
    typer.Option(min=0, help="Pictures to paint to see what bfloat16 changes; default: 6 of a small base, else none."),
]
Verify = Annotated[
    bool | None,
    typer.Option(
        "--verify/--no-verify",
        help="Compare every network that is exported with torch, or none; default: the small ones.",
    ),
]
Merge = Annotated[bool, typer.Option("--merge", help="Bake the subject into weights of its own.")]
NoSlots = Annotated[bool, typer.Option("--no-slots", help="Attention weights are fixed: no subject can be added.")]
Keep = Annotated[
    bool,
    typer.Option("--keep", help="Leave the engine that is there where the same command made it of the same files."),
]
SelfContained = Annotated[bool, typer.Option("--self-contained", help="Copy the base's parts into OUT.")]

EXAMPLES = """
Examples:

dreammix-trt build --lora lora/ -o engines/mug

dreammix-trt build --base sdxl.safetensors --patch v26.fooocus.patch --head head.pth --lora mug.safetensors -o mug/

dreammix-trt build --base sdxl-inpainting/ --lora lora/ --target sm_89 -o mug-for-rtx-4090/
"""
PANELS = {
    "The base": (
        *(
            "base",
            "patch",
            "head",
            "vae",
            "tokenizer",
            "asuka",
            "tokens",
            "base_lora",
            "few_step",
            "patch_biases",
            "no_slots",
        ),
    ),
    "The subject": ("lora", "subject", "name", "token", "class_name", "attributes", "merge"),
    "What requests use by default": ("sampler", "steps", "guidance_scale"),
    "What it runs on": (
        *(
            "backend",
            "target",
            "precision",
            "unet_precision",
            "calibration",
            "shapes",
            "pictures",
            "context",
            "workspace",
            "vae_image",
            "no_safe_vae",
            "look",
        ),
    ),
    "What is written": ("out", "self_contained", "keep", "store", "verify", "as_json"),
}


def build(
    out: Out,
    lora: Loras = None,
    subject: Subjects = None,
    name: Name = None,
    token: Token = None,
    class_name: ClassName = None,
    attributes: Attributes = None,
    base: Base = None,
    patch: Patch = None,
    head: Head = None,
    vae: Vae = None,
    tokenizer: Tokenizer = None,
    asuka: Asuka = None,
    tokens: Tokens = None,
    base_lora: BaseLoras = None,
    few_step: FewStep = False,
    sampler: Sampler = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    backend: Backend = None,
    target: Targets = None,
    precision: Precision = None,
    unet_precision: UnetPrecision = None,
    calibration: CalibrationFile = None,
    shapes: Shapes = "static",
    pictures: Pictures = 1,
    context: Context = "77",
    workspace: Workspace = None,
    vae_image: VaeImages = None,
    no_safe_vae: NoSafeVae = False,
    look: Look = None,
    verify: Verify = None,
    merge: Merge = False,
    no_slots: NoSlots = False,
    patch_biases: PatchBiases = False,
    self_contained: SelfContained = False,
    keep: Keep = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Turn a base and a subject's LoRA into an engine directory."""
    from dreammix_trt.building import BaseSources, BuildOrder, Defaults, EngineOptions, carry_out

    engine = EngineOptions(
        backend=backend or "",
        precision=precision or "",
        unet_precision=unet_precision or "",
        calibration=calibration,
        targets=tuple(target or ()),
        shapes=shapes,
        pictures=pictures,
        workspace=workspace * (1 << 20) if workspace else None,
        context=_parse_lengths(context),
        vae_images=tuple(vae_image or ()),
        safe_vae=not no_safe_vae,
        look=look,
    )
    order = BuildOrder(
        out,
        BaseSources(base, patch, head, vae, tokenizer, patch_biases, asuka, tokens),
        lora,
        [*(base_lora or ()), *_choose_few_step(few_step, base)],
        subjects=_parse_pairs("--subject", subject or ()),
        name=name,
        token=_parse_words("--token", token or ()),
        class_name=_parse_words("--class-name", class_name or ()),
        attributes=_parse_words("--attributes", attributes or ()),
        merge=merge,
        slots=not no_slots,
        defaults=Defaults(sampler, steps, guidance_scale),
        engine=engine,
        verify=verify,
        store=store,
        self_contained=self_contained,
        keep=keep,
    )
    with show_progress("building") as update:
        passport = carry_out(order, update, say)
    if as_json:
        print_json({"engine": str(out), **_summarise(passport)})
    say(f"{out}: {', '.join(subject.name for subject in passport.subjects) or 'no subject'}")
    if passport.subjects:
        first = passport.subjects[0]
        words = f"a {first.token} {first.class_name}".strip()
        say(f'next: dreammix-trt inpaint {out} --image PICTURE --mask MASK --prompt "{words}" --out out.png')


def _choose_few_step(wanted: bool, base: Path | None) -> list[str]:
    """The embedded base's few-step LoRA, where it is wanted."""
    if wanted and base is not None:
        raise InputError(
            "--few-step takes the LoRA that was distilled from the embedded base; for another base give its own with "
            "--base-lora FILE (dreammix-trt distill makes one), or omit --base"
        )
    from dreammix_trt.core.checkpoint import EMBEDDED_LCM

    return [str(EMBEDDED_LCM)] if wanted else []


def _summarise(passport: Passport) -> dict[str, Any]:
    """What a script wants to know of a build; `inspect --json` prints the whole passport."""
    facts = {name: getattr(passport, name) for name in ("backend", "precision", "targets", "base_key", "command")}
    fields = ("name", "token", "class_name", "attributes")
    subjects = [{name: getattr(each, name) for name in fields} for each in passport.subjects]
    return facts | {"subjects": subjects}


def _parse_words(option: str, given: Sequence[str]) -> str | dict[str, str] | None:
    """WORD, or NAME=WORD for each of several subjects."""
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    return _parse_pairs(option, given) or None


def _parse_pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE each. Raises InputError for another form and for a name given twice."""
    pairs: dict[str, str] = {}
    for text in given:
        name, mark, value = text.partition("=")
        if not mark or not name or not value:
            raise InputError(f"{option} {text!r}: give NAME=VALUE, for example {option} teapot={value or text}")
        if name in pairs:
            raise InputError(f"{option} names {name!r} twice; give each subject once")
        pairs[name] = value
    return pairs


def _parse_lengths(text: str) -> tuple[Length, ...]:
    """Whole numbers and spans separated by commas."""
    try:
        return parse_lengths(text)
    except ValueError:
        raise InputError(
            f"--context is {text!r}; give whole numbers or spans separated by commas, such as 77,101 or 77,78-125"
        ) from None
