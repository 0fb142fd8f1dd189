"""Requests on a device as a whole: one arena, one stream, weights, subjects, texts and graphs, batch after batch.

A batch is uploaded in one go. From then until the finished pictures come back, the host only decides whether to go on.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import DeviceError, EngineError, InputError, OutOfMemoryError
from dreammix_trt.core.seam import Array, BaseFacts, DeviceNetworks, Stream
from dreammix_trt.core.subject import Subject
from dreammix_trt.core.token_adapter import TokenAdapter
from dreammix_trt.core.token_factors import read_as_subject
from dreammix_trt.engine.canvas.geometry import Size
from dreammix_trt.engine.device import blocks
from dreammix_trt.engine.device.arena import Arena
from dreammix_trt.engine.device.blocks import Picture
from dreammix_trt.engine.device.captures import Statistics, Tally
from dreammix_trt.engine.device.memory_plan import MemoryPlan, Options, explain_memory
from dreammix_trt.engine.device.needs import Needs
from dreammix_trt.engine.device.pace import Pace
from dreammix_trt.engine.device.painter import Marks, add_up_marks, paint_batch
from dreammix_trt.engine.device.residency import Residency, Usable, restrict_to_plan
from dreammix_trt.engine.device.room import Room, Rooms, RoomShape
from dreammix_trt.engine.device.slot_layout import list_slotted
from dreammix_trt.engine.device.texts import DeviceTexts
from dreammix_trt.engine.device.tokens import SingleCalls
from dreammix_trt.engine.device.transfers import Transfers, Uploads
from dreammix_trt.engine.device.weights import DeviceWeights
from dreammix_trt.engine.drivers.device import Device, put
from dreammix_trt.engine.enrolment import Reference, make_rows
from dreammix_trt.engine.painting import run_safely
from dreammix_trt.engine.runtime import Painting, Work, check_parts
from dreammix_trt.engine.text import Tokenizer

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


class Studio:
    """A base on a device (see `engine.runtime.Runtime`). One request at a time. Close it after use.

    A batch has one subject, whose factors are merged into the networks' weights before it is painted (`weights`).

    networks: those that the memory plan has room for.
    shared: all of the base's networks.
    plan: what takes how much memory.

    Networks and device belong to the caller. Several studios may share them, each with its own memory and stream.
    """

    def __init__(
        self,
        device: Device,
        networks: DeviceNetworks,
        options: Options | None = None,
        stream: Stream | None = None,
        *,
        shares: bool = False,
        adapter: TokenAdapter | None = None,
    ) -> None:
        """Plan and allocate the memory.

        adapter: the base's token adapter, if it has one.
        stream: the caller's, where the networks must run (ONNX Runtime's are tied to one); None: the studio makes one.
        shares: other studios use the networks, so their weights stay.

        Raises InputError, EngineError, OutOfMemoryError with the memory plan, and what the networks' `load` raises;
        under "swap" the latter only in the first request.
        """
        self.device, self.shared, self.options = device, networks, options or Options()
        usable = cast(DeviceNetworks, Usable(networks))
        self.facts: BaseFacts = networks.facts
        self.adapter = adapter
        self._reading = read_as_subject(adapter) if adapter else None
        self.needs = Needs(usable, self.options, self._reading, adapter.config if adapter else None)
        self.plan: MemoryPlan = self.needs.plan(device, beside=shares)
        self.networks = cast(DeviceNetworks, restrict_to_plan(usable, self.plan))
        self.turn: object | None = None  # the batch that uses the device's memory now
        self.closed = False
        self._marks: Marks = []
        self._weights_before = 0.0
        self._tally = Tally()
        with explain_memory(self.plan), ExitStack() as made:
            self.stream = stream or device.make_stream()
            if stream is None:
                made.callback(self.stream.close)
            self.pace = Pace(device, self.stream)
            try:
                self._take_memory(made, shares)
            except DeviceError:
                if self.pace.lost:  # then nothing can be freed
                    made.pop_all()
                raise
            self._owned = made.pop_all()

    def _take_memory(self, made: ExitStack, shares: bool) -> None:
        """Make everything that takes memory; `made` frees each of it."""
        device, networks = self.device, self.networks
        serves = getattr(networks, "serves", None)
        if serves is not None and not serves(self.stream):
            raise EngineError(
                "ONNX Runtime's networks run in the one stream they were opened with: load the engine a second time"
            )
        self.residency = Residency(networks, self.plan, self.pace.wait, shared=shares)
        self.arena = Arena(device, self.needs.list_regions(self.plan))
        made.callback(self.arena.close)
        self.transfers = Transfers(device, self.arena, list(self.needs.blocks), made)
        self.put(self.arena["numbers"], np.arange(blocks.MOST_STEPS + 1, dtype=np.int32))  # the values of the counter
        self.weights = DeviceWeights(
            device,
            self.stream,
            networks,
            list_slotted(networks),
            self.arena,
            Uploads(device, self.stream, self.pace.wait_for, made),
            turns=self.plan.strategy == "swap",
            pristine=self.plan.pristine,
            reading=self._reading,
        )
        self.texts = DeviceTexts(device, self.stream, networks, self.arena, self.weights, self.put, self._tally)
        made.callback(self.texts.close)
        self.rooms = Rooms(self._make_room, self.options.shapes)
        made.callback(self.rooms.close)

    def _make_room(self, shape: RoomShape) -> Room:
        self.residency.free_weights()
        workspace = self.arena["workspace"]
        return Room(shape, self.device, self.networks, self.arena, self.weights, workspace, self.put, self._tally)

    # -- what a runtime offers ----------------------------------------------------------------------------------------

    @property
    def most_pictures(self) -> int:
        """The largest batch."""
        return self.options.pictures

    @property
    def frames(self) -> Sequence[Size] | None:
        """The frame sizes that the engines take; None: any."""
        return self.networks.frames()

    @property
    def contexts(self) -> Sequence[int]:
        """The lengths of the text condition that the engines take; a range: those that memory is set aside for."""
        return self.needs.contexts

    @property
    def has_raw_unet(self) -> bool:
        """Whether steps run on the unpatched UNet: the base has one and the memory plan keeps it."""
        return "unet_raw" in self.networks

    @property
    def lost_raw_unet(self) -> bool:
        """Whether the memory plan omits the base's unpatched UNet."""
        return "unet_raw" in self.shared and not self.has_raw_unet

    def add_subject(self, name: str, subject: Subject) -> None:
        """Make a subject known. It replaces one of the same name.

        Raises FileFormatError where it does not fit the base, DeviceError; then nothing changes.
        """
        self._check_open()
        self.weights.add(name, subject)
        self.texts.forget(name)

    def remove_subject(self, name: str) -> None:
        """Forget a subject; its room on the device is free for others."""
        self._check_open()
        self.weights.remove(name)
        self.texts.forget(name)

    def make_rows(self, references: Sequence[Reference], class_name: str, tokenizers: Sequence[Tokenizer]) -> F32:
        """Make the rows of a subject; see `engine.runtime.Runtime`. After an overflow with the available twins.

        A batch that was begun before cannot go on. Raises also InputError where the engines do not take the class as
        it is, OutOfMemoryError, DeviceError.
        """
        self._check_open()
        assert self.adapter is not None
        config = self.adapter.config
        self.weights.check_adapter()
        self.needs.check_enrolment()
        turn = self.turn = object()
        self.pace.wait()
        self.leave_rooms()

        def make(safe: bool) -> F32:
            return make_rows(references, class_name, tokenizers, SingleCalls(self, config, safe), self.facts, config)

        try:
            with explain_memory(self.plan):
                return run_safely(make, self.networks.__contains__, "while enrolling")
        except (OutOfMemoryError, MemoryError):
            self.recover()
            raise
        finally:
            if self.turn is turn:
                self.turn = None

    def check(self, work: Work) -> Hashable:
        """What pictures of one batch must share. Raises InputError for a picture that cannot be painted."""
        if work.noise is not None:
            raise InputError("noise is given, but on a GPU it is drawn there, from the seed: load with device='cpu'")
        check_parts(work.request, self.networks.__contains__)
        picture = Picture.of(work)
        self.needs.check_picture(picture)
        self.weights.check_range(work.subject)
        return picture.variant

    def paint(self, batch: Sequence[Work], keep: Collection[int] = ()) -> Painting:
        """Paint up to `most_pictures` pictures of equal `check`; see `engine.runtime.Runtime.paint`.

        A batch that begins meanwhile takes over the device's memory. Going on with this one then raises EngineError.

        Raises InputError for pictures that cannot share a batch, NotFiniteError, OutOfMemoryError (the studio stays
        usable), DeviceError.
        """
        self._check_open()
        if not 0 < len(batch) <= self.options.pictures:
            raise InputError(f"{len(batch)} pictures in a batch; this runtime was loaded for {self.options.pictures}")
        pictures = [Picture.of(work) for work in batch]
        blocks.check_batch(pictures)
        self._marks, self._weights_before = [], self.residency.seconds
        yield from paint_batch(self, pictures, keep, self._marks)

    @property
    def timings(self) -> Mapping[str, float]:
        """Device seconds of the last finished batch by phase.

        "subject": merging it into the UNets, which under "swap" is part of "loop", as the text encoders' is of "text".
        "weights": host seconds of loading networks, if some were.
        """
        seconds = add_up_marks(self._marks)
        if self.residency.seconds > self._weights_before:
            seconds["weights"] = self.residency.seconds - self._weights_before
        return seconds

    # -- what only a device has ---------------------------------------------------------------------------------------

    @property
    def lost(self) -> bool:
        """Whether the device stopped answering, which ends this studio."""
        return self.pace.lost

    @property
    def shapes(self) -> int:
        """How many shapes (frame and batch size) keep captured graphs now."""
        return len(self.rooms)

    @property
    def statistics(self) -> Statistics:
        """How its phases ran so far: captured, replayed, plainly, and which could not be captured and why."""
        return self._tally.statistics

    def another(self) -> Studio:
        """Make a second studio over the same networks, with its own memory and stream. Close it before this one.

        Its memory includes slots' weights, and copies of the base's own ones where there is room.

        Raises EngineError where the networks cannot be shared, OutOfMemoryError with the memory plan.
        """
        self._check_open()
        if self.plan.strategy == "swap":
            raise EngineError(
                "the networks take turns in the device's memory (residency 'swap'), so two runtimes would take them "
                "from each other: use one, or free memory so that all networks stay"
            )
        options = replace(self.options, residency=self.plan.strategy)
        return Studio(self.device, self.shared, options, shares=True, adapter=self.adapter)

    def leave_rooms(self) -> None:
        """Free what was bound for one request: guests' rooms and twins. The device must be idle."""
        self.rooms.leave()
        self.texts.leave()

    def recover(self) -> None:
        """Free what a request has taken, after it found no memory."""
        self.pace.wait_quietly()
        if self.pace.lost:
            return
        self.rooms.close()
        self.texts.close()
        self.texts.forget()

    def bring(self, array: Array) -> npt.NDArray[Any]:
        """Copy a device's array to the host, once all earlier work is done."""
        host = np.empty(array.shape, array.dtype)
        self.pace.wait()  # a copy to memory that is not pinned waits by itself, without end
        self.device.download(host, array, self.stream)
        self.device.synchronize(self.stream)
        return host

    def close(self) -> None:
        """Free everything but networks and device. Again does nothing. A device that does not answer is left alone."""
        if self.closed:
            return
        self.closed, self.turn = True, None
        try:
            if not self.pace.lost:
                self.pace.wait()
        except DeviceError as error:
            if not self.pace.lost:
                raise
            logging.getLogger(__name__).warning("closing a runtime: %s", error)
        finally:
            if not self.pace.lost:
                self._owned.close()

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self.closed:
            raise EngineError("this runtime was closed: load it again")
        self.pace.check()

    def put(self, to: Array, values: npt.NDArray[np.generic]) -> None:
        """Copy values to a device's array, and wait."""
        put(self.device, to, values, self.stream, self.pace.wait)


__all__ = ["Studio"]
