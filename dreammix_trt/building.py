"""Build: base checkpoint -> parts in the store; LoRAs -> subject; both -> engine directory.

The only place that knows the exporter and the engine. Every network is a part with a key of its own, so that a build
goes on where another ended, and bases share what they have in common. After a base's parts are there, a subject costs
seconds and needs no torch.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreammix_trt import __version__
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.files import check_place, folder_bytes, sha256_of
from dreammix_trt.core.lora import Lora, LoraSpec, parse_lora, read_lora
from dreammix_trt.core.network_weights import BaseLora
from dreammix_trt.core.passport import FILE_NAME as PASSPORT
from dreammix_trt.core.request import Request
from dreammix_trt.core.store import Store
from dreammix_trt.core.subject import Subject, subject_from_loras
from dreammix_trt.engine.backends.tensorrt.builder import Estimate, check_room
from dreammix_trt.engine.directory import write_engine
from dreammix_trt.parts import EngineOptions, Parts

if TYPE_CHECKING:
    from dreammix_trt.core.passport import Passport

Update = Callable[[str, float, str], None]
LoraOption = str | Path | LoraSpec
#: marks in the name of a few-step LoRA -> its sampler
_FEW_STEP = ((r"(?<![a-z])lcm(?![a-z])", "lcm"), (r"lightning|hyper[-_ ]?sd", "euler"))


@dataclass(frozen=True)
class Defaults:
    """Fields of a request that suit a base, where they differ from the usual; None: the usual."""

    sampler: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Those that are given."""
        return {name: value for name, value in vars(self).items() if value is not None}


def build(
    lora: LoraOption | Sequence[LoraOption] | None = None,
    *,
    out: str | Path,
    base: str | Path | None = None,
    patch: str | Path | None = None,
    head: str | Path | None = None,
    vae: str | Path | None = None,
    tokenizer: str | Path | None = None,
    name: str | None = None,
    merge: bool = False,
    slot_rank: int = 8,
    patch_biases: bool = False,
    base_loras: Sequence[LoraOption] = (),
    defaults: Defaults | None = None,
    engine: EngineOptions | None = None,
    verify: bool | None = None,
    store: str | Path | None = None,
    self_contained: bool = False,
    progress: Update | None = None,
    notice: Callable[[str], None] | None = None,
) -> Passport:
    """Make the engine directory `out` and return its passport.

    lora: file or folder of the subject, or several, each as "FILE[:scale[:target]]" (target: "patched", "raw" or "both"
    UNets); None: a base alone. base: diffusers folder or single file, default the embedded model; patch, head: default
    those beside the base; vae, tokenizer: instead of the base's. name: the subject's, default from the LoRA's folder.
    merge: bake the subject into weights of its own. slot_rank: largest LoRA rank that subjects of this base may have
    (0: no slots). base_loras: merged into the base (few-step, style), given as `lora` is, target "both" by default.
    defaults: what requests to this base use unless they say otherwise; filled in for LCM, Lightning and Hyper-SD
    LoRAs. engine: back end, precision, GPUs, shapes. verify: compare every network with torch, or none (None: those
    that are small enough). self_contained: copy the base's parts into `out`. progress(part, fraction, message) is told
    of each part, notice(text) what a person should know.

    Raises FileFormatError, InputError, BuildError; `out` is then as it was.
    """
    update, tell = progress or (lambda *_: None), notice or (lambda _: None)
    engine = engine or EngineOptions()
    if not 0 <= slot_rank <= 256:
        raise InputError(f"slot_rank is {slot_rank}; allowed: 0 (no slots) to 256")
    check_place(out, PASSPORT)
    engine.check()
    if name is not None and lora is None:
        raise InputError(f"name is {name!r}, but there is no LoRA to make a subject of: give --lora")
    specs = _specs([] if lora is None else [lora] if isinstance(lora, LoraOption) else list(lora), "patched")
    base_specs = _specs(base_loras, "both")
    if merge and not specs:
        raise InputError("merge needs a LoRA to bake in: give --lora, or leave --merge")
    shelf = Store(Path(store) if store else None)
    files = BaseFiles.open(base, patch, head, patch_biases, vae=vae, tokenizer=tokenizer)
    if patch_biases and files.patch is None:
        raise InputError("patch_biases is given, but this base has no patch: give --patch, or leave it")
    _check_outside(
        Path(out),
        [
            files.folder,
            files.patch,
            files.head_file,
            files.vae,
            files.tokenizer,
            *(spec.file for spec in (*specs, *base_specs)),
        ],
    )
    given = [(read_lora(spec.file, files.configs["unet"]), spec) for spec in specs]
    merged = [(read_lora(spec.file, files.configs["unet"]), spec) for spec in base_specs]
    defaults = _suiting(defaults or Defaults(), [spec for _, spec in merged], tell)
    subject = _subject(given, name) if given else None
    baked = [*merged, *given] if merge else merged
    parts = Parts(
        shelf,
        Path(out).resolve(),
        files,
        slot_rank=slot_rank,
        engine=engine,
        defaults=defaults.to_dict(),
        loras=[(BaseLora(lora, spec.scale, spec.target), sha256_of(lora.source_path)) for lora, spec in baked],
        verify=verify,
        update=update,
        tell=tell,
    )
    kept: list[tuple[Subject, str]] = []
    if subject is not None and not merge:
        parts.check_fit(subject)
        kept = [(replace(subject, base_key=parts.base_key), ", ".join(str(spec.file) for spec in specs))]
    folders = parts.made()
    facts = {
        "name": files.folder.name,
        "native_side": files.native_side,
        "slot_rank": slot_rank,
        "files": files.content_hashes(),
        "head": files.head_padding if files.has_head else None,
        "loras": [_described(spec, "both") for _, spec in baked],
        "merged": subject.name if merge and subject else None,
        "defaults": defaults.to_dict(),
    }
    if self_contained:
        size = sum(folder_bytes(folder) for folder in folders.values())
        check_room(Estimate(0, size), Path(out).resolve().parent)
    passport = write_engine(
        Path(out),
        parts=folders,
        keys=parts.keys,
        files=parts.files(),
        subjects=kept,
        self_contained=self_contained,
        created_by=f"dreammix-trt {__version__}",
        base_key=parts.base_key,
        base=facts,
        backend=engine.backend,
        backend_version=engine.version,
        targets=list(engine.gpus),
        precision=engine.precision,
        command=_command(
            lora=[_described(spec, "patched") for spec in specs],
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
            base_lora=[_described(spec, "both") for _, spec in merged],
            self_contained=self_contained,
            store=store,
            verify=verify or None,
            no_verify=verify is False,
            **engine.words(),
            **{
                "sampler": defaults.sampler,
                "steps": defaults.num_inference_steps,
                "guidance_scale": defaults.guidance_scale,
            },
        ),
    )
    shelf.register(Path(out).resolve(), () if self_contained else set(parts.keys.values()))
    return passport


