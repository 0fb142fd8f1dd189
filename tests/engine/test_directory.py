"""Engine directories when things go wrong: killed and simultaneous builds, damaged stores, unusable places."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from dreammix_trt.building import build
from dreammix_trt.core.errors import EngineError, InputError
from dreammix_trt.core.networks import Network
from dreammix_trt.core.passport import Passport
from dreammix_trt.core.store import Store
from dreammix_trt.engine.directory import check_engine, check_runnable, open_engine
from dreammix_trt.engine.hardware import Driver, Gpu
from dreammix_trt.export.onnx_export import export_network
from tests.conftest import write_lora

BUILDER = """
    import os, sys
    from dreammix_trt import building
    from dreammix_trt.engine import directory as engine_build
    lora, out, name, die = sys.argv[1:]
    if die == "die":
        engine_build._write = lambda *_: os.kill(os.getpid(), 9)
    print(building.build(lora, out=out, name=name).subjects[0].name)
"""


def start(lora: Path, out: Path, name: str, how: str = "live") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(BUILDER), str(lora), str(out), name, how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_build_leaves_the_old_engine_and_the_next_cleans_up(mug_engine: Path, tmp_path: Path) -> None:
    out, lora = tmp_path / "engine", write_lora(tmp_path / "lora", seed=4)
    build(lora, out=out, name="old")
    killed = start(lora, out, "new", "die")
    killed.communicate(timeout=120)
    assert killed.returncode == -9
    assert check_engine(out).subjects[0].name == "old"
    assert [file for file in tmp_path.iterdir() if file.name.startswith(".engine.")]
    build(lora, out=out, name="new")
    assert check_engine(out).subjects[0].name == "new"
    assert {file.name for file in tmp_path.iterdir()} == {"engine", "lora"}


def test_builds_of_one_place_at_once_leave_one_whole_engine(mug_engine: Path, tmp_path: Path) -> None:
    out, lora = tmp_path / "engine", write_lora(tmp_path / "lora", seed=4)
    names = ["one", "two", "three"]
    running = [start(lora, out, name) for name in names]
    told = [process.communicate(timeout=180) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], told
    assert [text.strip() for text, _ in told] == names
    passport = check_engine(out)
    assert passport.subjects[0].name in names
    assert {file.stem for file in (out / "subjects").iterdir()} == {passport.subjects[0].name}
    assert {file.name for file in tmp_path.iterdir()} == {"engine", "lora"}


def test_a_damaged_part_is_found_and_the_remedy_makes_that_part_alone(
    small_base: Path, mug_engine: Path, mug_lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dreammix_trt.building import parts

    passport, store = Passport.read(mug_engine), Store()
    folder = store.get(passport.parts["inpaint_head"])
    assert folder is not None
    victim = folder / "inpaint_head.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(EngineError, match=r"inpaint_head\.safetensors is not what was built.*dreammix-trt build"):
        check_engine(mug_engine)
    made: list[str] = []

    def told(base: object, network: Network, *rest: Any, **options: Any) -> dict[str, Any]:
        made.append(network.name)
        return export_network(base, network, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(parts, "export_network", told)
    again = build(mug_lora, base=small_base, out=mug_engine, name="mug")
    assert (again.parts, again.files) == (passport.parts, passport.files)
    assert made == ["inpaint_head"]
    check_engine(mug_engine, verify=True)


def test_a_part_that_is_gone_from_the_store_is_named_with_the_command(mug_engine: Path, tmp_path: Path) -> None:
    passport = Passport.read(mug_engine)
    with pytest.raises(EngineError, match=r"needs text_encoder .*, which the store .* lacks.*dreammix-trt build"):
        check_engine(mug_engine, store=tmp_path / "other")
    assert Store(tmp_path / "other").entries() == []
    assert {entry.key for entry in Store().entries() if mug_engine in entry.users} == set(passport.parts.values())


def test_opening_an_engine_tells_the_store_who_needs_its_parts(mug_engine: Path, tmp_path: Path) -> None:
    """A copy made by hand protects its parts from the moment it is used."""
    copy = Path(shutil.copytree(mug_engine, tmp_path / "copy"))
    assert copy not in Store().users()
    check_engine(copy)
    assert Store().users()[copy] == frozenset(Passport.read(copy).parts.values())


def test_a_place_that_cannot_be_used_is_told_before_any_work(tmp_path: Path, mug_lora: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"")
    store = tmp_path / "store"
    for out, told in (("file", "is a file"), ("file/below", "is a file"), ("photos", "holds other files")):
        with pytest.raises(InputError, match=told):
            build(mug_lora, out=tmp_path / out, store=store)
    assert not store.exists()


def test_a_store_that_cannot_be_made_is_told(tmp_path: Path, mug_lora: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"store .*cannot be made.*--store"):
        build(mug_lora, out=tmp_path / "engine", store=tmp_path / "file" / "store")
    assert not (tmp_path / "engine").exists()


def test_an_engine_for_another_back_end_is_refused(mug_engine: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    passport = Passport.read(mug_engine)
    replace(passport, backend="tflite", subjects=()).write(tmp_path)
    with pytest.raises(EngineError, match=r"'tflite'.*dreammix-trt build"):
        check_engine(tmp_path)


def test_plans_run_where_nothing_speaks_against_it(mug_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from dreammix_trt.engine import machine

    opened = open_engine(mug_engine)
    check_runnable(mug_engine, opened, "cuda")
    plans = replace(
        opened.passport,
        backend="tensorrt-rtx",
        backend_version="1.7",
        targets=["sm_89"],
        networks=(),
        command="dreammix-trt build --out it --target sm_89",
    )
    opened = replace(opened, passport=plans)
    here = replace(
        machine.examine(),
        versions={"tensorrt-rtx": "1.7", "cuda-python": "13.4.4"},
        extension=True,
        kernels={"toolkit": "13.0", "architectures": ["sm_86"], "ptx": "compute_120"},
        platform=plans.platform,
        driver=Driver("13.0", (Gpu("RTX 4090", "sm_89", 1),)),
    )
    monkeypatch.setattr(machine, "examine", lambda: here)
    check_runnable(mug_engine, opened, "cuda")
    for change, told in (
        ({"driver": Driver(problem="there is no NVIDIA driver here")}, r"no NVIDIA.*build --out it --backend onnxrunt"),
        ({"versions": {"tensorrt-rtx": "1.8", "cuda-python": "13"}}, r"with tensorrt-rtx 1\.7, installed is 1\.8"),
        ({"kernels": None}, r"no CUDA kernels"),
    ):
        monkeypatch.setattr(machine, "examine", lambda change=change: replace(here, **change))
        with pytest.raises(EngineError, match=told) as caught:
            check_runnable(mug_engine, opened, "cuda")
        assert str(caught.value).startswith(str(mug_engine))
