"""The part `kernels`: each kernel on the device against the host and against what it must give, and how fast it is."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
from _gpu_cases import KernelCase, all_cases, kernels_of
from _gpu_clock import array, copy_bandwidth, download, replay_seconds, upload
from _gpu_models import Setting, device_of
from _gpu_report import Part, largest_difference

from dreammix_trt.core.errors import DreamMixError

if TYPE_CHECKING:
    from dreammix_trt.core.seam import Array, Stream
    from dreammix_trt.engine.drivers.device import Device

CACHE = 128 << 20  # bytes that no GPU's cache holds
MOST_COPIES = 16  # of a case's arrays, to rotate among
PRE_AND_POST_MS = 8.0
_CHECKED_SIDE = 64  # under a checker everything is a hundred times slower


def kernels(part: Part, setting: Setting) -> None:
    """The part on the setting's device."""
    with device_of(setting) as device:
        measure(part, device, side=setting.side)


def memcheck(part: Part, setting: Setting) -> None:
    """Every kernel once on small arrays, right or not; for a checker of memory accesses around this process."""
    from dreammix_trt import _cpp

    wrong = []
    with device_of(setting) as device, ExitStack() as owned:
        stream = device.make_stream()
        owned.callback(stream.close)
        cases = all_cases(_CHECKED_SIDE, _cpp.gpu)
        for case in cases:
            with ExitStack() as arrays:
                if not is_right(part, device, stream, case, on_device(device, stream, arrays, case), _cpp.gpu):
                    wrong.append(case.label)
    if setting.simulate:
        part.note("simulated: there was no checker around it")
    part.add("kernels that ran", len({case.kernel for case in cases}))
    part.add("cases that are not right", len(wrong), goal="== 0")


def is_right(part: Part, device: Device, stream: Stream, case: KernelCase, arrays: dict[str, Array], gpu: Any) -> bool:
    """Run a case once and hold its results against the right values and the host's; rows where something is to say."""
    on_host = run_on_host(gpu, case)
    run(device, stream, case, arrays)
    found = {name: download(device, stream, arrays[name]) for name in case.wanted}
    return all([compare(part, case, name, found[name], on_host[name]) for name in case.wanted])


def measure(part: Part, device: Device, *, side: int) -> None:
    """Rows of every kernel: correctness first, then time and share of the copy bandwidth."""
    from dreammix_trt import _cpp

    bandwidth = copy_bandwidth(device, nbytes=CACHE if side < 512 else 1 << 30)
    part.add("copy within the device [GB/s]", bandwidth / 1e9)
    cases = all_cases(side, _cpp.gpu)
    wrong, around = 0, 0.0
    for case in cases:
        try:
            right, seconds = one(part, device, _cpp.gpu, case, bandwidth)
        except (DreamMixError, RuntimeError, TypeError, ValueError) as error:  # the others are tried all the same
            part.note(f"{case.label} ({case.kernel}): {type(error).__name__}: {error}")
            right, seconds = False, 0.0
        wrong += not right
        around += case.times * seconds
    untried = kernels_of(_cpp.gpu) - {case.kernel for case in cases}
    part.add("kernels that are not right", wrong, goal="== 0")
    part.add("kernels not tried", ", ".join(sorted(untried)) or "none")
    part.add(
        "before, between and after the steps, all kernels of a picture [ms]",
        1e3 * around,
        goal=f"<= {PRE_AND_POST_MS:g}",
    )
    part.note(
        "share: the fewest bytes a kernel must move, over its time, over the copy bandwidth; kernels on small arrays "
        f"are bound by their launch, and cached where {MOST_COPIES} copies of their arrays fit the caches"
    )


