"""`dreammix-trt doctor`: its exit code, and advice that fits the machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dreammix_trt import doctor_cli
from dreammix_trt.core.errors import DreamMixError
from dreammix_trt.core.store import Store
from dreammix_trt.doctor_cli import advice, doctor, notes
from dreammix_trt.engine.hardware import Driver, Gpu
from dreammix_trt.engine.machine import Machine
from tests.core.test_store import add

GIB = 1 << 30
NONE = Driver(problem="there is no NVIDIA driver here")
BARE = Machine(
    platform="Linux x86_64",
    system="Linux-6.1",
    cpu="a processor",
    cores=2,
    memory_total=64 * GIB,
    memory_available=64 * GIB,
    store="store",
    disk_free=90 * GIB,
    driver=NONE,
    versions={"onnxruntime": "1.31.1"},
    extension=True,
    kernels={"toolkit": "13.0", "architectures": ["sm_75", "sm_86", "sm_90"], "ptx": "compute_120"},
)
ADA = Gpu("RTX 4090", "sm_89", 24 * GIB)
BLACKWELL = Gpu("RTX 5090", "sm_120", 32 * GIB)
HOPPER = Gpu("H200", "sm_90", 139 * GIB)


def run(*words: str) -> Any:
    app = typer.Typer()
    app.command()(doctor)
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "300", "NO_COLOR": "1"})


def machine(*gpus: Gpu, **packages: str) -> Machine:
    versions = {name.replace("_", "-"): version for name, version in packages.items()}
    return replace(BARE, versions=versions, driver=Driver("13.0", gpus) if gpus else NONE)


EXPORT = {"torch": "2.13.0", "diffusers": "0.42.1", "onnx": "1.23.2", "onnxslim": "0.1.98"}
ORT, BARE_RTX, TRT, CUDA = (
    {"onnxruntime": "1.31.1"}, {"tensorrt_rtx": "1.7.1.116"}, {"tensorrt": "11.4.0.106"}, {"onnxruntime_gpu": "1.31.1"},
)  # fmt: skip
RTX, BINDINGS = {**BARE_RTX, **EXPORT}, {"cuda_python": "13.4.4"}


@pytest.mark.parametrize(
    "here, told",
    [
        (machine(**ORT, **RTX), ["on the processor: `dreammix-trt build", "--backend tensorrt-rtx --target sm_89`"]),
        (machine(**ORT), ["on the processor", "elsewhere: `pip install 'dreammix-trt[rtx]'`"]),
        (machine(**RTX), ["Nothing can run here yet: `pip install onnxruntime`", "--target sm_89`"]),
        (machine(BLACKWELL, **ORT, **RTX),
         ["on the processor", "For the RTX 5090", "--target sm_120`; running them here: cuda-python is not installed"]),
        (machine(BLACKWELL, **ORT, **RTX, **BINDINGS),
         ["here with TensorRT-RTX, on the RTX 5090: `dreammix-trt build --out ENGINE --backend tensorrt-rtx --target "
          "sm_120`, and `--device cuda` when you paint."]),
        (machine(ADA, HOPPER, **CUDA, **RTX, **BINDINGS),
         ["here with TensorRT-RTX, on the RTX 4090", "--target sm_89`"]),
        (machine(HOPPER, ADA, **CUDA, **RTX, **BINDINGS),
         ["here with ONNX Runtime, on the H200:", "For the H200: `pip install 'dreammix-trt[trt]'`"]),
        (machine(HOPPER, **CUDA, **RTX, **BINDINGS),
         ["here with ONNX Runtime, on the H200: `dreammix-trt build --out ENGINE --backend onnxruntime`, and",
          "For the H200: `pip install 'dreammix-trt[trt]'`"]),
        (machine(HOPPER, **CUDA, **EXPORT, **TRT, **BINDINGS),
         ["here with TensorRT, on the H200", "--backend tensorrt`"]),
        (machine(HOPPER, **ORT, **RTX, tensorrt="10.1"), ["For the H200: `pip install 'dreammix-trt[trt]'`"]),
        (machine(HOPPER, **ORT, **TRT), ["For the H200: `pip install 'dreammix-trt[export]'`"]),
        (machine(**ORT, **BARE_RTX), ["on the processor", "elsewhere: `pip install 'dreammix-trt[export]'`"]),
        (machine(ADA, **ORT), ["For the RTX 4090: `pip install 'dreammix-trt[rtx]'`"]),
        (machine(ADA, **ORT, **CUDA, **RTX), ["--target sm_89`"]),
    ],
)  # fmt: skip
def test_advice_fits_the_machine(here: Machine, told: list[str]) -> None:
    said = advice(here)
    for words in told:
        assert words in said
    assert said.count("`") % 2 == 0


def test_advice_mends_before_it_installs() -> None:
    assert "yet: `dreammix-trt doctor --mend`, then" in advice(replace(machine(**ORT), damaged=("onnxruntime",)))


def test_what_is_too_small_for_a_full_size_base_is_noted() -> None:
    assert notes(BARE) == []
    # the measured store of a full-size base is 23.3 GiB
    assert notes(replace(BARE, memory_available=12 * GIB, disk_free=24 * GIB)) == []
    assert ["24.0 GiB of disk" in note for note in notes(replace(BARE, disk_free=24 * GIB - 1))] == [True]
    small = replace(BARE, memory_available=8 * GIB, disk_free=None)
    assert len(notes(small)) == 1 and "8.0 GiB are free" in notes(small)[0] and "memory" in notes(small)[0]


def test_this_machine_is_shown_with_its_store(tmp_path: Path) -> None:
    add(Store(tmp_path), "onnx", "unet")
    done = run("--store", str(tmp_path))
    assert done.exit_code == 0, done.output
    for words in ("Back ends", "onnxruntime", "can be written; 1 part,", "Build and run here with ONNX Runtime"):
        assert words in done.stdout
    record = json.loads(run("--store", str(tmp_path), "--json").stdout)
    assert record["ready"] is True and record["store"]["parts"] == 1 and record["store"]["fault"] is None
    assert record["advice"] == done.stdout.splitlines()[-1]
    assert {state["name"] for state in record["backends"]} >= {"onnxruntime", "tensorrt-rtx", "tensorrt"}


def test_what_training_needs_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"torch": "2.13.0", "diffusers": "0.42.1", "transformers": "5.3.0", "peft": "0.19.0"}
    for versions, state in (
        (there, (True, "torch 2.13.0, diffusers 0.42.1, transformers 5.3.0, peft 0.19.0")),
        ({"diffusers": "0.42.1"}, (False, "torch, transformers, peft missing: `pip install 'dreammix-trt[train]'`")),
    ):
        monkeypatch.setattr(doctor_cli, "examine", lambda store, found=versions: machine(**ORT, **found))
        record = json.loads(run("--store", str(tmp_path), "--json").stdout)["training"]
        assert (record["can_train"], record["why"]) == state
        lines = run("--store", str(tmp_path)).stdout.splitlines()
        row = lines[lines.index("Training") + 1].split(maxsplit=2)
        assert row == ["train", "trains" if state[0] else "-", state[1]]


def test_a_store_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("--store", str(tmp_path / "file" / "store"))
    assert done.exit_code == 1
    assert "is a file, not a directory" in done.stdout


def test_a_machine_where_nothing_runs_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_cli, "examine", lambda store: machine(**RTX))
    done = run("--store", str(tmp_path / "new"), "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["ready"] is False
    assert list(tmp_path.iterdir()) == []


def test_mend_has_pip_do_what_the_fault_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(machine(onnxruntime="1.31.1", onnxruntime_gpu="1.31.1"), damaged=("onnxruntime",))
    seen, code = [], 0

    def call(command: list[str], **_: Any) -> Any:
        seen.append(command[1:])
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(doctor_cli.subprocess, "run", call)
    monkeypatch.setattr(doctor_cli, "examine", lambda *_: replace(broken, damaged=()) if len(seen) == 2 else broken)
    done = run("--mend", "--store", str(tmp_path))
    assert seen == [
        ["-m", "pip", "uninstall", "-y", "onnxruntime", "onnxruntime-gpu"],
        ["-m", "pip", "install", "--no-deps", "onnxruntime-gpu==1.31.1"],
    ]
    assert done.exit_code == 0, done.output
    seen.clear()
    code = 1
    failed = run("--mend", "--store", str(tmp_path))
    assert isinstance(failed.exception, DreamMixError) and "run it by hand" in str(failed.exception)
    assert len(seen) == 1
    seen.clear()
    monkeypatch.setattr(doctor_cli, "examine", lambda *_: BARE)
    assert run("--mend", "--store", str(tmp_path)).exit_code == 0 and seen == []
