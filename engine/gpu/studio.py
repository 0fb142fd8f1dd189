"""Painting on a device: one arena, one stream, weights, subjects, texts and graphs, for request after request.

A batch is uploaded in one go; from there until the finished pictures come back nothing crosses to the host but the
question whether to go on. The host enqueues at most `AHEAD` steps more than are done, so leaving the iteration stops
the work, while the device never waits for the host.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import EngineError, InputError
from dreammix_trt.core.request import Request
from dreammix_trt.core.schedule import Schedule, Step
from dreammix_trt.core.subject import Subject
from dreammix_trt.engine.canvas import Canvas
from dreammix_trt.engine.geometry import Size
from dreammix_trt.engine.gpu import jobs, phases, room, texts
from dreammix_trt.engine.gpu.arena import Arena, Regions, sizes
from dreammix_trt.engine.gpu.device import Array, Device, DeviceError, Mark, NotFiniteError, OutOfMemoryError, Stream
from dreammix_trt.engine.gpu.jobs import Picture
from dreammix_trt.engine.gpu.networks import DeviceNetworks
from dreammix_trt.engine.gpu.phases import Phases
from dreammix_trt.engine.gpu.plan import MemoryPlan, Options, plan_memory
from dreammix_trt.engine.gpu.records import FLAGS
from dreammix_trt.engine.gpu.residency import Planned, Residency
from dreammix_trt.engine.gpu.room import Room, Rooms, Shape
from dreammix_trt.engine.gpu.subjects import NOBODY, Layout, Subjects
from dreammix_trt.engine.gpu.texts import PictureTexts, Texts
from dreammix_trt.engine.text import Tokenizer

U8 = npt.NDArray[np.uint8]
AHEAD: Final = 2
PATIENCE: Final = 300.0  # seconds without an answer of the device after which it counts as lost
_POLL = 0.0002
_Given = tuple[list[str], list[U8]]


@dataclass(frozen=True)
class Work:
    """One picture with all it needs: its pixels are its canvas'."""

    picture: Picture
    texts: PictureTexts


@dataclass(frozen=True)
class Progress:
    """A step of a batch was enqueued. preview(k): picture k's present prediction, uint8 (h, w, 3); waits for it."""

    step: Step
    preview: Callable[[int], U8]


