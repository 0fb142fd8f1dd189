"""Painters whose work is done by replicas elsewhere, as a `RequestQueue` takes them.

A painter here paints one request at a time, on whichever replica takes it. When that replica dies, the request is begun
again, once; no step is reported twice.
"""

from __future__ import annotations

import itertools
import logging
import queue
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Protocol, Unpack

from PIL import Image

from dreammix_trt.core.errors import DreamMixError, EngineError, InputError
from dreammix_trt.core.presets import Preset, fill_request
from dreammix_trt.core.remarks import remark
from dreammix_trt.core.request import Request, RequestFields, draw_seed
from dreammix_trt.core.sources import Source
from dreammix_trt.core.subject import Subject
from dreammix_trt.engine.requests.tickets import Noise
from dreammix_trt.engine.result import StepEvent
from dreammix_trt.service.wire import Begun, Facts, Failed, Guest, Item, Order, Shown, Stepped

log = logging.getLogger(__name__)
_DIED = "the worker that painted it died"


class ReplicaDied(Exception):
    """The replica of a call is gone."""


class Stream(Protocol):
    """What a replica reports of an order. Iterating raises ReplicaDied."""

    def __iter__(self) -> Iterator[Item]: ...
    def cancel(self) -> None:
        """Stop it after its present step. May be called from any thread, also after its end."""
        ...


