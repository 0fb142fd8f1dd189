"""The protocol of an evaluation: subjects x scenes x prompts x seeds, in a folder that other engines can repeat.

    protocol.json      schema, name, seeds, request, subjects
    scenes/            NAME.png with NAME_mask.png, or image/NAME.png with mask/NAME.png: where to paint
    subjects/NAME/     photographs of the subject with masks, as the trainer takes them: the reference of identity

docs/evaluation.md describes the fields.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from dreammix_trt.trainer.photographs import PhotographFile

SCHEMA: Final = 1
FILE_NAME: Final = "protocol.json"
SCENES: Final = "scenes"
SUBJECTS: Final = "subjects"
Task = Literal["identity", "editing", "removal"]
TASKS: Final[tuple[Task, ...]] = get_args(Task)


@dataclass(frozen=True)
class Scene:
    """A picture and the region of it to paint (white in the mask), as files of equal size."""

    name: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class Prompt:
    """What a subject is asked for.

    name: unique for its subject; part of file names.
    task: "identity" (as it is), "editing", or "removal": nothing is to be seen there, and the scene is the truth.
    fields: of the request: the prompt, and whatever is particular to it, such as `substitute`.
    expected: what is to be seen: part -> word. Of an edit, what it changes.
    """

    name: str
    task: Task
    fields: Mapping[str, Any]
    expected: Mapping[str, str]

    @property
    def text(self) -> str:
        return str(self.fields["prompt"])


@dataclass(frozen=True)
class Subject:
    """A subject, and what it is asked for.

    engine_name: what the engine calls it; "": the base alone paints its prompts.
    token: its word in the prompts.
    photographs: with masks; () where only removal is asked for.
    expected: what the subject looks like: part -> word.
    scenes: where it is painted.
    """

    name: str
    engine_name: str
    class_name: str
    token: str
    photographs: tuple[PhotographFile, ...]
    expected: Mapping[str, str]
    prompts: tuple[Prompt, ...]
    scenes: tuple[Scene, ...]


class Order(NamedTuple):
    """One picture to paint."""

    subject: Subject
    scene: Scene
    prompt: Prompt
    seed: int

    @property
    def name(self) -> str:
        """Its place below the folder of pictures, without a suffix."""
        return f"{self.subject.name}/{self.scene.name}.{self.prompt.name}.{self.seed}"

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of its request beside those that all requests share."""
        return {**self.prompt.fields, "subject": self.subject.engine_name, "seed": self.seed}


@dataclass(frozen=True)
class Protocol:
    """A checked protocol. `read_protocol` makes it.

    fields: of every request.
    record: what it says, as JSON values, where that is not in protocol.json; {}: it is.
    """

    folder: Path
    name: str
    seeds: tuple[int, ...]
    fields: Mapping[str, Any]
    subjects: tuple[Subject, ...]
    record: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """How many pictures it asks for."""
        return sum(len(each.scenes) * len(each.prompts) for each in self.subjects) * len(self.seeds)

    def orders(self) -> Iterator[Order]:
        """Every picture: subject by subject, in each scene by scene."""
        for subject in self.subjects:
            for scene in subject.scenes:
                for prompt in subject.prompts:
                    for seed in self.seeds:
                        yield Order(subject, scene, prompt, seed)

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """The scenes that are used, each once."""
        return tuple(dict.fromkeys(scene for subject in self.subjects for scene in subject.scenes))

    def digest(self) -> str:
        """SHA-256 in hex of all that it says: protocol.json, or `record`, and the contents of every picture used."""
        from dreammix_trt.core.files import sha256_of

        files = {file for scene in self.scenes for file in (scene.image, scene.mask)}
        files |= {
            file for each in self.subjects for photo in each.photographs for file in (photo.image, photo.mask) if file
        }
        whole = hashlib.sha256()
        if self.record:
            whole.update(f"{json.dumps(self.record, sort_keys=True)}\n".encode())
        for file in (*([] if self.record else [self.folder / FILE_NAME]), *sorted(files)):
            whole.update(f"{file.relative_to(self.folder).as_posix()} {sha256_of(file)}\n".encode())
        return whole.hexdigest()