class Studio:
    """Everything of one base that lives on a device between requests; one request at a time. Close it after use.

    networks: those the memory plan has room for, `shared`: all. They and the device stay their owner's: several studios
    may share them, each with memory and a stream of its own. stream: where the networks must run (ONNX Runtime's are
    tied to one), its owner's; None: one is made.
    """

    def __init__(
        self,
        device: Device,
        networks: DeviceNetworks,
        tokenizers: Sequence[Tokenizer],
        options: Options | None = None,
        stream: Stream | None = None,
    ) -> None:
        self.device, self.shared, self.options = device, networks, options or Options()
        self.networks = networks
        self.facts: Any = networks.facts
        self._tokenizers = tuple(tokenizers)
        self._check(self.options)
        self._layout = Layout(networks, self.options.pictures)
        regions = self._regions()
        self.plan = self._planned(regions)
        self._stream, self._owns_stream = stream or device.stream(), stream is None
        self.residency = Residency(networks, self.plan, lambda: device.synchronize(self._stream))
        networks = self.networks = cast(DeviceNetworks, Planned(networks, self.plan))
        self._arena = Arena(device, regions)
        self._staging = _Staging(device, self._arena, self.options)
        self._prepare()
        workspace = self._arena["workspace"]
        self.subjects = Subjects(device, self._stream, self._layout, self._arena)
        flags = self._arena["flags"]
        self._texts = Texts(
            device, self._stream, networks, self._arena, self._layout, self.subjects, workspace,
            flags.part(flags.shape[0] - 1, 1),
        )  # fmt: skip
        self._rooms = Rooms(
            lambda shape: Room(shape, device, networks, self._arena, self._layout, workspace), self.options.shapes
        )
        self._marks: list[tuple[str, Mark]] = []
        self._finished = 0  # pictures of the last batch
        self.closed = False

    # ------------------------------------------------------------------------------------------------ requests

    @property
    def has_raw_unet(self) -> bool:
        """Whether steps run on the unpatched UNet: the base has one and the memory plan keeps it."""
        return "unet_raw" in self.networks

    def add_subject(self, name: str, subject: Subject) -> None:
        """Make a subject known; one of the same name is replaced. FileFormatError where it does not fit the base."""
        self.subjects.add(name, subject)
        self._texts.forget(name)

    def work(self, canvas: Canvas, request: Request, schedule: Schedule, seed: int, subject: str, token: str) -> Work:
        """Check and lay out one picture; touches no device. Raises InputError naming what cannot be painted."""
        jobs.check_size(canvas, self.options.largest_picture)
        picture = Picture.of(canvas, request, schedule, seed, subject)
        for place in (picture.first, picture.last):
            if place.work[0] * place.work[1] > self._largest.work[0] * self._largest.work[1]:
                raise InputError(
                    f"the frame of {place.work[1]}x{place.work[0]} is larger than the base's "
                    f"{self._largest.work[1]}x{self._largest.work[0]}; crop the picture to a plainer aspect"
                )
        return Work(picture, texts.texts_of(self._tokenizers, request, subject, token))

    def paint(self, batch: Sequence[Work]) -> Generator[Progress | list[U8], None, None]:
        """Paint up to `options.pictures` pictures of equal shape as one batch: a Progress after each step is enqueued,
        last the finished pictures, uint8 (H, W, 3).

        Where a network gives values that are not finite, the batch runs once more with the float32 twins there are.
        Raises InputError for pictures that cannot share a batch, NotFiniteError, OutOfMemoryError (the studio stays
        usable), DeviceError. Leaving the iteration stops the work.
        """
        if self.closed:
            raise EngineError("this runtime was closed: load it again")
        if not 0 < len(batch) <= self.options.pictures:
            raise InputError(f"{len(batch)} pictures in a batch; this runtime was loaded for {self.options.pictures}")
        jobs.checked_batch([work.picture for work in batch])
        try:
            flagged, images = yield from self._attempt(batch, safe=False)
            if flagged:
                twins = [name for name in flagged if f"{name}_float32" in self.networks]
                if not twins:
                    raise NotFiniteError(_not_finite(flagged, "and it has no float32 twin"))
                logging.getLogger(__name__).warning("%s; painting again in float32", _not_finite(flagged, "in float16"))
                self._texts.forget()
                flagged, images = _last(self._attempt(batch, safe=True))
                if flagged:
                    raise NotFiniteError(_not_finite(flagged, "in float32, too"))
        except OutOfMemoryError as error:
            self._recover()
            raise OutOfMemoryError(f"{error}\nThe memory plan was:\n{self.plan}") from error
        except NotFiniteError:
            self._texts.forget()
            raise
        yield images

    def stages(self, k: int, picture: Picture) -> dict[str, U8]:
        """After a batch: what picture k's stages decoded, uint8 (h, w, 3), by name."""
        found = {}
        if picture.second is not None:
            found["local result"] = self._host(self._arena["decoded"][k].reshaped((*picture.first.size, 3)))
        if k == self._finished - 1:
            found["last result"] = self._host(self._arena["last decoded"].reshaped((*picture.last.size, 3)))
        return found

    @property
    def timings(self) -> dict[str, float]:
        """Device seconds of the last batch by phase, after it was finished; "weights": host seconds of loading some."""
        seconds: dict[str, float] = {}
        for (_, earlier), (name, mark) in zip(self._marks, self._marks[1:], strict=False):
            seconds[name] = seconds.get(name, 0.0) + mark.seconds_since(earlier)
        if self.residency.seconds:
            seconds["weights"] = self.residency.seconds
        return seconds

    @property
    def shapes(self) -> int:
        """How many frame shapes have rooms that stay."""
        return len(self._rooms)

    def close(self) -> None:
        """Free everything but networks and device; again does nothing."""
        if self.closed:
            return
        self.closed = True
        try:
            self.device.synchronize(self._stream)
        finally:
            self._texts.close()
            self._rooms.close()
            self._staging.close()
            self._arena.close()
            if self._owns_stream:
                self._stream.close()

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
        self._idle()
        try:
            local, keep_local = self._rooms.enter(shape)
            last, keep_last = local, keep_local
            if first.second is not None and first.second.work != first.first.work:
                last, keep_last = self._rooms.enter(replace(shape, work=first.second.work))
            self._marks = [("", self._mark())]
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
                queued.append(self.device.mark(self._stream))
                yield Progress(step, self._preview_of(now))
                while len(queued) > AHEAD:
                    self._wait_for(queued.popleft())
            self._marked("loop")
            self._finish(pictures, now, keep)
            return self._downloaded(pictures)
        finally:
            self._wait_quietly()
            self._rooms.leave()

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
            for step in schedule.steps[index:]:
                self._step(local, step.network, keep_local)
        self.residency.need("vae_encoder", "vae_decoder", "inpaint_head", safe=local.shape.safe)
        before, after = self._phases(local), self._phases(last)
        for k, picture in enumerate(pictures):
            self._play(local, ("decode", k, source), lambda k=k: before.decode_local(k, source), keep_local)  # type: ignore
            key = ("hand over", k, picture.request.gch_background, local.shape.work)
            self._play(last, key, lambda k=k, picture=picture: after.hand_over(k, picture), keep_last)  # type: ignore
        self._count_from(index)
        self._marked("hand over")

    def _finish(self, pictures: Sequence[Picture], now: Room, keep: bool) -> None:
        self.residency.need("vae_decoder", safe=now.shape.safe)
        phase = self._phases(now)
        for k, picture in enumerate(pictures):
            key = ("finish", k, picture.keeps_local, picture.second is not None)
            self._play(now, key, lambda k=k, picture=picture: phase.finish(k, picture), keep)  # type: ignore[misc]
        self._finished = len(pictures)
        self._marked("finish")

    def _downloaded(self, pictures: Sequence[Picture]) -> tuple[list[str], list[U8]]:
        """Bring pictures and flags back, and wait for them."""
        finished = self._staging.download([picture.canvas.size for picture in pictures], self._stream)
        self._marked("download")
        self._wait_for(self._marks[-1][1])
        self.device.synchronize(self._stream)
        flags, images = finished()
        seen = int(np.bitwise_or.reduce(flags))
        return [name for name, bit in FLAGS.items() if seen & bit], images

    def _preview_of(self, now: Room) -> Callable[[int], U8]:
        def preview(k: int) -> U8:
            self.residency.need("vae_decoder", safe=now.shape.safe)
            shown = self._phases(now).preview(k)
            return self._host(shown)

        return preview

    def _host(self, array: Array) -> U8:
        """A copy of an array, once everything before it is done."""
        host = np.empty(array.shape, np.uint8)
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
                raise DeviceError(
                    f"{self.device.name} has not answered for {PATIENCE:.0f} s; restart the program, and the driver "
                    "where that does not help"
                )
            time.sleep(_POLL)

    def _idle(self) -> None:
        """Wait until nothing of an earlier request runs any more."""
        self._wait_for(self.device.mark(self._stream))
        self.device.synchronize(self._stream)

    def _wait_quietly(self) -> None:
        """After a request, however it ended: rooms of guests can only be closed when nothing runs in them."""
        try:
            self._idle()
        except Exception as error:  # the request's own error is on its way already, or the next request will tell
            logging.getLogger(__name__).debug("waiting after a request: %s", error)

    def _recover(self) -> None:
        """Give back what a request took, after it found no memory."""
        self._wait_quietly()
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

    def _planned(self, regions: Regions) -> MemoryPlan:
        free, total = self.device.memory()
        taken = sizes(regions)
        workspace = taken.pop("workspace")
        plan = plan_memory(self.networks, free, total, self.options, taken, workspace, loaded=self.networks.loaded)
        logging.getLogger(__name__).info("%s", plan)
        return plan

    def _prepare(self) -> None:
        """Fill what never changes: the numbers that the step counter is set to."""
        numbers = np.arange(jobs.MOST_STEPS + 1, dtype=np.int32)
        pinned = self.device.pinned(numbers.nbytes)
        pinned.array[:] = numbers.view(np.uint8)
        self.device.upload(self._arena["numbers"].reshaped((numbers.nbytes,), "uint8"), pinned.array, self._stream)
        self.device.synchronize(self._stream)
        pinned.free()