def _check_outside(out: Path, sources: Sequence[Path | None]) -> None:
    """Raise InputError for a source inside the directory that is about to be replaced."""
    place = out.resolve()
    for source in sources:
        if source is not None and source.resolve().is_relative_to(place):
            raise InputError(f"{source} lies in {out}, which this build replaces; move it, or choose another --out")


def _specs(given: Sequence[LoraOption], target: Any) -> list[LoraSpec]:
    return [each if isinstance(each, LoraSpec) else parse_lora(str(each), target) for each in given]


def _described(spec: LoraSpec, usual: str) -> str:
    """The option that means this LoRA; usual: the target where none is given."""
    target = f":{spec.target}" if spec.target != usual else ""
    plain = f"{spec.scale:g}" if float(f"{spec.scale:g}") == spec.scale else repr(spec.scale)
    scale = f":{plain}" if spec.scale != 1 or target or ":" in spec.file.name else ""
    return f"{spec.file}{scale}{target}"


def _subject(loras: Sequence[tuple[Lora, LoraSpec]], name: str | None) -> Subject:
    first, spec = loras[0]
    chosen = name or _file_name(spec.file)
    if not re.fullmatch(r"[\w.-]+", chosen) or chosen.startswith("."):
        raise InputError(
            f"--name {chosen!r}: a subject's name has letters, digits, '_', '-' and '.' only, as it names a file"
        )
    hashes = [sha256_of(lora.source_path, verify=True) for lora, _ in loras]
    return subject_from_loras(
        [(lora, each.scale, each.target) for lora, each in loras],
        chosen,
        first.metadata.get("token", "sks"),
        first.metadata.get("class_name", ""),
        source_sha256=hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest(),
    )


def _file_name(path: Path) -> str:
    """A subject's name from its LoRA's place: the folder that says most."""
    parts = [part for part in (path.absolute().parts if path.is_dir() else path.absolute().with_suffix("").parts)]
    dull = {"lora", "out", "output", "pytorch_lora_weights"}
    told = [part for part in reversed(parts) if part.lower() not in dull and not part.startswith("checkpoint-")]
    return re.sub(r"[^\w.-]+", "-", told[0]).strip("-.") or "subject" if told else "subject"


def _suiting(given: Defaults, loras: Sequence[LoraSpec], tell: Callable[[str], None]) -> Defaults:
    """The defaults, filled in from the name of a few-step LoRA: nothing else in such a file tells its kind."""
    Request.of(prompt="any", **given.to_dict())  # refuses what no request could have
    for spec in loras:
        text = spec.file.name.lower()
        steps = re.search(r"(\d+)[-_ ]?step", text)
        sampler = next((name for mark, name in _FEW_STEP if re.search(mark, text)), None)
        if sampler:
            found = Defaults(
                given.sampler or sampler,
                given.num_inference_steps or (int(steps[1]) if steps else 8),
                1.0 if given.guidance_scale is None else given.guidance_scale,
            )
            Request.of(prompt="any", **found.to_dict())
            tell(
                f"{spec.file.name}: a few-step LoRA by its name; requests use sampler {found.sampler}, "
                f"{found.num_inference_steps} steps and guidance {found.guidance_scale:g} unless they say otherwise "
                "(--sampler, --steps, --guidance-scale change that)"
            )
            return found
    return given


def _command(**options: Any) -> str:
    """The command line that makes this engine again."""
    words = ["dreammix-trt", "build"]
    for option, value in options.items():
        if value is None or value is False or value == [] or (option, value) == ("slot_rank", 8):
            continue
        for each in value if isinstance(value, list | tuple) else [value]:
            words.append(f"--{option.replace('_', '-')}")
            if each is not True:
                words.append(str(each))
    return shlex.join(words)


__all__ = ["Defaults", "EngineOptions", "build"]
