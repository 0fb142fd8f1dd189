"""What the wheel is made with: nvcc from packages, the release workflow. `dev.py wheel` itself takes minutes."""

from __future__ import annotations

import importlib
import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dreammix_trt.engine.hardware import CUDA_NEEDED
from tests.conftest import ROOT

WANTED = {"cmake.define.DREAMMIX_CUDA": "ON"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONSTRAINTS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)


@pytest.fixture
def backend() -> ModuleType:
    pytest.importorskip("scikit_build_core")
    return importlib.import_module("build_backend")


@pytest.fixture
def no_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without nvcc, which the build may name to CMake."""
    monkeypatch.setenv("CUDACXX", "")
    monkeypatch.delenv("SKBUILD_CMAKE_DEFINE", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


@pytest.mark.usefixtures("no_nvcc")
def test_nvcc_comes_as_packages_only_where_kernels_are_asked_for(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for hook in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
        assert not [each for each in hook({}) if "nvidia" in each]
        assert not [each for each in hook({"cmake.define.DREAMMIX_CUDA": "AUTO"}) if "nvidia" in each]
        assert [each for each in hook(WANTED) if "nvidia" in each] == backend.CUDA_PACKAGES
    monkeypatch.setenv("SKBUILD_CMAKE_DEFINE", "DREAMMIX_WERROR=ON;DREAMMIX_CUDA=ON")
    assert backend.cuda_requirements(None) == backend.CUDA_PACKAGES
    assert backend.cuda_requirements({"cmake.define.DREAMMIX_CUDA": "OFF"}) == []


def test_an_installed_nvcc_is_used(backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDACXX", "/opt/cuda/bin/nvcc")
    assert backend.cuda_requirements(WANTED) == []
    backend.use_packaged_nvcc(WANTED)
    assert os.environ["CUDACXX"] == "/opt/cuda/bin/nvcc"
    monkeypatch.delenv("CUDACXX")
    nvcc = tmp_path / ("nvcc.exe" if os.name == "nt" else "nvcc")
    nvcc.write_text("")
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert backend.cuda_requirements(WANTED) == []


@pytest.mark.usefixtures("no_nvcc")
def test_the_packages_nvcc_is_named_to_cmake(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    toolkit = tmp_path / "nvidia" / "cu13"
    for folder in ("bin", "lib"):
        (toolkit / folder).mkdir(parents=True)
    (toolkit / "bin" / "nvcc.profile").write_text("")
    (toolkit / "bin" / "nvcc").write_text("")
    (toolkit / "lib" / "libcudart_static.a").write_text("the runtime")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    importlib.invalidate_caches()
    backend.use_packaged_nvcc({})
    assert not os.environ["CUDACXX"]
    backend.use_packaged_nvcc(WANTED)
    assert os.environ["CUDACXX"] == str(toolkit / "bin" / "nvcc")
    if os.name != "nt":
        assert (toolkit / "lib64" / "libcudart_static.a").read_text() == "the runtime"


def test_one_wheel_serves_later_pythons_where_it_holds_the_extension(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SKBUILD_WHEEL_CMAKE", raising=False)
    assert backend.add_stable_abi(None) == {"wheel.py-api": "cp312"}
    assert backend.add_stable_abi({"wheel.py-api": ""}) == {"wheel.py-api": ""}
    assert backend.add_stable_abi({"wheel.cmake": "false"}) == {"wheel.cmake": "false"}
    monkeypatch.setenv("SKBUILD_WHEEL_CMAKE", "OFF")
    assert backend.add_stable_abi({}) == {}


def test_the_kernels_run_with_the_driver_that_is_asked_for(backend: ModuleType) -> None:
    """A newer toolkit's PTX would need a newer driver than `doctor` asks for."""
    for package in backend.CUDA_PACKAGES:
        major, minor = re.search(r"==(\d+)\.(\d+)\.\*$", package).groups()  # type: ignore[union-attr]
        assert int(major) * 1000 + int(minor) * 10 == CUDA_NEEDED


def test_what_was_tested_lies_within_what_users_may_have() -> None:
    requirements = pytest.importorskip("packaging.requirements")
    asked = list(PROJECT["project"]["dependencies"])
    asked += [each for extra in PROJECT["project"]["optional-dependencies"].values() for each in extra]
    asked += PROJECT["build-system"]["requires"]
    pins = {name.replace("_", "-").lower(): version for name, version in CONSTRAINTS.items()}
    checked = 0
    for requirement in map(requirements.Requirement, asked):
        if pin := pins.get(requirement.name.lower()):
            assert requirement.specifier.contains(pin), f"{requirement} leaves out {pin}"
            checked += 1
    assert checked >= 20


def test_no_extra_brings_a_second_onnxruntime() -> None:
    """The CPU's and the GPU's overwrite each other. A plain install runs on a CPU; `doctor --mend` does the rest."""
    assert [each for each in PROJECT["project"]["dependencies"] if each.startswith("onnxruntime")]
    extras = PROJECT["project"]["optional-dependencies"].values()
    assert not [each for extra in extras for each in extra if each.startswith("onnxruntime")]


def test_a_release_is_built_and_tried_and_published_by_a_tag_alone(backend: ModuleType) -> None:
    yaml = pytest.importorskip("yaml")
    workflow: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    jobs = workflow["jobs"]
    publish = jobs["publish"]
    assert publish["if"] == jobs["version"]["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert set(publish["needs"]) == {"wheels", "sdist", "version"}
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert workflow["permissions"] == {"contents": "read"}  # publishing alone may ask for a token
    assert {name for name, job in jobs.items() if "permissions" in job} == {"publish"}
    assert jobs["wheels"]["strategy"]["matrix"]["os"] == ["ubuntu-latest", "windows-latest"]
    settings = PROJECT["tool"]["cibuildwheel"]
    assert settings["config-settings"] == WANTED
    assert settings["manylinux-x86_64-image"] == "manylinux_2_28"
    assert (ROOT / settings["test-command"].split()[-1].replace("{project}/", "")).is_file()
    assert {each.split("-")[0] for each in settings["build"]} == {"cp311", backend.STABLE_ABI}


def test_the_trial_notices_a_source_tree() -> None:
    """It must never pass on the tree itself: here the package is an editable install, not a wheel."""
    ran = subprocess.run(
        [sys.executable, ROOT / "tests" / "try_wheel.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode != 0 and "is not the installed wheel" in ran.stderr
