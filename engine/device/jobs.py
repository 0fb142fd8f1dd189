"""A request as the records the device works from: geometry, schedule and texts of one batch, made on the host.

Nothing here touches pixels but the mask's bounds: boxes and sizes come from `Canvas`, resampling tables from the same
function as the host's resizing. What a batch needs is one block of bytes, uploaded in one copy.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.errors import InputError
from dreammix_trt.core.request import Request
from dreammix_trt.core.schedule import Schedule
from dreammix_trt.engine.canvas.frames import Canvas
from dreammix_trt.engine.canvas.geometry import Size, floored, mask_bounds
from dreammix_trt.engine.device.arena import Regions
from dreammix_trt.engine.device.records import CUT, FIELD, JOB, SHEET, STEP
from dreammix_trt.engine.kernels import Box

I32 = npt.NDArray[np.int32]
MOST_STEPS = 1000
PROMPTS = 3  # of one picture: its own, the text TAS takes attributes from, the negative one
TABLE = 2 << 20  # int32 numbers of resampling tables a picture may need
_TAS = 2 + 2 * 77

#: what a picture's records hold, by name: cuts of the canvas to a frame, of a frame to the network's size, of what was
#: decoded to its box; pastes; distances
CUTS = ("image_local", "fit_local", "box_local", "image_global", "fit_global", "box_global")
SHEETS, FIELDS = ("hand_over", "final"), ("feather", "dilate", "seam")
PICTURE = np.dtype(
    [(name, CUT) for name in CUTS] + [(f"{name}_sheet", SHEET) for name in SHEETS]
    + [(f"{name}_field", FIELD) for name in FIELDS]
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A stage's frame without its pixels: box in canvas pixels, work size, and the size the networks see."""

    box: Box
    work: Size

    @property
    def size(self) -> Size:
        return floored(self.work)

    @property
    def crop(self) -> Size:
        return self.box[1] - self.box[0], self.box[3] - self.box[2]


@dataclass(frozen=True)
class Picture:
    """One picture to paint: its canvas, request and schedule, the place of its first stage and of the second (None
    where there is one stage), and whether the local result is kept inside the mask."""

    canvas: Canvas
    request: Request
    schedule: Schedule
    seed: int
    subject: str
    first: Place
    second: Place | None

    @classmethod
    def of(cls, canvas: Canvas, request: Request, schedule: Schedule, seed: int, subject: str) -> Picture:
        """Lay out the stages. Raises InputError for frames the engines do not take."""
        local = schedule[0].stage == "lcg"
        first = _place(canvas, request.lcg_field if local else request.gch_field)
        second = _place(canvas, request.gch_field) if schedule.hand_over_index is not None else None
        return cls(canvas, request, schedule, seed, subject, first, second)

    @property
    def last(self) -> Place:
        """The place of the last stage."""
        return self.second or self.first

    @property
    def dilate(self) -> int:
        """Pixels by which the first stage repaints more than the mask."""
        return self.request.lcg_mask_dilate if self.schedule[0].stage == "lcg" else 0

    @property
    def keeps_local(self) -> bool:
        """See `Canvas.keeps_local`."""
        if self.second is None:
            return False
        return self.canvas.keeps_scale(self.second.box, self.second.size, self.first.box, self.first.size)

    @property
    def variant(self) -> tuple[Any, ...]:
        """What pictures of one batch must share, since their steps run as one: sizes, steps and what is captured."""
        request, schedule = self.request, self.schedule
        return (
            self.first.work, self.second and self.second.work, len(schedule), schedule.hand_over_index,
            self.keeps_local, tuple(step.network for step in schedule), request.guided,
        )  # fmt: skip


def _place(canvas: Canvas, field: float) -> Place:
    box = canvas.box(field)
    return Place(box, canvas.work_size(box))


def regions(pictures: int) -> Regions:
    """Device memory for the block of a batch."""
    return {name: (shape, dtype) for name, shape, dtype in _layout(pictures)}


def _layout(pictures: int) -> list[tuple[str, tuple[int, ...], str]]:
    """The parts of the block in the order of their upload; the tables stand last, as only their beginning is used."""
    return [
        ("records", (pictures, PICTURE.itemsize), "uint8"),
        ("jobs", (pictures, JOB.itemsize), "uint8"),
        ("steps", (pictures, MOST_STEPS, STEP.itemsize), "uint8"),
        ("ids", (pictures * PROMPTS, 2, 77), "int64"),
        ("tas plans", (pictures, _TAS), "int32"),
        ("tables", (pictures * TABLE,), "int32"),
    ]


class Block:
    """The bytes of a batch, to be written into pinned memory and uploaded."""

    def __init__(self, pictures: int) -> None:
        self._parts = {name: (shape, np.dtype(dtype)) for name, shape, dtype in _layout(pictures)}

    def fill(
        self, batch: Sequence[Picture], ids: npt.NDArray[np.int64], plans: I32, facts: Any
    ) -> list[tuple[str, npt.NDArray[np.uint8]]]:
        """(region, bytes to copy to its beginning) of a batch. ids: (prompts, 2, 77); plans: (pictures, 2 + 154)."""
        tables = _Tables()
        records = np.zeros(len(batch), PICTURE)
        jobs = np.zeros(len(batch), JOB)
        steps = np.zeros((len(batch), MOST_STEPS), STEP)
        for k, picture in enumerate(batch):
            _geometry(records[k : k + 1], picture, tables)
            jobs[k] = _job(picture, facts)
            steps[k, : len(picture.schedule)] = _steps(picture.schedule)
        filled = {
            "records": records, "jobs": jobs, "steps": steps, "ids": ids, "tas plans": plans, "tables": tables.joined(),
        }  # fmt: skip
        return [(name, np.ascontiguousarray(filled[name]).reshape(-1).view(np.uint8)) for name in self._parts]


