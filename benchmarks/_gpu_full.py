"""The parts `full` and `compiled-*`: SDXL at full size with random weights: a step, the VAE, whole pictures.

`BackEnd` measures the same of any back end.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from _gpu_clock import array, event_seconds, replay_seconds, upload
from _gpu_models import (
    PROMPT,
    Front,
    Setting,
    StepRig,
    device_of,
    random_networks,
    sample_picture,
    studio_for,
    tokenizers_of,
)
from _gpu_parts import ceiling
from _gpu_report import DECODE_TFLOP, DECODES, ENCODE_TFLOP, ENCODES, Part, job_tflop, step_tflop

LOOP_GOAL, AROUND_GOAL = "<= 0.03", "<= 0.02"
_PLAIN_VALUES = {"timestep": 500.0, "time_ids": 1024.0}


def full(part: Part, setting: Setting) -> None:
    """In eager torch."""
    with _torch_back_end(part, setting, compiled=False) as back_end:
        back_end.time_all(tokenizers_of(setting))


def compiled_step(part: Part, setting: Setting) -> None:
    """Through torch.compile, a part for each thing that takes minutes to compile: the UNet with guidance alone."""
    with _torch_back_end(part, setting, compiled=True) as back_end:
        back_end.time_step(2)


def compiled_vae(part: Part, setting: Setting) -> None:
    """Both halves of the VAE through torch.compile."""
    with _torch_back_end(part, setting, compiled=True) as back_end:
        back_end.time_vae()


def compiled_pictures(part: Part, setting: Setting, job: int) -> None:
    """A step and whole pictures of one job through torch.compile; job: its number in `Setting.jobs`.

    What the parts before it compiled is in torch's cache.
    """
    name, fields = list(setting.jobs().items())[job]
    with _torch_back_end(part, setting, compiled=True) as back_end:
        back_end.time_step(rows_of(fields))
        back_end.time_pictures(tokenizers_of(setting), {name: fields})


@contextmanager
def _torch_back_end(part: Part, setting: Setting, *, compiled: bool) -> Iterator[BackEnd]:
    """Random SDXL in torch, and the row that everything is held against."""
    rate = ceiling(setting)
    part.add("float16 matrix product [TFLOP/s]", rate / 1e12)
    if compiled and not setting.compiled:
        part.note("in eager torch, as was asked (--eager)")
    compiled = compiled and setting.compiled
    kind = f"torch, {'compiled' if compiled else 'eager'}"
    with device_of(setting) as device, random_networks(setting, device, compiled=compiled) as networks:
        yield BackEnd(part, setting, device, networks, kind, rate)


def rows_of(fields: Mapping[str, Any]) -> int:
    """Rows of the UNet's batch for one picture of a job."""
    return 2 if fields["guidance_scale"] > 1 else 1


