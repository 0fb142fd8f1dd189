"""Fixtures that all tests share; markers follow from them."""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_golden = {"passed": 0, "failed": 0, "skipped": 0}


def shared_folder() -> Path:
    """The folder of recorded runs and real data: DREAMMIX_SHARED, or `shared` beside the checkout."""
    return Path(os.environ.get("DREAMMIX_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared data; a test that needs it skips where it is absent."""
    folder = shared_folder()
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set DREAMMIX_SHARED")
    return folder


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """The recorded runs of the authors' code (docs/algorithm.md, 15)."""
    folder = shared / "golden"
    if not folder.is_dir():
        pytest.skip(f"no golden data at {folder}")
    return folder


@pytest.fixture(autouse=True)
def _own_store(test_home: Path) -> None:
    """No test touches the user's own store."""


@pytest.fixture(autouse=True, scope="module")
def _short_collections() -> Iterator[None]:
    """Every part that a build makes is followed by a garbage collection. Spare it what earlier modules have left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def gpu() -> None:
    """For tests that need an NVIDIA GPU: a driver that answers and has one."""
    problem = _no_gpu()
    if problem:
        pytest.skip(problem)


@functools.cache
def _no_gpu() -> str | None:
    from dreammix_trt.engine.hardware import ask_driver

    return ask_driver().problem


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Markers follow from fixtures."""
    for item in items:
        if "gpu" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count the tests on recorded runs."""
    if getattr(report, "golden", False) and (report.when == "call" or (report.when == "setup" and report.skipped)):
        _golden[report.outcome] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many golden tests ran."""
    terminalreporter.write_line(
        f"golden tests: {_golden['passed'] + _golden['failed']} ran"
        f" ({_golden['failed']} failed), {_golden['skipped']} skipped"
    )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):  # type: ignore[no-untyped-def]
    """Remember on the report whether the test used the golden folder."""
    outcome = yield
    outcome.get_result().golden = "golden" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session")
def test_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that all tests of a run share."""
    folder = Path(os.environ.setdefault("DREAMMIX_TEST_HOME", str(tmp_path_factory.mktemp("home"))))
    os.environ["DREAMMIX_HOME"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def mug_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random LoRA of the embedded base, as the trainer writes it."""
    return write_lora(tmp_path_factory.mktemp("loras") / "mug", seed=1)


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base, said to be of native side 128: the same weights and graphs, a quarter of the work.

    Without ASUKA's parts and the token adapter, which few tests need and all builds would make.
    """
    from dreammix_trt.core.checkpoint import BaseFiles

    folder = tmp_path_factory.mktemp("bases") / "micro-sdxl"
    shutil.copytree(BaseFiles.open().folder, folder, ignore=shutil.ignore_patterns("graphs", "asuka", "token_adapter*"))
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"sample_size": 16}))
    return folder


@pytest.fixture(scope="session")
def mug_engine(test_home: Path, small_base: Path, mug_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine directory of the small base with one subject, `mug`."""
    from dreammix_trt.building import build

    out = tmp_path_factory.mktemp("engines") / "mug"
    build(mug_lora, base=small_base, out=out, name="mug")
    return out


def write_lora(folder: Path, seed: int, rank: int = 4, scale: float = 0.05) -> Path:
    """Write a random LoRA of the embedded base's attention layers in the diffusers format; returns its folder."""
    import numpy as np
    from safetensors.numpy import save_file

    from dreammix_trt.core.checkpoint import BaseFiles

    rng = np.random.default_rng(seed)
    tensors = {}
    for name, weight in BaseFiles.open().state("unet").items():
        if name.endswith((".to_k.weight", ".to_v.weight", ".to_out.0.weight")):
            module = f"unet.{name.removesuffix('.weight')}"
            outputs, inputs = weight.shape
            tensors[f"{module}.lora.down.weight"] = rng.normal(0, 1 / rank, (rank, inputs)).astype(np.float32)
            tensors[f"{module}.lora.up.weight"] = rng.normal(0, scale, (outputs, rank)).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
    return folder
