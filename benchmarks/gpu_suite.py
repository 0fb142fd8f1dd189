"""Everything that only a GPU can tell: `python benchmarks/gpu_suite.py [PART ...]`.

Parts: machine (what this GPU can do at most), build (the kernels, for this GPU alone), kernels (each against the host
and the right values), memcheck (the same under compute-sanitizer), loop (whole pictures against the host), graphs,
networks (a call and its kernels, each alone), subjects (what a swap launches, moves and takes), full (SDXL at full size
in eager torch), compiled-* (in torch.compile, by what takes minutes to compile; `compiled`: all of them), peers-*
(diffusers on the same GPU, likewise), memory, soak, rtx (TensorRT-RTX), ratios (of what the peers' parts measured).

Each runs in a process of its own, at most `--limit` seconds. Its rows are in one JSON file seconds after they are
measured: a part that is stopped keeps them. `--resume` runs what is not complete in that file; what torch compiled
stays in the build folder, so a stopped `compiled` part goes on where it was. `benchmarks/first_light.sh` runs the parts
in the order that tells most in the first ten minutes.

Without TensorRT and without diffusers installed torch and nvcc are enough, with cmake and nanobind to build: kernels
are built for the GPU at hand, torch runs the networks, wheels (diffusers, nanobind) are taken from `--wheels DIR`, and
weights and inputs are made on the spot.
Exits 0, 1 where a goal was missed or a part failed, 2 without a GPU (nothing is written then), 3 where nothing failed
but a part was skipped because something is missing here.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parent))

import _gpu_clock
from _common import RESULTS
from _gpu_models import Setting
from _gpu_report import (
    GROUPS,
    NAME,
    PARTS,
    UNFINISHED,
    Part,
    add_ratios,
    chosen,
    has_failed,
    is_complete,
    keep_rows,
    merge_parts,
    read_parts,
    table,
    write,
)
from _gpu_setup import (
    ROOT,
    build_extension,
    describe,
    end_group,
    extension_info,
    extension_serves,
    extract_extension,
    gpu_state,
    info_of_extension,
    unpack_wheels,
    use_extension,
    with_paths,
)

_EXTENSION = "DREAMMIX_BENCHMARK_EXTENSION"  # to the parts' processes: the folder the extension is taken from
_POLL = 2.0  # seconds between two looks at the rows of a part that runs
_WITHOUT_KERNELS = ("machine", "networks", "compiled-vae", "peers-float32")
#: what a machine may lack, and how it gets there: a part that misses one of these is skipped
PROVIDED = {
    "torch": "it must be installed on the machine itself (a build with CUDA is too large to lay beside)",
    "triton": "it comes with torch for Linux; --eager measures without it",
    "diffusers": "lay its wheel beside (--wheels)",
    "transformers": "lay its wheel beside (--wheels)",
    "tokenizers": "lay its wheel beside (--wheels)",
    "safetensors": "lay its wheel beside (--wheels)",
    "onnxruntime": "lay its wheel beside (--wheels)",
    "PIL": "lay the wheel of pillow beside (--wheels)",
}


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
    if given.child:
        return child(names[0], setting_of(given), out)
    capability = gpu_capability()
    if capability is None and not given.simulate:
        print("no NVIDIA GPU can be used here, so there is nothing to measure", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part's processes end with this one
    with tempfile.TemporaryDirectory() as scratch:
        if find_spec("platformdirs") is None:  # torch and nvcc alone: nothing then knows the user's own folder
            os.environ.setdefault("DREAMMIX_HOME", scratch)
        records = run_parts(names, given, Kernels(given, capability, Path(scratch)), out, Path(scratch))
    sys.stdout.write(table(records, goals=not given.simulate))
    if any(has_failed(record) for record in records.values()):
        return 1
    return 3 if any(record.get("skipped") for record in records.values()) else 0


def options() -> argparse.ArgumentParser:
    """The command line; `Setting` says what its values mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = ", ".join((*PARTS, *GROUPS))
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {listed} (default: all)")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/gpu_suite.json)")
    parser.add_argument("--resume", action="store_true", help="leave out the parts that are complete in that file")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to import from, unpacked for this run")
    parser.add_argument("--build", type=Path, help="build folder of the kernels (default: build/gpu-suite)")
    parser.add_argument("--kernels", type=Path, help="a wheel of dreammix-trt to take the kernels from, not built then")
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


