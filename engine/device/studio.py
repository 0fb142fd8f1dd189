"""Painting on a device: one arena, one stream, weights, subjects, texts and graphs, for request after request.

A batch is uploaded in one go; from there until the finished pictures come back nothing crosses to the host but the
question whether to go on. The host enqueues at most `AHEAD` steps more than are done, so leaving the iteration stops
the work, while the device never waits for the host.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, cast

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import EngineError, InputError
from dreammix_trt.core.request import Request
from dreammix_trt.core.schedule import Schedule, Step
from dreammix_trt.core.subject import Subject
from dreammix_trt.engine.canvas.frames import Canvas
from dreammix_trt.engine.canvas.geometry import Size
from dreammix_trt.engine.device import jobs, phases, room, texts
from dreammix_trt.engine.device.arena import Arena, Regions, sizes
from dreammix_trt.engine.device.jobs import Picture
from dreammix_trt.engine.device.phases import Phases
from dreammix_trt.engine.device.plan import MemoryPlan, Options, plan_memory
from dreammix_trt.engine.device.records import FLAGS
from dreammix_trt.engine.device.residency import Residency, Usable, planned
from dreammix_trt.engine.device.room import Room, Rooms, Shape
from dreammix_trt.engine.device.staging import Staging, Work
from dreammix_trt.engine.device.subjects import Layout, Subjects
from dreammix_trt.engine.device.texts import Texts
from dreammix_trt.engine.drivers.device import (
    Array,
    Device,
    DeviceError,
    Mark,
    NotFiniteError,
    OutOfMemoryError,
    Stream,
    put,
)
from dreammix_trt.engine.seam import DeviceNetworks
from dreammix_trt.engine.text import Tokenizer

U8 = npt.NDArray[np.uint8]
AHEAD: Final = 2
PATIENCE: Final = 300.0  # seconds without an answer of the device after which it counts as lost
_POLL = 0.0002
_Given = tuple[list[str], list[U8]]


@dataclass(frozen=True)
class Progress:
    """A step of a batch was enqueued. preview(k): picture k's present prediction, uint8 (h, w, 3); waits for it.
    EngineError once the next step is on its way."""

    step: Step
    preview: Callable[[int], U8]


class Studio:
    """Everything of one base that lives on a device between requests; one request at a time. Close it after use.

    networks: those the memory plan has room for, `shared`: all. They and the device stay their owner's: several studios
    may share them, each with memory and a stream of its own. stream: where the networks must run (ONNX Runtime's are
    tied to one), its owner's; None: one is made. shares: other studios use the networks, so their weights stay. plan:
    what takes how much memory. lost: whether the device stopped answering, which ends this studio.
    Raises InputError, EngineError, OutOfMemoryError with the memory plan, and what the networks' `load` raises: under
    "swap" not before the first request.
    """

    def __init__(
        self,
        device: Device,
        networks: DeviceNetworks,
        tokenizers: Sequence[Tokenizer],
        options: Options | None = None,
        stream: Stream | None = None,
        *,
        shares: bool = False,
    ) -> None:
        self.device, self.shared, self.options = device, networks, options or Options()
        networks = self.networks = cast(DeviceNetworks, Usable(networks))
        self.facts: Any = networks.facts
        self._tokenizers = tuple(tokenizers)
        self._check(self.options)
        self._layout = Layout(networks, self.options.pictures)
        regions = self._regions()
        self.plan = self._planned(regions, beside=shares)
        networks = self.networks = cast(DeviceNetworks, planned(networks, self.plan))
        self._marks: list[tuple[str, Mark]] = []
        self._turn: object | None = None  # the batch that has the device's memory now
        self._now: tuple[Room, int] | None = None  # its room and the last step enqueued
        self._weights = 0.0  # seconds spent on weights before it
        self.lost = self.closed = False
        with _told_with(self.plan), ExitStack() as made:
            self._stream = stream or device.stream()
            if stream is None:
                made.callback(self._stream.close)
            try:
                self._make(regions, made, shares)
            except DeviceError:
                if self.lost:  # then nothing can be given back
                    made.pop_all()
                raise
            self._owned = made.pop_all()

    def _make(self, regions: Regions, made: ExitStack, shares: bool) -> None:
        """What takes memory; each is given back by `made`."""
        device, networks = self.device, self.networks
        serves = getattr(networks, "serves", None)
        if serves is not None and not serves(self._stream):
            raise EngineError(
                "ONNX Runtime's networks run in the one stream they were opened with: load the engine a second time"
            )
        self.residency = Residency(networks, self.plan, self._idle, shared=shares)
        self._arena = Arena(device, regions)
        made.callback(self._arena.close)
        self._staging = Staging(device, self._arena, self.options, made)
        self._put(self._arena["numbers"], np.arange(jobs.MOST_STEPS + 1, dtype=np.int32))  # what the counter is set to
        workspace = self._arena["workspace"]
        self.subjects = Subjects(device, self._stream, self._layout, self._arena, self._idle)
        flags = self._arena["flags"]
        self._texts = Texts(
            device, self._stream, networks, self._arena, self._layout, self.subjects, workspace,
            flags.part(flags.shape[0] - 1, 1), self._put,
        )  # fmt: skip
        made.callback(self._texts.close)
        self._rooms = Rooms(self._room, self.options.shapes)
        made.callback(self._rooms.close)

    def _room(self, shape: Shape) -> Room:
        self.residency.make_room()
        workspace = self._arena["workspace"]
        return Room(shape, self.device, self.networks, self._arena, self._layout, workspace, self._put)

    # ------------------------------------------------------------------------------------------------ requests

    def another(self) -> Studio:
        """A second one over the same networks, with memory and a stream of its own; close it before this one.

        Raises EngineError where the networks cannot be shared, OutOfMemoryError with the memory plan.
        """
        self._ready()
        if self.plan.strategy == "swap":
            raise EngineError(
                "the networks take turns in the device's memory (residency 'swap'), so two runtimes would take them "
                "from each other: use one, or free memory so that all networks stay"
            )
        options = replace(self.options, residency=self.plan.strategy)
        return Studio(self.device, self.shared, self._tokenizers, options, shares=True)

    @property
    def has_raw_unet(self) -> bool:
        """Whether steps run on the unpatched UNet: the base has one and the memory plan keeps it."""
        return "unet_raw" in self.networks

    def add_subject(self, name: str, subject: Subject) -> None:
        """Make a subject known; one of the same name is replaced. FileFormatError where it does not fit the base,
        DeviceError; then nothing changes."""
        self._ready()
        self.subjects.add(name, subject)
        self._texts.forget(name)

    def work(self, canvas: Canvas, request: Request, schedule: Schedule, seed: int, subject: str, token: str) -> Work:
        """Check and lay out one picture; touches no device. Raises InputError naming what cannot be painted."""
        jobs.check_size(canvas, self.options.largest_picture)
        picture = Picture.of(canvas, request, schedule, seed, subject)
        jobs.check_tables(picture)
        for place in (picture.first, picture.last):
            if any(side % self.facts.divisor for side in place.size):
                raise InputError(
                    f"reference mode needs a frame of {place.size[0]}x{place.size[1]} pixels here, and this base's "
                    f"networks take multiples of {self.facts.divisor}; use native mode, or another reference_resize"
                )
            if place.work[0] * place.work[1] > self._largest.work[0] * self._largest.work[1]:
                raise InputError(
                    f"the frame of {place.work[1]}x{place.work[0]} is larger than the base's "
                    f"{self._largest.work[1]}x{self._largest.work[0]}; crop the picture to a plainer aspect"
                )
        return Work(picture, texts.texts_of(self._tokenizers, request, subject, token))

    def paint(self, batch: Sequence[Work]) -> Generator[Progress | list[U8], None, None]:
        """Paint up to `options.pictures` pictures of equal shape as one batch: a Progress after each step is enqueued,
        last the finished pictures, uint8 (H, W, 3).

        Where a network gives values that are not finite, the batch runs once more with the float32 twins there are,
        and no Progress tells of that. Raises InputError for pictures that cannot share a batch, NotFiniteError,
        OutOfMemoryError (the studio stays usable), DeviceError. Leaving the iteration stops the work. A batch that is
        begun meanwhile takes the device's memory over; going on with this one then raises EngineError.
        """
        self._ready()
        if not 0 < len(batch) <= self.options.pictures:
            raise InputError(f"{len(batch)} pictures in a batch; this runtime was loaded for {self.options.pictures}")
        jobs.checked_batch([work.picture for work in batch])
        turn = self._turn = object()
        self._texts.settle(proven=False)
        try:
            flagged, images = yield from self._attempt(batch, safe=False)
            if flagged:
                first = flagged[0]  # what comes after it may only have passed it on
                if f"{first}_float32" not in self.networks:
                    raise NotFiniteError(_not_finite(first, "and there is no float32 twin to take instead"))
                logging.getLogger(__name__).warning("%s; painting again in float32", _not_finite(first, "in float16"))
                self._texts.forget()
                flagged, images = _last(self._attempt(batch, safe=True))
                if flagged:
                    raise NotFiniteError(_not_finite(flagged[0], "again, with the twins there are in float32"))
                self._texts.forget()  # they are the twins'
        except (OutOfMemoryError, MemoryError):
            self._recover()
            with _told_with(self.plan):
                raise
        except NotFiniteError:
            self._texts.forget()
            raise
        else:
            self._texts.settle(proven=True)
            yield images
        finally:
            if self._turn is turn:
                self._turn = None
                self._wait_quietly()
                if not self.lost:
                    self._rooms.leave()

    def stages(self, k: int, picture: Picture) -> dict[str, U8]:
        """While the finished batch is still open: what picture k's stages decoded, uint8 (h, w, 3), by name."""
        found = {}
        if picture.second is not None:
            found["local result"] = self._host(self._arena["decoded"][k].reshaped((*picture.first.size, 3)))
        if self._now is not None:
            found["last result"] = self._decoded(k, "x", self._now[0])
        return found

    @property
    def timings(self) -> dict[str, float]:
        """Device seconds of the last batch by phase, after it was finished; "weights": host seconds of loading some."""
        seconds: dict[str, float] = {}
        for (_, earlier), (name, mark) in zip(self._marks, self._marks[1:], strict=False):
            seconds[name] = seconds.get(name, 0.0) + mark.seconds_since(earlier)
        if self.residency.seconds > self._weights:
            seconds["weights"] = self.residency.seconds - self._weights
        return seconds

    @property
    def shapes(self) -> int:
        """How many shapes (frame and batch size) keep captured graphs now."""
        return len(self._rooms)

    def close(self) -> None:
        """Free everything but networks and device; again does nothing. A device that does not answer is left alone."""
        if self.closed:
            return
        self.closed, self._turn = True, None
        try:
            if not self.lost:
                self._idle()
        except DeviceError as error:
            if not self.lost:
                raise
            logging.getLogger(__name__).warning("closing a runtime: %s", error)
        finally:
            if not self.lost:
                self._owned.close()

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------ one batch

    def _attempt(self, batch: Sequence[Work], *, safe: bool) -> Generator[Progress, None, _Given]:
        """A generator: a Progress a step; returns (names of networks whose values were not finite, pictures)."""
        pictures, first = [work.picture for work in batch], batch[0].picture
        rows = 2 if first.request.guided else 1
        shape = Shape(first.first.work, len(batch), rows, safe)
        turn = self._turn
        self._idle()
        self._rooms.leave()  # those of a batch that was left open
        local, keep_local = self._rooms.enter(shape)
        last, keep_last = local, keep_local
        if first.second is not None and first.second.work != first.first.work:
            last, keep_last = self._rooms.enter(replace(shape, work=first.second.work))
        if not safe:  # what is painted again counts as well
            self._marks, self._weights = [("", self._mark())], self.residency.seconds
        self._upload(batch)
        self._tell(batch, rows, local, safe)
        self._start(pictures, local, keep_local)
        now, keep = local, keep_local
        queued: deque[Mark] = deque()
        for step in first.schedule:
            if step.index == first.schedule.hand_over_index:
                self._hand_over(pictures, local, last, keep_local, keep_last)
                now, keep = last, keep_last
            self._step(now, step.network, keep)
            self._now = now, step.index
            queued.append(self.device.mark(self._stream))
            yield Progress(step, self._preview_of(turn, step.index))
            if self._turn is not turn:
                raise EngineError(
                    "this runtime was closed, or has begun another request, before this one was done: take one "
                    "request at a time, or use `another()`"
                )
            while len(queued) > AHEAD:
                self._wait_for(queued.popleft())
        self._marked("loop")
        self._finish(pictures, now, keep)
        return self._downloaded(pictures)

    def _upload(self, batch: Sequence[Work]) -> None:
        self._staging.upload(batch, self.facts, self._stream)
        self._marked("upload")

    def _tell(self, batch: Sequence[Work], rows: int, local: Room, safe: bool) -> None:
        """Subjects and texts."""
        self.device.clear(self._arena["flags"], self._stream)
        self.subjects.enter([work.picture.subject for work in batch])
        if any(self._texts.missing(work.texts) for work in batch):
            self.residency.need("text_encoder", "text_encoder_2", safe=safe)
        dtype = local.arrays["unet"]["encoder_hidden_states"].dtype
        for k, work in enumerate(batch):
            self._texts.tell(
                k, rows, dtype, work.texts, work.picture.request, safe=safe, capture=self.residency.captures
            )
        self._marked("text")

    def _start(self, pictures: Sequence[Picture], local: Room, keep: bool) -> None:
        self.residency.need("vae_encoder", "inpaint_head", safe=local.shape.safe)
        if "inpaint_head" in self.networks:  # the raw UNet never hears of the head
            self.device.clear(self._arena["no feature"], self._stream)
        phase = self._phases(local)
        for k, picture in enumerate(pictures):
            key = ("start", k, picture.schedule[0].stage, picture.schedule.fills, bool(picture.dilate))
            self._play(local, key, lambda k=k, picture=picture: phase.start(k, picture), keep)  # type: ignore[misc]
        self._count_from(0)
        self._marked("start")

    def _step(self, now: Room, network: str, keep: bool) -> None:
        self.residency.need(network, safe=now.shape.safe)
        self._play(now, ("step", network), lambda: self._phases(now).step(network), keep)

    def _hand_over(
        self, pictures: Sequence[Picture], local: Room, last: Room, keep_local: bool, keep_last: bool
    ) -> None:
        """Finish the local stage where its picture is kept, then start the global one."""
        self._marked("loop")
        schedule = pictures[0].schedule
        index = schedule.hand_over_index or 0
        source = "x" if pictures[0].keeps_local else "x0"
        if pictures[0].keeps_local:
            queued: deque[Mark] = deque()
            for step in schedule.steps[index:]:
                self._step(local, step.network, keep_local)
                queued.append(self.device.mark(self._stream))
                if len(queued) > AHEAD:
                    self._wait_for(queued.popleft())
        self.residency.need("vae_encoder", "vae_decoder", "inpaint_head", safe=local.shape.safe)
        before, after = self._phases(local), self._phases(last)
        for k, picture in enumerate(pictures):
            self._play(local, ("decode", k, source), lambda k=k: before.decode_local(k, source), keep_local)  # type: ignore
            key = ("hand over", k, picture.request.gch_background)
            self._play(last, key, lambda k=k, picture=picture: after.hand_over(k, picture), keep_last)  # type: ignore
        self._count_from(index)
        self._marked("hand over")

    def _finish(self, pictures: Sequence[Picture], now: Room, keep: bool) -> None:
        self.residency.need("vae_decoder", safe=now.shape.safe)
        phase = self._phases(now)
        for k, picture in enumerate(pictures):
            key = ("finish", k, picture.keeps_local, picture.second is not None)
            self._play(now, key, lambda k=k, picture=picture: phase.finish(k, picture), keep)  # type: ignore[misc]
        self._marked("finish")

    def _downloaded(self, pictures: Sequence[Picture]) -> tuple[list[str], list[U8]]:
        """Bring pictures and flags back, and wait for them. Names in the order in which the networks run."""
        finished = self._staging.download([picture.canvas.size for picture in pictures], self._stream)
        self._marked("download")
        self._wait_for(self._marks[-1][1])
        self.device.synchronize(self._stream)
        flags, images = finished()
        seen = int(np.bitwise_or.reduce(flags))
        return [name for name, bit in FLAGS.items() if seen & bit], images

    def _preview_of(self, turn: object, index: int) -> Callable[[int], U8]:
        def preview(k: int) -> U8:
            if self._turn is not turn or self._now is None or self._now[1] != index:
                raise EngineError(f"the preview of step {index} is gone: ask for it before the next step")
            return self._decoded(k, "x0", self._now[0])

        return preview

    def _decoded(self, k: int, source: Literal["x", "x0"], now: Room) -> U8:
        """Picture k's latent as a picture of the room's frame."""
        with _told_with(self.plan):
            self.residency.need("vae_decoder", safe=now.shape.safe)
            return self._host(self._phases(now).preview(k, source))

    def _host(self, array: Array) -> U8:
        """A copy of an array, once everything before it is done."""
        host = np.empty(array.shape, np.uint8)
        self._idle()  # a copy to memory that is not pinned waits itself, without end
        self.device.download(host, array, self._stream)
        self.device.synchronize(self._stream)
        return host

    # ------------------------------------------------------------------------------------------------ small things

    def _play(self, where: Room, key: Any, record: Callable[[], None], keep: bool) -> None:
        where.play(key, record, self._stream, capture=keep and self.residency.captures)

    def _phases(self, where: Room) -> Phases:
        return Phases(self.device, self._stream, self._arena, where, self._texts, self.facts)

    def _count_from(self, index: int) -> None:
        """Set the step counter, by a copy within the device."""
        self.device.copy(self._arena["counter"], self._arena["numbers"].part(index, 1), self._stream)

    def _mark(self) -> Mark:
        return self.device.mark(self._stream, timed=True)

    def _marked(self, phase: str) -> None:
        self._marks.append((phase, self._mark()))

    def _wait_for(self, mark: Mark) -> None:
        started = time.monotonic()
        while not mark.passed():
            if time.monotonic() - started > PATIENCE:
                self.lost = True
                raise _silent(self.device)
            time.sleep(_POLL)

    def _ready(self) -> None:
        if self.closed:
            raise EngineError("this runtime was closed: load it again")
        if self.lost:
            raise _silent(self.device)

    def _idle(self) -> None:
        """Wait until nothing in the stream runs any more."""
        self._wait_for(self.device.mark(self._stream))
        self.device.synchronize(self._stream)

    def _wait_quietly(self) -> None:
        """After a request, however it ended: rooms of guests can only be closed when nothing runs in them."""
        try:
            if not self.lost:
                self._idle()
        except Exception as error:  # the request's own error is on its way already, or the next request will tell
            logging.getLogger(__name__).debug("waiting after a request: %s", error)

    def _recover(self) -> None:
        """Give back what a request took, after it found no memory."""
        self._wait_quietly()
        if self.lost:
            return
        self._rooms.close()
        self._texts.close()
        self._texts.forget()

    # ------------------------------------------------------------------------------------------------ making

    @property
    def _largest(self) -> Shape:
        side = self.facts.native_side
        frames: Sequence[Size] = self.networks.frames() or ((side, side),)
        return Shape(max(frames, key=lambda size: size[0] * size[1]), self.options.pictures, 2)

    def _check(self, options: Options) -> None:
        most = self.networks.most_pictures
        if most is not None and options.pictures > most:
            raise InputError(
                f"pictures is {options.pictures}, these engines take {most} in a batch; "
                f"build them again with `--pictures {options.pictures}`"
            )
        for name in ("unet", "text_encoder", "text_encoder_2", "vae_encoder", "vae_decoder"):
            if name not in self.networks:
                raise EngineError(f"the base has no network {name!r}; build it again with `dreammix-trt build`")

    def _regions(self) -> Regions:
        largest, options = self._largest, self.options
        return {
            **phases.regions(_scratch, largest, options.largest_picture), **jobs.regions(options.pictures),
            **room.regions(self.networks, largest), **texts.regions(self.networks, options.pictures, 2, options.texts),
            **self._layout.regions(options.subjects), "workspace": ((self._workspace(largest),), "uint8"),
        }  # fmt: skip

    def _workspace(self, largest: Shape) -> int:
        """Scratch for the neediest network: they never run at once."""
        needs = [256]
        for name in FLAGS:
            sides = largest.batch if name.startswith("unet") else largest.vae if name.startswith("vae") else largest.one
            for each in (name, f"{name}_float32"):
                if each in self.networks:
                    needs.append(self.networks.workspace_bytes(each, sides))
        return max(needs)

    def _planned(self, regions: Regions, beside: bool) -> MemoryPlan:
        free, total = self.device.memory()
        taken = sizes(regions)
        workspace = taken.pop("workspace")
        loaded = [name for name in self.networks.loaded if name in self.networks]
        plan = plan_memory(self.networks, free, total, self.options, taken, workspace, loaded=loaded, beside=beside)
        logging.getLogger(__name__).info("%s", plan)
        return plan

    def _put(self, to: Array, values: np.ndarray) -> None:
        put(self.device, to, values, self._stream, self._idle)


