"""The recorded runs of the authors' code, through both back ends; the long ones are marked slow."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks._golden_case import Case, find_cases, networks_for
from benchmarks.golden import checked
from benchmarks.golden_units import Row
from dreammix_trt.engine.networks import EngineSet
from dreammix_trt.engine.stages import Networks

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def torch_networks(golden: Path) -> Networks:
    """The tiny model of the golden data in torch."""
    pytest.importorskip("torch")
    return networks_for(find_cases(golden, ["case1"])[0], "torch", 8)


@pytest.fixture(scope="module")
def engine_set(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Networks]:
    """The same, exported and on ONNX Runtime."""
    pytest.importorskip("torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DREAMMIX_HOME", str(tmp_path_factory.mktemp("golden-engines")))
        networks = networks_for(find_cases(golden, ["case1"])[0], "onnxruntime", 8)
    assert isinstance(networks, EngineSet)
    with networks:
        yield networks


def missed(rows: list[Row]) -> list[Row]:
    assert len(rows) > 40
    return [row for row in rows if not row.passed]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch_networks", "engine_set"])
def test_a_whole_run_is_reproduced(golden: Path, request: pytest.FixtureRequest, backend: str) -> None:
    assert missed(checked(Case(golden / "case3"), request.getfixturevalue(backend))) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["case1", "case2"])
def test_every_recorded_array_follows_from_recorded_inputs(golden: Path, torch_networks: Networks, name: str) -> None:
    assert missed(checked(Case(golden / name), torch_networks, whole=False)) == []


CHANGED = ("lcg_crop_box", "feather", "time_ids", "lcg_unet_text", "vae_mean_lcg_masked", "x_in_step02", "x_out_step03",
           "unet_cond_step00", "initial_latent", "lcg_head_feature_ch", "x0_cond_postblur_step05")  # fmt: skip


@pytest.mark.slow
def test_wrong_numbers_are_found(golden: Path, torch_networks: Networks, tmp_path: Path) -> None:
    for beside in ("model", "inpaint_head.pth", "tiny.fooocus.patch", "lora"):
        (tmp_path / beside).symlink_to(golden / beside)
    folder = tmp_path / "case3"
    shutil.copytree(golden / "case3", folder)
    with np.load(folder / "golden.npz") as file:
        arrays = {name: file[name] for name in file.files}
    for name in CHANGED:
        flat = arrays[name].reshape(-1)
        flat[0] += max(1, 0.01 * np.abs(flat).max()) if arrays[name].dtype.kind == "f" else 1
    np.savez(folder / "golden.npz", **arrays)
    failed = " ".join(row.array for row in missed(checked(Case(folder), torch_networks, whole=False)))
    for name in CHANGED:
        assert name.partition("_step")[0] in failed


def test_the_benchmark_prints_one_object(golden: Path, tmp_path: Path) -> None:
    for beside in ("model", "inpaint_head.pth", "units.npz"):
        (tmp_path / beside).symlink_to(golden / beside)
    command = [sys.executable, str(ROOT / "benchmarks" / "golden.py"), str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["name"] == "golden"
    assert len(told["rows"]) > 30
    assert all(row["pass"] for row in told["rows"])
