"""A subject as data: what one object adds to a base, and the file that keeps it.

A subject has parts, each of which may be absent: LoRA factors, named and unpadded, so that the file does not depend on
an engine (merging.py merges them into weights), and tokens, rows that stand beside the text (token_rows.py). Several
LoRAs become one subject by stacking their factors along the rank, as x A1 B1 + x A2 B2 = x [A1 A2] [B1; B2].
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dreammix_trt.core.attributes import AttributeDictionary
from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.core.factor_names import decode_factors, encode_factors
from dreammix_trt.core.files import atomic_file, join_digests, sha256_of
from dreammix_trt.core.lora import TARGETS, Factors, Lora, LoraSpec, Target, read_lora
from dreammix_trt.core.lora_words import find_words, read_attributes, read_caption_words
from dreammix_trt.core.networks import KINDS, kind_of, names_of_factors, unets_of
from dreammix_trt.core.slots import Floats
from dreammix_trt.core.tensors import open_tensors
from dreammix_trt.core.token_rows import PART as _TOKENS
from dreammix_trt.core.token_rows import Tokens, decode_tokens, encode_tokens

Pairs = Mapping[str, tuple[Floats, Floats]]  # module -> (A float32 (in, r), B float32 (r, out))
Kind = Literal["lora", "tokens", "lora+tokens"]
SCHEMA = 3  # 2 has no parts: all of it is factors; 1 names the UNets that they act on by a target
_FACTORS = "factors"  # the part of a file that holds them
_FACTS = ("name", "token", "class_name", "scale", "base_key", "source_sha256", "caption_words", "attributes")
_MARK = "dreammix_subject"  # the metadata of a subject file
_DULL = {"lora", "loras", "out", "output", "pytorch_lora_weights", "adapter_model"}  # names that say nothing
TOKEN = "sks"  # where nobody says the word


@dataclass(frozen=True)
class Subject:
    """One object the engine can draw.

    name: how a request calls it.
    token: its word in prompts ("sks"); "": none, as for tokens alone, which stand beside any text.
    class_name: what it is ("mug").
    factors: engine network ("unet" with the patch, "unet_raw" without, "text_encoder", "text_encoder_2") -> module ->
        (A float32 (in, r), B float32 (r, out)), alpha / rank folded in. None: the networks stay the base's.
    scale: strength of the factors, multiplied in by `merging.list_changes`.
    base_key: the base it was made for.
    source_sha256: of the LoRA file; of tokens alone, of the photographs and masks.
    caption_words: of the captions that it was trained with, lower case; (): nobody knows.
    attributes: what is seen of it, kind -> values (`AttributeDictionary`); {}: nobody knows.
    tokens: rows beside the text; None: it has none.
    """

    name: str
    token: str
    class_name: str
    factors: Factors = field(default_factory=dict, repr=False)
    scale: float = 1.0
    base_key: str = ""
    source_sha256: str = ""
    caption_words: tuple[str, ...] = field(default=(), repr=False)
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    tokens: Tokens | None = field(default=None, repr=False)

    @property
    def has_factors(self) -> bool:
        """Whether there is anything to merge."""
        return any(self.factors.values())

    @property
    def kind(self) -> Kind:
        """Which parts it has, to show. Where factors are merged into an engine's weights it is a "lora", too."""
        if self.tokens is None:
            return "lora"
        return "lora+tokens" if self.has_factors else "tokens"

    def factors_for(self, network: str) -> dict[str, tuple[Floats, Floats]]:
        """The factors of a network and those it shares with others; `merging.list_changes` takes its own."""
        return self.factors.get(kind_of(network).factors_of or network, {})

    @property
    def target(self) -> Target:
        """Which UNet weights its factors change, to show: "patched", "raw" or "both"."""
        patched, raw = (bool(self.factors.get(name)) for name in unets_of("both"))
        return ("both" if patched else "raw") if raw else "patched"


class Role(NamedTuple):
    """A loaded subject at a strength: what is merged and kept as one.

    name: of the subject whose factors are merged, "" for none.
    scale: beside the subject's own.
    adapted: whether the token adapter's factors are merged as well. Which tokens are read makes no difference.
    """

    name: str
    scale: float = 1.0
    adapted: bool = False


NOBODY = Role("")  # whose weights are the base's own


