"""What paints the pictures of a protocol: an engine, a folder of finished pictures, or anything of the same form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from typing import Protocol as Interface

from PIL import Image

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.request import Request
from dreammix_trt.evaluation.protocol import Protocol, Scene, Subject

if TYPE_CHECKING:
    from dreammix_trt.core.passport import Passport
    from dreammix_trt.engine.dreammix import DreamMix
    from dreammix_trt.engine.imprint import Imprint


@dataclass(frozen=True)
class Painting:
    """A finished picture.

    imprint: the request that makes it, and what painted it.
    seconds: that it took.
    warnings: what its user should know, one sentence each.
    """

    image: Image.Image
    imprint: Imprint
    seconds: float
    warnings: tuple[str, ...] = ()


class Painter(Interface):
    """Paints requests of subjects."""

    def request(self, fields: Mapping[str, Any]) -> Request:
        """The whole request of some fields, with the painter's own defaults."""
        ...

    def identify(self, subject: Subject) -> str:
        """What paints this subject, as text that changes with the weights."""
        ...

    @contextmanager
    def open(self, subject: Subject) -> Iterator[None]:
        """Make the subject paintable while the block lasts. Raises InputError where it is not known."""
        ...

    def check(self, scene: Scene, request: Request) -> tuple[str, ...]:
        """Refuse what cannot be painted, without painting; returns what the user should know of it."""
        ...

    def paint(self, scene: Scene, request: Request) -> Painting: ...


class EnginePainter:
    """Paints with a loaded engine. Subjects that it lacks come from a folder of LoRAs, one at a time."""

    def __init__(self, dm: DreamMix, passport: Passport, loras: Path | None = None) -> None:
        """loras: holds NAME.safetensors or a folder NAME for each subject that the engine lacks."""
        self._dm, self._loras = dm, loras
        built = json.dumps([passport.backend, passport.precision, passport.base_key, sorted(passport.parts.items())])
        self._engine = hashlib.sha256(built.encode()).hexdigest()
        self._hashes = {entry.name: entry.sha256 for entry in passport.subjects}

    def request(self, fields: Mapping[str, Any]) -> Request:
        return self._dm.request(**fields)

    def identify(self, subject: Subject) -> str:
        from dreammix_trt.core.files import sha256_of

        name = subject.engine_name
        if not name or name in self._hashes:
            return f"{self._engine} {self._hashes.get(name, '')}"
        lora = self._find_lora(subject)
        files = [lora] if lora.is_file() else sorted(lora.glob("**/*.safetensors"))
        return " ".join([self._engine, *(sha256_of(file) for file in files)])

    @contextmanager
    def open(self, subject: Subject) -> Iterator[None]:
        name = subject.engine_name
        if not name or name in self._dm.subjects:
            yield
            return
        self._dm.add_subject(self._find_lora(subject), name, token=subject.token)
        try:
            yield
        finally:
            self._dm.remove_subject(name)

    def check(self, scene: Scene, request: Request) -> tuple[str, ...]:
        from dreammix_trt.core.remarks import keep_remarks

        with keep_remarks(tell=False) as said:
            self._dm.iterate(scene.image, scene.mask, request)  # it is laid out, and no step is taken
        return tuple(said)

    def paint(self, scene: Scene, request: Request) -> Painting:
        from dreammix_trt.core.remarks import keep_remarks

        with keep_remarks(tell=False):  # they are in the result
            result = self._dm.inpaint(scene.image, scene.mask, request)
        image, imprint = result.pick(0)
        return Painting(image, imprint, sum(result.timings.values()), result.warnings)

    def _find_lora(self, subject: Subject) -> Path:
        name = subject.engine_name
        if self._loras is not None:
            for place in (self._loras / f"{name}.safetensors", self._loras / name):
                if place.exists():
                    return place
        known = ", ".join(self._hashes) or "none"
        looked = f", and {self._loras} has neither {name}.safetensors nor a folder {name}" if self._loras else ""
        raise InputError(
            f"subjects.{subject.name}: the engine has no subject {name!r} (it has {known}){looked}; build it in with "
            f"--lora, or put its LoRA into a folder and give --subjects FOLDER"
        )


class FinishedPainter:
    """Gives pictures that others painted: SCENE.png, or another format, in one folder, one picture a scene."""

    def __init__(self, folder: Path, protocol: Protocol) -> None:
        """Raises InputError for a folder that is missing, and for a protocol that asks for several pictures a scene."""
        from dreammix_trt.trainer.listing import is_picture

        if not folder.is_dir():
            raise InputError(f"--pictures {folder}: no such folder; give one with a finished picture for each scene")
        if len(protocol) > len(protocol.scenes):
            raise InputError(
                f"--pictures: {protocol.folder} asks for {len(protocol)} pictures of {len(protocol.scenes)} scenes; "
                "finished pictures need one prompt, one seed and one subject a scene"
            )
        self._folder = folder
        self._files = {file.stem: file for file in sorted(folder.iterdir()) if is_picture(file)}

    def request(self, fields: Mapping[str, Any]) -> Request:
        return Request.of(**fields)

    def identify(self, subject: Subject) -> str:
        from dreammix_trt.core.files import sha256_of

        files = [self._find(scene) for scene in subject.scenes]
        return "finished " + hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()

    @contextmanager
    def open(self, subject: Subject) -> Iterator[None]:
        yield

    def check(self, scene: Scene, request: Request) -> tuple[str, ...]:
        self._read(scene)
        return ()

    def paint(self, scene: Scene, request: Request) -> Painting:
        from dreammix_trt.engine.imprint import Imprint, Origin

        return Painting(self._read(scene), Imprint(request, Origin()), 0.0)

    def _find(self, scene: Scene) -> Path:
        try:
            return self._files[scene.name]
        except KeyError:
            raise InputError(f"--pictures {self._folder}: has no {scene.name}.png; give one for each scene") from None

    def _read(self, scene: Scene) -> Image.Image:
        """A scene's picture. Raises InputError where it is missing, damaged, or of another size."""
        from dreammix_trt.core.pictures import read_image, spell_size

        file = self._find(scene)
        picture, wanted = read_image(file, name="picture"), read_image(scene.image, name="scene").size
        if picture.size != wanted:
            raise InputError(
                f"{file}: is {spell_size(picture.size)}, but its scene {spell_size(wanted)}; give it at that size"
            )
        return Image.fromarray(picture.seen)