class _Tables:
    """Resampling tables, each pair of lengths once."""

    def __init__(self) -> None:
        self.length = 0
        self._found: dict[tuple[int, int], tuple[int, int]] = {}
        self._parts: list[I32] = []

    def of(self, inputs: int, outputs: int) -> tuple[int, int]:
        """(where the table stands, taps an output); (-1, 0) where the length stays."""
        if inputs == outputs:
            return -1, 0
        if (inputs, outputs) not in self._found:
            most, table = resampling(inputs, outputs)
            self._found[inputs, outputs] = (self.length, most)
            self._parts.append(table)
            self.length += len(table)
        return self._found[inputs, outputs]

    def joined(self) -> I32:
        return np.concatenate(self._parts) if self._parts else np.zeros(1, np.int32)


@functools.lru_cache(64)
def resampling(inputs: int, outputs: int) -> tuple[int, I32]:
    """Pillow's Lanczos from one length to another: taps an output, and first, count and weights in one int32 array."""
    first, count, weights, most = importlib.import_module("dreammix_trt._cpp").gpu.resize_taps(inputs, outputs)
    table = np.concatenate([np.asarray(part, np.int32).reshape(-1) for part in (first, count, weights)])
    table.setflags(write=False)
    return int(most), table


def _geometry(record: np.ndarray, picture: Picture, tables: _Tables) -> None:
    canvas, mask = picture.canvas, picture.canvas.mask
    whole = canvas.size
    _cuts(record, picture, tables)
    soft = int(picture.request.soft_blending)
    record["hand_over_sheet"] = _record(SHEET, *whole, *picture.first.box, soft, 0)
    kept = picture.first.box if picture.keeps_local else (0, 0, 0, 0)
    record["final_sheet"] = _record(SHEET, *whole, *picture.last.box, 0, int(picture.keeps_local), *kept)
    bounds = mask_bounds(mask)
    reach = canvas.feather_width
    record["feather_field"] = _record(FIELD, *whole, reach, 0, whole[0], 0, whole[1])
    record["dilate_field"] = _record(FIELD, *whole, max(picture.dilate, 1), 0, whole[0], 0, whole[1])
    ring = (max(bounds[0] - 1, 0), min(bounds[1] + 1, whole[0]), max(bounds[2] - 1, 0), min(bounds[3] + 1, whole[1]))
    record["seam_field"] = _record(FIELD, *whole, reach, *ring)


def _cuts(record: np.ndarray, picture: Picture, tables: _Tables) -> None:
    whole = picture.canvas.size
    for stage, place in (("local", picture.first), ("global", picture.second)):
        if place is None:
            continue
        record[f"image_{stage}"] = _cut(whole, place.box, place.work, tables)
        record[f"fit_{stage}"] = _cut(place.work, (0, place.work[0], 0, place.work[1]), place.size, tables)
        record[f"box_{stage}"] = _cut(place.size, (0, place.size[0], 0, place.size[1]), place.crop, tables)


def _cut(source: Size, box: Box, out: Size, tables: _Tables) -> np.ndarray:
    height, width = box[1] - box[0], box[3] - box[2]
    first = int(out[0] < height and height - out[0] > 2 * (width - out[1]))  # Pillow 13's order of passes
    return _record(CUT, *source, *box, *out, first, *tables.of(height, out[0]), *tables.of(width, out[1]))


def _record(dtype: np.dtype, *values: int) -> np.ndarray:
    """A record of the first fields' values; zeros in the rest."""
    return np.array([tuple(values) + (0,) * (len(dtype.names or ()) - len(values))], dtype)


def _job(picture: Picture, facts: Any) -> tuple[Any, ...]:
    schedule, request = picture.schedule, picture.request
    index = schedule.hand_over_index
    return (
        picture.seed, schedule.start_scale, schedule[index].sigma if index is not None else 0.0,
        int(request.samples_vae), int(schedule.blends_output), *picture.first.size, facts.native_side, 0,
    )  # fmt: skip


def _steps(schedule: Schedule) -> np.ndarray:
    rows = np.zeros(len(schedule), STEP)
    for row, step in zip(rows, schedule, strict=True):
        for name in STEP.names or ():
            if hasattr(step, name):
                row[name] = getattr(step, name)
        row["blend_step"] = step.blend_draw[1]
        row["solver_step"] = -1 if step.solver_draw is None else step.solver_draw[1]
    return rows


def check_size(canvas: Canvas, most: int) -> None:
    """Raise InputError for a picture of more pixels than the runtime's memory was planned for."""
    if math.prod(canvas.size) > most:
        height, width = canvas.size
        raise InputError(
            f"image is {width}x{height}; this runtime was loaded for at most {most} pixels: "
            f"load it with largest_picture={height * width}, or make the picture smaller"
        )


def check_tables(picture: Picture) -> None:
    """Raise InputError for a picture so long that its resampling tables have no room."""
    tables = _Tables()
    _cuts(np.zeros(1, PICTURE), picture, tables)
    if tables.length > TABLE:
        height, width = picture.canvas.size
        raise InputError(
            f"image is {width}x{height}: a side so long takes resampling tables of {tables.length} numbers, and there "
            f"is room for {TABLE}; cut it into pieces, or make it smaller"
        )


def checked_batch(batch: Sequence[Picture]) -> None:
    """Raise InputError where pictures cannot run as one batch."""
    kinds: Mapping[Any, Picture] = {picture.variant: picture for picture in batch}
    if len(kinds) > 1:
        raise InputError(
            "pictures of one batch must have frames of one size and equal steps, guidance and stages; "
            "paint them one after the other"
        )