def one(part: Part, device: Device, gpu: Any, case: KernelCase, bandwidth: float) -> tuple[bool, float]:
    """A case's rows; returns whether it is right, and its seconds."""
    with ExitStack() as owned:
        stream = device.make_stream()
        owned.callback(stream.close)
        copies = max(2, min(MOST_COPIES, -(-CACHE // max(case.moved, 1))))
        sets = [on_device(device, stream, owned, case) for _ in range(copies)]
        right = is_right(part, device, stream, case, sets[0], gpu)
        works = [lambda arrays=arrays: run(device, stream, case, arrays) for arrays in sets[1:]]
        seconds = statistics.median(replay_seconds(device, stream, works))
    goal = None if case.goal_ms is None else f"<= {case.goal_ms:g}"
    part.add(f"{case.label} ({case.kernel}) [ms]", 1e3 * seconds, goal=goal)
    said = f"{case.label}: {case.moved / 1e6:.3g} MB, share of copying"
    part.add_share(said, case.moved / max(seconds, 1e-9), bandwidth)
    return right, seconds


def compare(part: Part, case: KernelCase, name: str, found: Any, host: Any) -> bool:
    """Hold a result against what it must be and against the host's; a row only where something is to be said."""
    truth, tolerance = case.wanted[name], case.tolerance(name)
    error = difference(found.reshape(truth.shape), truth)
    same = difference(found, host)
    right = max(error, same) <= tolerance
    if not right or tolerance:  # equal bits go without saying
        part.add(f"{case.label}: {name}, error", max(error, same), goal=f"<= {tolerance:g}")
    if not right:
        part.note(f"{case.label}: {name}: {error:.3g} from the right values, {same:.3g} from the host's")
    return right


def difference(found: Any, truth: Any) -> float:
    """Of floats the largest, relative; of whole numbers how many differ."""
    if np.asarray(truth).dtype.kind == "f":
        return largest_difference(found, truth)
    return float(np.count_nonzero(np.asarray(found) != np.asarray(truth)))


def run(device: Device, stream: Stream, case: KernelCase, arrays: dict[str, Array]) -> None:
    """Enqueue the case's kernel."""
    given = {name: each for name, each in arrays.items() if name not in case.inside.values()}
    device.launch_kernel(case.kernel, stream, **{**case.plain, **given})


def on_device(device: Device, stream: Stream, owned: ExitStack, case: KernelCase) -> dict[str, Array]:
    """The case's arrays on the device, results poisoned."""
    given = _arrays(case)
    arrays = {name: array(device, owned, values.shape, str(values.dtype)) for name, values in given.items()}
    if case.inside:
        case.link(given["slots"], {name: each.pointer for name, each in arrays.items()})
    for name, values in given.items():
        upload(device, stream, arrays[name], values)
    return arrays


def run_on_host(gpu: Any, case: KernelCase) -> dict[str, Any]:
    """The same kernel on the host; the results by name."""
    arrays = _arrays(case)
    pointers = {name: values.ctypes.data for name, values in arrays.items()}
    if case.inside:
        case.link(arrays["slots"], pointers)
    pointers = {name: pointer for name, pointer in pointers.items() if name not in case.inside.values()}
    plain = {name: 0 if value is None else value for name, value in case.plain.items()}
    getattr(gpu, case.kernel)(**{**plain, **pointers}, stream=None)
    return {name: arrays[name] for name in case.wanted}


def _arrays(case: KernelCase) -> dict[str, Any]:
    """Fresh copies: inputs as given; results that are not, and scratch, poisoned."""
    arrays = {name: np.array(values) for name, values in case.given.items()}
    for name, values in case.wanted.items():
        if name not in arrays:
            arrays[name] = make_poison(values.shape, str(values.dtype))
    return arrays | {name: make_poison((size,), "uint8") for name, size in case.scratch.items()}


def make_poison(shape: tuple[int, ...], dtype: str) -> Any:
    """Values nothing gives: NaN, or a pattern of bits."""
    out = np.empty(shape, dtype)
    out.reshape(-1).view(np.uint8)[...] = 0xFF if out.dtype.kind == "f" else 0x5A
    return out