def subject_from_loras(
    loras: Sequence[tuple[Lora, float, Target]], name: str, token: str = "sks", class_name: str = "", **more: Any
) -> Subject:
    """Make a subject of several LoRAs. Text encoders get all of them.

    On a module that several LoRAs change, A = [A1 A2 ...] and B = [s1 B1; s2 B2; ...]: ranks add up.

    loras: (LoRA, scale, UNet weights it acts on) each.
    more: the remaining fields of `Subject`.
    """
    factors: Factors = {}
    for part in dict.fromkeys(kind.factors for kind in KINDS if kind.factors):
        for network in names_of_factors(part):
            chosen = [each for each in loras if part != "unet" or network in unets_of(each[2])]
            factors[network] = stack_pairs((lora.factors.get(part, {}), scale) for lora, scale, _ in chosen)
    told = {
        "caption_words": tuple(sorted({word for lora, _, _ in loras for word in read_caption_words(lora.metadata)})),
        "attributes": next(
            filter(None, (read_attributes(each.source_path, each.metadata) for each, _, _ in loras)), {}
        ),
    }
    found = {network: pairs for network, pairs in factors.items() if pairs}
    return Subject(name, token, class_name, found, **{**told, **more})


def open_subject(
    source: str | Path | LoraSpec,
    unet_config: Mapping[str, Any] | None = None,
    *,
    name: str = "",
    token: str = "",
    class_name: str = "",
    attributes: AttributeDictionary | None = None,
) -> Subject:
    """The subject in a file: a subject file's, or one made of a LoRA in any dialect that `read_lora` reads.

    source: the file, an engine directory with one subject, or a LoRA's folder; a `LoraSpec` has its scale and target,
        too.
    unet_config: the base's diffusers `unet/config.json`, as for `read_lora`.
    name: how requests call it; empty: the subject file's, else the class, else the file's name.
    token, class_name: empty: as the file says, else "sks" and no class.
    attributes: what is seen of it; None: as the file says.

    Raises `FileFormatError` for a file that is neither and for a subject without factors, `InputError` for a name that
    cannot be one, and for a target of a subject file, which has its own.
    """
    spec = source if isinstance(source, LoraSpec) else LoraSpec(Path(source))
    file = find_subject_file(spec.file)
    if file is None:
        return make_subject([(read_lora(spec.file, unet_config), spec)], spec.file, name, token, class_name, attributes)
    subject = read_subject(file)
    if not subject.factors and subject.tokens is None:
        raise FileFormatError(
            f"{file}: subject {subject.name} is merged into the weights of its engine, and has no factors of its own; "
            "load that engine, or give its LoRA"
        )
    if spec.target != LoraSpec.target:
        raise InputError(f"{file} is a subject file, which has its own target; leave {spec.target!r}")
    return replace(
        subject,
        name=check_name(name or subject.name),
        token=token or subject.token,
        class_name=class_name or subject.class_name or (attributes.class_name if attributes else ""),
        scale=subject.scale * spec.scale,
        attributes=dict(attributes.attributes) if attributes else subject.attributes,
    )


def find_subject_file(path: str | Path) -> Path | None:
    """The subject file that a path means: itself, or the only one of an engine directory; None for a LoRA.

    Reads its header only. Raises `FileFormatError` for an engine directory with several subjects.
    """
    path = Path(path)
    held = sorted((path / "subjects").glob("*.safetensors")) if path.is_dir() else []
    if len(held) > 1:
        raise FileFormatError(f"{path} holds {len(held)} subjects; name the file of one: {', '.join(map(str, held))}")
    file = held[0] if held else path
    return file if file.is_file() and _MARK in open_tensors(file).metadata else None


def make_subject(
    loras: Sequence[tuple[Lora, LoraSpec]],
    place: str | Path,
    name: str = "",
    token: str = "",
    class_name: str = "",
    attributes: AttributeDictionary | None = None,
) -> Subject:
    """Make a subject of LoRAs that work together, called as it is asked for or as their files say.

    place: gives the name where neither `name` nor a class does.
    attributes: what is seen of it; None: as their files say. It says the class where nothing else does.

    Raises `InputError` for a name that cannot be one.
    """
    words = [find_words(lora.source_path, lora.metadata) for lora, _ in loras]
    token = token or next((each.token for each in words if each.token), TOKEN)
    class_name = class_name or next((each.class_name for each in words if each.class_name), "")
    class_name = class_name or (attributes.class_name if attributes else "")
    hashes = [sha256_of(lora.source_path, verify=True) for lora, _ in loras]
    return subject_from_loras(
        [(lora, spec.scale, spec.target) for lora, spec in loras],
        check_name(name or _slug(class_name) or _name_after(Path(place))),
        token,
        class_name,
        source_sha256=join_digests(hashes),
        **({"attributes": dict(attributes.attributes)} if attributes else {}),
    )


def name_after_class(class_name: str) -> str:
    """What a subject is called where only its class is known: "alarm-clock"."""
    return _slug(class_name)


def check_name(name: str) -> str:
    """Return a subject's name. Raises InputError when it cannot name a file."""
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise InputError(
            f"the name {name!r} cannot be: it has letters, digits, '_', '-' and '.' only, as it names a file (--name)"
        )
    return name


