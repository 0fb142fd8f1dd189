"""The kernels of the device runtime on inputs as a request has them, each with what it must give.

What a kernel must give comes from the host's own functions (engine/kernels.py, engine/canvas/) or from a formula in
float64, never from the kernel. Frames are those of one request of `side` pixels in two stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dreammix_trt.core.axes import FACTOR
from dreammix_trt.core.config_fields import TOKENS
from dreammix_trt.core.request import Request
from dreammix_trt.core.schedule import make_schedule, time_ids
from dreammix_trt.core.seam import BaseFacts
from dreammix_trt.core.slots import Slot
from dreammix_trt.core.subject import NOBODY
from dreammix_trt.engine import kernels
from dreammix_trt.engine.canvas.frames import Canvas, dilate_mask, from_decoded, seam_weight, to_latent_range
from dreammix_trt.engine.canvas.geometry import fill_cascade
from dreammix_trt.engine.device.blocks import MOST_STEPS, PICTURE, Picture, fill_block
from dreammix_trt.engine.device.records import JOB, MERGE, MERGE_KINDS, STEP
from dreammix_trt.engine.prompts import Prompt, PromptPlan, weigh_text
from dreammix_trt.engine.runtime import Work

Array = npt.NDArray[Any]
U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
CHANNELS, SCALING, SEED = 4, 0.13025, 7
RANK = 4
_STEP = 3  # the row of the schedule that is tried: one with history and solver noise
_OUTPUTS = {"float32": 1e-5, "float16": 1e-2}  # relative; other types must be equal


@dataclass(frozen=True)
class KernelCase:
    """One call of a kernel.

    given: arrays it reads, and those it changes in place; wanted: name -> what must stand there afterwards; scratch:
    bytes by name; plain: arguments that are no arrays. tolerances: where they are not those of the type. least: the
    fewest bytes it moves, where that is not every input read once and every result written once. times: how often a
    picture in two stages needs it before, between and after the steps. inside: of the MERGE records in "slots", field
    -> the array that its addresses count from; such arrays are no arguments of the kernel.
    """

    label: str
    kernel: str
    given: Mapping[str, Array]
    wanted: Mapping[str, Array]
    plain: Mapping[str, Any] = field(default_factory=dict)
    scratch: Mapping[str, int] = field(default_factory=dict)
    tolerances: Mapping[str, float] = field(default_factory=dict)
    least: int | None = None
    times: int = 0
    goal_ms: float | None = None
    inside: Mapping[str, str] = field(default_factory=dict)

    def link(self, slots: Array, addresses: Mapping[str, int]) -> None:
        """Turn the records' places into addresses. slots: the table's bytes."""
        table = slots.view(MERGE)
        for name, there in self.inside.items():
            table[name] += np.uint64(addresses[there])

    @property
    def moved(self) -> int:
        """The fewest bytes it moves."""
        if self.least is not None:
            return self.least
        return sum(array.nbytes for arrays in (self.given, self.wanted) for array in arrays.values())

    def tolerance(self, name: str) -> float:
        """Largest difference over the largest value that is right for a result; 0: equal bits."""
        return self.tolerances.get(name, _OUTPUTS.get(str(self.wanted[name].dtype), 0.0))


class Workbench:
    """A picture of 1.25 x 1 sides, its frames and records."""

    def __init__(self, side: int, gpu: Any) -> None:
        """side: the base's native side in pixels, a multiple of 64; gpu: `dreammix_trt._cpp.gpu`."""
        self.side, self.gpu = side, gpu
        self.rng = np.random.default_rng(0)
        height, width = 5 * side // 4, side
        y, x = np.mgrid[0:height, 0:width]
        waves = np.stack([np.sin(x / 37 + y / 91 + c) for c in range(3)], axis=-1) * 90 + 128
        self.image: U8 = (waves + self.rng.normal(0, 20, waves.shape)).clip(0, 255).astype(np.uint8)
        inside = ((y - height * 0.45) / (side * 0.26)) ** 2 + ((x - width * 0.55) / (side * 0.22)) ** 2 < 1
        self.mask: U8 = np.where(inside, np.uint8(255), np.uint8(0))
        request = Request(prompt="a mug", num_inference_steps=200, seed=SEED, lcg_mask_dilate=3, blend_output=True)
        self.canvas = Canvas.of(self.image, self.mask, native=side)
        self.schedule = make_schedule(request)
        plan = PromptPlan((Prompt(NOBODY, np.zeros((2, TOKENS), np.int64)),), None, (), None, {})
        self.picture = Picture.of(Work(self.canvas, request, self.schedule, SEED, NOBODY, plan))
        facts = BaseFacts(native_side=side, divisor=32, scaling_factor=SCALING, feature_channels=320)
        self.block = dict(fill_block([self.picture], facts))
        self.records = self.block["records"].view(PICTURE).reshape(-1)[0]
        self.tables = self.block["tables"].view(np.int32)
        self.frame = self.canvas.first_frame(request.lcg_field, fill=False, dilate=request.lcg_mask_dilate)

    def record(self, name: str) -> U8:
        """A record's bytes."""
        return np.ascontiguousarray(self.records[name]).reshape(1).view(np.uint8)

    def floats(self, *shape: int, dtype: str = "float32") -> Array:
        """Random normals."""
        return self.rng.standard_normal(shape, np.float32).astype(dtype)


