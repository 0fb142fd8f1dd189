#!/usr/bin/env python3
"""One file that sets the project up and runs it: `python dev.py demo`, `python dev.py test`, `python dev.py setup`.

Standard library only, re-runnable, Linux and Windows. Everything it makes lies in `.venv`, `build` and `demo`,
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
FLOORS = ("core", "export", "engine", "trainer")
# Named first and alone: a plain "torch" would take the newest build with gigabytes of CUDA libraries.
TORCH = "torch==2.13.0"
EXTRAS = "train,export,rtx,cuda,dev"


def python() -> Path:
    """The interpreter of the project's own environment."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run(*command: str | Path, check: bool = True, **environment: str) -> int:
    """Run a command in the project's root; the environment's programs come first on PATH."""
    env = {**os.environ, "PATH": f"{python().parent}{os.pathsep}{os.environ.get('PATH', '')}", **environment}
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


def recipe() -> str:
    """What an up-to-date environment was made from: the build files, the C++ and CUDA sources, which nvcc there is."""
    digest = hashlib.sha256(f"{sys.version} {shutil.which('nvcc')}".encode())
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
    stamp.write_text(recipe())


def demo(arguments: list[str]) -> int:
    """Train a subject, build its engine, inpaint with it, and say where the contact sheet is."""
    setup()
    return run(python(), "-m", "dreammix_trt", "demo", *arguments, check=False)


def test(arguments: list[str]) -> int:
    """Lint, types, then the tests; pytest's own closing line ends the output."""
    setup()
    if not arguments:
        run(python(), "-m", "ruff", "check", ".")
        run(python(), "-m", "ruff", "format", "--check", ".")
        run(python(), "-m", "mypy")
    return run(python(), "-m", "pytest", *arguments, check=False)


def clean() -> int:
    """Remove what this file made."""
    for path in (VENV, ROOT / "build", ROOT / "demo"):
        shutil.rmtree(path, ignore_errors=True)
    return 0


def main() -> int:
    """Choose the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("setup", "demo", "test", "clean"))
    known, rest = parser.parse_known_args()
    if known.command == "setup":
        setup()
        return 0
    if known.command == "clean":
        return clean()
    return demo(rest) if known.command == "demo" else test(rest)


if __name__ == "__main__":
    sys.exit(main())