def _name_after(place: Path) -> str:
    """The part of a path, as it was given, that says most; what the working directory is called says nothing."""
    parts = [_slug(re.sub(r"\.(safetensors|bin|pth?|ckpt)$", "", part)) for part in place.parts]
    told = [part for part in parts if part and part.lower() not in _DULL and not part.startswith("checkpoint-")]
    return told[-1] if told else "subject"


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")


def write_subject(path: str | Path, subject: Subject) -> None:
    """Write the subject as safetensors, float16, whole or not at all.

    Factors are named `factors.` and as `core/factor_names.py` says; tokens are as `core/token_rows.py` says.

    Raises FileFormatError for factors and tokens that are too large all the same.
    """
    from safetensors.numpy import save_file

    path = Path(path)
    tensors = {f"{_FACTORS}.{name}": factor for name, factor in encode_factors(subject.factors).items()}
    facts = {name: getattr(subject, name) for name in _FACTS} | {"parts": [_FACTORS] if tensors else []}
    if subject.tokens is not None:
        rows, told = encode_tokens(subject.tokens)
        tensors, facts = tensors | rows, facts | told | {"parts": [*facts["parts"], _TOKENS]}
    with atomic_file(path) as part:
        save_file(tensors, part, {_MARK: json.dumps({"schema": SCHEMA, **facts}, sort_keys=True)})


def read_subject(path: str | Path) -> Subject:
    """Read what `write_subject` wrote, also with schema 1 and 2.

    Raises FileFormatError for anything else, for a newer schema, and for parts that this version does not know.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(_MARK, "null")
            tensors = {name: file.get_tensor(name).astype(np.float32) for name in list(file.keys())}
        facts = json.loads(text)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise FileFormatError(f"{path}: missing, truncated, or not a subject file ({error})") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("schema"), int):
        raise FileFormatError(f"{path}: not a subject file; make one of a LoRA with `dreammix-trt build --lora FILE`")
    if facts["schema"] > SCHEMA:
        raise FileFormatError(
            f"{path}: subject schema {facts['schema']}, this version reads {SCHEMA}; update dreammix-trt"
        )
    if not all(isinstance(facts.get(name), str) for name in ("name", "token", "class_name")) or not facts["name"]:
        raise FileFormatError(f"{path}: damaged, it says no name, token and class; build the subject again")
    words = facts.get("caption_words", [])
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise FileFormatError(f"{path}: damaged, its caption_words are {words!r}; build the subject again")
    try:
        seen = AttributeDictionary.of(facts["class_name"] or "thing", facts.get("attributes", {}), "", str(path))
    except InputError as error:
        raise FileFormatError(f"{error}; it is damaged, build the subject again") from error
    told = {name: facts[name] for name in _FACTS if name in facts}
    told |= {"caption_words": tuple(words), "attributes": dict(seen.attributes)}
    return Subject(**_read_parts(path, facts, tensors), **told)


def _read_parts(path: Path, facts: Mapping[str, Any], tensors: dict[str, Floats]) -> dict[str, Any]:
    """The fields of a subject that are parts of its file."""
    if facts["schema"] > 2:
        parts = facts.get("parts", [])
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise FileFormatError(f"{path}: damaged, its list of parts is {parts!r}; build the subject again")
        unknown = sorted({*parts} - {_FACTORS, _TOKENS})
        if unknown:
            raise FileFormatError(
                f"{path}: has parts that this version does not know ({', '.join(unknown)}); update dreammix-trt"
            )
        rows = {name: values for name, values in tensors.items() if name.startswith(f"{_TOKENS}.")}
        named = {name.removeprefix(f"{_FACTORS}."): each for name, each in tensors.items() if name not in rows}
        tokens = {"tokens": decode_tokens(path, facts, rows)} if _TOKENS in parts else {}
        return {"factors": decode_factors(path, named), **tokens}
    if facts["schema"] > 1:
        return {"factors": decode_factors(path, tensors)}
    if facts.get("target") not in TARGETS:
        raise FileFormatError(f"{path}: unknown target {facts.get('target')!r}, expected one of {', '.join(TARGETS)}")
    return {"factors": decode_factors(path, tensors, facts["target"])}


def stack_pairs(parts: Iterable[tuple[Pairs, float]]) -> dict[str, tuple[Floats, Floats]]:
    """Factors that act together as one: module -> ([A1 A2 ...], [s1 B1; s2 B2; ...]).

    parts: (module -> (A, B), its strength s) each.
    """
    found: dict[str, list[tuple[Floats, Floats]]] = {}
    for pairs, scale in parts:
        for module, (a, b) in pairs.items():
            found.setdefault(module, []).append((a, b * np.float32(scale)))
    return {
        module: (np.concatenate([a for a, _ in pairs], axis=1), np.concatenate([b for _, b in pairs]))
        for module, pairs in found.items()
    }
