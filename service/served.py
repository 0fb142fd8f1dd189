"""One engine that is served: its queue, what is known of its base and its subjects, and how subjects come and go."""

from __future__ import annotations

import io
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from dreammix_trt.core.errors import DreamMixError, FileFormatError
from dreammix_trt.core.presets import Preset
from dreammix_trt.core.remarks import keep_remarks
from dreammix_trt.core.request import Request
from dreammix_trt.core.subject import Subject, check_name, open_subject
from dreammix_trt.engine import RequestQueue, StepEvent
from dreammix_trt.service.refusals import Refusal, invalid

_THUMBNAIL = 192
_LONGEST_NAME = 64


@dataclass(frozen=True)
class Card:
    """What clients may know of a subject.

    kind: "lora", "tokens" or "both".
    thumbnail: a WebP file, where there is one.
    removable: whether it came through this service, and not with the engine.
    """

    name: str
    token: str
    class_name: str
    kind: str = "lora"
    attributes: dict[str, list[str]] = field(default_factory=dict)
    thumbnail: bytes | None = field(default=None, repr=False)
    removable: bool = False

    @classmethod
    def of(cls, subject: Subject, **more: Any) -> Card:
        """The card of a loaded subject."""
        tokens = bool(getattr(subject, "tokens", None))
        kind = ("both" if subject.factors else "tokens") if tokens else "lora"
        attributes = {name: list(values) for name, values in subject.attributes.items()}
        return cls(subject.name, subject.token, subject.class_name, kind, attributes, **more)


class _Worker:
    """A painter in a queue. Its remarks on a request, which may quote it, go to the result alone, not into the log.

    tells: they go into the log as well.
    """

    def __init__(self, painter: Any, tells: bool) -> None:
        self.painter, self._tells = painter, tells
        self.request, self.close = painter.request, painter.close

    def iterate(
        self, image: Any, mask_image: Any, request: Request, /, *, noise: Any, keep_stages: bool
    ) -> Iterator[StepEvent]:
        with keep_remarks(tell=self._tells):
            events: Iterator[StepEvent] = self.painter.iterate(
                image, mask_image, request, noise=noise, keep_stages=keep_stages
            )
        return events


