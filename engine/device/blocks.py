"""A batch as records that the device works from: geometry, schedule and texts, made on the host.

Of pixels only the mask's bounds are read here. Boxes and sizes come from `Canvas`, resampling tables from the same
function as the host's resizing. What a batch needs is one block of bytes, uploaded in one copy.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.asuka_pictures import shrink_for_prior
from dreammix_trt.core.config_fields import MOST_TOKENS, TOKENS
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.request import Prior
from dreammix_trt.core.schedule import STAGES, Schedule, Stage, time_ids
from dreammix_trt.core.seam import BaseFacts
from dreammix_trt.engine.canvas.frames import Canvas
from dreammix_trt.engine.canvas.geometry import Size, floor_to_cells, mask_bounds
from dreammix_trt.engine.device.arena import Regions
from dreammix_trt.engine.device.records import CUT, FIELD, JOB, SHEET, STEP, STEP_FIELDS
from dreammix_trt.engine.kernels import Box
from dreammix_trt.engine.painting import prior_in
from dreammix_trt.engine.prompts import count_prompts
from dreammix_trt.engine.runtime import Work
from dreammix_trt.engine.text import TasPlan

I32 = npt.NDArray[np.int32]
MOST_STEPS = 1000
TABLE = 2 << 20  # int32 numbers of resampling tables a picture may need

#: what a picture's records hold, by name: cuts of the canvas to a frame, of a frame to the network's size, of a decoded
#: picture to its box; pastes; distances
CUTS = ("image_first", "fit_first", "box_first", "image_second", "fit_second", "box_second")
SHEETS, FIELDS = ("hand_over", "final"), ("feather", "dilate", "seam")
PICTURE = np.dtype(
    [(name, CUT) for name in CUTS]
    + [(f"{name}_sheet", SHEET) for name in SHEETS]
    + [(f"{name}_field", FIELD) for name in FIELDS]
)


@dataclass(frozen=True)
class Framing:
    """A stage's frame without its pixels.

    box: in canvas pixels.
    work: (height, width) in pixels to which the box is resized.
    """

    box: Box
    work: Size

    @property
    def size(self) -> Size:
        """(height, width) in pixels that the networks see."""
        return floor_to_cells(self.work)

    @property
    def crop(self) -> Size:
        return self.box[1] - self.box[0], self.box[3] - self.box[2]


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture's work with the framings of its stages.

    first: of the first stage.
    second: of the second stage, or None.
    """

    work: Work
    first: Framing
    second: Framing | None

    @classmethod
    def of(cls, work: Work) -> Picture:
        """Frame the stages. Raises InputError for frames that the engines do not take."""
        request, schedule = work.request, work.schedule
        first = _frame_stage(work.canvas, request.field_of(schedule[0].stage))
        two = schedule.hand_over_index is not None
        return cls(work, first, _frame_stage(work.canvas, request.field_of("gch")) if two else None)

    @property
    def framings(self) -> tuple[Framing, ...]:
        """Of the stages, in their order."""
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Their names, in their order."""
        first = self.work.schedule[0].stage
        return (first,) if self.second is None else (first, "gch")

    def prior_in(self, stage: Stage) -> Prior | None:
        """See `engine.painting.prior_in`."""
        return prior_in(stage, self.work.request, self.work.schedule)

    @property
    def dilate(self) -> int:
        """Pixels by which the first stage repaints more than the mask."""
        return self.work.request.dilate_of(self.work.schedule[0].stage)

    @property
    def keeps_local(self) -> bool:
        """See `Canvas.keeps_local`."""
        if self.second is None:
            return False
        return self.work.canvas.keeps_scale(self.second.box, self.second.size, self.first.box, self.first.size)

    @property
    def variant(self) -> tuple[Any, ...]:
        """What pictures of one batch must share, since their steps run as one: sizes, steps, the subject's weights."""
        schedule = self.work.schedule
        return (
            tuple(framing.work for framing in self.framings),
            len(schedule),
            schedule.hand_over_index,
            self.keeps_local,
            tuple(step.network for step in schedule),
            self.work.request.guided,
            self.work.request.prior,
            self.work.request.decoder,
            self.work.prompts.text_rows,
            self.work.prompts.extra,
            self.work.subject,
        )


def _frame_stage(canvas: Canvas, field: float) -> Framing:
    box = canvas.box(field)
    return Framing(box, canvas.work_size(box))


def list_regions(pictures: int, context: int, width: int, prior_side: int | None = None) -> Regions:
    """Device memory for what a batch uploads, in its order. The tables come last; only a part of them is used.

    pictures: the largest batch.
    context: rows of the longest condition.
    width: numbers of a row.
    prior_side: of the pictures that ASUKA's prior takes; None: the base has no prior.
    """
    shown = (pictures, len(STAGES), 4, prior_side or 0, prior_side or 0)
    prior: Regions = {"prior pictures": (shown, "float32"), "prior weights": ((pictures,), "float32")}
    return {
        "records": ((pictures, PICTURE.itemsize), "uint8"),
        "jobs": ((pictures, JOB.itemsize), "uint8"),
        "steps": ((pictures, MOST_STEPS, STEP.itemsize), "uint8"),
        "ids": ((pictures * count_prompts(context), 2, TOKENS), "int64"),
        "text weights": ((pictures * count_prompts(context), 2, TOKENS), "float32"),
        "tas plans": ((pictures, measure_tas_plan(context)), "int32"),
        "appended": ((pictures * 2 * max(context - TOKENS, MOST_TOKENS), width), "float32"),
        **(prior if prior_side else {}),
        "tables": ((pictures * TABLE,), "int32"),
    }


