"""The parts `full` and `compiled`: SDXL at full size with random weights: a step, the VAE, whole pictures.

`time_networks` does the same for any back end.
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


def full(part: Part, setting: Setting) -> None:
    """In eager torch."""
    _measure(part, setting, "torch, eager", compiled=False)


def measure_compiled(part: Part, setting: Setting) -> None:
    """The same through torch.compile: a part of its own, as compiling takes minutes."""
    if setting.compiled:
        _measure(part, setting, "torch, compiled", compiled=True)
    else:
        part.note("left out, as was asked")


def _measure(part: Part, setting: Setting, kind: str, *, compiled: bool) -> None:
    rate = ceiling(setting)
    part.add("float16 matrix product [TFLOP/s]", rate / 1e12)
    with device_of(setting) as device, random_networks(setting, device, compiled=compiled) as networks:
        time_networks(part, setting, device, networks, kind, rate, tokenizers_of(setting))


def time_networks(
    part: Part,
    setting: Setting,
    device: Any,
    networks: Any,
    kind: str,
    rate: float,
    tokenizers: Sequence[Any],
    stream: Any = None,
) -> None:
    """The rows of `full` for one back end; kind: what it is called; stream: where its networks must run."""
    side = setting.side // 8
    for name in ("unet", "vae_encoder", "vae_decoder"):
        networks.load(name)
    unet: dict[int, float] = {}
    for rows in (2, 1):
        started = time.perf_counter()
        with StepRig(device, networks, (side, side), rows=rows, stream=stream) as rig:
            unet[rows], around, whole = _step_times(rig)
            if not np.isfinite(rig.result()["eps"]).all():
                part.note(f"{kind}: the UNet gave values that are no numbers")
        told = "with guidance" if rows == 2 else "without guidance"
        part.add(f"{kind}: UNet call {told} [ms]", 1e3 * unet[rows])
        part.add(f"{kind}: bound, run the first time and measured {told} [s]", time.perf_counter() - started)
        _share(
            part,
            f"{kind}: UNet {told}, share of the matrix product",
            step_tflop(side, side, rows, setting.width),
            unet[rows],
            rate,
        )
        part.add(f"{kind}: a whole step {told} [ms]", 1e3 * whole)
        part.add(f"{kind}: a step outside the UNet {told} [ms]", 1e3 * around)
        part.add_share(f"{kind}: a step outside the UNet, of it", around, unet[rows], goal=AROUND_GOAL)
    vae = {name: _vae_time(device, networks, name, side, stream) for name in ("vae_encoder", "vae_decoder")}
    for (name, seconds), tflop in zip(vae.items(), (ENCODE_TFLOP, DECODE_TFLOP), strict=True):
        part.add(f"{kind}: {name} [ms]", 1e3 * seconds)
        if setting.width == 1 and setting.side == 1024:
            _share(part, f"{kind}: {name}, share of the matrix product", tflop, seconds, rate)
    largest = setting.side**2
    with studio_for(device, networks, tokenizers, stream=stream, largest_picture=largest) as front:
        for name, fields in setting.jobs().items():
            rows = 2 if fields["guidance_scale"] > 1 else 1
            walls, timings = paint_often(front, setting, fields, times=setting.repeats)
            job_rows(part, setting, f"{kind}: {name}", fields, walls, timings, unet[rows], vae, rate)
            traffic_rows(part, setting, device, front, f"{kind}: {name}", fields)


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
    with bound_alone(device, networks, name, side, stream) as (bound, stream):
        if bound.capturable:
            return statistics.median(replay_seconds(device, stream, [lambda: bound.enqueue(stream)]))
        return statistics.median(event_seconds(device, stream, lambda: bound.enqueue(stream)))


@contextmanager
def bound_alone(device: Any, networks: Any, name: str, side: int, stream: Any = None) -> Iterator[tuple[Any, Any]]:
    """A network for one picture on memory of its own with random values, and a stream, where none is given."""
    from dreammix_trt.core.axes import Sides

    sides, rng = Sides(1, 1, side, side), np.random.default_rng(2)
    with ExitStack() as owned:
        if stream is None:
            stream = device.make_stream()
            owned.callback(stream.close)
        arrays = {
            tensor.name: array(device, owned, sides.shape(tensor), tensor.dtype)
            for tensor in (*networks.inputs(name), *networks.outputs(name))
        }
        for tensor in networks.inputs(name):
            values = np.tanh(rng.standard_normal(sides.shape(tensor))).astype(tensor.dtype)
            upload(device, stream, arrays[tensor.name], values)
        workspace = array(device, owned, (max(networks.workspace_bytes(name, sides), 256),), "uint8")
        bound = networks.bind(name, sides, arrays, workspace)
        owned.callback(bound.close)
        owned.callback(lambda: device.synchronize(stream))
        bound.enqueue(stream)
        device.synchronize(stream)
        yield bound, stream


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


def job_rows(
    part: Part,
    setting: Setting,
    name: str,
    fields: Mapping[str, Any],
    walls: list[float],
    timings: list[dict[str, float]],
    unet: float,
    vae: Mapping[str, float],
    rate: float,
) -> None:
    """A whole picture: its time, its share of the ceiling, and what the networks do not account for."""
    wall = statistics.median(walls)
    steps, rows = fields["num_inference_steps"], 2 if fields["guidance_scale"] > 1 else 1
    part.add(f"{name}: whole picture [s]", wall)
    tflop = job_tflop(steps, rows, setting.side, setting.width)
    _share(part, f"{name}: share of the matrix product", tflop, wall, rate)
    phases = {key: statistics.median(each.get(key, 0.0) for each in timings) for key in timings[0]}
    for key, seconds in phases.items():
        part.add(f"{name}: {key} [ms]", 1e3 * seconds)
    if "loop" in phases:
        share = phases["loop"] / (steps * unet) - 1
        part.add(f"{name}: loop beyond the sum of its UNet calls", share, goal=LOOP_GOAL)
    around = sum(phases.get(key, 0.0) for key in ("start", "hand over", "finish"))
    networks = ENCODES * vae["vae_encoder"] + DECODES * vae["vae_decoder"]
    part.add(f"{name}: before, between and after the steps, without the VAE [ms]", 1e3 * (around - networks))


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


def _share(part: Part, metric: str, tflop: float | None, seconds: float, rate: float) -> None:
    if tflop is not None:
        part.add(metric, tflop * 1e12 / seconds / rate)
