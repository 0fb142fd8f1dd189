"""The extension's CUDA kernels, compiled for real wherever there is an nvcc; no GPU is needed to compile or import."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCES = ROOT / "cpp_ext" / "gpu"
NUMBERS = {
    "StepBefore", "StepAfter", "EncodeLatent", "Noised", "Scaled", "Convert", "CheckFinite", "JoinText",
    "WeighText", "Tas", "MergeWeights",
}  # fmt: skip


@pytest.fixture(scope="session")
def nvcc() -> str:
    """A CUDA compiler that runs."""
    found = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if not found:
        pytest.skip("no nvcc on PATH")
    if subprocess.run([found, "--version"], capture_output=True, check=False).returncode:
        pytest.skip(f"{found} does not run")
    return found


@pytest.fixture(scope="session")
def compiled(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What ptxas says about every kernel: machine code for one GPU and PTX, warnings as errors, as CMake does it."""
    folder = tmp_path_factory.mktemp("cuda")
    command = [
        nvcc, "-x", "cu", "-std=c++17", "-O3", "--fmad=false", "--Werror", "all-warnings",
        "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v", "--generate-code=arch=compute_89,code=[sm_89,compute_89]", "-c",
    ]  # fmt: skip
    running = [
        subprocess.Popen(
            [*command, str(source), "-o", str(folder / f"{source.stem}.o")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for source in sorted(SOURCES.glob("*.cpp"))
    ]
    said = [each.communicate(timeout=300)[0] for each in running]
    assert len(running) == 2
    for each, text in zip(running, said, strict=True):
        assert each.returncode == 0, text[-4000:]
    return "".join(said)


def kernel_name(mangled: str) -> str:
    """The struct a kernel was made of: `_ZN3dmx13run_on_deviceINS_3gpu3CutEEEvT_` -> Cut."""
    rest, name = mangled.partition("run_on_deviceI")[2].lstrip("NS_"), ""
    while found := re.match(r"\d+", rest):
        end = found.end() + int(found[0])
        name, rest = rest[found.end() : end], rest[end:]
    return name


def kernels_in_sources() -> set[str]:
    """Structs at the left margin that have a body over a group."""
    found = set()
    for header in SOURCES.glob("*.hpp"):
        for struct in re.split(r"^(?:template .*\n)?struct ", header.read_text(), flags=re.MULTILINE)[1:]:
            if "operator()(Group& group)" in struct:
                found.add(re.match(r"\w+", struct)[0])  # type: ignore[index]
    return found


@pytest.mark.slow
def test_every_kernel_is_compiled(compiled: str) -> None:
    made = {kernel_name(each) for each in re.findall(r"Compiling entry function '(\w+)'", compiled)}
    assert made == kernels_in_sources()
    assert made >= NUMBERS


@pytest.mark.slow
def test_no_kernel_spills_registers(compiled: str) -> None:
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", compiled)
    assert len(spills) >= len(NUMBERS) and set(spills) == {("0", "0")}


def test_build_info() -> None:
    cpp = pytest.importorskip("dreammix_trt._cpp")
    info = cpp.build_info()
    assert set(info) == {"version", "compiler", "host_features", "cuda"} and info["compiler"]
    assert info["version"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    if info["cuda"] is not None:
        assert set(info["cuda"]) == {"toolkit", "architectures", "ptx"}
        assert re.fullmatch(r"\d+\.\d+", info["cuda"]["toolkit"])
        assert all(re.fullmatch(r"sm_\d+", each) for each in info["cuda"]["architectures"])
        assert re.fullmatch(r"compute_\d+", info["cuda"]["ptx"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_importing_needs_no_driver() -> None:
    """The driver's library is not even opened; the CUDA runtime is part of the module, so nothing else is either."""
    pytest.importorskip("dreammix_trt._cpp")
    code = "import dreammix_trt._cpp; print([line for line in open('/proc/self/maps') if 'libcuda' in line])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize(("mode", "fits"), [("AUTO", True), ("ON", False)])
def test_a_broken_nvcc_breaks_only_builds_that_ask_for_it(mode: str, fits: bool, tmp_path: Path) -> None:
    if not shutil.which("cmake") or importlib.util.find_spec("nanobind") is None or os.name == "nt":
        pytest.skip("needs cmake and nanobind")
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    nanobind = subprocess.check_output([sys.executable, "-m", "nanobind", "--cmake_dir"], text=True).strip()
    ran = subprocess.run(
        [
            "cmake",
            "-S",
            ROOT,
            "-B",
            tmp_path / "build",
            f"-DDREAMMIX_CUDA={mode}",
            f"-Dnanobind_DIR={nanobind}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ],
        env={**os.environ, "CUDACXX": str(broken)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode == 0) == fits
    assert "no working nvcc was found" in ran.stdout + ran.stderr