class _Staging:
    """Pinned host memory beside the arena: what a batch uploads, and the pictures it brings back."""

    def __init__(self, device: Device, arena: Arena, options: Options) -> None:
        self._device, self._arena = device, arena
        self._block = jobs.Block(options.pictures)
        names = (*jobs.regions(options.pictures), "image", "mask")
        self._up = {name: device.pinned(arena[name].nbytes) for name in names}
        self._down = {name: device.pinned(arena[name].nbytes) for name in ("out", "flags")}

    def upload(self, batch: Sequence[Work], facts: Any, stream: Any) -> None:
        ids = np.zeros((len(batch) * jobs.PROMPTS, 2, 77), np.int64)
        for k, work in enumerate(batch):
            for number, wanted in enumerate(work.texts.all):
                ids[k * jobs.PROMPTS + number] = wanted.ids
        plans = np.stack([texts.plan_record(work.texts.plan) for work in batch])
        for name, data in self._block.fill([work.picture for work in batch], ids, plans, facts):
            self._copy(name, self._arena[name], 0, data, stream)
        for k, work in enumerate(batch):
            canvas = work.picture.canvas
            for name, data in (("image", canvas.image), ("mask", canvas.mask)):
                each = self._arena[name].nbytes // self._arena[name].shape[0]
                flat = np.ascontiguousarray(data).reshape(-1)
                self._copy(name, self._arena[name][k], k * each, flat, stream)

    def download(self, shapes: Sequence[Size], stream: Any) -> Callable[[], tuple[npt.NDArray[np.int32], list[U8]]]:
        """Enqueue the way back; the function gives flags and pictures once the device is done."""
        out, flags = self._arena["out"], self._arena["flags"]
        each = out.nbytes // out.shape[0]
        parts = []
        for k, (height, width) in enumerate(shapes):
            part = self._down["out"].array[k * each : k * each + 3 * height * width]
            self._device.download(part, out[k].reshaped((part.nbytes,), "uint8"), stream)
            parts.append(part.reshape(height, width, 3))
        self._device.download(
            self._down["flags"].array[: flags.nbytes], flags.reshaped((flags.nbytes,), "uint8"), stream
        )
        return lambda: (
            self._down["flags"].array[: flags.nbytes].view(np.int32).copy(),
            [part.copy() for part in parts],
        )

    def close(self) -> None:
        for pinned in (*self._up.values(), *self._down.values()):
            pinned.free()

    def _copy(self, name: str, to: Array, at: int, data: npt.NDArray[np.uint8], stream: Any) -> None:
        pinned = self._up[name].array[at : at + data.nbytes]
        pinned[:] = data
        self._device.upload(to.reshaped((data.nbytes,), "uint8"), pinned, stream)


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


def _not_finite(names: Sequence[str], how: str) -> str:
    return f"{', '.join(names)} gave values that are not numbers {how}: lower guidance_scale or the subject's scale"


def _last(attempt: Generator[Progress, None, _Given]) -> _Given:
    """Run a generator to its end and give what it returns."""
    while True:
        try:
            next(attempt)
        except StopIteration as end:
            given: _Given = end.value
            return given


__all__ = ["AHEAD", "NOBODY", "Progress", "Studio", "Work"]
