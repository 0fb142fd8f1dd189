"""What a machine has for `first_light.sh`, and what it lacks: `python benchmarks/_gpu_look.py [--out FILE]`.

Standard library only. Every line of what is missing says what it stops and how it gets there, and one line
names all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

_BESIDE = "lay its wheel beside (--wheels)"
_PATIENCE = 40  # seconds for a program's answer
_TORCH = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
_ON_IT = "install it on the machine (too large to lay beside)"


class Wanted(NamedTuple):
    """Something a first light uses.

    stops: what cannot be measured without it; remedy: how it gets there.
    """

    name: str
    stops: str
    remedy: str


PACKAGES = (
    Wanted("torch", "everything but build, kernels and memcheck", _ON_IT),
    Wanted("numpy", "everything", _BESIDE),
    Wanted("pillow", "everything", _BESIDE),
    Wanted("safetensors", "everything", _BESIDE),
    Wanted("filelock", "everything", _BESIDE),
    Wanted("tokenizers", "whole pictures: loop, full, compiled, peers, soak", _BESIDE),
    Wanted("cuda-bindings", "every part on the GPU", _BESIDE + ", with cuda-pathfinder's"),
    Wanted("diffusers", "every part with networks: loop and all after it", _BESIDE),
    Wanted("transformers", "diffusers' own pipeline in peers (a plain loop stands in)", _BESIDE),
    Wanted("nanobind", "building the kernels", _BESIDE + ", or a wheel of dreammix-trt with its kernels"),
    Wanted("triton", "compiled, and peers with torch.compile", "it comes with torch for Linux"),
    Wanted("platformdirs", "nothing: a scratch folder stands in for the store", _BESIDE),
    Wanted("tensorrt-rtx", "rtx", _ON_IT),
)
TOOLS = (
    Wanted("nvidia-smi", "the record of clocks and power", "it comes with the driver"),
    Wanted("nvcc", "building the kernels", "the CUDA toolkit, or a wheel of dreammix-trt with its kernels beside"),
    Wanted("cmake", "building the kernels", "lay the wheel of cmake beside (--wheels)"),
    Wanted("c++", "building the kernels", "a C++ compiler, or a wheel of dreammix-trt with its kernels beside"),
    Wanted("compute-sanitizer", "memcheck", "it comes with the CUDA toolkit"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write what was found there, too, as JSON")
    given = parser.parse_args(arguments)
    told: dict[str, Any] = {}
    for name, value in list_facts():  # one by one: the last may take its time
        told[name] = value
        print(f"{name}: {value}", flush=True)
    found, missing = look(find_package, find_tool)
    told |= {"found": found, "missing": [wanted._asdict() for wanted in missing]}
    print("\n".join(lines_of(found, missing)), flush=True)
    told["torch"] = ask([sys.executable, "-c", _TORCH]) or "none that can be imported"
    print(f"torch, its CUDA, whether it sees a GPU: {told['torch']}", flush=True)
    if given.out:
        given.out.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return 0


def look(
    package: Callable[[str], str | None], tool: Callable[[str], str | None]
) -> tuple[dict[str, str], list[Wanted]]:
    """Name -> version of what is there, and what is missing. package, tool: name -> version, None where it is not."""
    seen = [(wanted, package(wanted.name)) for wanted in PACKAGES] + [(wanted, tool(wanted.name)) for wanted in TOOLS]
    found = {wanted.name: said for wanted, said in seen if said is not None}
    return found, [wanted for wanted, said in seen if said is None]


def lines_of(found: Mapping[str, str], missing: Sequence[Wanted]) -> list[str]:
    """The report for people."""
    there = [f"found    {name} {said}" for name, said in found.items()]
    lacking = [f"missing  {wanted.name}: stops {wanted.stops}; remedy: {wanted.remedy}" for wanted in missing]
    names = [f"MISSING: {', '.join(wanted.name for wanted in missing)}"] if missing else []
    return [*there, *lacking, *names]


def find_package(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def find_tool(name: str) -> str | None:
    """The version a program says it has; its path where it says none."""
    places = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent), "/usr/local/cuda/bin"])
    path = shutil.which(name, path=places)
    if path is None:
        return None
    said = ask([path, "--version"])
    numbers = re.findall(r"\d+\.\d+[.\d]*", said)
    return f"{numbers[-1] if numbers and name == 'nvcc' else numbers[0] if numbers else ''} ({path})".strip()


def list_facts() -> Iterator[tuple[str, Any]]:
    """Machine, memory, Python, and the GPU as nvidia-smi tells it."""
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "cores", len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if hasattr(os, "sysconf"):
        yield "memory [GiB]", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    yield "disk free [GiB]", shutil.disk_usage(Path.cwd()).free >> 30
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "python headers", (Path(sysconfig.get_path("include")) / "Python.h").exists()
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    yield "gpu", ask(asked) or "none that nvidia-smi reports"


def ask(command: list[str]) -> str:
    """What a program prints, on one line, or that it did not answer in time; "" where it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        return f"no answer within {_PATIENCE} s"
    except OSError:
        return ""
    return " ".join((done.stdout or done.stderr).split()) if done.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main())
