"""What must be there before anything is measured on a GPU: wheels laid beside, the extension with CUDA, a description.

The kernels are built for the GPU at hand alone, into a folder of their own; the installed extension stays as it is.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from _common import machine

ROOT = Path(__file__).resolve().parent.parent
OWN_WHEEL = "dreammix_trt-"  # how the name of a wheel of this project begins
_ASKED = {
    "name": "gpu", "compute_cap": "capability", "memory.total": "memory [MiB]", "driver_version": "driver",
    "clocks.sm": "SM clock [MHz]", "clocks.mem": "memory clock [MHz]", "clocks.max.sm": "SM clock, most [MHz]",
    "clocks.max.mem": "memory clock, most [MHz]", "power.limit": "power limit [W]",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ wheels


def unpack_wheels(wheels: Path, to: Path) -> list[Path]:
    """Unpack every wheel of a folder below `to`; returns the folders to be imported from, in the files' order.

    The project's own wheel is left out: this checkout is what is measured. Raises FileNotFoundError where the folder
    has no wheel at all.
    """
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise FileNotFoundError(f"{wheels} holds no wheel (*.whl)")
    files = [file for file in files if not file.name.startswith(OWN_WHEEL)]
    places = []
    for file in files:
        place = to / file.name.removesuffix(".whl")
        with zipfile.ZipFile(file) as packed:
            packed.extractall(place)
        for part in ("purelib", "platlib"):  # what a wheel of the other kind keeps aside
            for folder in place.glob(f"*.data/{part}"):
                shutil.copytree(folder, place, dirs_exist_ok=True)
        places.append(place)
    return places


def with_paths(paths: Iterable[Path], environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with these folders first on Python's path."""
    before = environment.get("PYTHONPATH", "")
    return {**environment, "PYTHONPATH": os.pathsep.join([*map(str, paths), *([before] if before else [])])}


# ------------------------------------------------------------------------------------------------ extension


def extension_serves(info: Mapping[str, Any] | None, capability: str) -> bool:
    """Whether an extension's `build_info()` has kernels for a GPU ("sm_90"), as machine code or as PTX."""
    cuda = (info or {}).get("cuda")
    if not cuda:
        return False
    ptx = cuda.get("ptx")
    return capability in cuda["architectures"] or bool(ptx and _number(ptx) <= _number(capability))


def extension_info(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """`build_info()` of the extension as another process finds it; None: there is none, or one without."""
    code = "import json, dreammix_trt._cpp as c; print(json.dumps(c.build_info()))"
    done = subprocess.run([sys.executable, "-c", code], env=dict(environment), capture_output=True, text=True)
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return None
    return found


def build_extension(
    folder: Path, capability: str, environment: Mapping[str, str] | None = None, *, limit: float | None = None
) -> Path:
    """Build the extension with kernels for one GPU ("sm_90"); returns the folder that holds it.

    limit: seconds that each of cmake's two runs may take. What was built before, and is newer than its sources, stays.

    Needs cmake, nvcc, a C++ compiler and nanobind, which may lie on the environment's PYTHONPATH. Raises RuntimeError
    with the end of what a tool said.
    """
    alone = folder / "alone"
    if _is_fresh(alone) and extension_serves(info_of_extension(alone, environment or os.environ), capability):
        return alone
    nanobind = _ran([sys.executable, "-m", "nanobind", "--cmake_dir"], environment).strip()
    command = [
        _tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release", "-DDREAMMIX_CUDA=ON",
        f"-DDREAMMIX_CUDA_ARCHITECTURES={_number(capability)}-real", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dnanobind_DIR={nanobind}", f"-DCMAKE_CUDA_COMPILER={_tool('nvcc')}",
    ]  # fmt: skip
    _ran(command, environment, limit)
    cores = str(min(16, os.cpu_count() or 1))
    _ran([_tool("cmake"), "--build", str(folder), "--config", "Release", "-j", cores], environment, limit)
    built = [file for kind in ("so", "pyd") for file in folder.rglob(f"_cpp*.{kind}") if file.parent.name != "alone"]
    if not built:
        raise RuntimeError(f"{folder}: cmake built no _cpp module")
    alone.mkdir(exist_ok=True)
    shutil.copy(max(built, key=lambda file: file.stat().st_mtime), alone)
    return alone


def _is_fresh(folder: Path) -> bool:
    """Whether a module lies there that is newer than every source of it."""
    made = [file.stat().st_mtime for file in folder.glob("_cpp*")]
    sources = [ROOT / "CMakeLists.txt", *(file for file in (ROOT / "cpp_ext").rglob("*") if file.is_file())]
    return bool(made) and min(made) > max(file.stat().st_mtime for file in sources)


def extract_extension(wheel: Path, to: Path) -> Path:
    """Take the `_cpp` module alone out of a wheel of this project; returns the folder that holds it then.

    Raises RuntimeError for a wheel without one.
    """
    with zipfile.ZipFile(wheel) as packed:
        modules = [name for name in packed.namelist() if Path(name).match("dreammix_trt/_cpp*.*")]
        modules = [name for name in modules if name.endswith((".so", ".pyd"))]
        if not modules:
            raise RuntimeError(f"{wheel} holds no _cpp module: it is a wheel without the C++ extension")
        to.mkdir(parents=True, exist_ok=True)
        for name in modules:
            (to / Path(name).name).write_bytes(packed.read(name))
    return to


def info_of_extension(folder: Path, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """`build_info()` of the module in a folder, asked in another process; None where it does not load."""
    code = (
        "import json, sys, pathlib, _gpu_setup as setup; setup.use_extension(pathlib.Path(sys.argv[1])); "
        "import dreammix_trt._cpp as c; print(json.dumps(c.build_info()))"
    )
    given = with_paths([ROOT / "benchmarks", ROOT], environment)
    done = subprocess.run([sys.executable, "-c", code, str(folder)], env=given, capture_output=True, text=True)
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return None
    return found


def use_extension(folder: Path) -> None:
    """From now on this process takes `dreammix_trt._cpp` from `folder`. Call it before anything imports the kernels."""
    import dreammix_trt

    if "dreammix_trt._cpp" in sys.modules:
        raise RuntimeError("the extension is already loaded: use_extension comes first")
    dreammix_trt.__path__.insert(0, str(folder))


def _tool(name: str) -> str:
    places = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), "/usr/local/cuda/bin"]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise RuntimeError(f"{name} is needed to build the kernels and is not on PATH")
    return found


