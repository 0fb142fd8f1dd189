"""From files that a user holds to engines: a narrow SDXL in a single file, patch, head, LoRAs in two dialects.

One build for ONNX Runtime, which paints; one of real TensorRT-RTX plans for SM89, ahead of time, on whatever machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("torch")
pytest.importorskip("onnxslim")

from benchmarks import _sdxl_files as files
from dreammix_trt.building import EngineOptions, build
from dreammix_trt.core.errors import EngineError, FileFormatError
from dreammix_trt.core.files import folder_bytes
from dreammix_trt.core.networks import KINDS
from dreammix_trt.core.passport import Passport
from dreammix_trt.core.store import Store
from dreammix_trt.core.subject import read_subject
from dreammix_trt.engine import DreamMix
from dreammix_trt.engine.backends.onnxruntime.engine_set import EngineSet
from dreammix_trt.engine.backends.tensorrt.plans import holds_host_code
from dreammix_trt.engine.directory import open_engine
from dreammix_trt.engine.hardware import Driver, Gpu
from dreammix_trt.engine.text import Tokenizer
from dreammix_trt.export.parity import BOUNDS
from tests.support.mini_sdxl import Checkpoint, mini_configs, small_configs, write_single

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = {kind.name for kind in KINDS if kind.group not in ("asuka", "tokens")}  # which this base has not
TWINS = {"vae_encoder_float32", "vae_decoder_float32"}  # of a float16 VAE
SIDE = 128
RNG = np.random.default_rng(1)
IMAGE = np.kron(RNG.integers(40, 220, (6, 8, 3)), np.ones((16, 16, 1))).astype(np.uint8)
MASK = np.zeros((96, 128), np.uint8)
MASK[30:66, 40:88] = 255


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chain") / "store"


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_single(tmp_path_factory.mktemp("held"), mini_configs())


@pytest.fixture(scope="module")
def loras(held: Checkpoint) -> dict[str, Path]:
    """One LoRA of both text encoders and the UNet in two dialects, and another."""
    place = held.base.parent
    return {
        "reference": files.write_lora(place / "a.safetensors", held.configs, text_encoders=True),
        "kohya": files.write_lora(place / "b.safetensors", held.configs, text_encoders=True, dialect="kohya_sgm"),
        "other": files.write_lora(place / "other.safetensors", held.configs, seed=8),
    }


@pytest.fixture(scope="module")
def engine(held: Checkpoint, loras: dict[str, Path], shelf: Path) -> Path:
    """As a user makes it: the command line, in a process of its own."""
    out = shelf.parent / "engine"
    options = {"base": held.base, "patch": held.patch, "head": held.head, "tokenizer": held.tokenizer, "name": "mug",
               "lora": loras["reference"], "out": out, "store": shelf}  # fmt: skip
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, "-m", "dreammix_trt", "build", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and "mug" in done.stderr
    return out


def painter(engine: Path, shelf: Path) -> DreamMix:
    """A single file counts as SDXL's 1024 pixels, which takes a CPU minutes: the same networks at `SIDE`."""
    opened = open_engine(engine, store=shelf)
    networks = EngineSet.load(opened.parts, threads=2)
    words = [Tokenizer.load(opened.parts["base"] / name) for name in ("tokenizer", "tokenizer_2")]
    subjects = [read_subject(file) for file in opened.subjects]
    return DreamMix.on_host(networks, replace(networks.facts, native_side=SIDE), words, subjects)


def painted(dm: DreamMix, **fields: Any) -> np.ndarray[Any, Any]:
    fields = {"num_inference_steps": 2, "seed": 4, **fields}
    return np.asarray(dm.inpaint(IMAGE, MASK, "a red sks mug", **fields).images[0])


def test_a_checkpoint_becomes_an_engine_that_says_what_it_is(engine: Path, held: Checkpoint, shelf: Path) -> None:
    passport = open_engine(engine, store=shelf, verify=True).passport
    assert {entry.name for entry in passport.networks} == NETWORKS
    assert passport.base["name"] == "base.safetensors" and passport.base["native_side"] == 1024
    assert {"base", "patch", "inpaint_head"} <= passport.base["files"].keys()
    for entry in passport.networks:
        assert entry.parity["checked"] == "at build" and entry.parity["max_rel"] <= BOUNDS["float32"], entry.name
    assert Passport.read(engine).command.startswith(f"dreammix-trt build --lora {held.base.parent}/a.safetensors")


