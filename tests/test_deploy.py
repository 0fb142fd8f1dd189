"""Images and the page about deploying, which cannot be run here: what they name exists."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main

from tests.conftest import ROOT

FILES = ("Dockerfile", "Dockerfile.cpu")
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
KNOWN = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


def read_instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, its lines joined."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in joined]


def find_copied(name: str) -> list[str]:
    """What is copied from the checkout."""
    copies = [words.split() for what, words in read_instructions(name) if what == "COPY" and "--from" not in words]
    return [source for words in copies for source in words[:-1]]


def serve_options() -> set[str]:
    from dreammix_trt.cli import app

    group: Any = typer.main.get_command(app)
    command: click.Command = group.get_command(click.Context(group), "serve")
    return {option for each in command.params for option in (*each.opts, *each.secondary_opts)} | {"--log-level"}


@pytest.mark.parametrize("name", FILES)
def test_an_image_has_what_it_names(name: str) -> None:
    instructions = read_instructions(name)
    assert {what for what, _ in instructions} <= KNOWN and len(instructions) < 32
    stages = [words.split()[2] for what, words in instructions if what == "FROM" and " AS " in words]
    mounted = re.findall(r"from=(\w+)", " ".join(words for _, words in instructions))
    assert stages == ["wheel"] and set(mounted) == {"wheel"}
    (install,) = [words for what, words in instructions if what == "RUN" and "pip install" in words]
    extras = re.findall(r"\.whl\)\[([\w,]+)\]", install)[0].split(",")
    assert set(extras) <= set(EXTRAS) and "serve" in extras and ("cuda" in extras) == (name == "Dockerfile")
    assert not [need for extra in extras for need in EXTRAS[extra] if re.match(r"torch|diffusers|transformers", need)]
    defined = re.findall(r"cmake\.define\.(\w+)=(\w+)", str(instructions))
    assert defined == [("DREAMMIX_CUDA", "ON" if name == "Dockerfile" else "OFF")]
    assert "set(DREAMMIX_CUDA " in (ROOT / "CMakeLists.txt").read_text()


@pytest.mark.parametrize("name", FILES)
def test_an_image_runs_as_nobody_special_and_is_asked_how_it_is(name: str) -> None:
    from dreammix_trt.service.app import make_app
    from dreammix_trt.service.served import Served
    from dreammix_trt.service.settings import Settings
    from tests.support.fake_service import FakePainter

    instructions = read_instructions(name)
    last = [what for what, _ in instructions][-5:]
    assert last == ["USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"]
    values = dict(instructions[-5:])
    assert int(values["USER"]) > 999 and f"--uid {values['USER']} " in str(instructions)
    asked = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", values["HEALTHCHECK"])
    served = Served("fake", [FakePainter()])
    paths = make_app([served], Settings()).openapi()["paths"]
    served.queue.close()
    assert asked == [(values["EXPOSE"], "/healthz")] and "/healthz" in paths
    program = json.loads(values["HEALTHCHECK"].partition("CMD ")[2])
    compile(program[2], name, "exec")
    command = [
        *json.loads(values["ENTRYPOINT"]),
        *json.loads(values["CMD"]),
    ]  # a list: signals reach the process itself
    assert command[:2] == ["dreammix-trt", "serve"] and "dreammix-trt" in PROJECT["project"]["scripts"]
    assert {word for word in command if word.startswith("--")} <= serve_options()
    assert Settings.port == int(values["EXPOSE"])


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_exists_and_is_not_ignored(name: str) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines and set(find_copied(name)) == kept
    assert not [path for path in kept if not (ROOT / path).exists()]
    packages = PROJECT["tool"]["scikit-build"]["wheel"]["packages"]
    assert set(packages.values()) <= kept, "every floor is in the wheel"


@pytest.mark.slow
def test_what_is_copied_makes_the_wheel(tmp_path: Path) -> None:
    """As the first stage does, without a compiler: nothing else of the checkout is needed."""
    for need in ("scikit_build_core", "nanobind"):
        pytest.importorskip(need)
    for name in find_copied("Dockerfile"):
        source, target = ROOT / name, tmp_path / "src" / name
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target, symlinks=True, ignore=ignored) if source.is_dir() else shutil.copy(
            source, target
        )
    code = f"import build_backend; print(build_backend.build_wheel({str(tmp_path)!r}, {{'wheel.cmake': 'false'}}))"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "src", capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / ran.stdout.split()[-1]).stat().st_size > 10 << 20  # the embedded model is in it


def test_the_commands_of_the_page_have_options_that_exist() -> None:
    known = serve_options() | set(re.findall(r'"(--[\w-]+)"', (ROOT / "benchmarks" / "capacity.py").read_text()))
    docker = {"--gpus", "--restart", "--stop-timeout", "--read-only", "--tmpfs", "--now", "--shm-size"}
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE))
    assert said - docker - {"--self-contained"} <= known and {"--grace", "--workers", "--queue"} <= said
    for script in re.findall(r"python (benchmarks/\w+\.py)", PAGE):
        assert (ROOT / script).is_file()


def test_the_unit_starts_the_service() -> None:
    (text,) = re.findall(r"```ini\n(.*?)```", PAGE, re.S)
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(text)
    service = unit["Service"]
    words = service["ExecStart"].split()
    assert words[0].endswith("/dreammix-trt") and words[1] == "serve"
    assert {word for word in words if word.startswith("--")} <= serve_options()
    assert int(service["TimeoutStopSec"]) > 30 + 5 and service["Restart"] == "on-failure"


def test_the_numbers_to_watch_are_there() -> None:
    from prometheus_client import generate_latest

    from dreammix_trt.service.meters import Meters

    meters = Meters()
    meters.watch(dict, lambda: (0, 0))
    told = generate_latest(meters.registry).decode()
    names = set(re.findall(r"(?:dreammix|process)_\w+", PAGE))
    assert len(names) > 8 and not [name for name in names if f"# TYPE {name.removesuffix('_total')}" not in told]
