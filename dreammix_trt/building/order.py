"""What a build is asked for, and the command line that asks for the same."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dreammix_trt.building.defaults import Defaults
from dreammix_trt.building.engine_options import EngineOptions
from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.files import check_place
from dreammix_trt.core.lora import LoraSpec, parse_lora
from dreammix_trt.core.passport import FILE_NAME as PASSPORT
from dreammix_trt.core.subject import check_name

LoraOption = str | Path | LoraSpec
Words = str | Mapping[str, str] | None
Paths = str | Path | Mapping[str, str | Path] | None


@dataclass(frozen=True)
class BaseSources:
    """Where a base comes from; None: the embedded one, and what lies beside the base or in it."""

    base: str | Path | None = None
    patch: str | Path | None = None
    head: str | Path | None = None
    vae: str | Path | None = None
    tokenizer: str | Path | None = None
    patch_biases: bool = False
    asuka: str | Path | None = None
    tokens: str | Path | None = None

    def open(self) -> BaseFiles:
        """Raises FileFormatError for what is no base, InputError for biases of no patch."""
        files = BaseFiles.open(
            self.base,
            self.patch,
            self.head,
            self.patch_biases,
            vae=self.vae,
            tokenizer=self.tokenizer,
            asuka=self.asuka,
            tokens=self.tokens,
        )
        if self.patch_biases and files.patch is None:
            raise InputError("patch_biases is given, but this base has no patch: give --patch, or leave it")
        return files


@dataclass(frozen=True)
class SubjectOrder:
    """One subject that is asked for.

    files: LoRAs that work together, or one subject file.
    name, token, class_name: empty: as the files say.
    attributes: the file of its attributes; None: as the files say.
    """

    files: tuple[LoraSpec, ...]
    name: str = ""
    token: str = ""
    class_name: str = ""
    attributes: Path | None = None


@dataclass(frozen=True)
class BuildOrder:
    """All that `build` is asked for, as it was said; see there."""

    out: str | Path
    base: BaseSources = field(default_factory=BaseSources)
    lora: LoraOption | Sequence[LoraOption] | None = None
    base_loras: Sequence[LoraOption] = ()
    subjects: Mapping[str, LoraOption] = field(default_factory=dict)
    name: str | None = None
    token: Words = None
    class_name: Words = None
    attributes: Paths = None
    merge: bool = False
    slots: bool = True
    defaults: Defaults = field(default_factory=Defaults)
    engine: EngineOptions = field(default_factory=EngineOptions)
    verify: bool | None = None
    store: str | Path | None = None
    self_contained: bool = False
    keep: bool = False

    @property
    def place(self) -> Path:
        """The engine directory to be."""
        return Path(self.out).resolve()

    @cached_property
    def subject_orders(self) -> list[SubjectOrder]:
        """The subjects: first that of `lora`, then the named ones. Raises InputError for what is none."""
        given = [] if self.lora is None else [self.lora] if isinstance(self.lora, LoraOption) else self.lora
        together = _parse_loras(given, "patched")
        asked = [(self.name or "", together)] if together else []
        asked += [(check_name(name), _parse_loras([each], "patched")) for name, each in self.subjects.items()]
        names = [name for name, _ in asked]
        tokens, classes = (_give_words(field, getattr(self, field), names) for field in ("token", "class_name"))
        files_of = _give_words("attributes", _as_texts(self.attributes), names)
        return [
            SubjectOrder(
                tuple(files), name, tokens[name], classes[name], Path(files_of[name]) if files_of[name] else None
            )
            for name, files in asked
        ]

    @property
    def subject_specs(self) -> list[LoraSpec]:
        """The files of all subjects."""
        return [spec for each in self.subject_orders for spec in each.files]

    @cached_property
    def base_specs(self) -> list[LoraSpec]:
        """The base's LoRAs. Raises InputError for what is none."""
        return _parse_loras(self.base_loras, "both")

    def check(self) -> None:
        """Raise InputError for what cannot be built, before anything is read."""
        check_place(self.out, PASSPORT)
        self.engine.check()
        for field_name in ("name", "token", "class_name", "attributes"):
            value = getattr(self, field_name)
            value = str(value) if isinstance(value, Path) else value
            if value and (self.lora is None if field_name == "name" else not self.lora and not self.subjects):
                raise InputError(f"{field_name} is {value!r}, but there is no LoRA to make a subject of: give --lora")
        orders, _ = self.subject_orders, self.base_specs  # refuses what is none
        if self.merge and not orders:
            raise InputError("merge needs a LoRA to bake in: give --lora, or leave --merge")
        if self.merge and len(orders) > 1:
            raise InputError(
                f"merge bakes one subject into the weights, but {len(orders)} are given; build an engine for each"
            )

    def check_outside(self, files: BaseFiles) -> None:
        """Raise InputError for a source inside the directory that is about to be replaced."""
        given = [spec.file for spec in (*self.subject_specs, *self.base_specs)]
        given += [each.attributes for each in self.subject_orders if each.attributes]
        given += [files.asuka.folder] if files.asuka else []
        given += [files.tokens.file] if files.tokens else []
        for source in (files.folder, files.patch, files.head_file, files.vae, files.tokenizer, *given):
            if source is not None and source.resolve().is_relative_to(self.place):
                raise InputError(
                    f"{source} lies in {Path(self.out)}, which this build replaces; move it, or choose another --out"
                )

    def command(self, defaults: Mapping[str, Any] | None = None) -> str:
        """The command line that makes this engine again.

        defaults: of requests, as they were filled in; None: as they were given.
        """
        defaults = self.defaults.to_dict() if defaults is None else defaults
        named = [each for each in self.subject_orders if each.name in self.subjects]
        options = {
            "lora": [
                describe_lora(spec, "patched")
                for each in self.subject_orders
                for spec in each.files
                if each not in named
            ],
            "subject": [f"{each.name}={describe_lora(each.files[0], 'patched')}" for each in named],
            "out": self.out,
            "base": self.base.base,
            "patch": self.base.patch,
            "head": self.base.head,
            "vae": self.base.vae,
            "tokenizer": self.base.tokenizer,
            "asuka": self.base.asuka,
            "tokens": self.base.tokens,
            "name": self.name,
            "token": _list_given(self.token),
            "class_name": _list_given(self.class_name),
            "attributes": _list_given(_as_texts(self.attributes)),
            "merge": self.merge,
            "no_slots": not self.slots,
            "patch_biases": self.base.patch_biases,
            "base_lora": [describe_lora(spec, "both") for spec in self.base_specs],
            "self_contained": self.self_contained,
            "store": self.store,
            "verify": self.verify,
            "no_verify": self.verify is False,
            **self.engine.words(),
            "sampler": defaults.get("sampler"),
            "steps": defaults.get("num_inference_steps"),
            "guidance_scale": defaults.get("guidance_scale"),
        }
        words = (word for option, value in options.items() for word in _list_words(option, value))
        return shlex.join(("dreammix-trt", "build", *words))


