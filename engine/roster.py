"""The subjects that a DreamMix can draw, by name."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from dreammix_trt.core.errors import EngineError, InputError
from dreammix_trt.core.request import Request
from dreammix_trt.core.subject import Subject, read_subject
from dreammix_trt.engine.runtime import Runtime

_TOKEN = "sks"


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

        Returns that name.
        """
        name = name or subject.name
        self._runtime.add_subject(name, subject)
        self._subjects[name] = subject
        return name

    def add_from(self, path: str | os.PathLike[str], name: str | None = None) -> str:
        """Add the subjects of a subject file or of an engine directory.

        name: what requests call it, for a single subject; None: each keeps its own.

        Returns the first one's name. Raises EngineError for a directory without subjects, InputError for one name for
        several.
        """
        source = Path(path)
        files = sorted((source / "subjects").glob("*.safetensors")) if source.is_dir() else [source]
        if not files:
            raise EngineError(f"{source} holds no subject (subjects/*.safetensors); make one with `dreammix-trt build`")
        if name is not None and len(files) > 1:
            raise InputError(f"name is {name!r}, but {source} holds {len(files)} subjects; name one of their files")
        names = [self.add(subject, name or "") for subject in map(read_subject, files)]
        return names[0]

    def choose(self, request: Request) -> tuple[str, str]:
        """(name, word in prompts) of the request's subject; ("", "sks") when it asks for none."""
        name = request.subject if request.subject is not None else next(iter(self._subjects), "")
        if name == "":
            return "", _TOKEN
        if name not in self._subjects:
            known = ", ".join(map(repr, self._subjects)) or "none"
            raise InputError(f"subject is {name!r}; loaded are: {known}; load it with add_subject, or give '' for none")
        return name, self._subjects[name].token or _TOKEN
