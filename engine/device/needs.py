"""What a runtime needs from a device before its first request: the arena's regions, scratch, and the memory plan."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from dreammix_trt.core.config_fields import MOST_TOKENS, TOKENS
from dreammix_trt.core.errors import EngineError, InputError
from dreammix_trt.core.lengths import write_lengths
from dreammix_trt.core.networks import KINDS
from dreammix_trt.core.schedule import Stage
from dreammix_trt.core.seam import BaseFacts, DeviceNetworks, Shape
from dreammix_trt.core.subject import Subject
from dreammix_trt.core.subject_tokens import TokenConfig
from dreammix_trt.engine.canvas.geometry import Size
from dreammix_trt.engine.device import blocks, phases, prior, room, slot_layout, texts, tokens
from dreammix_trt.engine.device.arena import Regions, measure_regions
from dreammix_trt.engine.device.blocks import Picture
from dreammix_trt.engine.device.memory_plan import MemoryPlan, Options, plan_memory
from dreammix_trt.engine.device.room import RoomShape
from dreammix_trt.engine.device.tools import CHANNELS
from dreammix_trt.engine.drivers.device import Device


class Needs:
    """What networks need with options.

    reading: what the base's token adapter adds for subjects of tokens; None: there is no adapter.
    config: of that adapter.
    slotted: the networks with slots, whose weights the memory plan places.

    Raises InputError for options that the engines were not built for, EngineError for a base that lacks a network.
    """

    def __init__(
        self,
        networks: DeviceNetworks,
        options: Options,
        reading: Subject | None = None,
        config: TokenConfig | None = None,
    ) -> None:
        self._networks, self._options, self._reading, self._config = networks, options, reading, config
        self._facts: BaseFacts = networks.facts
        most = networks.most_pictures
        if most is not None and options.pictures > most:
            raise InputError(
                f"pictures is {options.pictures}, these engines take {most} in a batch; "
                f"build them again with `--pictures {options.pictures}`"
            )
        for kind in KINDS:
            if kind.required and kind.name not in networks:
                raise EngineError(f"the base has no network {kind.name!r}; build it again with `dreammix-trt build`")
        self.slotted = slot_layout.list_slotted(networks)

    @cached_property
    def largest(self) -> RoomShape:
        """The largest shape that a room can have."""
        side = self._facts.native_side
        frames: Sequence[Size] = self._networks.frames() or ((side, side),)
        work = max(frames, key=lambda size: size[0] * size[1])
        return RoomShape(work, self._options.pictures, 2, self.most_context)

    @property
    def contexts(self) -> Sequence[int]:
        """The lengths of the condition that the engines take; where they take any, those that memory is there for.

        A subject's tokens have memory beside what was asked for.
        """
        lengths, extra = self._networks.contexts(), MOST_TOKENS if self._config else 0
        return lengths or range(TOKENS, max(self._options.context, TOKENS) + extra + 1)

    @property
    def most_context(self) -> int:
        """The longest condition for which memory is set aside."""
        return max(self.contexts)

    def check_context(self, length: int) -> int:
        """The rows of a condition. Raises InputError for a number of rows that does not fit."""
        lengths = self._networks.contexts()
        if lengths is not None and length not in lengths:
            raise InputError(
                f"the condition has {length} rows, and these engines take {write_lengths(lengths)}; build them with "
                f"`--context {write_lengths({*lengths, length}, ',')}`"
            )
        if lengths is None and length > self.most_context:
            raise InputError(
                f"the condition has {length} rows, and this runtime was loaded for {self.most_context}: load it with "
                f"context={length}"
            )
        return length

    def check_enrolment(self) -> None:
        """Raise InputError where the engines do not take the condition that enrolling runs on: a class's name."""
        lengths = self._networks.contexts()
        if lengths is not None and TOKENS not in lengths:
            raise InputError(
                f"enrolling reads the subject's class as a condition of {TOKENS} rows, and these engines take "
                f"{write_lengths(lengths)}; build them with `--context {write_lengths({*lengths, TOKENS}, ',')}`, or "
                "enrol on the CPU: the subject's file serves every engine of its base"
            )

    @cached_property
    def prior_rows(self) -> int:
        """Rows of the condition that ASUKA's prior makes; 0: the base has no prior."""
        return prior.count_rows(self._networks)

    def shape_room(self, batch: Sequence[Picture], stage: Stage, *, safe: bool) -> RoomShape:
        """The shape of the room in which a batch runs a stage. Raises InputError for a condition that does not fit."""
        first, context, against = batch[0], batch[0].work.prompts.context, 0
        match first.prior_in(stage):
            case "alone":
                context = self.prior_rows + first.work.prompts.extra
            case "concat":
                context += self.prior_rows
            case "negative":
                against = self.prior_rows + first.work.prompts.extra
        for length in filter(None, (context, against)):
            self.check_context(length)
        work = first.framings[first.stages.index(stage)].work
        return RoomShape(work, len(batch), 2 if first.work.request.guided else 1, context, safe, against)

    def check_picture(self, picture: Picture) -> None:
        """Raise InputError for a picture that exceeds the memory set aside, or that the networks do not take."""
        work = picture.work
        blocks.check_size(work.canvas, self._options.largest_picture)
        blocks.check_tables(picture)
        for stage in picture.stages:
            self.shape_room([picture], stage, safe=False)
        largest = self.largest.work
        for framing in picture.framings:
            if any(side % self._facts.divisor for side in framing.size):
                raise InputError(
                    f"reference mode needs a frame of {framing.size[0]}x{framing.size[1]} pixels here, and this base's "
                    f"networks take multiples of {self._facts.divisor}; use native mode, or another reference_resize"
                )
            if framing.work[0] * framing.work[1] > largest[0] * largest[1]:
                raise InputError(
                    f"the frame of {framing.work[1]}x{framing.work[0]} is larger than the base's "
                    f"{largest[1]}x{largest[0]}; crop the picture to a plainer aspect"
                )

    @cached_property
    def blocks(self) -> Regions:
        """The regions that a batch's records fill."""
        width, _ = texts.find_widths(self._networks)
        side = self._facts.prior_side if self.prior_rows else None
        return blocks.list_regions(self._options.pictures, self.most_context, width, side)

    @cached_property
    def shared(self) -> Regions:
        """The regions of the arena that every memory plan has."""
        options, networks = self._options, self._networks
        lent = tokens.measure(networks, self._config) if self._config else 0
        regions = room.list_regions(networks, self.largest)
        regions = {**regions, room.KEYS_AND_VALUES: _grow(regions[room.KEYS_AND_VALUES], lent)}
        return {
            **phases.list_regions(
                measure_scratch, self.largest, options.largest_picture, sees="asuka_decoder" in networks
            ),
            **self.blocks,
            **regions,
            **texts.list_regions(networks, options.pictures, 2, options.texts, self.most_context),
            **prior.list_regions(networks),
            **slot_layout.list_tables(self.slotted, options.subjects, self._reading),
            "workspace": ((self._measure_workspace(),), "uint8"),
        }

    def list_regions(self, plan: MemoryPlan) -> Regions:
        """All regions of the arena under a plan."""
        kept = {name: each for name, each in self.slotted.items() if plan.keeps(name)}
        weights = slot_layout.measure_weights(kept, turns=plan.strategy == "swap", pristine=plan.pristine)
        return {**self.shared, **{name: ((size,), "uint8") for name, size in weights.items()}}

    def plan(self, device: Device, *, beside: bool) -> MemoryPlan:
        """Make the memory plan on a device.

        beside: another runtime uses the same networks.
        """
        free, total = device.memory()
        taken = measure_regions(self.shared)
        workspace = taken.pop("workspace")
        loaded = [name for name in self._networks.loaded if name in self._networks]
        plan = plan_memory(
            self._networks,
            free,
            total,
            self._options,
            taken,
            workspace,
            slotted=self.slotted,
            loaded=loaded,
            beside=beside,
        )
        logging.getLogger(__name__).info("%s", plan)
        return plan

    def _measure_workspace(self) -> int:
        """Scratch for the network that needs most: they never run at once. Twins get theirs when they are needed."""
        present = [kind for kind in KINDS if kind.name in self._networks]
        shapes = [self.largest, replace(self.largest, against=self.most_context)] if self.prior_rows else [self.largest]
        sides = {(kind.name, each) for kind in present for shape in shapes for each in shape.sides_of(kind.call)}
        return max([256, *(self._networks.workspace_bytes(name, each) for name, each in sides)])


def _grow(region: tuple[Shape, str], size: int) -> tuple[Shape, str]:
    """A region of bytes that has at least a size."""
    return (max(region[0][0], size),), region[1]


def measure_scratch(kernel: str, pictures: int, height: int, width: int) -> int:
    """Bytes of scratch that a kernel needs.

    kernel: "fill" (pictures, height, width), "distance" (1, pixels, 1) or "step" (pictures, height, width in cells).
    """
    gpu = importlib.import_module("dreammix_trt._cpp").gpu
    if kernel == "fill":
        return int(gpu.fill_scratch(height=height, width=width))
    if kernel == "distance":
        return int(gpu.distance_scratch(height * width))
    return int(gpu.step_scratch(pictures=pictures, channels=CHANNELS, height=height, width=width))