def describe_lora(spec: LoraSpec, usual: str) -> str:
    """The option that means this LoRA; usual: the target where none is given."""
    target = f":{spec.target}" if spec.target != usual else ""
    plain = f"{spec.scale:g}" if float(f"{spec.scale:g}") == spec.scale else repr(spec.scale)
    scale = f":{plain}" if spec.scale != 1 or target or ":" in spec.file.name else ""
    return f"{spec.file}{scale}{target}"


def _parse_loras(given: Sequence[LoraOption], target: Any) -> list[LoraSpec]:
    return [each if isinstance(each, LoraSpec) else parse_lora(str(each), target) for each in given]


def _as_texts(given: Paths) -> Words:
    if isinstance(given, Mapping):
        return {name: str(path) for name, path in given.items()}
    return None if given is None else str(given)


def _give_words(option: str, given: Words, names: Sequence[str]) -> dict[str, str]:
    """The word of each subject; "" where none is given. Raises InputError for a word of no subject, or of which one."""
    if isinstance(given, str):
        if len(names) != 1:
            raise InputError(f"{option} is {given!r}, but there are {len(names)} subjects; say of which: NAME={given}")
        given = {name: given for name in names}
    words = {name: word.strip() for name, word in (given or {}).items()}
    unknown = sorted(words.keys() - set(names))
    if unknown:
        known = ", ".join(filter(None, names)) or "unnamed"
        raise InputError(f"{option} is given for {', '.join(unknown)}; the subjects are: {known}")
    for name, word in words.items():
        if not word or (option == "token" and len(word.split()) > 1):
            what = {"token": "be one word", "attributes": "name a file"}.get(option, "say what the subject is")
            raise InputError(f"{option} is {word!r}{f' for {name}' if name else ''}; it must {what}")
    return {name: words.get(name, "") for name in names}


def _list_given(given: Words) -> list[str]:
    """What the options of the command line say of words."""
    return [given] if isinstance(given, str) else [f"{name}={word}" for name, word in (given or {}).items()]


def _list_words(option: str, value: Any) -> Iterator[str]:
    """An option of the command line once for each of its values; None, False: not at all."""
    for each in value if isinstance(value, list | tuple) else [value]:
        if each is None or each is False:
            continue
        yield f"--{option.replace('_', '-')}"
        if each is not True:
            yield str(each)
