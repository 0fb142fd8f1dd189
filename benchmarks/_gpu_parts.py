"""Parts of `gpu_suite.py`: the machine's ceilings, parity of whole pictures with the host, captured steps.

Every part takes its `Part` and the `Setting`, and adds rows.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
from _gpu_clock import copy_bandwidth, event_seconds, matmul_rate
from _gpu_models import (
    PROMPT,
    Setting,
    StepRig,
    device_of,
    on_device,
    plain_float32,
    random_networks,
    random_subject,
    sample_picture,
    studio_for,
)
from _gpu_report import MIB, Part

# ------------------------------------------------------------------------------------------------ machine


def machine(part: Part, setting: Setting) -> None:
    """The two ceilings everything else is held against."""
    with device_of(setting) as device:
        free, total = device.memory()
        part.add("device memory, free [MiB]", free / MIB)
        part.add("device memory, all [MiB]", total / MIB)
        nbytes = 1 << (24 if setting.simulate else 30)
        for turn in ("first", "again"):
            part.add(f"copy within the device, {turn} [GB/s]", copy_bandwidth(device, nbytes=nbytes) / 1e9)
            part.add(f"float16 matrix product, {turn} [TFLOP/s]", ceiling(setting) / 1e12)
    part.note("copy: bytes read and bytes written, 1 GiB each; matrix product: 8192^3, random values, float32 sums")


def ceiling(setting: Setting) -> float:
    """FLOP a second of the largest matrix product here."""
    return matmul_rate(setting.torch_device, side=256 if setting.simulate else 8192)


# ------------------------------------------------------------------------------------------------ loop


def loop(part: Part, setting: Setting) -> None:
    """Whole pictures of the embedded model in float32: the device runtime against the host's `DreamMix`."""
    from dreammix_trt.core.checkpoint import BaseFiles
    from dreammix_trt.core.request import Request
    from dreammix_trt.engine.dreammix import DreamMix
    from dreammix_trt.engine.text import Tokenizer
    from dreammix_trt.export.torch_backend.engine_set import TorchEngineSet
    from dreammix_trt.export.torch_backend.on_device import TorchNetworks

    plain_float32()
    base = BaseFiles.open()
    assert base.folder is not None
    tokenizers = [Tokenizer.load(base.folder / name) for name in ("tokenizer", "tokenizer_2")]
    host_networks = TorchEngineSet(base)
    with device_of(setting) as device, TorchNetworks.of(base, device=setting.torch_device, dtype="float32") as plain:
        networks = on_device(setting, device, plain)
        facts, subject = networks.facts, random_subject(networks, "mug", seed=3)
        with (
            DreamMix.on_host(host_networks, facts, tokenizers, [subject]) as host,
            studio_for(device, networks, tokenizers, [subject]) as front,
        ):
            for name, side, fields in _loop_cases(setting):
                image, mask = sample_picture(side)
                request = Request.of(**{"prompt": PROMPT, "seed": 5, **fields})
                truth = np.asarray(host.inpaint(image, mask, request).images[0]).astype(int)
                found = front.paint(image, mask, request, subject=fields.get("subject") or "mug").astype(int)
                apart = np.abs(found - truth)
                part.add(f"{name}: largest difference of 255 levels", int(apart.max()), goal="<= 2")
                part.add(f"{name}: share of values that differ", float((apart > 0).mean()))
                again = front.paint(image, mask, request, subject=fields.get("subject") or "mug")
                part.add(f"{name}: the same bits again", bool((again == found).all()), goal="== 1")


def _loop_cases(setting: Setting) -> list[tuple[str, int, dict[str, Any]]]:
    """(name, side of the picture, fields of the request)."""
    steps = {"num_inference_steps": setting.steps or 20}
    cases: list[tuple[str, int, dict[str, Any]]] = [
        ("two stages", 128, steps),
        ("reference mode, sampled VAE", 128, {**steps, "mode": "reference"}),
        ("attributes taken away", 128, {**steps, "prompt": "a red sks mug", "substitute": ["striped"]}),
        ("a picture larger than the frame", 384, steps),
        ("one stage, no guidance", 128, {**steps, "lcg_steps": 0, "guidance_scale": 1.0}),
    ]
    return cases[:2] if setting.simulate else cases


# ------------------------------------------------------------------------------------------------ graphs


def graphs(part: Part, setting: Setting) -> None:
    """A captured step against plain launches of the same: time, what the host spends, and the result."""
    side = setting.side // 8
    with (
        device_of(setting) as device,
        random_networks(setting, device) as networks,
        StepRig(device, networks, (side, side)) as rig,
    ):
        rig.step()
        plain = statistics.median(event_seconds(device, rig.stream, rig.step))
        part.add("a step, plain launches [ms]", 1e3 * plain)
        part.add("a step, plain launches: the host's part [ms]", 1e3 * host_seconds(rig, rig.step))
        graph = rig.capture(rig.step)
        if graph is None:
            part.note("the networks here cannot be captured")
            return
        try:
            replay = statistics.median(event_seconds(device, rig.stream, lambda: graph.launch(rig.stream)))
            part.add("a step, replayed [ms]", 1e3 * replay)
            host = host_seconds(rig, lambda: graph.launch(rig.stream))
            part.add("a step, replayed: the host's part [ms]", 1e3 * host)
            part.add("plain / replayed", plain / replay)
            part.add("the same bits either way", _same_results(rig, graph), goal="== 1")
        finally:
            device.synchronize(rig.stream)
            graph.close()


def host_seconds(rig: StepRig, work: Any, repeats: int = 10) -> float:
    """Median seconds until `work` has enqueued all and returns, the device idle before."""
    times = []
    for _ in range(repeats):
        rig.device.synchronize(rig.stream)
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    rig.device.synchronize(rig.stream)
    return statistics.median(times)


def _same_results(rig: StepRig, graph: Any, steps: int = 3) -> bool:
    """Whether some steps from one state end in the same bits, launched plainly and replayed."""
    ends = []
    for work in (rig.step, lambda: graph.launch(rig.stream)):
        rig.reset()
        for _ in range(steps):
            work()
        ends.append(rig.result())
    return all(np.array_equal(ends[0][name], ends[1][name]) for name in ends[0])
