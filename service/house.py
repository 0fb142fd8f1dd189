"""Everything one service has, and what all its doors share: which engine is meant, accepting, waiting, draining."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

from fastapi import Depends
from fastapi import Request as HttpRequest
from starlette.concurrency import run_in_threadpool

from dreammix_trt.core.request import Request
from dreammix_trt.service.forms import check_picture
from dreammix_trt.service.jobs import Door, Job, Jobs
from dreammix_trt.service.meters import Meters
from dreammix_trt.service.refusals import Refusal, invalid
from dreammix_trt.service.served import Served
from dreammix_trt.service.settings import Settings

_TRIM = 10.0  # seconds between two looks at results that are too old


class House:
    """One service.

    engines: the first one is meant where nobody names one.
    """

    def __init__(self, engines: Sequence[Served], settings: Settings) -> None:
        self.engines = {each.name: each for each in engines}
        self.settings, self.meters = settings, Meters()
        self.jobs = Jobs(settings, self.meters)
        self.begun, self.draining = int(time.time()), False
        self.meters.watch(
            lambda: {name: (each.queue.workers, each.queue.statistics()) for name, each in self.engines.items()},
            lambda: (self.jobs.kept, self.jobs.bytes),
        )

    @property
    def first(self) -> Served:
        """The engine that is meant where nobody names one."""
        return next(iter(self.engines.values()))

    def choose_engine(self, name: str | None) -> Served:
        """The engine of a name. Raises Refusal for any other."""
        if not name:
            return self.first
        if name not in self.engines:
            known = ", ".join(map(repr, self.engines))
            raise Refusal("not_found", f"engine {name[:80]!r} is not served here; served are: {known}", "engine")
        return self.engines[name]

    def choose_model(self, model: str | None) -> tuple[Served, str | None]:
        """What a model's name means: an engine, a subject of one ("ENGINE/SUBJECT"), or a subject of the first engine
        that has it. Raises Refusal for any other."""
        if not model or model in self.engines:
            return self.choose_engine(model), None
        engine, slash, subject = model.partition("/")
        if slash and engine in self.engines and subject in self.engines[engine].cards:
            return self.engines[engine], subject
        for served in self.engines.values():
            if model in served.cards:
                return served, model
        known = ", ".join(map(repr, self.list_models()))
        raise Refusal("not_found", f"model {model[:80]!r} is not served here; served are: {known}", "model")

    def list_models(self) -> list[str]:
        """Every name that `choose_model` takes, once."""
        names: list[str] = []
        for served in self.engines.values():
            names += [served.name, *(card if card not in names else f"{served.name}/{card}" for card in served.cards)]
        return names

    def refuse_where_draining(self) -> None:
        """Raise the Refusal of new work once the end has begun."""
        if self.draining:
            raise Refusal("draining", "the service is about to end and takes no more work", retry_after=30)

    @property
    def is_lost(self) -> bool:
        """Whether no engine has a worker left."""
        return not any(each.queue.workers for each in self.engines.values())

    def refuse_where_lost(self) -> None:
        """Raise a Refusal when an engine has lost all its workers, which nothing but a new start brings back."""
        lost = [repr(name) for name, each in self.engines.items() if not each.queue.workers]
        if lost:
            raise Refusal("unavailable", f"engine {', '.join(lost)} has lost its devices: start the service again")

    async def accept(
        self, served: Served, image: bytes, mask: Any, request: Request, *, door: Door, **more: Any
    ) -> Job:
        """Accept a request into the line.

        image: of a file, checked by its header.
        mask: of a file, an array, or None for the picture's transparency.
        more: as for `Jobs.submit`.
        """
        self.refuse_where_draining()
        if request.num_images_per_prompt > self.settings.pictures:
            count = request.num_images_per_prompt
            raise invalid("num_images_per_prompt", f"is {count}; {self.settings.pictures} are the most here")
        await run_in_threadpool(check_picture, image, "image", self.settings)
        if isinstance(mask, bytes):
            await run_in_threadpool(check_picture, mask, "mask_image", self.settings)
        self.refuse_where_draining()  # once more: it may have begun meanwhile, and waits for no later job
        return self.jobs.submit(served, image, mask, request, door=door, **more)

    async def wait_for(self, job: Job, client: HttpRequest) -> None:
        """Wait until a job has ended, and cancel it when its client goes away. Raises the Refusal that it ends with."""
        leaving = asyncio.create_task(_await_leaving(client))
        ending = asyncio.create_task(self.jobs.wait_for_end(job))
        try:
            await asyncio.wait({leaving, ending}, return_when=asyncio.FIRST_COMPLETED)
            if job.ended is None:
                job.cancel()
                await ending
        finally:
            if job.ended is None:  # this very call is given up
                job.cancel()
            for task in (leaving, ending):
                task.cancel()
        if job.error is not None:
            raise job.error

    async def watch(self) -> None:
        """Forget old results for as long as the service runs."""
        while True:
            await asyncio.sleep(_TRIM)
            self.jobs.trim()

    async def drain(self, grace: float) -> None:
        """Take no more work, and wait until what was accepted has ended, or cancel it when the grace is over.

        Then wait a little for clients that fetch what they were promised.

        grace: seconds.
        """
        self.draining = True
        until = time.monotonic() + grace
        while self.jobs.list_open() and time.monotonic() < until:
            await asyncio.sleep(0.05)
        for job in self.jobs.list_open():
            job.cancel()
        until = min(until, time.monotonic() + 5)
        while self.jobs.list_uncollected() and time.monotonic() < until:
            await asyncio.sleep(0.05)

    def close(self) -> None:
        """End the queues; what runs stops after its present step."""
        for each in self.engines.values():
            each.queue.close()


async def _await_leaving(client: HttpRequest) -> None:
    """Wait until a client has gone away. Its body must have been read."""
    with suppress(Refusal):
        while (await client.receive())["type"] != "http.disconnect":
            pass


def _find_house(request: HttpRequest) -> House:
    house: House = request.app.state.house
    return house


#: the service, as endpoints ask for it
Here = Annotated[House, Depends(_find_house)]
