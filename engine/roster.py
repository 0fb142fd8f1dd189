"""The subjects that a DreamMix can draw, by name: added, enrolled, and chosen for a request."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dreammix_trt.core.attributes import AttributeDictionary
from dreammix_trt.core.errors import EngineError, FileFormatError, InputError
from dreammix_trt.core.files import join_digests
from dreammix_trt.core.passport import FILE_NAME
from dreammix_trt.core.remarks import remark
from dreammix_trt.core.request import Request
from dreammix_trt.core.sources import Source
from dreammix_trt.core.subject import Role, Subject, check_name, name_after_class, open_subject
from dreammix_trt.core.token_factors import check_tokens
from dreammix_trt.core.token_rows import Tokens
from dreammix_trt.engine.enrolment import Segment, read_references
from dreammix_trt.engine.runtime import Runtime
from dreammix_trt.engine.text import Tokenizer, has_word

_NONE = Subject("", "sks", "")


@dataclass(frozen=True)
class Cast:
    """What a request draws.

    subject: under the name that requests use; with an empty name for none.
    role: whose factors are merged, and how strongly.
    tokens: rows that stand beside the text; None: none do.
    token_subject: whose they are, "" for nobody's.
    """

    subject: Subject
    role: Role
    tokens: Tokens | None = None
    token_subject: str = ""


class Roster:
    """The subjects that a runtime knows. The first is the default."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._subjects: dict[str, Subject] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which they were added."""
        return tuple(self._subjects)

    @property
    def subjects(self) -> list[Subject]:
        """The subjects, each under the name that requests use."""
        return [replace(subject, name=name) for name, subject in self._subjects.items()]

    def add(self, subject: Subject, name: str = "") -> str:
        """Make a subject known.

        name: what requests call it; empty: the subject's own name.

        Remarks on one that no step can draw.

        Returns that name. Raises InputError where a subject of the other kind has the name, FileFormatError for one
        that does not fit the base or its token adapter.
        """
        name = name or subject.name
        self._check_free(name, "tokens" if subject.kind == "tokens" else "lora")
        if subject.tokens is not None:
            check_tokens(subject.tokens, self._runtime.adapter)
        self._runtime.add_subject(name, subject)
        self._subjects[name] = subject
        self._note_unused(name, subject)
        return name

    def enroll(
        self,
        image: Source | Sequence[Source],
        mask: Source | Sequence[Source | None] | None,
        name: str | None,
        class_name: str,
        segment: Segment | None,
        tokenizers: Sequence[Tokenizer],
    ) -> Subject:
        """Make a subject of photographs, and add it; see `DreamMix.enroll`. Nothing is added where it fails."""
        adapter = self._runtime.adapter
        if adapter is None:
            raise EngineError(
                "this engine's base has no token adapter, which makes subjects of photographs: build it again with "
                "`dreammix-trt build --tokens ADAPTER` (dreammix-trt train-tokens makes one)"
            )
        if not class_name.strip():
            raise InputError("class_name is empty: say what the subject is, as in 'mug' (--class-name)")
        called = check_name(name_after_class(class_name) if name is None else name)
        self._check_free(called, "tokens")
        references = read_references(image, mask, segment, adapter.config)
        rows = self._runtime.make_rows(references, class_name, tokenizers)
        source = join_digests([each.digest for each in references])
        # as the file has them, so that it paints the same
        tokens = Tokens(rows.astype(np.float16).astype(np.float32), adapter.sha256)
        subject = Subject(called, "", class_name, source_sha256=source, tokens=tokens)
        self.add(subject)
        return subject

    def add_from(
        self,
        path: str | os.PathLike[str],
        name: str | None = None,
        token: str | None = None,
        attributes: str | os.PathLike[str] | None = None,
    ) -> str:
        """Add the subjects of a file, of a LoRA's folder, or of an engine directory.

        name: what requests call it, for a single subject; None: each keeps its own.
        token: its word in prompts; None: as the file says.
        attributes: the file of its attributes; None: as the file says.

        Returns the first one's name. Raises EngineError for an engine without subjects, InputError for one name, word
        or file of attributes for several, FileFormatError for what is no subject or does not fit.
        """
        source = Path(path)
        files = _list_files(source)
        given = {"name": name, "token": token, "attributes": None if attributes is None else os.fspath(attributes)}
        first = next((f"{field} is {value!r}" for field, value in given.items() if value is not None), None)
        if first is not None and len(files) > 1:
            raise InputError(f"{first}, but {source} holds {len(files)} subjects; name one of their files")
        seen = None if attributes is None else AttributeDictionary.read(Path(attributes))
        opened = [open_subject(file, self._runtime.facts.unet, token=token or "", attributes=seen) for file in files]
        names = []
        for file, subject in zip(files, opened, strict=True):
            try:
                names.append(self.add(subject, name or ""))
            except FileFormatError as error:
                raise FileFormatError(f"{file}: {error}") from error
        return names[0]

    def remove(self, name: str) -> None:
        """Forget a subject. Raises InputError for a name that is not loaded."""
        self._check_known("name", name)
        self._runtime.remove_subject(name)
        del self._subjects[name]

    def choose(self, request: Request) -> Cast:
        """What the request draws.

        Remarks on a prompt that speaks of another subject, where the request leaves the choice open, and on tokens that
        are fewer than asked for.

        Raises InputError for a subject that is not loaded, for a strength of none, and for tokens of none.
        """
        name = request.subject if request.subject is not None else next(iter(self._subjects), "")
        if name != "":
            self._check_known("subject", name)
        subject = self._subjects[name] if name else _NONE
        if request.subject_scale != 1 and subject.kind == "tokens":
            raise InputError(
                f"subject_scale is {request.subject_scale:g}, but subject {name!r} is of tokens and has no LoRA: set "
                "token_weight or token_count, or leave subject_scale at 1"
            )
        if request.subject_scale != 1 and not subject.has_factors:
            why = f"subject {name!r} is baked into the weights" if name else "no subject is drawn"
            raise InputError(
                f"subject_scale is {request.subject_scale:g}, but {why}, so there is no strength to set: "
                f"{'build it without --merge' if name else 'give a subject'}, or leave subject_scale at 1"
            )
        if request.subject is None:
            self._note_others(request.prompt, name, subject)
        tokens, owner = self._choose_tokens(request, name, subject)
        role = Role("" if subject.kind == "tokens" else name, request.subject_scale, tokens is not None)
        return Cast(replace(subject, name=name, token=subject.token or _NONE.token), role, tokens, owner)

    def _choose_tokens(self, request: Request, name: str, subject: Subject) -> tuple[Tokens | None, str]:
        """The tokens of a request and whose they are.

        name, subject: that it draws.
        """
        asked = request.token_subject
        owner = name if asked is None else asked
        if asked:
            self._check_known("token_subject", asked)
            if self._subjects[asked].tokens is None:
                raise InputError(
                    f"token_subject is {owner!r}, which is of a LoRA and has no tokens: name it as subject, or one "
                    "that was enrolled from a photograph"
                )
            if subject.kind == "tokens" and asked != name:
                raise InputError(
                    f"subject {name!r} and token_subject {owner!r} are both of tokens, and a request has those of one: "
                    "leave one of them"
                )
        tokens = self._subjects[owner].tokens if owner else None
        if tokens is None or request.token_weight == 0:
            return None, ""
        if len(tokens.rows) < request.token_count:
            remark(f"token_count is {request.token_count}, and subject {owner!r} has {len(tokens.rows)}: all are used")
        return tokens, owner

    def _note_unused(self, name: str, subject: Subject) -> None:
        has_raw = self._runtime.has_raw_unet or self._runtime.lost_raw_unet
        if "unet_raw" in subject.factors and "unet" not in subject.factors and not has_raw:
            remark(
                f"subject {name!r}: its LoRA's target is 'raw', the UNet without the inpaint patch, which this base "
                "does not have, so no step draws it: give the LoRA the target 'patched'"
            )

    def _note_others(self, prompt: str, name: str, subject: Subject) -> None:
        for other, each in self._subjects.items():
            word, own = each.token, subject.token
            if word == own:  # then the class tells them apart
                word, own = each.class_name, subject.class_name
            wordless = subject.kind == "tokens"
            named = bool(own) and has_word(prompt, own)
            if word and (own or wordless) and word != own and has_word(prompt, word) and not named:
                remark(
                    f"prompt: it names {word!r}, which is subject {other!r}, and {name!r} is painted, the first one: "
                    f"choose with subject={other!r} (--subject {other})"
                )

    def _check_free(self, name: str, kind: str) -> None:
        """Refuse a name under which a subject of the other kind is loaded.

        kind: "tokens", or "lora" for what has factors.
        """
        known = self._subjects.get(name)
        if known is not None and (known.kind == "tokens") != (kind == "tokens"):
            own, other = ("tokens", "a LoRA") if kind == "tokens" else ("a LoRA", "tokens")
            raise InputError(
                f"name is {name!r}: a subject of {other} is loaded under it, and this one is of {own}, so requests "
                "could not tell them apart: give it another name, or remove the other (remove_subject)"
            )

    def _check_known(self, field: str, name: str) -> None:
        if name not in self._subjects:
            known = ", ".join(map(repr, self._subjects)) or "none"
            hint = "" if field == "name" else "; load it with add_subject, or give '' for none"
            raise InputError(f"{field} is {name!r}; loaded are: {known}{hint}")


def _list_files(source: Path) -> list[Path]:
    """The subjects' files of an engine directory; of anything else, itself. Raises EngineError where there is none."""
    if not (source / FILE_NAME).is_file() and not (source / "subjects").is_dir():
        return [source]
    files = sorted((source / "subjects").glob("*.safetensors"))
    if not files:
        raise EngineError(f"{source} holds no subject (subjects/*.safetensors); make one with `dreammix-trt build`")
    return files