def test_it_paints_what_torch_paints(engine: Path, held: Checkpoint, shelf: Path) -> None:
    """Two steps through both stages, by ONNX Runtime and by torch on the files themselves: the same picture."""
    from dreammix_trt.core.checkpoint import BaseFiles
    from dreammix_trt.export.torch_backend.engine_set import TorchEngineSet

    with painter(engine, shelf) as dm:
        picture, without = painted(dm), painted(dm, subject="")
        base = BaseFiles.open(held.base, held.patch, held.head, tokenizer=held.tokenizer)
        judge = DreamMix.on_host(TorchEngineSet(base), dm.facts, dm.tokenizers, dm._roster.subjects)
        truth = painted(judge)
    assert picture.shape == IMAGE.shape
    assert np.abs(picture.astype(int) - truth).max() <= 2
    assert not np.array_equal(picture, without), "the LoRA is at work"
    outside = np.ones(MASK.shape, bool)
    outside[14:82, 24:104] = False
    assert np.array_equal(picture[outside], IMAGE[outside])
    assert (picture[34:62, 44:84] != IMAGE[34:62, 44:84]).mean() > 0.9


def test_two_dialects_are_one_subject(
    engine: Path, held: Checkpoint, loras: dict[str, Path], shelf: Path, tmp_path: Path
) -> None:
    build(loras["kohya"], out=tmp_path / "kohya", name="mug", store=shelf, **held.given())
    one, other = (load_file(place / "subjects/mug.safetensors") for place in (engine, tmp_path / "kohya"))
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    assert {name.split(".")[1] for name in one} == {"unet", "text_encoder", "text_encoder_2"}


# TensorRT-RTX, ahead of time