def all_cases(side: int, gpu: Any) -> list[KernelCase]:
    """Every kernel at least once."""
    scene = Workbench(side, gpu)
    cases = [*_cuts(scene), *_canvas(scene), *_tiles(scene), *_steps(scene), *_latents(scene), *_texts(scene)]
    return [*cases, *_merges(scene)]


def kernels_of(gpu: Any) -> set[str]:
    """The kernels there are: what takes a stream."""
    found = {name for name in dir(gpu) if not name.startswith("_") and callable(getattr(gpu, name))}
    return {name for name in found if "stream" in _read_docstring(getattr(gpu, name))}


def _read_docstring(function: Any) -> str:
    """What a kernel function says of its arguments."""
    return str(function.__doc__ or "")


# ------------------------------------------------------------------------------------------------ pictures


def _cut(scene: Workbench, record: str, **arrays: Any) -> dict[str, Any]:
    return {"cut": scene.record(record), "tables": scene.tables, **arrays}


_NOTHING = {"out": None, "mask": None, "network": None, "masked": None, "found": None}


def _cuts(scene: Workbench) -> list[KernelCase]:
    canvas, frame = scene.canvas, scene.frame
    box, (h, w) = frame.box, frame.size
    image = kernels.resize(canvas.image, h, w, "lanczos", box)
    seen = to_latent_range(image)
    masked = seen * (frame.mask < 128)
    grown = dilate_mask(canvas.mask, 3)
    plain = {**_NOTHING, "channels": 3, "half": 1, "threshold": 0}
    decoded = scene.rng.integers(0, 256, (h, w, 3), np.uint8)
    crop = (box[1] - box[0], box[3] - box[2])
    back = kernels.resize(decoded, *crop, "lanczos") if crop != (h, w) else decoded
    rows, cols = np.nonzero(grown[box[0] : box[1], box[2] : box[3]] > 127)
    nearest = np.zeros((h, w), np.uint8)
    nearest[rows * h // crop[0], cols * w // crop[1]] = 255
    return [
        KernelCase(
            "crop, resize, normalise, mask", "cut", _cut(scene, "image_first", source=canvas.image, mask=frame.mask),
            {"out": image, "network": _half(seen), "masked": _half(masked)}, plain,
            least=3 * crop[0] * crop[1] + (1 + 3 + 6 + 6) * h * w, times=3,
        ),
        KernelCase(
            "crop and resize a mask", "cut", _cut(scene, "image_first", source=grown, found=np.zeros(1, np.int32)),
            {"out": frame.mask, "found": np.ones(1, np.int32)},
            {**plain, "channels": 1, "threshold": 1, "half": 0}, least=crop[0] * crop[1] + h * w, times=2,
        ),
        KernelCase(
            "resize a result to its box", "cut", _cut(scene, "box_first", source=decoded), {"out": back},
            {**plain, "half": 0}, least=decoded.nbytes + back.nbytes, times=3,
        ),
        KernelCase(
            "keep a speck", "keep_speck",
            {"source": grown, "cut": scene.record("image_first"), "found": np.zeros(1, np.int32)}, {"out": nearest},
            least=crop[0] * crop[1] + h * w, times=2,
        ),
        KernelCase(
            "normalise and mask", "normalise", {"picture": image, "mask": frame.mask},
            {"network": _half(seen), "masked": _half(masked)}, {"height": h, "width": w, "half": 1}, times=1,
        ),
    ]  # fmt: skip


def _canvas(scene: Workbench) -> list[KernelCase]:
    canvas, frame, gpu = scene.canvas, scene.frame, scene.gpu
    (h, w), pixels = frame.size, canvas.mask.size
    cascade = fill_cascade(scene.side)
    latent = kernels.latent_mask(frame.mask, FACTOR)
    distances = {"scratch": int(gpu.distance_scratch(pixels))}
    seam = seam_weight(canvas.mask, canvas.feather_width)
    decoded = scene.floats(1, 3, h, w, dtype="float16") * np.float16(0.6)
    content = [scene.rng.integers(0, 256, _box_size(scene, name), np.uint8) for name in ("first", "second")]
    pasted = kernels.paste(canvas.image, content[0], scene.picture.first.box, canvas.feather)
    return [
        KernelCase(
            "fill the hole", "fill", {"picture": frame.image, "mask": frame.mask},
            {"picture": kernels.fill(frame.image, frame.mask, cascade)},
            {"height": h, "width": w, "cascade": cascade}, {"scratch": int(gpu.fill_scratch(height=h, width=w))},
            times=1, goal_ms=2.0,
        ),
        KernelCase(
            "latent mask", "latent_mask", {"mask": frame.mask}, {"out": latent, "network": _half(latent)},
            {"height": h, "width": w, "factor": FACTOR, "half": 1}, times=2,
        ),
        KernelCase(
            "feather", "feather", {"mask": canvas.mask, "field": scene.record("feather_field")},
            {"out": kernels.feather(canvas.mask, canvas.feather_width)}, {"dilate": 0}, distances, times=1,
        ),
        KernelCase(
            "grow a mask", "feather", {"mask": canvas.mask, "field": scene.record("dilate_field")},
            {"out": dilate_mask(canvas.mask, 3)}, {"dilate": 1}, distances,
        ),
        KernelCase(
            "seam", "seam",
            {"mask": canvas.mask, "field": scene.record("seam_field"), "deepest": np.zeros(1, np.int32)},
            {"out": seam}, {}, distances,
        ),
        KernelCase(
            "paste", "paste",
            {"original": canvas.image, "content": content[0], "weight": canvas.feather,
             "sheet": scene.record("hand_over_sheet")},
            {"out": pasted}, {"local": None, "seam": None}, times=2,
        ),
        _final_paste(scene, content, seam),
        KernelCase(
            "decoded to 8 bit", "decoded", {"image": decoded, "flags": np.zeros(1, np.int32)},
            {"out": from_decoded(decoded.astype(np.float32)), "flags": np.zeros(1, np.int32)},
            {"height": h, "width": w, "half": 1, "bit": 64}, times=2,
        ),
    ]  # fmt: skip


def _final_paste(scene: Workbench, content: list[U8], seam: U8) -> KernelCase:
    """The last paste where the local result stays inside the mask (as `Canvas.compose`)."""
    canvas, records = scene.canvas, scene.records
    first, second = scene.picture.first.box, scene.picture.framings[-1].box
    whole = [canvas.image.copy() for _ in content]
    for picture, part, box in zip(whole, content, (first, second), strict=True):
        picture[box[0] : box[1], box[2] : box[3]] = part
    everything = (0, canvas.size[0], 0, canvas.size[1])
    mixed = kernels.paste(whole[0], whole[1], everything, seam)
    sheet = np.array([records["final_sheet"]])
    sheet["keeps_local"] = 1
    for name, value in zip(("local_row0", "local_row1", "local_col0", "local_col1"), first, strict=True):
        sheet[name] = value
    return KernelCase(
        "paste, local inside", "paste",
        {"original": canvas.image, "content": content[1], "local": content[0], "seam": seam, "weight": canvas.feather,
         "sheet": sheet.view(np.uint8)},
        {"out": kernels.paste(canvas.image, mixed, everything, canvas.feather)},
    )  # fmt: skip


def _box_size(scene: Workbench, which: str) -> tuple[int, int, int]:
    crop = (scene.picture.first if which == "first" else scene.picture.framings[-1]).crop
    return (*crop, 3)


def _tiles(scene: Workbench) -> list[KernelCase]:
    height, width, tile = scene.side, scene.side + scene.side // 4, scene.side // 2
    row, col = height // 4, width // 4
    source = scene.floats(1, 3, height, width)
    values, out = scene.floats(1, 3, tile, tile, dtype="float16"), scene.floats(1, 3, height, width)
    rows, cols = (np.linspace(0, 1, tile, dtype=np.float32) for _ in range(2))
    there = np.s_[..., row : row + tile, col : col + tile]
    summed = out.astype(np.float64)
    summed[there] += values.astype(np.float64) * rows[:, None].astype(np.float64) * cols.astype(np.float64)
    place = {
        "channels": 3, "height": height, "width": width, "row": row, "col": col, "tile_height": tile,
        "tile_width": tile,
    }  # fmt: skip
    return [
        KernelCase(
            "take a tile", "take_tile", {"source": source}, {"out": _half(source[there])},
            {**place, "source_half": 0, "out_half": 1}, least=(4 + 2) * values.size,
        ),
        KernelCase(
            "add a tile", "add_tile", {"tile": values, "ramp_rows": rows, "ramp_cols": cols, "out": out},
            {"out": summed.astype(np.float32)}, {**place, "half": 1}, least=(2 + 4 + 4) * values.size,
        ),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ latents


def _steps(scene: Workbench) -> list[KernelCase]:
    h = w = scene.side // FACTOR
    one, step = (1, CHANNELS, h, w), scene.schedule[_STEP]
    x, background, previous = (scene.floats(*one) for _ in range(3))
    mask = (scene.floats(1, 1, h, w) > 0).astype(np.float32)
    blend, solver = (kernels.normals(SEED, draw, _STEP, one) for draw in (1, 2))
    x_in, doubled = kernels.blend_scale(x, background, mask, blend, step.sigma)
    eps = scene.floats(2, *one[1:], dtype="float16")
    names = ("sigma", "guidance_scale", "guidance_rescale", "blur_alpha", "c_x", "c_x0", "c_dx0", "c_noise")
    row = {name: getattr(step, name) for name in names}
    after, x0 = kernels.guided_step(x_in, eps.astype(np.float32), previous, solver, **row)
    change = (background - x0) * (1 - mask)  # the background is kept in every prediction (engine/host/sampling.py)
    after, x0 = after + np.float32(step.c_x0 + step.c_dx0) * change, x0 + change
    table = np.ascontiguousarray(scene.block["steps"].view(STEP).reshape(1, MOST_STEPS)).view(np.uint8)
    jobs = scene.block["jobs"]
    ids = time_ids(step, scene.picture.first.size, scene.side)
    counter = np.full(1, _STEP, np.int32)
    shared: dict[str, Array] = {
        "counter": counter,
        "table": table,
        "jobs": jobs,
        "background": background,
        "mask": mask,
    }
    sides = {
        "most_steps": MOST_STEPS, "pictures": 1, "channels": CHANNELS, "height": h, "width": w, "rows_per_picture": 2,
        "half": 1,
    }  # fmt: skip
    scratch = {"scratch": int(scene.gpu.step_scratch(pictures=1, channels=CHANNELS, height=h, width=w))}
    return [
        KernelCase(
            "step: blend, noise, scale", "step_before", {**shared, "x": x},
            {"x_in": x_in, "network_in": _half(doubled), "timestep": np.full(2, step.timestep, np.float32),
             "time_ids": ids},
            sides, least=4 * x.nbytes + mask.nbytes + eps.nbytes,
        ),
        KernelCase(
            "step: guidance, sharpness, solver", "step_after",
            {**shared, "x_in": x_in, "eps": eps, "x0": previous, "flags": np.zeros(1, np.int32)},
            {"x": after, "x0": x0, "counter": np.full(1, _STEP + 1, np.int32), "flags": np.zeros(1, np.int32)},
            {**sides, "bit": 4}, scratch, least=5 * x.nbytes + mask.nbytes + eps.nbytes,
        ),
    ]  # fmt: skip


def _latents(scene: Workbench) -> list[KernelCase]:
    h = w = scene.side // FACTOR
    one = (CHANNELS, h, w)
    job = np.zeros(1, JOB)
    job["seed"], job["start_scale"], job["hand_over_sigma"], job["samples_vae"] = SEED, 14.6, 2.5, 1
    mean, std = scene.floats(*one, dtype="float16"), np.abs(scene.floats(*one, dtype="float16"))
    drawn, init, again = (kernels.normals(SEED, draw, 0, one) for draw in (4, 0, 3))
    latent = np.float32(SCALING) * (mean.astype(np.float32) + std.astype(np.float32) * drawn)
    start, flags = scene.floats(*one), np.zeros(1, np.int32)
    feature = scene.floats(1, 320, h, w, dtype="float16")
    bytes_of_job = job.view(np.uint8)
    return [
        KernelCase(
            "sample a latent", "encode_latent", {"mean": mean, "std": std, "job": bytes_of_job, "flags": flags},
            {"latent": latent, "network": _half(latent), "flags": flags},
            {"scaling": SCALING, "draw": 4, "channels": CHANNELS, "height": h, "width": w, "half": 1,
             "bit": 32, **({"network_half": 1} if "network_half" in _read_docstring(scene.gpu.encode_latent) else {})},
            times=5,
        ),
        KernelCase(
            "noise on a latent", "noised", {"latent": start, "job": bytes_of_job},
            {"out": start + init * job["start_scale"]}, {"hand_over": 0, "count": start.size}, times=1,
        ),
        KernelCase(
            "noise at the hand-over", "noised", {"latent": start, "job": bytes_of_job},
            {"out": start + job["hand_over_sigma"] * again}, {"hand_over": 1, "count": start.size}, times=1,
        ),
        KernelCase(
            "a latent for the decoder", "scaled", {"latent": start}, {"out": _half(start / np.float32(SCALING))},
            {"factor": SCALING, "count": start.size, "half": 1}, times=2,
        ),
        KernelCase(
            "look for what is no number", "check_finite", {"values": feature, "flags": flags}, {"flags": flags},
            {"count": feature.size, "half": 1, "bit": 16}, times=2,
        ),
        KernelCase(
            "find what is no number", "check_finite", {"values": _spoilt(feature), "flags": flags},
            {"flags": np.full(1, 16, np.int32)}, {"count": feature.size, "half": 1, "bit": 16},
        ),
        KernelCase(
            "change the type", "convert", {"source": feature}, {"out": feature.astype(np.float32)},
            {"source_half": 1, "out_half": 0, "count": feature.size}, tolerances={"out": 0.0}, times=2,
        ),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ text, weights


def _texts(scene: Workbench) -> list[KernelCase]:
    rows, first, second = 77, 768, 1280
    a, b = scene.floats(rows, first, dtype="float16"), scene.floats(rows, second, dtype="float16")
    tokens, removed = scene.floats(rows, first + second), scene.floats(rows, first + second)
    away, places = np.array([5, 6, 7]), np.arange(1, 12)
    plan = np.zeros(2 + 2 * rows, np.int32)
    plan[:2] = len(away), len(places)
    plan[2 : 2 + len(away)], plan[2 + rows : 2 + rows + len(places)] = away, places
    less = kernels.tas_project(tokens, removed[away], places)
    flags, weights = np.zeros(1, np.int32), np.ones((2, rows), np.float32)
    weights[:, 2:5] = 1.3
    return [
        KernelCase(
            "join two texts", "join_text", {"first": a, "second": b, "flags": flags},
            {"out": np.concatenate([a, b], axis=1).astype(np.float32), "flags": flags},
            {"rows": rows, "first_width": first, "second_width": second, "half": 1, "first_bit": 1, "second_bit": 2},
            tolerances={"out": 0.0}, times=2,
        ),
        KernelCase(
            "weigh the words", "weigh_text", {"tokens": tokens, "empty": removed, "weights": weights},
            {"tokens": weigh_text(tokens, removed, weights, (first, second))},
            {"rows": rows, "first_width": first, "width": first + second}, tolerances={"tokens": 0.0}, times=1,
        ),
        KernelCase(
            "take attributes away", "tas", {"tokens": tokens, "removed": removed, "plan": plan}, {"tokens": less},
            {"rows": rows, "width": first + second}, least=4 * (first + second) * (len(away) + 2 * len(places)),
            times=1,
        ),
    ]  # fmt: skip


def _merges(scene: Workbench) -> list[KernelCase]:
    """A subject of `RANK` in a fifth of SDXL's slots, at miniature sides fewer and narrower; one in four is copied."""
    small = scene.side < 512
    count, wide = (8, 64) if small else (112, 1280)
    table = np.zeros(count, MERGE)
    table["source"] = table["target"] = 2 * wide * wide * np.arange(count)
    table["rank"] = np.where(np.arange(count) % 4, RANK, 0)
    table["left"] = table["right"] = 4 * wide * RANK * np.arange(count)
    table["stride"] = table["rows"] = table["columns"] = wide
    table["kind"] = MERGE_KINDS["float16", "float16"]
    table["left_scale"], table["right_scale"], table["out_scale"] = 1, 0.8, 1
    tasks = scene.gpu.plan_merges(table=_at_home(table).ctypes.data, count=count)
    pristine = np.resize(scene.floats(min(count, 8), wide, wide, dtype="float16"), (count, wide, wide))
    left, right = (scene.floats(count, *shape) * np.float32(0.1) for shape in ((wide, RANK), (RANK, wide)))
    merged = pristine.copy()
    for number in np.flatnonzero(table["rank"]):
        slot = Slot("", wide, wide, "", 0, wide)
        factors = left[number], right[number] * np.float32(0.8)
        kernels.merge_weight(pristine[number], merged[number], slot, *factors)
    plain = _at_home(table)
    scene.gpu.plan_merges(table=plain.ctypes.data, count=count)
    table["first"] = plain["first"]
    return [
        KernelCase(
            "merge a subject", "merge_weights",
            {"slots": table.view(np.uint8), "pristine": pristine, "left": left, "right": right},
            {"merged": merged}, {"count": count, "tasks": tasks},
            inside={"source": "pristine", "target": "merged", "left": "left", "right": "right"},
            least=2 * pristine.nbytes + (left.nbytes + right.nbytes) * 3 // 4, goal_ms=None if small else 1.0,
        ),
    ]  # fmt: skip


def _at_home(table: Array) -> Array:
    """The records with addresses that are none, at which nothing looks, to count their tasks."""
    found = table.copy()
    for name in ("source", "target", "left", "right"):
        found[name] += np.uint64(4096)
    return found


def _half(values: Any) -> Array:
    return np.asarray(values).astype(np.float16)


def _spoilt(values: Array) -> Array:
    spoilt = values.copy()
    spoilt.reshape(-1)[values.size // 3] = np.inf
    return spoilt