def fill_block(batch: Sequence[Picture], facts: BaseFacts) -> list[tuple[str, npt.NDArray[np.uint8]]]:
    """Make the records of a batch. Returns (region, bytes to copy to its beginning) pairs."""
    tables = _Tables()
    records = np.zeros(len(batch), PICTURE)
    jobs = np.zeros(len(batch), JOB)
    steps = np.zeros((len(batch), MOST_STEPS), STEP)
    rows = batch[0].work.prompts.text_rows
    ids = np.zeros((len(batch), count_prompts(rows), 2, TOKENS), np.int64)
    weights = np.ones(ids.shape, np.float32)
    for k, picture in enumerate(batch):
        _write_geometry(records[k : k + 1], picture, tables)
        jobs[k] = _make_job(picture)
        steps[k, : len(picture.work.schedule)] = make_steps(picture.work.schedule, picture.first.size, facts)
        for number, prompt in enumerate(picture.work.prompts.prompts):
            ids[k, number] = prompt.ids
            if prompt.weights is not None:
                weights[k, number] = prompt.weights
    plans = np.stack([make_tas_plan(picture.work.prompts.tas, rows) for picture in batch])
    filled: dict[str, np.ndarray] = {"records": records, "jobs": jobs, "steps": steps, "ids": ids}
    filled |= {"text weights": weights, "tas plans": plans}
    extra = [picture.work.prompts.appended for picture in batch if picture.work.prompts.appended is not None]
    if extra:
        filled["appended"] = np.concatenate([rows.reshape(-1, rows.shape[-1]) for rows in extra])
    if batch[0].work.request.prior is not None:
        assert facts.prior_side is not None
        filled["prior pictures"] = np.stack([_show_prior(picture, facts.prior_side) for picture in batch])
        filled["prior weights"] = np.array([picture.work.request.prior_weight for picture in batch], np.float32)
    filled["tables"] = tables.join()
    return [(name, np.ascontiguousarray(values).reshape(-1).view(np.uint8)) for name, values in filled.items()]


def _show_prior(picture: Picture, side: int) -> npt.NDArray[np.float32]:
    """What ASUKA's prior is shown of a picture's frames: float32 (stages, 4, side, side), the picture and the mask.

    The frames are cut on the host, as it does for itself: what is uploaded is small.
    """
    work, shown = picture.work, np.zeros((len(STAGES), 4, side, side), np.float32)
    for number, stage in enumerate(picture.stages):
        if picture.prior_in(stage) is None:
            continue
        field, dilate = work.request.field_of(stage), 0 if number else picture.dilate
        frame = work.canvas.first_frame(field, fill=False, dilate=dilate)
        seen = frame.image if work.prior_image is None else work.canvas.crop(work.prior_image, frame)
        shown[number] = np.concatenate(shrink_for_prior(seen, frame.mask, side), axis=1)[0]
    return shown


def measure_tas_plan(rows: int) -> int:
    """Numbers of a TAS plan for a text of that many rows."""
    return 2 + 2 * rows


def make_tas_plan(plan: TasPlan | None, rows: int) -> I32:
    """A TAS plan as the kernel `tas` reads it.

    Returns int32 (2 + 2 rows,): how many rows are removed and projected, then both lists, each with room for `rows`.
    """
    record = np.zeros(measure_tas_plan(rows), np.int32)
    if plan is not None:
        record[:2] = len(plan.removed), len(plan.projected)
        for start, listed in ((2, plan.removed), (2 + rows, plan.projected)):
            record[start : start + len(listed)] = listed
    return record


class _Tables:
    """Resampling tables, each pair of lengths once."""

    def __init__(self) -> None:
        self.length = 0
        self._found: dict[tuple[int, int], tuple[int, int]] = {}
        self._parts: list[I32] = []

    def find(self, inputs: int, outputs: int) -> tuple[int, int]:
        """(where the table begins, taps an output); (-1, 0) where the length stays."""
        if inputs == outputs:
            return -1, 0
        if (inputs, outputs) not in self._found:
            most, table = make_resampling(inputs, outputs)
            self._found[inputs, outputs] = (self.length, most)
            self._parts.append(table)
            self.length += len(table)
        return self._found[inputs, outputs]

    def join(self) -> I32:
        return np.concatenate(self._parts) if self._parts else np.zeros(1, np.int32)