def setting_of(given: argparse.Namespace) -> Setting:
    """The settings of the parts."""
    same = ("width", "side", "steps", "repeats", "requests", "swaps", "compile_mode", "simulate", "engine")
    return Setting(compiled=not given.eager, **{name: getattr(given, name) for name in same})


# ------------------------------------------------------------------------------------------------ this process


def gpu_capability() -> str | None:
    """Of the first GPU ("sm_90"); None where there is none."""
    from dreammix_trt.engine.hardware import ask_driver

    gpus = ask_driver().gpus
    return gpus[0].capability if gpus else None


class Kernels:
    """The environment of the parts' processes, and the extension with kernels for this GPU, made when first asked."""

    def __init__(self, given: argparse.Namespace, capability: str | None, scratch: Path) -> None:
        """capability: of the GPU; None: simulated, the extension that is installed serves."""
        self._given, self._capability, self._scratch = given, capability, scratch
        self.folder: Path = given.build or ROOT / "build" / "gpu-suite"
        wheels = unpack_wheels(given.wheels, scratch / "wheels") if given.wheels else []
        #: of parts that need no kernels: the checkout and the wheels on Python's path, and where torch keeps what it
        #: compiled, so that a stopped part need not compile it again
        self.plain = with_paths([*wheels, ROOT], os.environ)
        self.plain.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self.folder / "inductor"))

    @cached_property
    def part(self) -> Part:
        """The part `build`: it makes them, or says why there are none."""
        part = Part("build", goals=not self._given.simulate)
        started = time.perf_counter()
        try:
            self._make(part)
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            part.fail(f"{type(error).__name__}: {error}")
        part.seconds = time.perf_counter() - started
        return part

    def environment(self) -> dict[str, str]:
        """Of parts that need kernels. Raises RuntimeError where there are none."""
        if self.part.error:
            raise RuntimeError("there are no kernels for this GPU; the part `build` says why")
        return self.plain | self._found

    def _make(self, part: Part) -> None:
        self._found: dict[str, str] = {}
        if self._capability is None:
            part.skip("simulated: the extension that is installed serves")
            return
        if extension_serves(extension_info(self.plain), self._capability):
            part.note("the extension that is installed has kernels for this GPU")
            return
        if self._given.kernels:
            place = extract_extension(self._given.kernels, self._scratch / "kernels")
            if not extension_serves(info_of_extension(place, self.plain), self._capability):
                raise RuntimeError(
                    f"{self._given.kernels}: no kernels for {self._capability}, or it does not load here"
                )
            part.note(f"taken from {self._given.kernels.name}")
        else:
            print(f"building the kernels for {self._capability} ...", file=sys.stderr, flush=True)
            started = time.perf_counter()
            place = build_extension(self.folder, self._capability, self.plain, limit=self._given.limit)
            seconds = time.perf_counter() - started
            part.add(f"kernels for {self._capability}: built, or found as built before, in [s]", seconds)
        part.add("size of the module [MB]", sum(file.stat().st_size for file in place.iterdir()) / 1e6)
        self._found[_EXTENSION] = str(place)


def run_parts(
    names: Sequence[str], given: argparse.Namespace, kernels: Kernels, out: Path, scratch: Path
) -> dict[str, dict[str, Any]]:
    """Run the parts, each record in the file as soon as there is one; returns the records."""
    records: dict[str, dict[str, Any]] = {}
    for name in names:
        known = read_parts(out, simulated=given.simulate)
        if given.resume and name not in ("build", "ratios") and _is_done(known.get(name), given):
            print(f"{name}: complete already", file=sys.stderr, flush=True)
            records[name] = known[name]
        elif name in ("build", "ratios"):
            part = kernels.part if name == "build" else Part(name, goals=not given.simulate)
            if name == "ratios":
                add_ratios(part, known)
            records[name] = part.to_json()
        else:
            records[name] = _run_part(name, given, kernels, out, scratch)
        write(out, merge_parts(out, {name: records[name]}, simulated=given.simulate))
    return records


def _is_done(record: Mapping[str, Any] | None, given: argparse.Namespace) -> bool:
    """Whether a part need not run again: complete, with these settings, on this GPU."""
    gpu = gpu_state().get("gpu")
    return (
        record is not None
        and is_complete(record)
        and record.get("settings") == asdict(setting_of(given))
        and (gpu is None or gpu == record.get("machine", {}).get("gpu"))
    )


