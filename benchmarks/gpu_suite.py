"""Everything that only a GPU can tell: `python benchmarks/gpu_suite.py [PART ...]`.

Parts: machine (what this GPU can do at most), kernels (each against the host and the right values), loop (whole
pictures against the host), full and compiled (SDXL at full size in torch, eager and compiled), peers (diffusers on the
same GPU), graphs, subjects, memory, soak, rtx (TensorRT-RTX). Each runs in a process of its own, at most `--limit`
seconds, and its rows are merged into one JSON file as soon as it ends.

Without TensorRT and without diffusers installed torch and nvcc are enough, with cmake and nanobind to build: kernels
are built for the GPU at hand, torch runs the networks, wheels (diffusers, nanobind) are taken from `--wheels DIR`, and
weights and inputs are made on the spot.
Exits 0, 1 where a goal was missed or a part failed, 2 without a GPU (nothing is written then).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parent))

import _gpu_clock
from _common import RESULTS
from _gpu_models import Setting
from _gpu_report import NAME, PARTS, Part, chosen, has_failed, merge_parts, table, write
from _gpu_setup import (
    ROOT,
    build_extension,
    describe,
    extension_info,
    extension_serves,
    unpack_wheels,
    use_extension,
    with_paths,
)

_EXTENSION = "DREAMMIX_BENCHMARK_EXTENSION"  # to the parts' processes: the folder the extension is taken from


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options()
    given = parser.parse_args(arguments)
    try:
        names = chosen(given.parts)
    except ValueError as error:
        parser.error(str(error))
    out = given.out or RESULTS / f"{NAME}.json"
    if given.simulate and (given.out is None or out.resolve().is_relative_to(RESULTS.resolve())):
        parser.error(f"simulated results are no results: give --out, outside {RESULTS}")
    setting = Setting(
        width=given.width,
        side=given.side,
        steps=given.steps,
        repeats=given.repeats,
        requests=given.requests,
        swaps=given.swaps,
        compiled=not given.eager,
        compile_mode=given.compile_mode,
        simulate=given.simulate,
        engine=given.engine,
    )
    if given.child:
        return child(names[0], setting, out)
    capability = gpu_capability()
    if capability is None and not given.simulate:
        print("no NVIDIA GPU can be used here, so there is nothing to measure", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        if find_spec("platformdirs") is None:  # torch and nvcc alone: nothing then knows the user's own folder
            os.environ.setdefault("DREAMMIX_HOME", scratch)
        environment = ready(given, capability, Path(scratch))
        records = {name: supervise(name, given, environment, out, Path(scratch)) for name in names}
    sys.stdout.write(table(records, goals=not given.simulate))
    return int(any(has_failed(record) for record in records.values()))


def options() -> argparse.ArgumentParser:
    """The command line; `Setting` says what its values mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/gpu_suite.json)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to import from, unpacked for this run")
    parser.add_argument("--build", type=Path, help="build folder of the kernels (default: build/gpu-suite)")
    parser.add_argument("--limit", type=float, default=600, help="seconds a part may take (default: 600)")
    parser.add_argument("--width", type=float, default=1.0, help="of the random SDXL; 1.0: SDXL itself, 0.2: miniature")
    parser.add_argument("--side", type=int, default=1024, help="of frames in pixels (default: 1024)")
    parser.add_argument("--steps", type=int, help="of every whole picture (default: 30 and 8)")
    parser.add_argument("--repeats", type=int, default=5, help="of whole pictures (default: 5)")
    parser.add_argument("--requests", type=int, default=1000, help="of the soak (default: 1000)")
    parser.add_argument("--swaps", type=int, default=1000, help="of subjects (default: 1000)")
    parser.add_argument("--eager", action="store_true", help="without torch.compile, on either side")
    parser.add_argument("--compile-mode", default="default", help="of torch.compile, on both sides (default: default)")
    parser.add_argument("--engine", help="an engine directory whose times part rtx takes, too")
    parser.add_argument("--simulate", action="store_true", help=argparse.SUPPRESS)  # a dry run without a GPU
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


# ------------------------------------------------------------------------------------------------ this process


def gpu_capability() -> str | None:
    """Of the first GPU ("sm_90"); None where there is none."""
    from dreammix_trt.engine.hardware import ask_driver

    gpus = ask_driver().gpus
    return gpus[0].capability if gpus else None


