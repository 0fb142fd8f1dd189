"""Jobs: what the service remembers of a ticket, from its acceptance until it is forgotten.

A job's worker tells its steps in its own thread; everything else happens in the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from PIL import Image

from dreammix_trt.core.request import Request
from dreammix_trt.engine.requests import Ticket
from dreammix_trt.engine.result import Result, StepEvent
from dreammix_trt.service.meters import Meters
from dreammix_trt.service.previews import Preview, Watcher, encode_preview
from dreammix_trt.service.refusals import Refusal, explain
from dreammix_trt.service.settings import Settings

if TYPE_CHECKING:
    from dreammix_trt.service.served import Served

log = logging.getLogger(__name__)
_SHOWN = 6  # letters of an id that the log shows: who knows all of them may see the job
State = Literal["queued", "running", "done", "failed", "cancelled"]
Door = Literal["native", "openai", "a1111"]
End = Literal["done", "failed", "cancelled"]
Event = Literal["accepted", "started", "retried", "done", "failed", "cancelled"]


class Happening(NamedTuple):
    """Something that has happened to a job. why: for one that is told, else ""."""

    event: Event
    at: datetime
    why: str = ""


class Job:
    """One accepted request.

    id: nobody can guess it; who knows it may see the job.
    door: by which API it came.
    digest: of what was asked for, with an idempotency key.
    result, error: one of them once it has ended.
    fetched: numbers of the pictures that somebody has fetched.
    so_far: the picture as it was when `interrupt` stopped it.
    watchers: who follows it.
    """

    def __init__(self, served: Served, request: Request, door: Door, meters: Meters) -> None:
        self.id = secrets.token_urlsafe(18)
        self.served, self.request, self.door = served, request, door
        self.created = datetime.now(UTC)
        self.ticket: Ticket | None = None
        self.result: Result | None = None
        self.error: Refusal | None = None
        self.ended: float | None = None
        self.fetched: set[int] = set()
        self.so_far: Image.Image | None = None
        self._interrupted = False
        self.key: str | None = None
        self.digest = ""
        self.watchers: tuple[Watcher, ...] = ()
        self._loop, self._meters = asyncio.get_running_loop(), meters
        self._done = 0
        self._stepped: float | None = None  # when the last step was told, where the next one is to be measured
        self._retries: tuple[Happening, ...] = ()

    @property
    def state(self) -> State:
        """Where it is."""
        if self.ended is not None:
            return _find_end(self.error)
        return "queued" if self.ticket is None or self.ticket.state == "waiting" else "running"

    @property
    def position(self) -> int | None:
        """Its place in the line, 1 for the next one; None when it does not wait."""
        return None if self.ticket is None else self.ticket.position

    @property
    def steps(self) -> tuple[int, int]:
        """Steps taken, and all."""
        assert self.ticket is not None
        return self.ticket.steps

    @property
    def seconds(self) -> dict[str, float]:
        """How long it waited and ran so far."""
        assert self.ticket is not None
        return {"waited": round(self.ticket.waited, 4), "ran": round(self.ticket.ran, 4)}

    @property
    def bytes(self) -> int:
        """Of the finished pictures in memory."""
        images = self.result.images if self.result else []
        return sum(image.width * image.height * len(image.getbands()) for image in images)

    @property
    def history(self) -> list[Happening]:
        """What has happened to it so far."""
        assert self.ticket is not None
        waited, ran = self.ticket.waited, self.ticket.ran
        found = [Happening("accepted", self.created)]
        if ran:
            found.append(Happening("started", self.created + timedelta(seconds=waited)))
        found += self._retries
        if self.ended is not None:
            how, end = _find_end(self.error), self.created + timedelta(seconds=waited + ran)
            found.append(Happening(how, end, self.error.message if self.error else ""))
        return found

    def cancel(self) -> None:
        """Stop it after its present step."""
        if self.ticket is not None:
            self.ticket.cancel()

    def interrupt(self) -> None:
        """Stop it after its present step, and keep the picture as it is then."""
        self._interrupted = True

    def add_watcher(self, watcher: Watcher, most: int) -> None:
        """Tell a client of its steps from now on. Raises Refusal for too many."""
        if len(self.watchers) >= most:
            raise Refusal("queue_full", f"{most} clients follow this job already", retry_after=5)
        self.watchers = (*self.watchers, watcher)
        watcher.wake()

    def remove_watcher(self, watcher: Watcher) -> None:
        """Tell it nothing more."""
        self.watchers = tuple(each for each in self.watchers if each is not watcher)

    def take_step(self, event: StepEvent) -> None:
        """A step is done: measure it, show it to whoever wants to see it. In the worker's thread."""
        if event.retry:
            self._retries = (*self._retries, Happening("retried", datetime.now(UTC), event.retry))
            self._stepped = None
            return
        before, self._done = self._done, event.index + 1
        now = time.monotonic()
        if self._stepped is not None and self._done > before:
            self._meters.note_step((now - self._stepped) / (self._done - before))
        self._stepped = now
        wanting = [each for each in self.watchers if each.wish(before, self._done, event.total)]
        if wanting and event.result is None:
            try:
                self._show(event, wanting)
            except Exception:  # whoever looks must not harm who is painted for
                log.exception("a preview could not be made")
            self._stepped = None  # a painter elsewhere has gone on meanwhile
        if self._interrupted and event.result is None:
            self._stop_here(event)
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self.wake)

    def _stop_here(self, event: StepEvent) -> None:
        try:
            self.so_far = event.preview()
        except Exception:
            log.exception("the picture so far could not be made")
        finally:
            self.cancel()

    def wake(self) -> None:
        """Tell the watchers that there is news. In the loop."""
        for each in self.watchers:
            each.wake()

    def _show(self, event: StepEvent, wanting: list[Watcher]) -> None:
        image, files = event.preview(), dict[str, bytes]()
        for each in wanting:
            data = files[each.kind] if each.kind in files else encode_preview(image, each.kind)
            files[each.kind] = data
            each.previews.append(Preview(event.index + 1, event.picture, data))