@pytest.fixture(scope="module")
def plans(held: Checkpoint, loras: dict[str, Path], shelf: Path) -> Path:
    """Every network of the same base as a plan for SM89."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install dreammix-trt[rtx]")
    out = shelf.parent / "plans"
    options = EngineOptions(targets=("sm_89",))
    build(loras["reference"], out=out, name="mug", store=shelf, engine=options, **held.given())
    return out


def parts_of(passport: Passport, shelf: Path) -> dict[str, Path]:
    return {name: Store(shelf).root / key for name, key in passport.parts.items()}


def entries(passport: Passport, shelf: Path) -> Iterator[tuple[str, Path, Mapping[str, Any]]]:
    for name, folder in parts_of(passport, shelf).items():
        if name != "base":
            yield name, folder, json.loads((folder / "network.json").read_text())


def test_every_network_becomes_a_plan(plans: Path, shelf: Path) -> None:
    """For the GPU asked for, whoever builds; without code for the host, and without the weights twice."""
    import tensorrt_rtx

    passport = open_engine(plans, store=shelf, verify=True).passport
    assert (passport.backend, passport.precision, passport.targets) == ("tensorrt-rtx", "float16", ["sm_89"])
    assert passport.backend_version.startswith(tensorrt_rtx.__version__[:3])
    assert "--backend tensorrt-rtx --target sm_89" in passport.command
    assert {entry.name for entry in passport.networks} == {*NETWORKS, *TWINS}
    for name, folder, entry in entries(passport, shelf):
        plan = folder / entry["engine"]
        assert plan.stat().st_size == entry["build"]["engine_bytes"] > 10_000
        assert not holds_host_code(plan), name
        slots = [file.name for file in folder.glob("*.safetensors")]
        assert slots == ([entry["slot_weights"]] if entry["slots"] else [])
        assert not list(folder.glob("*.onnx"))


def test_the_passport_holds_figures_of_each_build(plans: Path, shelf: Path) -> None:
    passport = open_engine(plans, store=shelf).passport
    for entry in passport.networks:
        assert entry.build["seconds"] > 0 and entry.build["layers"] > 0
        assert entry.build["targets"] == ["sm_89"] and entry.build["backend"] == "tensorrt-rtx"
        assert entry.build["peak_anonymous"] > 10 << 20
        assert entry.parity["checked"] == "at build"
        assert entry.parity["max_rel"] < BOUNDS["float16"] / 2, f"{entry.name} in float16 against torch"
        for profile in entry.build["profiles"]:
            for name, (low, usual, high) in profile.items():
                assert low == usual == high, name
    unet = next(entry for entry in passport.networks if entry.name == "unet")
    assert unet.slots == 42
    assert [profile["sample"] for profile in unet.build["profiles"]] == [[[rows, 4, 128, 128]] * 3 for rows in (1, 2)]
    assert unet.build["profiles"][0]["inpaint_feature"][0] == [1, 32, 128, 128]
    text = "\n".join(f"{title}: {row}" for title, rows in passport.describe() for row in rows)
    assert "sm_89" in text and "MiB, built in" in text


def test_a_second_subject_takes_seconds_and_no_builder(
    plans: Path, held: Checkpoint, loras: dict[str, Path], shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dreammix_trt.building import parts
    from dreammix_trt.engine.backends.tensorrt import builder as tensorrt

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a second subject exports and builds nothing")

    for module, step in ((parts, "export_network"), (parts, "write_graph"), (tensorrt, "build_engine")):
        monkeypatch.setattr(module, step, never)
    started = time.perf_counter()
    given = held.given(store=shelf, engine=EngineOptions(targets=("sm_89",)))
    passport = build(loras["other"], out=tmp_path / "cup", name="cup", **given)
    assert time.perf_counter() - started < 10
    assert folder_bytes(tmp_path / "cup") < 1_500_000
    assert passport.parts == Passport.read(plans).parts


ADA = Gpu("NVIDIA GeForce RTX 4090", "sm_89", 24 << 30)
AMPERE = Gpu("NVIDIA GeForce RTX 3090", "sm_86", 24 << 30)
DRIVERS = {
    "no driver": (Driver(problem="there is no NVIDIA driver here"), r"there is no NVIDIA driver here"),
    "another GPU": (
        Driver("13.0", (AMPERE,)),
        r"built for sm_89, the first GPU here is NVIDIA GeForce RTX 3090 \(sm_86\)",
    ),
}


@pytest.mark.parametrize("name", DRIVERS)
def test_loading_it_where_it_cannot_run_says_why_and_the_command(
    name: str, plans: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, told = DRIVERS[name]
    monkeypatch.setattr("dreammix_trt.engine.machine.ask_driver", lambda: driver)
    with pytest.raises(EngineError, match=told) as caught:
        DreamMix.load(plans, store=shelf)
    here = f"tensorrt-rtx --target {driver.gpus[0].capability}" if driver.gpus else "onnxruntime"
    command = Passport.read(plans).command.replace("tensorrt-rtx --target sm_89", here)
    assert f"`{command}`" in str(caught.value) and str(plans) in str(caught.value)


def test_loading_it_under_another_version_says_which(plans: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dreammix_trt.engine.machine.ask_driver", lambda: Driver("13.0", (ADA,)))
    monkeypatch.setattr("dreammix_trt.engine.machine.find_versions", lambda: {"tensorrt-rtx": "1.9"})
    version = Passport.read(plans).backend_version
    with pytest.raises(EngineError, match=f"built with tensorrt-rtx {version}, installed is 1.9.*dreammix-trt build"):
        DreamMix.load(plans, store=shelf)


def test_a_plan_with_code_for_the_host_is_refused(plans: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = "dreammix_trt.engine.backends.tensorrt.plans.holds_host_code"
    monkeypatch.setattr(check, lambda plan: plan.name == "unet.engine")
    with pytest.raises(EngineError, match=r"unet\.engine carries code for the host"):
        DreamMix.load(plans, store=shelf, verify=True)  # it is remembered that it has none


@pytest.fixture(scope="module")
def dynamic(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base alone for two pictures at a time, sides free within its area, for two GPUs."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install dreammix-trt[rtx]")
    folder = files.write_folder(tmp_path_factory.mktemp("small") / "base", small_configs())
    out = shelf.parent / "dynamic"
    options = EngineOptions(targets=("sm_89", "sm_120"), shapes="dynamic", pictures=2)
    build(out=out, base=folder, store=shelf, engine=options)
    return out


def test_free_sides_are_two_profiles(dynamic: Path, shelf: Path) -> None:
    passport = open_engine(dynamic, store=shelf).passport
    assert passport.targets == ["sm_89", "sm_120"] and passport.subjects == ()
    assert {entry.name for entry in passport.networks} == {*NETWORKS, *TWINS} - {
        "unet_raw",
        "unet_raw_kv",
        "inpaint_head",
    }
    for option in ("--target sm_89", "--target sm_120", "--shapes dynamic", "--pictures 2"):
        assert option in passport.command
    builds = {entry.name: entry.build for entry in passport.networks}
    assert [profile["sample"] for profile in builds["unet"]["profiles"]] == [
        [[rows, 4, 6, 6], [rows, 4, 8, 8], [rows, 4, *most]] for most in ([8, 10], [10, 8]) for rows in (1, 2, 2, 4)
    ]  # latents of 8: 0.69 and 1.31 of that, in steps of 2
    assert builds["vae_decoder"]["profiles"][0]["latent"][2] == [1, 4, 8, 10]
    assert builds["vae_encoder"]["profiles"][1]["image"] == [[1, 3, 48, 48], [1, 3, 64, 64], [1, 3, 80, 64]]
    assert len(builds["text_encoder"]["profiles"]) == 1, "no sides, one profile"


def test_a_subject_for_slots_that_plans_lack_is_refused(dynamic: Path, shelf: Path, tmp_path: Path) -> None:
    """Named from the base's description, before any plan would be built."""
    folder = dynamic.parent / "none"
    configs = small_configs()
    base = files.write_folder(tmp_path / "base", configs)
    lora = files.write_lora(tmp_path / "lora.safetensors", configs, rank=12)
    options = EngineOptions(targets=("sm_89",))
    with pytest.raises(FileFormatError, match="as --no-slots asks"):
        build(lora, out=folder, base=base, store=tmp_path / "empty", slots=False, engine=options)
    assert not folder.exists() and Store(tmp_path / "empty").entries() == []