class BackEnd:
    """A back end on a device, measured piece by piece; what later pieces need of earlier ones is kept."""

    def __init__(
        self, part: Part, setting: Setting, device: Any, networks: Any, kind: str, rate: float, stream: Any = None
    ) -> None:
        """kind: what it is called in the rows; rate: FLOP a second of a matrix product here; stream: where the networks
        must run."""
        self.part, self.setting, self.device, self.networks = part, setting, device, networks
        self.kind, self.rate, self.stream = kind, rate, stream
        self.unet: dict[int, float] = {}  # rows -> seconds of a call
        self.vae: dict[str, float] = {}  # "vae_encoder", "vae_decoder" -> seconds
        for name in ("unet", "vae_encoder", "vae_decoder"):
            networks.load(name)

    def time_all(self, tokenizers: Sequence[Any]) -> None:
        """Steps with and without guidance, the VAE, and whole pictures."""
        self.time_step(2)
        self.time_step(1)
        self.time_vae()
        self.time_pictures(tokenizers, self.setting.jobs())

    def time_step(self, rows: int) -> None:
        """A step by itself: the UNet, and what is around it."""
        side, kind = self.setting.side // 8, self.kind
        started = time.perf_counter()
        with StepRig(self.device, self.networks, (side, side), rows=rows, stream=self.stream) as rig:
            self.unet[rows], around, whole = _step_times(rig)
            if not np.isfinite(rig.result()["eps"]).all():
                self.part.note(f"{kind}: the UNet gave values that are no numbers")
        told = "with guidance" if rows == 2 else "without guidance"
        self.part.add(f"{kind}: UNet call {told} [ms]", 1e3 * self.unet[rows])
        first = time.perf_counter() - started
        self.part.add(f"{kind}: bound, run the first time and measured {told} [s]", first)
        tflop = step_tflop(side, side, rows, self.setting.width)
        self._share(f"{kind}: UNet {told}, share of the matrix product", tflop, self.unet[rows])
        self.part.add(f"{kind}: a whole step {told} [ms]", 1e3 * whole)
        self.part.add(f"{kind}: a step outside the UNet {told} [ms]", 1e3 * around)
        share = f"{kind}: a step outside the UNet {told}, of its call"
        self.part.add_share(share, around, self.unet[rows], goal=AROUND_GOAL)

    def time_vae(self) -> None:
        """Both halves on one picture."""
        side = self.setting.side // 8
        for name, tflop in (("vae_encoder", ENCODE_TFLOP), ("vae_decoder", DECODE_TFLOP)):
            seconds = self.vae[name] = _vae_time(self.device, self.networks, name, side, self.stream)
            self.part.add(f"{self.kind}: {name} [ms]", 1e3 * seconds)
            if self.setting.width == 1 and self.setting.side == 1024:
                self._share(f"{self.kind}: {name}, share of the matrix product", tflop, seconds)

    def time_pictures(self, tokenizers: Sequence[Any], jobs: Mapping[str, Mapping[str, Any]]) -> None:
        """Whole pictures, and the bytes that cross to the host meanwhile."""
        largest = self.setting.side**2
        with studio_for(self.device, self.networks, tokenizers, stream=self.stream, largest_picture=largest) as front:
            for name, fields in jobs.items():
                walls, timings = paint_often(front, self.setting, fields, times=self.setting.repeats)
                self._job_rows(f"{self.kind}: {name}", fields, walls, timings)
                traffic_rows(self.part, self.setting, self.device, front, f"{self.kind}: {name}", fields)

    def _job_rows(
        self, name: str, fields: Mapping[str, Any], walls: list[float], timings: list[dict[str, float]]
    ) -> None:
        """A whole picture: its time, its share of the ceiling, and what the networks do not account for."""
        wall, steps, rows = statistics.median(walls), fields["num_inference_steps"], rows_of(fields)
        self.part.add(f"{name}: whole picture [s]", wall)
        tflop = job_tflop(steps, rows, self.setting.side, self.setting.width)
        self._share(f"{name}: share of the matrix product", tflop, wall)
        phases = {key: statistics.median(each.get(key, 0.0) for each in timings) for key in timings[0]}
        for key, seconds in phases.items():
            self.part.add(f"{name}: {key} [ms]", 1e3 * seconds)
        if "loop" in phases and rows in self.unet:
            share = phases["loop"] / (steps * self.unet[rows]) - 1
            self.part.add(f"{name}: loop beyond the sum of its UNet calls", share, goal=LOOP_GOAL)
        if self.vae:
            around = sum(phases.get(key, 0.0) for key in ("start", "hand over", "finish"))
            networks = ENCODES * self.vae["vae_encoder"] + DECODES * self.vae["vae_decoder"]
            said = f"{name}: before, between and after the steps, without the VAE [ms]"
            self.part.add(said, 1e3 * (around - networks))

    def _share(self, metric: str, tflop: float | None, seconds: float) -> None:
        if tflop is not None:
            self.part.add(metric, tflop * 1e12 / seconds / self.rate)


def _step_times(rig: StepRig) -> tuple[float, ...]:
    """Median seconds of the UNet, of what is around it in a step, and of both, captured where that can be done."""
    rig.step()
    rig.device.synchronize(rig.stream)
    works = (rig.unet, rig.around, rig.step)
    if rig.bound.capturable:
        return tuple(statistics.median(replay_seconds(rig.device, rig.stream, [work])) for work in works)
    return tuple(statistics.median(event_seconds(rig.device, rig.stream, work)) for work in works)


def _vae_time(device: Any, networks: Any, name: str, side: int, stream: Any = None) -> float:
    """Median seconds of half the VAE on one picture."""
    from dreammix_trt.core.axes import Sides

    with bound_alone(device, networks, name, Sides(1, 1, side, side), stream) as (bound, stream):
        return call_seconds(device, bound, stream)


