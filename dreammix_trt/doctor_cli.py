"""`dreammix-trt doctor`: what this computer can build and run, whether the store is well, and what to do next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dreammix_trt.core.errors import DreamMixError
from dreammix_trt.core.files import size_text
from dreammix_trt.core.store import Store
from dreammix_trt.engine.machine import GIB, RTX_TARGETS, Machine, examine

NOT_READY = 1
# What a full-size SDXL takes: the exporter's peak (benchmarks/full_size.py), and ONNX and plans of all its networks.
_FULL_SIZE_MEMORY, _FULL_SIZE_DISK = 12 * GIB, 24 * GIB
_RUNTIMES = ("onnxruntime", "onnxruntime (CUDA)")  # what `DreamMix` runs today
_NOT_YET = "this version builds such engines and does not run them yet"
_BUILD = "dreammix-trt build --out ENGINE"
_out = Console()


def doctor(
    store: Annotated[Path | None, typer.Option("--store", help="Which store (default: that of DREAMMIX_HOME).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
) -> None:
    """Check this computer; exit code 1 when nothing both builds and runs here, or the store cannot be written."""
    shelf = Store(store)
    machine = examine(shelf.root)
    (parts, size), fault = _store_state(shelf)
    ready = fault is None and any(
        state.can_build and state.can_run for state in machine.backends() if state.name in _RUNTIMES
    )
    if as_json:
        state = {"path": str(shelf.root), "fault": fault, "parts": parts, "bytes": size}
        record = {"store": state, "notes": notes(machine), "advice": advice(machine), "ready": ready}
        typer.echo(json.dumps(machine.to_dict() | record, indent=2))
    else:
        _print(machine, fault or f"can be written; {parts} {'part' if parts == 1 else 'parts'}, {size_text(size)}")
    if not ready:
        raise typer.Exit(NOT_READY)


def advice(machine: Machine) -> str:
    """What to build with on this machine and where that runs, in plain words with the commands."""
    return f"{_to_run(machine)} {_to_plan(machine)}"


def _to_run(machine: Machine) -> str:
    able = {state.name for state in machine.backends() if state.can_build and state.can_run}
    command = f"`{_BUILD} --backend onnxruntime`"
    if not able & set(_RUNTIMES):
        return f"Nothing can run here yet: `pip install onnxruntime`, then {command}."
    where = machine.driver.gpus[0].name if "onnxruntime (CUDA)" in able else "processor"
    return f"Build and run here with ONNX Runtime, on the {where}: {command}."


def _to_plan(machine: Machine) -> str:
    """How to get TensorRT engines: for the GPU here, else for a usual one elsewhere."""
    able = {state.name for state in machine.backends() if state.can_build}
    gpu = next((gpu for gpu in machine.driver.gpus if gpu.capability in RTX_TARGETS), None)
    other = machine.driver.gpus[0] if machine.driver.gpus and not gpu else None
    found = gpu or other
    where = f"the {found.name}" if found else "an RTX card elsewhere"
    if ("tensorrt" if other else "tensorrt-rtx") in machine.versions.keys() - able and not machine.faults():
        return f"For {where}: `pip install 'dreammix-trt[export]'` brings what building its engines takes."
    if other and "tensorrt" in able:
        return f"For {where}: `{_BUILD} --backend tensorrt`; {_NOT_YET}."
    if other:
        return f"For {where}: `pip install 'dreammix-trt[trt]'` brings TensorRT."
    if "tensorrt-rtx" in able:
        target = gpu.capability if gpu else "sm_89"
        return f"For {where}: `{_BUILD} --backend tensorrt-rtx --target {target}`; {_NOT_YET}."
    return f"For {where}: `pip install 'dreammix-trt[rtx]'` brings TensorRT-RTX, which builds without a GPU, too."


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


def _store_state(shelf: Store) -> tuple[tuple[int, int], str | None]:
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
    from rich.table import Table
    from rich.text import Text

    tables: list[tuple[str, list[tuple[str, ...]]]] = [*machine.describe(), ("Store", [(store,)])]
    tables += [("Notes", [(note,) for note in notes(machine)])] if notes(machine) else []
    for title, rows in tables:
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 2))
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        _out.print(table)
    _out.print(Text(advice(machine), style="bold"), soft_wrap=True)
