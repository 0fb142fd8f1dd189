"""Parts of `gpu_suite.py`: subjects that swap, memory as planned and as measured, a thousand requests."""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _gpu_clock import copy_bandwidth, count_calls, event_seconds
from _gpu_full import paint_often
from _gpu_models import (
    PROMPT,
    TOKENS,
    Front,
    Setting,
    StepRig,
    device_of,
    random_networks,
    random_subject,
    sample_picture,
    studio_for,
    tokenizers_of,
)
from _gpu_report import GIB, MIB, Part, Spread, merge_bytes

from dreammix_trt.core.networks import KINDS

_MERGE = "merge_weights"  # the kernel that merges a subject into weights

# ------------------------------------------------------------------------------------------------ subjects


def subjects(part: Part, setting: Setting) -> None:
    """How long a swap takes, whether it leaves nothing behind, and what subjects in turns cost."""
    side = setting.side // 8
    with device_of(setting) as device, random_networks(setting, device) as networks:
        known = [random_subject(networks, name, seed=seed) for seed, name in enumerate("ABCD")]
        factors = known[0].factors["unet"]
        with StepRig(device, networks, (side, side), subjects=known) as rig:
            for name, size in rig.slot_bytes.items():
                part.add(f"{name} [MB]", size / 1e6)
            _time_swaps(part, rig, "a swap", setting.swaps, goal="<= 5")
            _swap_traffic(part, rig, "a swap", factors)
            _steps_with_and_without(part, rig)
            ends = _come_back(part, rig, "A, B, A")
            _turns_of_subjects(part, rig, rounds=2 * setting.repeats)
        told = "a swap, pristine weights with the host"
        with StepRig(device, networks, (side, side), subjects=known, pristine="host") as rig:
            _time_swaps(part, rig, told, max(setting.swaps // 20, 1))
            _swap_traffic(part, rig, told, factors)
            again = _come_back(part, rig, "A, B, A, pristine weights with the host")
        reading = random_subject(networks, "", seed=9, rank=16)
        with StepRig(device, networks, (side, side), subjects=known, reading=reading) as rig:
            _swap_tokens(part, rig, setting.swaps)
        _steps_with_tokens(part, lambda rows: StepRig(device, networks, (side, side), context=rows))
        part.add("the same bits from either place", np.array_equal(ends, again), goal="== 1")
    part.note("a swap: from the call to the device's answer, every slot of the UNet touched by factors of rank 4 there")


def _swap_tokens(part: Part, rig: StepRig, swaps: int) -> None:
    """Between a LoRA and a subject of tokens, whose adapter is of rank 16; alone, and beside another LoRA."""
    _time_swaps(part, rig, "a swap between a LoRA and tokens", swaps, goal="<= 5", order=("A", TOKENS))
    _time_swaps(part, rig, "a swap between a LoRA and tokens beside one", swaps, order=("A", f"B{TOKENS}"))
    _come_back(part, rig, "A, tokens, A", ("A", TOKENS, "A"))
    _come_back(part, rig, "tokens, tokens beside A, tokens", (TOKENS, f"A{TOKENS}", TOKENS))
    with count_calls(rig.device) as calls:
        rig.enter(TOKENS)
    part.add("from tokens to others: kernels and bytes", calls.kernels.total() + calls.uploaded, goal="== 0")


def _steps_with_tokens(part: Part, make_rig: Callable[[int], StepRig]) -> None:
    """What 24 rows more in the condition cost a step. make_rig: rows of the condition -> a rig."""
    found = {}
    for rows in (77, 77 + 24):
        with make_rig(rows) as rig:
            graph = rig.capture(rig.step)
            step = rig.step if graph is None else partial(graph.launch, rig.stream)
            found[rows] = statistics.median(event_seconds(rig.device, rig.stream, step))
            if graph is not None:
                rig.device.synchronize(rig.stream)
                graph.close()
        part.add(f"a step with {rows} rows of condition [ms]", 1e3 * found[rows])
    part.add("a step with 24 tokens: costs more by", found[77 + 24] / found[77] - 1, goal="<= 0.02")


def _time_swaps(
    part: Part, rig: StepRig, told: str, swaps: int, goal: str | None = None, order: Sequence[str] = "AB"
) -> None:
    """Wall time of many swaps. goal: of the 99th percentile."""
    turns, walls = itertools.cycle(order), []
    warm = min(10, swaps)
    for _ in range(swaps + warm):
        rig.device.synchronize(rig.stream)
        started = time.perf_counter()
        rig.enter(next(turns))
        rig.device.synchronize(rig.stream)
        walls.append(1e3 * (time.perf_counter() - started))
    spread = Spread.of(walls[warm:])
    part.add(f"{told}, p50 of {swaps} [ms]", spread.p50)
    part.add(f"{told}, p99 of {swaps} [ms]", spread.p99, goal=goal)


def _swap_traffic(part: Part, rig: StepRig, told: str, factors: Mapping[str, Any]) -> None:
    """What a swap launches and moves, and how long the device is at it; factors: of one of the subjects."""
    turns = itertools.cycle("CD")  # neither is there now
    with count_calls(rig.device) as calls:
        rig.enter(next(turns))
        rig.device.synchronize(rig.stream)
    part.add(f"{told}: kernels launched", calls.kernels.total())
    part.add(f"{told}: copies within the device", calls.copies)
    part.add(f"{told}: copied within the device [MB]", calls.copied / 1e6)
    part.add(f"{told}: uploaded [bytes]", calls.uploaded)
    if calls.kernels:
        part.note(f"{told}: {', '.join(f'{count} x {name}' for name, count in calls.kernels.items())}")
    seconds = statistics.median(event_seconds(rig.device, rig.stream, lambda: rig.enter(next(turns))))
    part.add(f"{told}, on the device [ms]", 1e3 * seconds)
    merged = merge_bytes(factors.values(), np.dtype(rig.arrays["sample"].dtype).itemsize)
    if calls.uploaded > merged // 4:  # weights crossed the bus, which is slower than memory
        part.add(f"{told}: over the bus [GB/s]", calls.uploaded / seconds / 1e9)
    elif set(calls.kernels) <= {_MERGE}:  # of other kernels nobody counted the bytes
        moved = 2 * calls.copied + calls.uploaded + merged * bool(calls.kernels)
        rate = copy_bandwidth(rig.device, nbytes=max(moved, MIB))
        part.add(f"{told}: fewest bytes it can move [MB]", moved / 1e6)
        part.add(f"{told}: share of copying", moved / seconds / rate)


def _come_back(part: Part, rig: StepRig, told: str, order: Sequence[str] = "ABA") -> Any:
    """One subject, another, the first again: rows, and the first's result."""
    rig.reset()
    ends = []
    for name in order:
        rig.enter(name)
        rig.unet()
        ends.append(rig.result()["eps"])
    part.add(f"{told}: the same bits as before", bool(np.array_equal(ends[0], ends[2])), goal="== 1")
    part.add(f"{told}: another result between", not np.array_equal(ends[0], ends[1]), goal="== 1")
    return ends[0]


def _steps_with_and_without(part: Part, rig: StepRig) -> None:
    """A step with a subject against one without: the difference is what a subject costs while it paints."""
    graph = rig.capture(rig.step)
    step = rig.step if graph is None else lambda: graph.launch(rig.stream)
    for told, name in (("with a subject", "A"), ("without a subject", "")):
        rig.enter(name)
        seconds = statistics.median(event_seconds(rig.device, rig.stream, step))
        part.add(f"a step {told} [ms]", 1e3 * seconds)
    if graph is not None:
        rig.device.synchronize(rig.stream)
        graph.close()


def _turns_of_subjects(part: Part, rig: StepRig, rounds: int) -> None:
    """Four pictures of two subjects, of four steps each: sorted, as `inpaint_batch` paints them, and in turns."""
    graph = rig.capture(rig.step)
    step = rig.step if graph is None else lambda: graph.launch(rig.stream)

    def work(order: str) -> float:
        rig.enter("D")
        rig.device.synchronize(rig.stream)

        def run() -> None:
            for name in order:
                rig.enter(name)
                for _ in range(4):
                    step()

        return event_seconds(rig.device, rig.stream, run, repeats=1, warm=0)[0]

    work("ABAB")
    times = [(work("ABAB"), work("AABB")) for _ in range(rounds)]
    turns, ordered = (statistics.median(each) for each in zip(*times, strict=True))
    part.add("four pictures of two subjects, 4 steps each, sorted [ms]", 1e3 * ordered)
    part.add("the same in turns: cost more by", turns / ordered - 1)
    if graph is not None:
        rig.device.synchronize(rig.stream)
        graph.close()


# ------------------------------------------------------------------------------------------------ memory


def memory(part: Part, setting: Setting) -> None:
    """The plan for this GPU, plans for smaller ones, and what the device says was taken."""
    with device_of(setting) as device:
        before = device.memory()[0]
        with random_networks(setting, device) as networks:
            part.add("weights, measured [MiB]", (before - device.memory()[0]) / MIB)
            held = sum(networks.weight_bytes(name) for name in _own(networks))
            part.add("weights, as told [MiB]", held / MIB)
            after = device.memory()[0]
            with studio_for(device, networks, tokenizers_of(setting), largest_picture=setting.side**2) as front:
                part.note(f"plan for this device:\n{front.studio.plan}")
                taken = after - device.memory()[0]
                part.add("the runtime's own memory, measured [MiB]", taken / MIB)
                paint_often(front, setting, next(iter(setting.jobs().values())), times=1)
                taken = after - device.memory()[0]
                part.add("with rooms and graphs after some pictures, measured [MiB]", taken / MIB)
                _turns(part, networks)
                for total in (24, 12):
                    part.note(f"plan as if the device had {total} GiB:\n{_as_if(front, total * GIB)}")


def _turns(part: Part, networks: Any) -> None:
    """What it costs to have weights leave and come back, where memory is short."""
    for turn in ("first", "again"):  # the first time takes a copy on the host
        started = time.perf_counter()
        networks.unload("unet")
        left = time.perf_counter()
        networks.load("unet")
        part.add(f"the UNet's weights leave, {turn} [s]", left - started)
        part.add(f"the UNet's weights come back, {turn} [s]", time.perf_counter() - left)


def _own(networks: Any) -> list[str]:
    """The networks that are loaded from the start: all but twins."""
    return [kind.name for kind in KINDS if kind.name in networks]


def _as_if(front: Front, total: int) -> str:
    """The plan for a device of `total` bytes with as much of it in use beforehand as here, or why there is none."""
    from dreammix_trt.core.errors import DreamMixError

    try:
        return str(front.plan_for(total))
    except DreamMixError as error:
        return f"none: {error}"


# ------------------------------------------------------------------------------------------------ soak


def soak(part: Part, setting: Setting) -> None:
    """Request after request of the reduced-width model: memory of device and host must not grow."""
    from dreammix_trt.core.request import Request

    reduced = replace(setting, width=min(setting.width, 0.2), side=min(setting.side, 512))
    image, mask = sample_picture(reduced.side)
    with device_of(reduced) as device, random_networks(reduced, device) as networks:
        known = [random_subject(networks, name, seed=seed) for seed, name in enumerate("ABCDE")]
        with studio_for(device, networks, tokenizers_of(reduced), known, largest_picture=reduced.side**2) as front:
            warm = min(50, max(reduced.requests // 10, 1))
            levels: list[tuple[int, int]] = []
            started = time.perf_counter()
            for turn in range(reduced.requests):
                if turn == warm:
                    levels.append(_levels(device))
                    started = time.perf_counter()
                request = Request(prompt=f"{PROMPT} {turn % 7}", seed=turn, num_inference_steps=4 + turn % 3)
                front.paint(image, mask, request, subject="ABCDE"[turn % 5])
            spent = time.perf_counter() - started
            levels.append(_levels(device))
    (device_before, host_before), (device_after, host_after) = levels[0], levels[-1]
    part.add("requests", reduced.requests)
    part.add("a request [ms]", 1e3 * spent / max(reduced.requests - warm, 1))
    part.add(f"device memory grown after the first {warm} [MiB]", (device_after - device_before) / MIB, goal="<= 0")
    part.add(f"host memory grown after the first {warm} [MiB]", (host_after - host_before) / MIB, goal="<= 32")


def _levels(device: Any) -> tuple[int, int]:
    """Bytes in use on the device, and of this process on the host."""
    gc.collect()
    free, total = device.memory()
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return total - free, pages * os.sysconf("SC_PAGE_SIZE") if pages else 0
