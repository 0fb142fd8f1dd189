"""`dreammix-trt doctor`: what this computer can build and run, whether the store is well, and what to do next."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Annotated

import typer

from dreammix_trt.core.errors import DreamMixError
from dreammix_trt.core.files import size_text
from dreammix_trt.core.store import Store as Shelf
from dreammix_trt.engine.machine import GIB, PLANS, RTX_TARGETS, Machine, examine
from dreammix_trt.terminal import AsJson, Store, print_json, print_line, print_table, say

NOT_READY = 1
# What a full-size SDXL takes: the exporter's peak (benchmarks/full_size.py), and ONNX and plans of all its networks.
_FULL_SIZE_MEMORY, _FULL_SIZE_DISK = 12 * GIB, 24 * GIB
# What runs, the fastest first: how it is called, and what builds it.
_RUNTIMES = {
    "tensorrt-rtx": "TensorRT-RTX", "tensorrt": "TensorRT", "onnxruntime (CUDA)": "ONNX Runtime",
    "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO",
}  # fmt: skip
_BUILD = "dreammix-trt build --out ENGINE"


def doctor(
    store: Store = None,
    as_json: AsJson = False,
    mend: Annotated[bool, typer.Option("--mend", help="Put ONNX Runtime right with pip where it is broken.")] = False,
) -> None:
    """Check this computer; exit code 1 when nothing both builds and runs here, or the store cannot be written."""
    if mend:
        mend_onnxruntime(examine())
    shelf = Shelf(store)
    machine = examine(shelf.root)
    (parts, size), fault = _store_state(shelf)
    ready = fault is None and _best(machine) is not None
    if as_json:
        state = {"path": str(shelf.root), "fault": fault, "parts": parts, "bytes": size}
        record = {"store": state, "notes": notes(machine), "advice": advice(machine), "ready": ready}
        print_json(machine.to_dict() | record)
    else:
        _print(machine, fault or f"can be written; {parts} {'part' if parts == 1 else 'parts'}, {size_text(size)}")
    if not ready:
        raise typer.Exit(NOT_READY)


def mend_onnxruntime(machine: Machine) -> None:
    """Have pip do what mends ONNX Runtime. Raises DreamMixError when pip fails."""
    for words in machine.mend_onnxruntime():
        command = [sys.executable, "-m", "pip", *words]
        say(f"pip {' '.join(words)}")
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            raise DreamMixError(f"`{' '.join(command)}` failed (its own words are above); run it by hand")
    importlib.invalidate_caches()


def advice(machine: Machine) -> str:
    """What to build with on this machine and where that runs, in plain words with the commands."""
    best = _best(machine)
    runs = _to_run(machine, best)
    return runs if best in PLANS else f"{runs} {_to_plan(machine)}"


def _best(machine: Machine) -> str | None:
    """The fastest back end that both builds and runs here."""
    able = {state.name for state in machine.list_backends() if state.can_build and state.can_run}
    return next((name for name in _RUNTIMES if name in able), None)


def _to_run(machine: Machine, best: str | None) -> str:
    if best is None and machine.mend_onnxruntime():
        return f"Nothing can run here yet: `dreammix-trt doctor --mend`, then `{_BUILD} --backend onnxruntime`."
    if best is None:
        return f"Nothing can run here yet: `pip install onnxruntime`, then `{_BUILD} --backend onnxruntime`."
    backend, target = best.partition(" ")[0], ""
    where, after = "processor", ""
    if best not in ("onnxruntime", "openvino"):
        gpu = machine.driver.gpus[0]
        where, after = gpu.name, ", and `--device cuda` when you paint"
        target = f" --target {gpu.capability}" if best == "tensorrt-rtx" else ""
    return f"Build and run here with {_RUNTIMES[best]}, on the {where}: `{_BUILD} --backend {backend}{target}`{after}."


def _to_plan(machine: Machine) -> str:
    """How to get TensorRT engines: for the first GPU here, else for a usual one elsewhere."""
    states = {state.name: state for state in machine.list_backends()}
    gpu = next(iter(machine.driver.gpus), None)
    # TensorRT-RTX has no engines for the GPUs of data centres
    name = "tensorrt" if gpu and gpu.capability not in RTX_TARGETS else "tensorrt-rtx"
    where = f"the {gpu.name}" if gpu else "an RTX card elsewhere"
    if name not in machine.versions or (name == "tensorrt" and machine.tensorrt_is_old()):
        extra, freely = PLANS[name], ", which builds without a GPU, too" if name == "tensorrt-rtx" else ""
        return f"For {where}: `pip install 'dreammix-trt[{extra}]'` brings {_RUNTIMES[name]}{freely}."
    if not states[name].can_build:
        return f"For {where}: `pip install 'dreammix-trt[export]'` brings what building its engines takes."
    target = f" --target {gpu.capability if gpu else 'sm_89'}" if name == "tensorrt-rtx" else ""
    lacks = f"; running them here: {'; and '.join(machine.list_gpu_lacks())}" if gpu else ""
    return f"For {where}: `{_BUILD} --backend {name}{target}`{lacks}."


def notes(machine: Machine) -> list[str]:
    """What would stop a full-size base here though the embedded one goes."""
    found = []
    needs = (("memory", machine.memory_available, _FULL_SIZE_MEMORY), ("disk", machine.disk_free, _FULL_SIZE_DISK))
    for what, free, need in needs:
        if free is not None and free < need:
            found.append(
                f"a full-size SDXL needs about {size_text(need)} of {what} to build; {size_text(free)} are free"
            )
    return found


def _store_state(shelf: Shelf) -> tuple[tuple[int, int], str | None]:
    """((parts, bytes) in the store, why it cannot be written)."""
    try:
        shelf.check_writable()
        fault = None
    except (DreamMixError, OSError) as error:
        fault = str(error)
    try:
        entries = shelf.entries()
    except OSError:
        entries = []
    return (len(entries), sum(entry.bytes for entry in entries)), fault


def _print(machine: Machine, store: str) -> None:
    tables: list[tuple[str, list[tuple[str, ...]]]] = [*machine.describe(), ("Store", [(store,)])]
    tables += [("Notes", [(note,) for note in notes(machine)])] if notes(machine) else []
    for title, rows in tables:
        print_table([[str(cell) for cell in row] for row in rows], title=title)
    print_line(advice(machine))