def _ran(command: list[str], environment: Mapping[str, str] | None = None, limit: float | None = None) -> str:
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            said, wrong = process.communicate(timeout=limit)
        finally:
            end_group(process)
    if process.returncode:
        last = "\n".join((said + wrong).splitlines()[-30:])
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{last}")
    return said


def end_group(process: subprocess.Popen[Any]) -> None:
    """End a process that was started in a session of its own, with whatever it started: compilers, say, or a checker's
    process. What has ended already is left alone."""
    with suppress(ProcessLookupError, PermissionError):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _number(capability: str) -> int:
    """ "sm_90", "sm_90a", "compute_120" -> 90, 90, 120."""
    return int("".join(letter for letter in capability if letter.isdigit()))


# ------------------------------------------------------------------------------------------------ description


def describe(info: Mapping[str, Any] | None) -> dict[str, Any]:
    """The machine: processor and system, GPU with driver and clocks as found, toolkit of the kernels, packages.

    info: the extension's `build_info()`.
    """
    from dreammix_trt.engine.hardware import ask_driver
    from dreammix_trt.engine.machine import find_versions

    driver = ask_driver()
    found: dict[str, Any] = {**machine(), "driver for CUDA": driver.cuda}
    for gpu in driver.gpus[:1]:
        found |= {"gpu": gpu.name, "capability": gpu.capability, "memory [MiB]": gpu.memory >> 20}
    found |= gpu_state()
    found["kernels"] = (info or {}).get("cuda")
    found["versions"] = find_versions()
    return found


def gpu_state() -> dict[str, Any]:
    """What nvidia-smi says of the first GPU now; {} where it is not to be had."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return parse_state(done.stdout) if done.returncode == 0 else {}


def parse_state(line: str) -> dict[str, Any]:
    """One line of nvidia-smi's answer; fields it does not know ("[N/A]") are left out."""
    cells = next(csv.reader([line.strip()], skipinitialspace=True), [])
    if len(cells) != len(_ASKED):
        return {}
    told: dict[str, Any] = {}
    for name, cell in zip(_ASKED.values(), cells, strict=True):
        if cell.startswith("["):
            continue
        if name == "capability":
            told[name] = f"sm_{cell.replace('.', '')}"
        elif name.endswith("]"):
            told[name] = round(float(cell))
        else:
            told[name] = cell
    return told
