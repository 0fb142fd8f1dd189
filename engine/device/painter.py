"""The phases of one batch on a device: in which room they run, which weights they need, in what order."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import EngineError, NotFiniteError, OutOfMemoryError
from dreammix_trt.core.networks import KINDS, flag_of, kind_of, names_of_group
from dreammix_trt.core.schedule import Step
from dreammix_trt.core.seam import Array
from dreammix_trt.engine.device import phases
from dreammix_trt.engine.device.blocks import Picture
from dreammix_trt.engine.device.choices import Chosen
from dreammix_trt.engine.device.memory_plan import explain_memory
from dreammix_trt.engine.device.phases import Phases
from dreammix_trt.engine.device.room import Room
from dreammix_trt.engine.drivers.device import Mark
from dreammix_trt.engine.painting import Preview, paint_safely
from dreammix_trt.engine.runtime import Painted, Painting

if TYPE_CHECKING:
    from dreammix_trt.engine.device.studio import Studio

U8 = npt.NDArray[np.uint8]


Marks = list[tuple[str, Mark]]
_TWINS_NEED_ROOM: Final = (
    "a network overflowed float16, and there is no room to paint again with the float32 twins, which need weights and "
    "scratch memory beside the rest: load with fewer pictures or shapes or a smaller largest_picture, end other "
    "programs that use the GPU, or build with a VAE that stays within float16 (`--vae`)"
)


def add_up_marks(marks: Marks) -> dict[str, float]:
    """Device seconds of each phase.

    marks: the first one starts the clock; marks without a name end no phase.
    """
    seconds: dict[str, float] = {}
    for (_, earlier), (name, mark) in pairwise(marks):
        if name:
            seconds[name] = seconds.get(name, 0.0) + mark.seconds_since(earlier)
    return seconds


def _list_group(network: str) -> tuple[str, ...]:
    """The networks that are needed together with one."""
    return names_of_group(kind_of(network).group)


class DevicePainter:
    """See `engine.painting.Painter`.

    studio: paints in this studio's memory.
    chosen: what the batch's subject meant when its request began.
    safe: use the available float32 twins.
    marks: points in the stream with the phase that ended there; the first starts the clock.
    """

    def __init__(self, studio: Studio, batch: Sequence[Picture], chosen: Chosen, *, safe: bool, marks: Marks) -> None:
        self._studio, self._batch, self._safe, self.marks = studio, batch, safe, marks
        self.schedule = batch[0].work.schedule
        self.keeps_local = batch[0].keeps_local
        self._turn = studio.turn
        self._step_done = -1
        self._rooms: list[tuple[Room, bool]] = []
        self._now = 0  # the stage under way
        self._chosen = chosen
        self._attended = ""  # the UNet that has the keys and values of this stage

    # -- the phases ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Enter the rooms, merge the subject, upload, encode the texts, start every picture."""
        studio, first = self._studio, self._batch[0]
        studio.pace.wait()
        studio.leave_rooms()  # those of a batch that was not finished
        for stage in first.stages:
            shape = studio.needs.shape_room(self._batch, stage, safe=self._safe)
            same = next((entered for entered in self._rooms if entered[0].shape == shape), None)
            self._rooms.append(same or studio.rooms.enter(shape))
        if not self.marks:
            self._mark("")
        if studio.plan.strategy != "swap":  # else weights come with their phases
            for network in dict.fromkeys(step.network for step in self.schedule):
                studio.weights.enter(self._chosen, _list_group(network))
        self._mark("subject")
        studio.transfers.upload(self._batch, studio.facts, studio.stream)
        self._mark("upload")
        self._prepare_texts()
        self._ask_prior()
        studio.residency.need("vae_encoder", "inpaint_head", safe=self._safe)
        if "inpaint_head" in studio.networks:  # the raw UNet never gets the head's feature
            studio.device.clear(studio.arena["no feature"], studio.stream)
        for k, picture in enumerate(self._batch):
            schedule = picture.work.schedule
            self._play(phases.Start(k, schedule[0].stage, schedule.fills, bool(picture.dilate)))
        self._count_from(0)
        studio.pace.begin()
        self._mark("start")

    def step(self, step: Step) -> None:
        """Carry out one row of the schedule. The host stays a few steps ahead."""
        self._check_turn()
        names = _list_group(step.network)
        self._studio.residency.need(*names, safe=self._safe)
        self._studio.weights.enter(self._chosen, names)
        if self._attended != step.network:
            self._play(phases.Attend(step.network))
            self._attended = step.network
        self._play(phases.TakeStep(step.network))
        self._step_done = step.index
        self._studio.pace.count_step()

    def hand_over(self, step: Step) -> None:
        """Decode the first stage's pictures, start the second stage."""
        self._check_turn()
        self._mark("loop")
        self._need_decoder(*names_of_group("picture"))
        for k in range(len(self._batch)):
            self._play(phases.DecodeLocal(k, "x" if self.keeps_local else "x0", self._see(k)))
        self._now = 1
        self._studio.residency.need("vae_encoder", "inpaint_head", safe=self._safe)
        for k, picture in enumerate(self._batch):
            self._play(phases.HandOver(k, picture.work.request.gch_background == "original"))
        self._attended = ""  # the second stage has another text
        self._count_from(step.index)
        self._studio.pace.begin()
        self._mark("hand over")

    def finish(self) -> list[U8]:
        """Decode and paste, then download pictures and flags and wait for them."""
        self._check_turn()
        self._mark("loop")
        studio = self._studio
        self._need_decoder("vae_decoder")
        for k, picture in enumerate(self._batch):
            self._play(phases.Finish(k, picture.second is not None, picture.keeps_local, self._see(k)))
        self._mark("finish")
        collect = studio.transfers.download([picture.work.canvas.size for picture in self._batch], studio.stream)
        self._mark("download")
        studio.pace.wait_for(self.marks[-1][1])
        studio.device.synchronize(studio.stream)
        flags, images = collect()
        seen = int(np.bitwise_or.reduce(flags))
        for kind in KINDS:  # in running order: later networks may only have passed on the first one's values
            if seen & flag_of(kind.name):
                raise NotFiniteError(f"{kind.name} gave values that are not numbers", kind.name)
        return images

    def open_preview(self) -> Preview:
        """A function that shows a picture's present prediction and waits for it. The host pastes it.

        It raises EngineError once the next step is enqueued.
        """
        index = self._step_done

        def preview(k: int, whole: bool) -> U8:
            if self._studio.turn is not self._turn or self._step_done != index:
                raise EngineError(f"the preview of step {index} is gone: ask for it before the next step")
            decoded = self._show_latent(k, "x0")
            return self._compose(k, decoded) if whole else decoded

        return preview

    def show_stages(self, k: int) -> dict[str, U8]:
        """After `finish`: what picture k's stages decoded, uint8 (h, w, 3), by name."""
        found = {}
        if self._batch[k].second is not None:
            found["local result"] = self._bring_local(k)
        return found | {"last result": self._show_latent(k, "x")}

    # -- parts of them ------------------------------------------------------------------------------------------------

    @property
    def _room(self) -> Room:
        return self._rooms[self._now][0]

    def _prepare_texts(self) -> None:
        """Write the texts of every picture, where they count."""
        studio = self._studio
        studio.device.clear(studio.arena["flags"], studio.stream)
        alone = self._batch[0].work.request.prior == "alone"
        plans = [] if alone else [picture.work.prompts for picture in self._batch]
        if any(studio.texts.lacks(plan) for plan in plans):
            studio.residency.need(*names_of_group("text"), safe=self._safe)
        stages, dtype = self._batch[0].stages, self._room.texts[0].dtype
        shapes = {stage: room.shape for stage, (room, _) in zip(stages, self._rooms, strict=True)}
        for k, plan in enumerate(plans):
            capture = studio.residency.captures
            studio.texts.compose(k, shapes, dtype, plan, self._chosen, safe=self._safe, capture=capture)
        self._mark("text")

    def _ask_prior(self) -> None:
        """Write what ASUKA's prior says of every picture's frames, where it is asked for."""
        kinds = [(stage, self._batch[0].prior_in(stage)) for stage in self._batch[0].stages]
        if not any(kind for _, kind in kinds):
            return
        self._studio.residency.need("asuka_prior", safe=self._safe)
        for number, (stage, kind) in enumerate(kinds):
            self._now = number
            for k in range(len(self._batch) if kind else 0):
                self._play(phases.AskPrior(k, number, stage, kind == "concat"))
        self._now = 0
        self._mark("prior")

    def _see(self, k: int) -> phases.Seen | None:
        """What ASUKA's decoder sees of picture k in the present stage; None: the VAE's decodes."""
        if self._batch[k].work.request.decoder != "asuka":
            return None
        return phases.Seen("second" if self._now else "first", not self._now and bool(self._batch[k].dilate))

    def _need_decoder(self, *names: str) -> None:
        """Load what decodes this batch.

        names: the networks to load for the VAE's decoder.
        """
        asuka = self._batch[0].work.request.decoder == "asuka"
        self._studio.residency.need(*(("asuka_decoder",) if asuka else names), safe=self._safe)

    def _play(self, phase: phases.Phase) -> None:
        room, keep = self._rooms[self._now]
        capture = keep and self._studio.residency.captures
        room.play(phase, self._open_phases().record, self._studio.stream, capture=capture)

    def _open_phases(self) -> Phases:
        studio = self._studio
        return Phases(studio.device, studio.stream, studio.arena, self._room, studio.texts, studio.facts)

    def _show_latent(self, k: int, source: phases.Latent) -> U8:
        studio = self._studio
        with explain_memory(studio.plan):
            self._need_decoder("vae_decoder")
            shown: Array = self._open_phases().preview(k, source, self._see(k))
            return studio.bring(shown)

    def _compose(self, k: int, decoded: U8) -> U8:
        """Picture k's canvas with the present stage's picture pasted, as `finish` will paste the last one."""
        picture = self._batch[k]
        local = (picture.first, self._bring_local(k)) if self._now and picture.keeps_local else None
        return picture.work.canvas.compose(picture.framings[self._now], decoded, local=local)

    def _bring_local(self, k: int) -> U8:
        """The local stage's picture, after the hand-over."""
        return self._studio.bring(self._studio.arena["decoded"][k].reshape((*self._batch[k].first.size, 3)))

    def _count_from(self, index: int) -> None:
        """Set the step counter, by a copy within the device."""
        studio = self._studio
        studio.device.copy(studio.arena["counter"], studio.arena["numbers"].part(index, 1), studio.stream)

    def _mark(self, phase: str) -> None:
        self.marks.append((phase, self._studio.device.mark(self._studio.stream, timed=True)))

    def _check_turn(self) -> None:
        if self._studio.turn is not self._turn:
            raise EngineError(
                "this runtime was closed, or has begun another request, before this one was done: take one "
                "request at a time, or use `another()`"
            )


