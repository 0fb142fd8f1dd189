"""The part `networks` of `gpu_suite.py`: every network alone: the time of a call and the kernels it takes.

Whatever network the list has is measured, so a new one needs nothing here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from _gpu_full import bound_alone, call_seconds
from _gpu_models import Setting, device_of, random_networks
from _gpu_report import MIB, Part

_MOST_NAMED = 8  # kernels of a network that are named, the most frequent first


def networks(part: Part, setting: Setting) -> None:
    """Rows of each network in running order, twins left out; two rows a batch where a step's networks take rows."""
    from dreammix_trt.core.axes import Sides
    from dreammix_trt.core.networks import KINDS

    side = setting.side // 8
    counted = True
    with device_of(setting) as device, random_networks(setting, device) as found:
        for kind in (kind for kind in KINDS if kind.name in found):
            sides = Sides(1 if kind.call in ("prompt", "frame", "vae") else 2, 1, side, side)
            found.load(kind.name)
            part.add(f"{kind.name}: weights [MiB]", found.weight_bytes(kind.name) / MIB)
            with bound_alone(device, found, kind.name, sides) as (bound, stream):
                part.add(f"{kind.name}: a call [ms]", 1e3 * call_seconds(device, bound, stream))
                launched = count_kernels(lambda: bound.enqueue(stream), lambda: device.synchronize(stream))
            counted &= launched is not None
            if launched is not None:
                part.add(f"{kind.name}: kernels of a call", launched.total())
                part.note(f"{kind.name}: {name_kernels(launched)}")
    if not counted:
        part.note("kernels were not counted: torch's profiler sees no GPU here")


def count_kernels(work: Callable[[], object], wait: Callable[[], object]) -> Counter[str] | None:
    """The kernels that reach the GPU while `work` is enqueued and waited for, by name, whoever launches them.

    None where torch's profiler sees no GPU.
    """
    from torch.profiler import ProfilerActivity, profile, supported_activities

    if ProfilerActivity.CUDA not in supported_activities():
        return None
    launched: Counter[str] = Counter()
    for _ in range(2):  # the first look loads the profiler, which may miss something
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            work()
            wait()
        launched = kernels_of(seen.events())
    return launched


def kernels_of(events: Iterable[Any]) -> Counter[str]:
    """The kernels among a profiler's events, by name; copies and fills are none."""
    names = (event.name for event in events if event.device_type.name == "CUDA")
    return Counter(name for name in names if not name.startswith(("Memcpy", "Memset")))


def name_kernels(launched: Counter[str]) -> str:
    """The most frequent kernels for people."""
    named = [f"{count} x {name.split('(')[0][:80]}" for name, count in launched.most_common(_MOST_NAMED)]
    return "; ".join([*named, *(["..."] if len(launched) > _MOST_NAMED else [])]) or "no kernel"