def _scratch(kernel: str, *sides: int) -> int:
    """Bytes of scratch a kernel needs: "fill" (pictures, height, width), "distance" (1, pixels, 1), "step"."""
    import importlib

    gpu = importlib.import_module("dreammix_trt._cpp").gpu
    pictures, height, width = sides
    if kernel == "fill":
        return int(gpu.fill_scratch(height=height, width=width))
    if kernel == "distance":
        return int(gpu.distance_scratch(height * width))
    return int(gpu.step_scratch(pictures=pictures, channels=phases.CHANNELS, height=height, width=width))


@contextmanager
def _told_with(plan: MemoryPlan) -> Iterator[None]:
    """Lack of memory is told with the plan. A MemoryError is torch's, by way of export/."""
    try:
        yield
    except (OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(f"{error}\nThe memory plan was:\n{plan}") from error


def _silent(device: Device) -> DeviceError:
    """The error for a device that does not answer: nothing more can be asked of it."""
    error = DeviceError(
        f"{device.name} has not answered for {PATIENCE:.0f} s; restart the program, and the driver where that does not "
        "help"
    )
    error.lost = True
    return error


def _not_finite(name: str, how: str) -> str:
    remedy = "lower guidance_scale or the subject's scale"
    if name.startswith("vae"):
        remedy += ", or build with a VAE that stays within float16 (`--vae`)"
    return f"{name} gave values that are not numbers {how}: {remedy}"


def _last(attempt: Generator[Progress, None, _Given]) -> _Given:
    """Run a generator to its end and give what it returns."""
    while True:
        try:
            next(attempt)
        except StopIteration as end:
            given: _Given = end.value
            return given


__all__ = ["AHEAD", "Progress", "Studio", "Work"]