def paint_batch(studio: Studio, pictures: Sequence[Picture], keep: Collection[int], marks: Marks) -> Painting:
    """Paint pictures of equal variant in a studio; see `Studio.paint`.

    keep: numbers of the pictures whose stages are wanted.
    marks: takes those of its painters.
    """
    chosen = studio.weights.choose(pictures[0].work.subject)
    turn = studio.turn = object()
    studio.texts.settle(proven=False)
    painters: list[DevicePainter] = []

    def open_painter(safe: bool) -> DevicePainter:
        if safe:
            studio.texts.forget()  # they are not the twins'
        painters.append(DevicePainter(studio, pictures, chosen, safe=safe, marks=marks))
        return painters[-1]

    try:
        images = yield from paint_safely(open_painter, studio.networks.__contains__)
        if len(painters) > 1:
            studio.texts.forget()  # they are the twins'
        painted = [Painted(image, painters[-1].show_stages(k) if k in keep else {}) for k, image in enumerate(images)]
    except (OutOfMemoryError, MemoryError) as error:
        studio.recover()
        with explain_memory(studio.plan):
            if len(painters) > 1:
                raise OutOfMemoryError(f"{error}; {_TWINS_NEED_ROOM}") from error
            raise
    except NotFiniteError:
        studio.texts.forget()
        raise
    else:
        studio.texts.settle(proven=True)
        yield painted
    finally:
        if studio.turn is turn:
            studio.turn = None
            studio.pace.wait_quietly()
            if not studio.pace.lost:
                studio.leave_rooms()