def call_seconds(device: Any, bound: Any, stream: Any) -> float:
    """Median seconds of one call of a bound network, replayed where it can be captured."""
    if bound.capturable:
        return statistics.median(replay_seconds(device, stream, [lambda: bound.enqueue(stream)]))
    return statistics.median(event_seconds(device, stream, lambda: bound.enqueue(stream)))


@contextmanager
def bound_alone(device: Any, networks: Any, name: str, sides: Any, stream: Any = None) -> Iterator[tuple[Any, Any]]:
    """A network on memory of its own with random values, run once, and a stream, where none is given."""
    rng = np.random.default_rng(2)
    with ExitStack() as owned:
        if stream is None:
            stream = device.make_stream()
            owned.callback(stream.close)
        arrays = {
            tensor.name: array(device, owned, sides.shape(tensor), tensor.dtype)
            for tensor in (*networks.inputs(name), *networks.outputs(name))
        }
        for tensor in networks.inputs(name):
            upload(device, stream, arrays[tensor.name], _draw_input(rng, tensor, sides.shape(tensor)))
        workspace = array(device, owned, (max(networks.workspace_bytes(name, sides), 256),), "uint8")
        bound = networks.bind(name, sides, arrays, workspace)
        owned.callback(bound.close)
        owned.callback(lambda: device.synchronize(stream))
        bound.enqueue(stream)
        device.synchronize(stream)
        yield bound, stream


def _draw_input(rng: np.random.Generator, tensor: Any, shape: tuple[int, ...]) -> Any:
    """Values that a network can be given: tokens, sizes and times where it wants those, and small numbers."""
    if np.dtype(tensor.dtype).kind == "i":
        return np.full(shape, 1, tensor.dtype)
    if tensor.name in _PLAIN_VALUES:
        return np.full(shape, _PLAIN_VALUES[tensor.name], tensor.dtype)
    # a matrix of weights, or of a LoRA's factors, must not make everything behind it overflow
    scale = 1.0 if any(isinstance(side, str) and side != "pictures" for side in tensor.shape) else 0.03
    return (scale * np.tanh(rng.standard_normal(shape, np.float32))).astype(tensor.dtype)


def paint_often(
    front: Front, setting: Setting, fields: Mapping[str, Any], *, warm: int = 2, times: int
) -> tuple[list[float], list[dict[str, float]]]:
    """Wall seconds and the runtime's own timings of `times` whole pictures, after `warm` that warm up and capture."""
    from dreammix_trt.core.request import Request

    image, mask = sample_picture(setting.side)
    walls, timings = [], []
    for turn in range(warm + times):
        request = Request.of(**{**fields, "prompt": PROMPT, "seed": turn})
        started = time.perf_counter()
        front.paint(image, mask, request)
        walls.append(time.perf_counter() - started)
        timings.append(front.timings)
    return walls[warm:], timings[warm:]


def traffic_rows(part: Part, setting: Setting, device: Any, front: Front, name: str, fields: Mapping[str, Any]) -> None:
    """Bytes between host and device for a picture: before the steps, while they run, after them."""
    from dreammix_trt.core.request import Request

    image, mask = sample_picture(setting.side)
    works = front.works([(image, mask, Request.of(**{**fields, "prompt": PROMPT}), "")])
    seen = [dict(device.transferred)]
    for _ in front.studio.paint(works):
        seen.append(dict(device.transferred))
    before, first, last, after = seen[0], seen[1], seen[-2], seen[-1]
    part.add(f"{name}: uploaded before the first step [bytes]", first["uploaded"] - before["uploaded"])
    part.add(
        f"{name}: downloaded before the last step is enqueued [bytes]",
        last["downloaded"] - before["downloaded"],
        goal="<= 0",
    )
    part.add(f"{name}: uploaded from the first step on [bytes]", after["uploaded"] - first["uploaded"], goal="<= 0")
    flags = 4 * (front.studio.options.pictures + 1)  # one of the texts'
    beyond = after["downloaded"] - last["downloaded"] - image.nbytes - flags
    part.add(f"{name}: downloaded beyond picture and flags [bytes]", beyond, goal="<= 0")