@functools.lru_cache(64)
def make_resampling(inputs: int, outputs: int) -> tuple[int, I32]:
    """Pillow's Lanczos from one length to another.

    Returns taps an output, and first, count and weights in one int32 array.
    """
    first, count, weights, most = importlib.import_module("dreammix_trt._cpp").gpu.resize_taps(inputs, outputs)
    table = np.concatenate([np.asarray(part, np.int32).reshape(-1) for part in (first, count, weights)])
    table.setflags(write=False)
    return int(most), table


def _write_geometry(record: np.ndarray, picture: Picture, tables: _Tables) -> None:
    canvas, mask = picture.work.canvas, picture.work.canvas.mask
    whole = canvas.size
    _write_cuts(record, picture, tables)
    soft = int(picture.work.request.soft_blending)
    record["hand_over_sheet"] = _make_record(SHEET, *whole, *picture.first.box, soft, 0)
    kept = picture.first.box if picture.keeps_local else (0, 0, 0, 0)
    record["final_sheet"] = _make_record(SHEET, *whole, *picture.framings[-1].box, 0, int(picture.keeps_local), *kept)
    bounds = mask_bounds(mask)
    reach = canvas.feather_width
    record["feather_field"] = _make_record(FIELD, *whole, reach, 0, whole[0], 0, whole[1])
    record["dilate_field"] = _make_record(FIELD, *whole, max(picture.dilate, 1), 0, whole[0], 0, whole[1])
    ring = (max(bounds[0] - 1, 0), min(bounds[1] + 1, whole[0]), max(bounds[2] - 1, 0), min(bounds[3] + 1, whole[1]))
    record["seam_field"] = _make_record(FIELD, *whole, reach, *ring)


def _write_cuts(record: np.ndarray, picture: Picture, tables: _Tables) -> None:
    whole = picture.work.canvas.size
    for stage, place in zip(("first", "second"), picture.framings, strict=False):
        record[f"image_{stage}"] = _make_cut(whole, place.box, place.work, tables)
        record[f"fit_{stage}"] = _make_cut(place.work, (0, place.work[0], 0, place.work[1]), place.size, tables)
        record[f"box_{stage}"] = _make_cut(place.size, (0, place.size[0], 0, place.size[1]), place.crop, tables)


def _make_cut(source: Size, box: Box, out: Size, tables: _Tables) -> np.ndarray:
    height, width = box[1] - box[0], box[3] - box[2]
    first = int(out[0] < height and height - out[0] > 2 * (width - out[1]))  # Pillow 13's order of passes
    return _make_record(CUT, *source, *box, *out, first, *tables.find(height, out[0]), *tables.find(width, out[1]))


def _make_record(dtype: np.dtype, *values: int) -> np.ndarray:
    """A record with the values of its first fields; the rest are zeros."""
    return np.array([tuple(values) + (0,) * (len(dtype.names or ()) - len(values))], dtype)


def _make_job(picture: Picture) -> tuple[Any, ...]:
    schedule, request = picture.work.schedule, picture.work.request
    index = schedule.hand_over_index
    sigma = schedule[index].sigma if index is not None else 0.0
    return picture.work.seed, schedule.start_scale, sigma, int(request.samples_vae), int(schedule.blends_output)


def make_steps(schedule: Schedule, size: Size, facts: BaseFacts) -> np.ndarray:
    """The schedule's rows as STEP records.

    size: (height, width) in pixels that the UNet gets as the original size.
    """
    rows = np.zeros(len(schedule), STEP)
    for row, step in zip(rows, schedule, strict=True):
        for name in STEP_FIELDS:
            row[name] = getattr(step, name)
        row["time_ids"] = time_ids(step, size, facts.native_side)
        row["blend_step"] = step.blend_draw[1]
        row["solver_step"] = -1 if step.solver_draw is None else step.solver_draw[1]
    return rows


def check_size(canvas: Canvas, most: int) -> None:
    """Raise InputError for a picture with more pixels than the runtime's memory was planned for.

    most: that number of pixels.
    """
    if math.prod(canvas.size) > most:
        height, width = canvas.size
        raise InputError(
            f"image is {width}x{height}; this runtime was loaded for at most {most} pixels: "
            f"load it with largest_picture={height * width}, or make the picture smaller"
        )


def check_tables(picture: Picture) -> None:
    """Raise InputError for a picture so long that its resampling tables do not fit."""
    tables = _Tables()
    _write_cuts(np.zeros(1, PICTURE), picture, tables)
    if tables.length > TABLE:
        height, width = picture.work.canvas.size
        raise InputError(
            f"image is {width}x{height}: a side so long takes resampling tables of {tables.length} numbers, and there "
            f"is room for {TABLE}; cut it into pieces, or make it smaller"
        )


def check_batch(batch: Sequence[Picture]) -> None:
    """Raise InputError where pictures cannot run as one batch."""
    if len({picture.variant for picture in batch}) > 1:
        raise InputError(
            "pictures of one batch must have frames of one size, one subject at one strength, and equal steps, "
            "guidance, stages, prior and decoder; paint them one after the other"
        )