class Served:
    """An engine behind a queue.

    name: how clients call it.
    painters: `DreamMix` objects of the engine; the queue closes them.
    waiting, timeout: of the queue.
    backend: what it was built for.
    most_subjects: how many subjects it may have.
    log_prompts: whether the log may quote requests.
    """

    def __init__(
        self,
        name: str,
        painters: Sequence[Any],
        *,
        waiting: int = 16,
        timeout: float | None = 60.0,
        backend: str = "",
        most_subjects: int = 64,
        log_prompts: bool = False,
    ) -> None:
        self.name, self.backend = name, backend
        self._painter, self._most = painters[0], most_subjects
        self.cards: dict[str, Card] = {each.name: Card.of(each) for each in painters[0].list_subjects()}
        workers = [_Worker(painter, log_prompts) for painter in painters]
        self.queue = RequestQueue(workers, waiting=waiting, timeout=timeout, owned=True)
        self._changing = threading.Lock()

    @property
    def native_size(self) -> int:
        """The base's native side in pixels."""
        return int(self._painter.facts.native_side)

    @property
    def context(self) -> int | None:
        """The longest text condition that it takes; None: any."""
        contexts = getattr(self._painter.runtime, "contexts", None)
        return int(max(contexts)) if contexts else None

    @property
    def can_enroll(self) -> bool:
        """Whether a subject can be made of pictures alone."""
        adapter = getattr(self._painter.runtime, "adapter", None)
        return adapter is not None and hasattr(self._painter, "enroll")

    @property
    def default_subject(self) -> str | None:
        """The subject that is painted where nobody names one."""
        return next(iter(self.cards), None)

    def make_request(self, fields: dict[str, Any], preset: Preset | None = None) -> Request:
        """A request with the engine's defaults. Raises InputError."""
        if "prompt" not in fields:
            raise invalid("prompt", "is missing: say what to paint, with the subject's token")
        given = dict(fields)
        request: Request = self._painter.request(given.pop("prompt"), preset=preset, **given)
        if request.subject and request.subject not in self.cards:
            known = ", ".join(map(repr, self.cards)) or "none"
            raise invalid("subject", f"is {request.subject!r}; loaded are: {known}")
        return request

    def add(self, data: bytes, name: str | None, token: str | None, class_name: str | None) -> Card:
        """Load a subject file or a LoRA, safetensors alone, between requests. Blocks until every worker has it.

        Raises Refusal for names that cannot be or are taken, FileFormatError for a file that does not fit.
        """
        check_safetensors(data)
        with self._change(), tempfile.TemporaryDirectory(prefix="dreammix-") as folder:
            if name is not None:
                self._check_new(name)
            file = Path(folder, "subject.safetensors")  # what clients call it is nowhere a name of a file
            file.write_bytes(data)
            try:
                return self._add(file, name, token, class_name)
            except DreamMixError as error:
                raise type(error)(str(error).replace(str(file), "file")) from error

    def _add(self, file: Path, name: str | None, token: str | None, class_name: str | None) -> Card:
        subject = open_subject(
            file, self._painter.facts.unet, name=name or "", token=token or "", class_name=class_name or ""
        )
        self._check_new(subject.name)
        return self._load(subject.name, lambda painter: painter.add_subject(subject), None)

    def enroll(self, images: Sequence[bytes], masks: Sequence[bytes | None], name: str, class_name: str) -> Card:
        """Make a subject of pictures, on an engine that can. Blocks until every worker has it.

        masks: one for each picture; None: its transparency.
        """
        if not self.can_enroll:
            raise Refusal(
                "invalid_request",
                "this engine makes no subject of pictures alone: its base has no token adapter (`dreammix-trt "
                "train-tokens`, `build --tokens`); train a LoRA and upload that",
            )
        with self._change():
            self._check_new(name)
            return self._load(
                name,
                lambda painter: painter.enroll(list(images), list(masks), name=name, class_name=class_name),
                make_thumbnail(images[0]),
            )

    def remove(self, name: str) -> None:
        """Forget a subject that came through this service. Blocks until no worker has it."""
        card = self.find(name)
        if not card.removable:
            raise Refusal(
                "conflict", f"subject {name!r} belongs to the engine; only subjects added here can go", "name"
            )
        with self._change():
            self.cards = {other: each for other, each in self.cards.items() if other != name}
            self._visit(lambda painter: _forget(painter, name))

    def find(self, name: str) -> Card:
        """The card of a subject. Raises Refusal where there is none."""
        if name not in self.cards:
            raise Refusal("not_found", f"there is no subject {name[:_LONGEST_NAME]!r}", "name")
        return self.cards[name]

    def _load(self, name: str, call: Callable[[Any], object], thumbnail: bytes | None) -> Card:
        """Have every painter load a subject; where one cannot, none keeps it."""
        try:
            self._visit(call)
            (subject,) = (each for each in self._visit(_list)[0] if each.name == name)
        except BaseException:
            self._visit(lambda painter: _forget(painter, name))
            raise
        card = replace(Card.of(subject), thumbnail=thumbnail, removable=True)
        self.cards = {**self.cards, name: card}
        return card

    @contextmanager
    def _change(self) -> Iterator[None]:
        """One change of the subjects at a time. Raises Refusal during another: it may take as long as requests run."""
        if not self._changing.acquire(blocking=False):
            raise Refusal("queue_full", "another subject is being added or removed: try again later", retry_after=5)
        try:
            yield
        finally:
            self._changing.release()

    def _visit(self, call: Callable[[Any], Any]) -> list[Any]:
        """Call a function with each painter between two requests."""
        return self.queue.visit(lambda worker: call(worker.painter))

    def _check_new(self, name: str) -> None:
        check_name(name)
        if len(name) > _LONGEST_NAME:
            raise invalid("name", f"has {len(name)} characters; {_LONGEST_NAME} are the most")
        if name in self.cards:
            raise Refusal("conflict", f"there is a subject {name!r} already: give another name, or remove that", "name")
        if len(self.cards) >= self._most:
            raise Refusal("conflict", f"the engine has {len(self.cards)} subjects, the most here: remove some first")


def _list(painter: Any) -> list[Subject]:
    return list(painter.list_subjects())


def _forget(painter: Any, name: str) -> None:
    if name in painter.subjects:
        painter.remove_subject(name)


def check_safetensors(data: bytes) -> None:
    """Raise FileFormatError unless a file begins as safetensors do: a length, then JSON. Nothing else is opened."""
    (length,) = struct.unpack("<Q", data[:8]) if len(data) >= 8 else (0,)
    if not 2 <= length <= len(data) - 8 or data[8:9] != b"{":
        raise FileFormatError("file: not safetensors, and no other file is opened here; convert it first")


def make_thumbnail(data: bytes) -> bytes:
    """A small WebP of a picture."""
    from dreammix_trt.core.pictures import read_image

    image = Image.fromarray(read_image(data).seen)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    to = io.BytesIO()
    image.save(to, "WEBP", quality=80)
    return to.getvalue()