def ready(given: argparse.Namespace, capability: str | None, scratch: Path) -> dict[str, str]:
    """The environment of the parts: the checkout and the wheels on Python's path, an extension for this GPU."""
    wheels = unpack_wheels(given.wheels, scratch / "wheels") if given.wheels else []
    environment = with_paths([*wheels, ROOT], os.environ)
    if capability is not None and not extension_serves(extension_info(environment), capability):
        print(f"building the kernels for {capability} ...", file=sys.stderr, flush=True)
        started = time.perf_counter()
        folder = given.build or ROOT / "build" / "gpu-suite"
        environment[_EXTENSION] = str(build_extension(folder, capability, environment))
        print(f"built in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return environment


def supervise(
    name: str, given: argparse.Namespace, environment: Mapping[str, str], out: Path, scratch: Path
) -> dict[str, Any]:
    """Run a part in a process of its own and merge what it left into the file, whatever became of it."""
    left = scratch / f"{name}.json"
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        name,
        "--child",
        "--out",
        str(left),
        *_pass_options(given),
    ]
    error, started = None, time.perf_counter()
    try:
        done = subprocess.run(command, env=dict(environment), stdout=sys.stderr, timeout=given.limit)
        if done.returncode:
            error = f"the part's process ended with {done.returncode}"
    except subprocess.TimeoutExpired:
        error = f"stopped after {given.limit:g} s"
    record: dict[str, Any] = {"rows": [], "notes": [], "error": None}
    if left.exists():
        record = json.loads(left.read_text(encoding="utf-8"))
    record["error"] = record["error"] or error
    record["seconds"] = round(time.perf_counter() - started, 1)
    write(out, merge_parts(out, {name: record}, simulated=given.simulate))
    return record


def _pass_options(given: argparse.Namespace) -> list[str]:
    """The options a part's process needs."""
    words = []
    for name in ("width", "side", "steps", "repeats", "requests", "swaps", "compile_mode", "engine"):
        if getattr(given, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(given, name))]
    return words + [f"--{name}" for name in ("eager", "simulate") if getattr(given, name)]


# ------------------------------------------------------------------------------------------------ a part's process


def child(name: str, setting: Setting, out: Path) -> int:
    """Run a part here; its rows are in `out` at any time. An error is kept with them."""
    if os.environ.get(_EXTENSION):
        use_extension(Path(os.environ[_EXTENSION]))
    part = Part(name, goals=not setting.simulate, keep=lambda part: write(out, part.to_json()))
    part.facts = {"machine": describe(_read_build_info()), "settings": asdict(setting)}
    logging.getLogger("dreammix_trt").addHandler(Warnings(part))
    if setting.simulate:
        _gpu_clock.REPEATS = 2
    started = time.perf_counter()
    try:
        work_of(name)(part, setting)
    except Exception as error:
        traceback.print_exc()
        part.fail(f"{type(error).__name__}: {error}")
    part.seconds = time.perf_counter() - started
    part.keep(part)
    return 0


class Warnings(logging.Handler):
    """What the runtime warns of (a picture painted twice, say) becomes notes of the part, each once."""

    def __init__(self, part: Part) -> None:
        super().__init__(logging.WARNING)
        self._part = part

    def emit(self, record: logging.LogRecord) -> None:
        text = f"warning: {record.getMessage()}"
        if text not in self._part.notes:
            self._part.note(text)


def work_of(name: str) -> Callable[[Part, Setting], None]:
    """The function of a part. Its modules are imported now: some need torch."""
    import _gpu_full
    import _gpu_kernels
    import _gpu_parts
    import _gpu_runtime

    if name == "peers":
        from _gpu_peers import peers

        return peers
    if name == "rtx":
        from _gpu_rtx import rtx

        return rtx
    works: dict[str, Callable[[Part, Setting], None]] = {
        "machine": _gpu_parts.machine, "kernels": _gpu_kernels.kernels, "loop": _gpu_parts.loop,
        "full": _gpu_full.full, "compiled": _gpu_full.measure_compiled, "graphs": _gpu_parts.graphs,
        "subjects": _gpu_runtime.subjects, "memory": _gpu_runtime.memory, "soak": _gpu_runtime.soak,
    }  # fmt: skip
    return works[name]


def _read_build_info() -> dict[str, Any] | None:
    try:
        from dreammix_trt import _cpp
    except ImportError:
        return None
    info: dict[str, Any] = _cpp.build_info()
    return info


if __name__ == "__main__":
    sys.exit(main())
