"""What runs in a replica of Ray Serve: the painters of one engine, and what it sends of a request while it is painted.

Only values that both sides know travel, errors included: what a method raised, Ray would write into its logs, and a
message may quote a request.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

from PIL import Image

from dreammix_trt.core.errors import DeviceError, DreamMixError, EngineError
from dreammix_trt.core.remarks import keep_remarks
from dreammix_trt.core.subject import Subject
from dreammix_trt.service.loading import Loading
from dreammix_trt.service.wire import Begun, Facts, Failed, Guest, Item, Order, Shown, Stepped


class Desk:
    """Where front and replicas leave word for each other: an actor without a core of its own."""

    def __init__(self) -> None:
        self._asked: dict[str, asyncio.Queue[bool | None]] = {}
        self._reports: dict[str, DreamMixError] = {}

    async def ask_preview(self, id: str, whole: bool) -> None:
        """Have the next step of an order shown."""
        self._find(id).put_nowait(whole)

    async def wait_for_wish(self, id: str) -> bool | None:
        """Wait until a preview of an order is asked for; whether whole. None: its front has done with it."""
        return await self._find(id).get()

    async def forget(self, id: str) -> None:
        """The order has ended."""
        self._find(id).put_nowait(None)
        asyncio.get_running_loop().call_later(60, self._asked.pop, id, None)

    async def report(self, key: str, error: DreamMixError) -> None:
        """Leave word of why a replica ends. key: of the order, or of the engine that could not be loaded."""
        self._reports[key] = error

    async def take_report(self, key: str) -> DreamMixError | None:
        """Why a replica has ended, where it could tell."""
        return self._reports.pop(key, None)

    def _find(self, id: str) -> asyncio.Queue[bool | None]:
        return self._asked.setdefault(id, asyncio.Queue())


class _Easel:
    """One painter with a thread of its own, and which guests it has."""

    def __init__(self, painter: Any) -> None:
        self.painter = painter
        self.thread = ThreadPoolExecutor(1, "dreammix-easel")
        self._guests: dict[str, int] = {}

    def receive(self, guests: Sequence[Guest]) -> None:
        """Make these the subjects that came later, in their order: the first subject is the default one."""
        import ray

        wanted = {guest.name: guest.number for guest in guests}
        for name in [name for name, number in self._guests.items() if wanted.get(name) != number]:
            self.painter.remove_subject(name)
            del self._guests[name]
        for guest in guests:
            if guest.name not in self._guests:
                self.painter.add_subject(ray.get(guest.subject))
                self._guests[guest.name] = guest.number

    def paint(
        self,
        order: Order,
        guests: Sequence[Guest],
        tell: Callable[[Item], None],
        wishes: queue.SimpleQueue[bool],
        stopped: threading.Event,
    ) -> None:
        """Paint a request, and tell what happens. Previews are made when they are wished for."""
        with keep_remarks(tell=False):
            self.receive(guests)
        with keep_remarks(tell=False) as remarks:
            events = self.painter.iterate(
                order.image, order.mask_image, order.request, noise=None, keep_stages=order.keep_stages
            )
        tell(Begun(tuple(remarks)))
        try:
            for event in events:
                tell(Stepped(event.index, event.total, event.stage, event.picture, event.result))
                if stopped.is_set():
                    return
                while event.result is None and not wishes.empty():
                    tell(Shown(_show(event, wishes.get())))
        finally:
            events.close()


def _show(event: Any, whole: bool) -> Image.Image | None:
    try:
        image: Image.Image = event.preview(whole)
    except Exception:  # whoever looks must not harm who is painted for
        return None
    return image


class Painter:
    """A replica: one engine's painters.

    desk: the actor of a `Desk`.
    key: under which it reports there why it could not load.
    """

    def __init__(self, loading: Loading, desk: Any, key: str) -> None:
        import ray
        from ray import serve

        try:
            painters = loading.open()
        except DreamMixError as error:
            ray.get(desk.report.remote(key, error))
            raise
        self._desk = desk
        self._easels = [_Easel(painter) for painter in painters]
        self._free: asyncio.Queue[_Easel] = asyncio.Queue()
        for easel in self._easels:
            self._free.put_nowait(easel)

        @serve.multiplexed(max_num_models_per_replica=1)  # type: ignore[untyped-decorator]
        async def note_resident(name: str) -> str:
            return name

        self._note_resident = note_resident

    async def paint(self, order: Order, guests: Sequence[Guest]) -> AsyncIterator[Item]:
        """Paint a request. Leaving the iteration stops it after its present step."""
        from ray import serve

        if name := serve.get_multiplexed_model_id():
            await self._note_resident(name)  # its weights are the merged ones from now on, and routers know it
        easel, loop = await self._free.get(), asyncio.get_running_loop()
        items: asyncio.Queue[Item | None] = asyncio.Queue()
        wishes: queue.SimpleQueue[bool] = queue.SimpleQueue()
        stopped = threading.Event()

        def tell(item: Item) -> None:
            loop.call_soon_threadsafe(items.put_nowait, item)

        def work() -> None:
            if (failed := self._try(order.id, easel.paint, order, guests, tell, wishes, stopped)[1]) is not None:
                tell(failed)

        def end(_: Any) -> None:
            self._free.put_nowait(easel)
            items.put_nowait(None)

        working = loop.run_in_executor(easel.thread, work)
        working.add_done_callback(end)
        listening = loop.create_task(self._listen(order.id, wishes))
        try:
            while (item := await items.get()) is not None:
                yield item
        finally:
            stopped.set()
            listening.cancel()
            await asyncio.wait({working})

    async def describe(self) -> Facts:
        """What the front must know."""
        painter = self._easels[0].painter
        contexts = painter.runtime.contexts
        subjects = (replace(each, factors={name: {} for name in each.factors}) for each in painter.list_subjects())
        return Facts(
            painter.facts,
            None if contexts is None else list(contexts),
            painter.runtime.adapter is not None,
            dict(painter.defaults),
            tuple(subjects),
        )

    async def try_guests(self, guests: Sequence[Guest]) -> tuple[tuple[str, ...], Failed | None]:
        """Load subjects, to see whether they fit. Returns what it remarked, and the error."""
        return await self._visit(lambda easel: _keep(easel.receive, guests))

    async def enroll(
        self, images: Sequence[bytes], masks: Sequence[bytes | None], name: str, class_name: str
    ) -> tuple[Subject | None, Failed | None]:
        """Make a subject of pictures. It is not kept: it comes back as a guest."""

        def make(easel: _Easel) -> Subject:
            subject: Subject = easel.painter.enroll(list(images), list(masks), name=name, class_name=class_name)
            easel.painter.remove_subject(name)
            return subject

        return await self._visit(make)

    async def _visit(self, call: Callable[[_Easel], Any]) -> tuple[Any, Failed | None]:
        """Call a function with a painter, between two requests."""
        easel = await self._free.get()
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(easel.thread, self._try, "", call, easel)
        finally:
            self._free.put_nowait(easel)

    async def _listen(self, id: str, wishes: queue.SimpleQueue[bool]) -> None:
        """Hear which previews are asked for."""
        with suppress(Exception):  # without the desk there are none
            while (whole := await self._desk.wait_for_wish.remote(id)) is not None:
                wishes.put(whole)

    def _try(self, id: str, call: Callable[..., Any], *arguments: Any) -> tuple[Any, Failed | None]:
        """Call a function; its value or its error. A replica whose device is lost ends, and Serve starts another."""
        import ray

        try:
            return call(*arguments), None
        except DeviceError as error:
            if error.lost:
                with suppress(Exception):
                    ray.get(self._desk.report.remote(id, error), timeout=5)
                os._exit(1)  # its context is broken for all; a health check would find it only after some more requests
            return None, Failed(error)
        except DreamMixError as error:
            return None, Failed(error)
        except Exception as error:
            kind, place = type(error).__name__, "".join(traceback.format_tb(error.__traceback__))
            return None, Failed(EngineError(f"the service failed ({kind}); its log says more"), place)


def _keep(call: Callable[..., Any], *arguments: Any) -> tuple[str, ...]:
    """Call a function; what it remarked."""
    with keep_remarks(tell=False) as remarks:
        call(*arguments)
    return tuple(remarks)