class Link(Protocol):
    """The way to the replicas of one engine."""

    def paint(self, order: Order, guests: Sequence[Guest], subject: str) -> Stream:
        """Have a request painted, where its subject is resident if that is free."""
        ...

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of `replicas.Painter` on any replica. Raises ReplicaDied."""
        ...

    def share(self, subject: Subject) -> Any:
        """Keep a subject where replicas can take it from, for as long as what this returns is kept."""
        ...

    def ask_preview(self, id: str, whole: bool) -> None:
        """Have the next step of an order shown."""
        ...

    def forget(self, id: str) -> None:
        """The order has ended."""
        ...

    def take_report(self, id: str) -> DreamMixError | None:
        """Why the replica of an order has ended, where it could tell."""
        ...


class RemoteEngine:
    """One engine on its replicas, and the subjects that came to it since: each replica takes what it lacks.

    tells: whether the log may quote requests.
    """

    def __init__(self, link: Link, tells: bool = False) -> None:
        self.link, self.tells = link, tells
        self.facts: Facts = link.call("describe")
        self.guests: tuple[Guest, ...] = ()
        self._subjects: dict[str, Subject] = {each.name: each for each in self.facts.subjects}
        self._numbers = itertools.count(1)
        self._enrolled: tuple[Any, ...] = ()
        self._changing = threading.Lock()

    @property
    def subjects(self) -> dict[str, Subject]:
        """By name; the first is the default."""
        return dict(self._subjects)

    def add(self, subject: Subject) -> None:
        """Make a subject known. Adding it again does nothing. Raises as `DreamMix.add_subject` does."""
        with self._changing:
            if self._subjects.get(subject.name) is not subject:
                self._add(subject)

    def enroll(self, images: Sequence[bytes], masks: Sequence[bytes | None], name: str, class_name: str) -> Subject:
        """Make a subject of pictures on one replica. Doing it again does nothing. Raises as `DreamMix.enroll` does."""
        pictures = (list(images), list(masks), name, class_name)
        with self._changing:
            if name not in self._subjects or pictures != self._enrolled:
                self._add(self._call("enroll", *pictures))
                self._enrolled = pictures
            return self._subjects[name]

    def remove(self, name: str) -> None:
        """Forget a subject that was added. Doing it again does nothing."""
        with self._changing:
            self.guests = tuple(guest for guest in self.guests if guest.name != name)
            self._subjects.pop(name, None)

    def _add(self, subject: Subject) -> None:
        guest = Guest(subject.name, next(self._numbers), self.link.share(subject))
        guests = (*(each for each in self.guests if each.name != subject.name), guest)
        for text in self._call("try_guests", guests):
            remark(text)
        self.guests, self._subjects[subject.name] = guests, subject

    def _call(self, method: str, *arguments: Any) -> Any:
        """Call a method of a replica; once more where that dies."""
        try:
            value, failed = self.link.call(method, *arguments)
        except ReplicaDied:
            try:
                value, failed = self.link.call(method, *arguments)
            except ReplicaDied as error:
                raise EngineError(f"two workers died over this subject ({error}): try again later") from error
        if failed is not None:
            raise _explain(failed)
        return value


class RayPainter:
    """One request at a time on any replica of an engine; see `engine.requests.errands.Paints`. It has nothing to close.

    All painters of an engine share its subjects.
    """

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine = engine
        facts = engine.facts
        self.facts = facts.base
        self.runtime = SimpleNamespace(contexts=facts.contexts, adapter=facts.has_adapter or None)

    @property
    def subjects(self) -> tuple[str, ...]:
        """Names of the subjects; the first is the default."""
        return tuple(self._engine.subjects)

    def list_subjects(self) -> list[Subject]:
        """The subjects with their words and attributes."""
        return list(self._engine.subjects.values())

    def add_subject(self, subject: Subject) -> str:
        """Have every replica load a subject, now or before its next request. Raises as `DreamMix.add_subject` does."""
        self._engine.add(subject)
        return subject.name

    def enroll(self, images: Sequence[bytes], masks: Sequence[bytes | None], *, class_name: str, name: str) -> Subject:
        """Make a subject of pictures, as `DreamMix.enroll` does, and have every replica load it."""
        return self._engine.enroll(images, masks, name, class_name)

    def remove_subject(self, name: str) -> None:
        """Forget a subject."""
        self._engine.remove(name)

    def request(self, prompt: str, *, preset: Preset | None = None, **fields: Unpack[RequestFields]) -> Request:
        """Make the request of a prompt, as `DreamMix.request` does."""
        return fill_request(prompt, preset, self._engine.facts.defaults, fields)

    def iterate(
        self, image: Source, mask_image: Source | None, prompt: Request, /, *, noise: Noise = None, keep_stages: bool
    ) -> Painting:
        """Paint a request elsewhere. Bad input is found there, and told with the first step.

        Raises InputError for noise: it is drawn where the request is painted, from its seed.
        """
        if noise is not None:
            raise InputError("noise cannot be given to a painter elsewhere; give the request a seed")
        seed = draw_seed() if prompt.seed is None else prompt.seed  # so that a second attempt paints the same
        order = Order("", image, mask_image, prompt.replace(seed=seed), keep_stages)
        return Painting(self._engine, order)

    def close(self) -> None:
        """Nothing: replicas belong to whoever has started them."""


class Painting:
    """The steps of one request, told by the replica that paints it. `stop` may be called from any thread."""

    def __init__(self, engine: RemoteEngine, order: Order) -> None:
        self._engine, self._link, self._order = engine, engine.link, order
        self._inbox: queue.SimpleQueue[Item | BaseException | None] = queue.SimpleQueue()
        self._early: deque[Item | BaseException | None] = deque()  # what came while a preview was waited for
        self._last = StepEvent(-1, order.request.steps * order.request.num_images_per_prompt, "lcg", 0, self._look)
        self._over, self._deaths = False, 0
        self._begin()

    def __iter__(self) -> Painting:
        return self

    def __next__(self) -> StepEvent:
        """Wait for the next step. Raises what the request raised, and EngineError where a second worker has died."""
        while not self._over:
            item = self._early.popleft() if self._early else self._inbox.get()
            if isinstance(item, Begun):
                self._tell(item)
            elif isinstance(item, Stepped) and (item.index > self._last.index or item.result):
                return self._take(item)
            elif isinstance(item, ReplicaDied):
                return self._begin_again(item)
            elif item is None or isinstance(item, Failed | BaseException):
                self.close()
                if item is not None:
                    raise _explain(item) if isinstance(item, Failed) else item
        raise StopIteration

    def stop(self) -> None:
        """Whoever waits for a step waits no longer."""
        self._inbox.put(None)

    def close(self) -> None:
        """Stop the replica after its present step, if it has not ended."""
        if not self._over:
            self._over = True
            self._stream.cancel()
            self._link.forget(self._order.id)

    def _begin(self) -> None:
        self._order = replace(self._order, id=secrets.token_hex(8))
        request, default = self._order.request, next(iter(self._engine.subjects), "")
        subject = default if request.subject is None else request.subject
        self._stream = self._link.paint(self._order, self._engine.guests, subject)
        pump = threading.Thread(target=_pump, args=(self._stream, self._inbox.put), name="dreammix-pump", daemon=True)
        pump.start()

    def _begin_again(self, death: ReplicaDied) -> StepEvent:
        """After a death: an event that says so, which repeats the last step."""
        self._deaths += 1
        told = self._link.take_report(self._order.id)
        why = _DIED if told is None else f"{_DIED}: {told}"
        log.warning("%s (%s)", why, death)
        self._link.forget(self._order.id)
        if self._deaths > 1:
            self._over = True
            raise EngineError(f"{why}, and so did the one before: the request is not tried a third time")
        self._begin()
        return replace(self._last, retry=why)

    def _tell(self, begun: Begun) -> None:
        """Remarks may quote the request. Where the log may not, they are in the result alone."""
        for text in begun.remarks if self._engine.tells and not self._deaths else ():
            remark(text)

    def _take(self, step: Stepped) -> StepEvent:
        if step.result is not None:  # nothing comes after it
            self._over = True
            self._link.forget(self._order.id)
        self._last = StepEvent(step.index, step.total, step.stage, step.picture, self._look, None, step.result)
        return self._last

    def _look(self, whole: bool) -> Image.Image:
        """Ask for a preview, and wait for it: the replica makes it after its present step."""
        if self._over:
            raise EngineError("a preview is asked for after the end of its request")
        self._link.ask_preview(self._order.id, whole)
        while True:
            item = self._inbox.get()
            if isinstance(item, Shown) and item.image is not None:
                return item.image
            if not isinstance(item, Shown):
                self._early.append(item)
            if isinstance(item, Stepped) and item.result is not None and whole:
                return item.result.images[item.picture]
            if not isinstance(item, Stepped | Begun):
                raise EngineError("no preview could be made")


def _pump(stream: Stream, put: Callable[[Item | BaseException | None], None]) -> None:
    """Take what a replica tells, in a thread of its own: whoever waits for it can be told to stop."""
    try:
        for item in stream:
            put(item)
    except BaseException as error:
        put(error)
    else:
        put(None)


def _explain(failed: Failed) -> DreamMixError:
    """The error of a replica, as one of this process. What nobody expected is logged."""
    if failed.place:
        log.error("an error in a replica that nobody expected: %s\n%s", failed.error, failed.place)
    return failed.error