def _find_end(error: Refusal | None) -> End:
    if error is None:
        return "done"
    return "cancelled" if error.kind == "cancelled" else "failed"


class Jobs:
    """All jobs of a service: under way, and finished ones within the settings' bounds."""

    def __init__(self, settings: Settings, meters: Meters) -> None:
        self._settings, self._meters = settings, meters
        self._jobs: dict[str, Job] = {}  # in the order of their acceptance
        self._keys: dict[str, Job] = {}
        self._followers: set[asyncio.Task[None]] = set()

    def submit(
        self,
        served: Served,
        image: Any,
        mask: Any,
        request: Request,
        *,
        door: Door,
        key: str | None = None,
        digest: str = "",
        watcher: Watcher | None = None,
    ) -> Job:
        """Accept a request into its engine's queue, or find the job that the same key has made before.

        Raises QueueFull, and Refusal for a key that stands for another request.
        """
        self.trim()
        if key is not None and (known := self._keys.get(key)) is not None:
            if known.digest != digest:
                raise Refusal("conflict", "this Idempotency-Key was used for another request", "Idempotency-Key")
            return known
        job = Job(served, request, door, self._meters)
        if watcher is not None:
            job.add_watcher(watcher, 1)
        job.ticket = served.queue.submit(image, mask, request, on_step=job.take_step)
        self._jobs[job.id] = job
        if key is not None:
            job.key, job.digest = key, digest
            self._keys[key] = job
        if self._settings.log_prompts:
            log.info("job %s: %s", job.id[:_SHOWN], request.to_json())
        follower = asyncio.create_task(self._follow(job))
        self._followers.add(follower)
        follower.add_done_callback(self._followers.discard)
        return job

    def find(self, id: str) -> Job:
        """The job of an id. Raises Refusal where there is none."""
        self.trim()
        job = self._jobs.get(id)
        if job is None:
            raise Refusal("not_found", "there is no such job: it was never accepted here, or is forgotten by now")
        return job

    def forget(self, job: Job) -> None:
        """Remove a finished job."""
        self._jobs.pop(job.id, None)
        if job.key is not None and self._keys.get(job.key) is job:
            del self._keys[job.key]

    def list_open(self, door: Door | None = None) -> list[Job]:
        """Jobs that have not ended, the oldest first. door: those that came by it; None: all."""
        return [job for job in self._jobs.values() if job.ended is None and door in (None, job.door)]

    def list_uncollected(self) -> list[Job]:
        """Jobs that are done and of whose pictures some were never fetched."""
        return [job for job in self._jobs.values() if job.result and len(job.fetched) < len(job.result.images)]

    @property
    def bytes(self) -> int:
        """Of all finished pictures."""
        return sum(job.bytes for job in self._jobs.values())

    @property
    def kept(self) -> int:
        """How many finished jobs are remembered."""
        return sum(job.ended is not None for job in self._jobs.values())

    def trim(self) -> None:
        """Forget finished jobs beyond the bounds, those that ended first: a slow one may have been accepted before."""
        oldest, limits = time.monotonic() - self._settings.keep_seconds, self._settings
        ended = sorted((job.ended, job.id, job) for job in self._jobs.values() if job.ended is not None)
        count, size = len(ended), sum(job.bytes for *_, job in ended)
        for end, _, job in ended:
            if end < oldest or count > limits.keep_results or (size > limits.keep_bytes and count > 1):
                self.forget(job)
                count, size = count - 1, size - job.bytes

    async def wait_for_end(self, job: Job) -> None:
        """Wait until a job has ended in any way."""
        watcher = Watcher(lambda before, now, total: False)
        job.add_watcher(watcher, self._settings.watchers + 1)
        try:
            while job.ended is None:
                await watcher.wait(5)
        finally:
            job.remove_watcher(watcher)

    async def _follow(self, job: Job) -> None:
        """Wait for a job's ticket, and note how it ended."""
        assert job.ticket is not None
        try:
            job.result = await job.ticket
        except asyncio.CancelledError:
            job.error = Refusal("cancelled", "the service ended")
        except Exception as error:
            job.error = explain(error)
        job.ended = time.monotonic()
        self._meters.note_end(job.served.name, job.ticket, job.result, job.error.kind if job.error else None)
        seconds = job.seconds
        log.info(
            "job %s: %s after %.2f s of waiting and %.2f s of work",
            *(job.id[:_SHOWN], job.state, seconds["waited"], seconds["ran"]),
        )
        if job.door != "native":  # who waits for it holds it; nobody else knows its id
            self.forget(job)
        job.wake()
        self.trim()
