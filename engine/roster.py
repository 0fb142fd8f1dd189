"""The subjects that a DreamMix can draw, by name."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from dreammix_trt.core.attributes import AttributeDictionary
from dreammix_trt.core.errors import EngineError, FileFormatError, InputError
from dreammix_trt.core.passport import FILE_NAME
from dreammix_trt.core.remarks import remark
from dreammix_trt.core.request import Request
from dreammix_trt.core.subject import Subject, open_subject
from dreammix_trt.engine.runtime import Runtime
from dreammix_trt.engine.text import has_word

_NONE = Subject("", "sks", "")


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

        Returns that name.
        """
        name = name or subject.name
        self._runtime.add_subject(name, subject)
        self._subjects[name] = subject
        self._note_unused(name, subject)
        return name

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

    def choose(self, request: Request) -> Subject:
        """The request's subject under the name that requests use; with an empty name when it asks for none.

        Remarks on a prompt that speaks of another subject, where the request leaves the choice open.

        Raises InputError for a subject that is not loaded, and for a strength of none.
        """
        name = request.subject if request.subject is not None else next(iter(self._subjects), "")
        if name != "":
            self._check_known("subject", name)
        subject = self._subjects[name] if name else _NONE
        if request.subject_scale != 1 and not any(subject.factors.values()):
            why = f"subject {name!r} is baked into the weights" if name else "no subject is drawn"
            raise InputError(
                f"subject_scale is {request.subject_scale:g}, but {why}, so there is no strength to set: "
                f"{'build it without --merge' if name else 'give a subject'}, or leave subject_scale at 1"
            )
        if request.subject is None:
            self._note_others(request.prompt, name, subject)
        return replace(subject, name=name, token=subject.token or _NONE.token)

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
            if word and own and word != own and has_word(prompt, word) and not has_word(prompt, own):
                remark(
                    f"prompt: it names {word!r}, which is subject {other!r}, and {name!r} is painted, the first one: "
                    f"choose with subject={other!r} (--subject {other})"
                )

    def _check_known(self, field: str, name: str) -> None:
        if name not in self._subjects:
            known = ", ".join(map(repr, self._subjects)) or "none"
            hint = "; load it with add_subject, or give '' for none" if field == "subject" else ""
            raise InputError(f"{field} is {name!r}; loaded are: {known}{hint}")


def _list_files(source: Path) -> list[Path]:
    """The subjects' files of an engine directory; of anything else, itself. Raises EngineError where there is none."""
    if not (source / FILE_NAME).is_file() and not (source / "subjects").is_dir():
        return [source]
    files = sorted((source / "subjects").glob("*.safetensors"))
    if not files:
        raise EngineError(f"{source} holds no subject (subjects/*.safetensors); make one with `dreammix-trt build`")
    return files