def _run_part(name: str, given: argparse.Namespace, kernels: Kernels, out: Path, scratch: Path) -> dict[str, Any]:
    """One part in a process of its own, under a checker where it is for one; or why it cannot be."""
    under: list[str] = []
    if name == "memcheck" and not given.simulate:
        checker = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
        if checker is None:
            part = Part(name)
            part.skip("compute-sanitizer is not on PATH; it comes with the CUDA toolkit")
            return part.to_json()
        under = [checker, "--tool", "memcheck", "--error-exitcode", "99"]
    try:
        environment = kernels.plain if name in _WITHOUT_KERNELS else kernels.environment()
    except RuntimeError as error:
        part = Part(name)
        part.fail(str(error))
        return part.to_json()
    return supervise(name, given, environment, out, scratch, under)


def supervise(
    name: str,
    given: argparse.Namespace,
    environment: Mapping[str, str],
    out: Path,
    scratch: Path,
    under: Sequence[str] = (),
) -> dict[str, Any]:
    """Run a part in a process of its own; what it has so far goes into the file at every look.

    under: a command that runs the process. Returns the part's record, whatever became of it, with the rows of an
    earlier run that was stopped.
    """
    left, error, started = scratch / f"{name}.json", None, time.perf_counter()
    before = read_parts(out, simulated=given.simulate).get(name)
    script = str(Path(__file__).resolve())
    command = [*under, sys.executable, script, name, "--child", "--out", str(left), *_pass_options(given)]

    def merged(error: str | None) -> dict[str, Any]:
        record: dict[str, Any] = {"rows": [], "notes": [], "error": None}
        if left.exists():
            record = json.loads(left.read_text(encoding="utf-8"))
        record["error"] = record["error"] or error
        record["seconds"] = round(time.perf_counter() - started, 1)
        record = keep_rows(record, before)
        write(out, merge_parts(out, {name: record}, simulated=given.simulate))
        return record

    with subprocess.Popen(command, env=dict(environment), stdout=sys.stderr, start_new_session=True) as process:
        try:
            while process.poll() is None:
                remaining = given.limit - (time.perf_counter() - started)
                if remaining <= 0:
                    error = f"stopped after {given.limit:g} s"
                    break
                try:
                    process.wait(min(_POLL, remaining))
                except subprocess.TimeoutExpired:
                    merged(UNFINISHED)
        except BaseException:  # told to stop: what there is so far is kept
            merged("interrupted")
            raise
        finally:
            end_group(process)
    if error is None and process.returncode:
        error = f"the part's process ended with {process.returncode}"
    return merged(error)


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
        missing = (getattr(error, "name", None) or "").split(".")[0]
        if isinstance(error, ModuleNotFoundError) and missing in PROVIDED:
            part.skip(f"{missing} is not installed here: {PROVIDED[missing]}")
        else:
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
    if name.startswith("peers-"):
        import _gpu_peers

        return {
            "peers-eager": _gpu_peers.peers_eager,
            "peers-float32": _gpu_peers.peers_float32,
            "peers-guided": partial(_gpu_peers.peers_compiled, job=0),
            "peers-quick": partial(_gpu_peers.peers_compiled, job=1),
        }[name]
    if name == "rtx":
        from _gpu_rtx import rtx

        return rtx
    import _gpu_full
    import _gpu_kernels
    import _gpu_networks
    import _gpu_parts
    import _gpu_runtime

    works: dict[str, Callable[[Part, Setting], None]] = {
        "machine": _gpu_parts.machine, "kernels": _gpu_kernels.kernels, "memcheck": _gpu_kernels.memcheck,
        "loop": _gpu_parts.loop, "graphs": _gpu_parts.graphs, "networks": _gpu_networks.networks,
        "subjects": _gpu_runtime.subjects, "full": _gpu_full.full, "compiled-step": _gpu_full.compiled_step,
        "compiled-vae": _gpu_full.compiled_vae, "compiled-guided": partial(_gpu_full.compiled_pictures, job=0),
        "compiled-quick": partial(_gpu_full.compiled_pictures, job=1), "memory": _gpu_runtime.memory,
        "soak": _gpu_runtime.soak,
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
