"""`first_light.sh`: its order, its summary, parts that fail or hang, and a dry run on the simulated device."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import _gpu_look as look
import _gpu_report as report
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "first_light.sh"
pytestmark = pytest.mark.skipif(
    os.name != "posix" or not shutil.which("timeout") or not shutil.which("bash"), reason="needs bash and coreutils"
)

# in place of Python: does what the test says of the part it is asked for, and keeps what it was told
ACTOR = """#!/usr/bin/env bash
case $1 in *_gpu_look.py) part=look ;; *gpu_suite.py) part=$2 ;; -m) part=pip ;; esac
echo "$part $*" >> "{calls}"
echo "this is $part"
case $part in
{cases}
esac
"""


@pytest.fixture
def stage(tmp_path: Path) -> Any:
    """(options, parts' doings in bash) -> exit code, summary, summary.txt and the calls that were made."""

    def perform(*options: str, cases: str = "") -> tuple[int, dict[str, Any], str, list[str]]:
        actor, calls = tmp_path / "python", tmp_path / "calls"
        actor.write_text(ACTOR.format(calls=calls, cases=cases))
        actor.chmod(0o755)
        calls.write_text("")
        done = subprocess.run(
            ["bash", str(SCRIPT), "--out", str(tmp_path / "out"), *options],
            env={**os.environ, "PYTHON": str(actor)}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        if done.returncode == 2:
            return 2, {}, done.stderr, []
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        return done.returncode, summary, (tmp_path / "out" / "summary.txt").read_text(), calls.read_text().splitlines()

    return perform


def states(summary: dict[str, Any]) -> dict[str, str]:
    return {part["part"]: part["state"] for part in summary["parts"]}


def test_every_part_runs_in_the_order_that_tells_most(stage: Any) -> None:
    code, summary, _, calls = stage("--budget", "90000")
    wanted = ["look", *report.PARTS]
    assert code == 0 and [part["part"] for part in summary["parts"]] == wanted
    assert [call.split()[0] for call in calls] == wanted
    assert wanted[:7] == ["look", "machine", "build", "kernels", "memcheck", "loop", "graphs"]
    assert {*states(summary).values()} == {"passed"}
    limits = {part["part"]: part["limit"] for part in summary["parts"]}
    assert max(limits.values()) <= 600  # of one command
    told = {call.split()[0]: int(call.split("--limit ")[1].split()[0]) for call in calls if "--limit" in call}
    # a part stops itself, and keeps its rows, before it is stopped
    assert told == {name: limits[name] - (20 if limits[name] > 60 else 0) for name in report.PARTS}


def test_a_part_that_fails_does_not_end_the_run_and_its_reason_is_told(stage: Any, tmp_path: Path) -> None:
    cases = """
    kernels) printf '  FAILED: RuntimeError: "nvcc" said C:\\\\no\\n  more\\n'; exit 1 ;;
    memcheck) echo "  SKIPPED: no checker here"; exit 3 ;;
    loop) echo "out of words"; exit 7 ;;"""
    code, summary, text, _ = stage("--only", "kernels,memcheck,loop,graphs", cases=cases)
    assert code == 1
    found = {part["part"]: (part["state"], part["rc"], part["reason"]) for part in summary["parts"]}
    assert found == {
        "kernels": ("failed", 1, 'FAILED: RuntimeError: "nvcc" said C:\\no'),
        "memcheck": ("skipped", 3, "SKIPPED: no checker here"),
        "loop": ("failed", 7, "out of words"),
        "graphs": ("passed", 0, ""),
    }
    assert [line.split()[0] for line in text.splitlines()[:-1]] == list(found)
    assert "=== loop\nthis is loop\nout of words\n" in (tmp_path / "out" / "log.txt").read_text()


def test_a_part_that_hangs_is_stopped_with_what_it_started(stage: Any, tmp_path: Path) -> None:
    cases = f"""
    loop) sleep 600 & echo $! > "{tmp_path / "helper"}"; wait ;;"""
    started = time.perf_counter()
    code, summary, _, _ = stage("--only", "loop,graphs", "--limit", "2", cases=cases)
    assert time.perf_counter() - started < 20
    assert code == 1 and states(summary) == {"loop": "stopped", "graphs": "passed"}
    stopped = summary["parts"][0]
    assert stopped["rc"] == 124 and stopped["limit"] == 2 and "limit" in stopped["reason"]
    helper = Path("/proc", (tmp_path / "helper").read_text().strip(), "stat")
    assert not helper.exists() or helper.read_text().split()[2] in "ZX"


def test_parts_that_no_longer_fit_are_left_out_and_shorter_ones_still_run(stage: Any) -> None:
    code, summary, text, calls = stage("--budget", "60", "--only", "kernels,full,compiled,ratios")
    assert code == 3
    assert states(summary) == {
        "kernels": "passed", "full": "not started", "compiled-step": "not started", "compiled-vae": "not started",
        "compiled-guided": "not started", "compiled-quick": "not started", "ratios": "passed",
    }  # fmt: skip
    assert [call.split()[0] for call in calls] == ["kernels", "ratios"]
    assert summary["parts"][0]["limit"] <= 50  # what was left, not its own 150
    assert "it wants 90" in text


def test_only_some_skipped_is_neither_passed_nor_failed(stage: Any) -> None:
    code, summary, _, _ = stage("--only", "rtx", cases='rtx) echo "  SKIPPED: not here"; exit 3 ;;')
    assert code == 3 and states(summary) == {"rtx": "skipped"}


@pytest.mark.parametrize(("sent", "wanted"), [(signal.SIGKILL, "running"), (signal.SIGTERM, "interrupted")])
def test_a_run_that_is_killed_has_said_how_far_it_came(tmp_path: Path, sent: signal.Signals, wanted: str) -> None:
    actor, group = tmp_path / "python", tmp_path / "group"
    actor.write_text(ACTOR.format(calls=tmp_path / "calls", cases=f"graphs) echo $PPID > {group}; sleep 30 ;;"))
    actor.chmod(0o755)
    command = ["bash", str(SCRIPT), "--out", str(tmp_path / "out"), "--only", "graphs,loop,soak"]
    environment = {**os.environ, "PYTHON": str(actor)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.perf_counter() + 30
        while not (group.exists() and group.read_text().endswith("\n")) and time.perf_counter() < deadline:
            time.sleep(0.05)
        process.send_signal(sent)
        process.wait(timeout=30)
    with suppress(ProcessLookupError):  # what a script that was killed could not end itself
        os.killpg(int(group.read_text()), signal.SIGKILL)
    assert process.returncode == (143 if sent == signal.SIGTERM else -signal.SIGKILL)
    assert states(json.loads((tmp_path / "out" / "summary.json").read_text())) == {"loop": "passed", "graphs": wanted}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--only", "colonel"], "no part colonel"),
        (["--budget", "soon"], "--budget is 'soon'"),
        (["--budget", "0"], "--budget is '0'"),
        (["--limit", "-3"], "--limit is '-3'"),
        (["--out"], "--out wants a value"),
        (["--wheels", "/nowhere"], "holds no wheel"),
        (["--fast"], "unknown option --fast"),
    ],
)
def test_a_wrong_call_is_refused_by_name(stage: Any, options: list[str], wanted: str) -> None:
    code, _, said, _ = stage(*options)
    assert code == 2 and wanted in said


def test_wheels_are_installed_offline_one_by_one_and_our_own_gives_the_kernels(stage: Any, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("diffusers-0.42-py3-none-any", "cuda_bindings-13-cp312", "dreammix_trt-0.1.0-cp312-abi3-linux"):
        (wheels / f"{name}.whl").write_bytes(b"")
    cases = """pip) case "$*" in *diffusers*) echo no; exit 1 ;; esac ;;"""
    code, summary, _, calls = stage("--wheels", str(wheels), "--only", "wheels,kernels", cases=cases)
    assert code == 1 and states(summary) == {"wheels": "failed", "kernels": "passed"}
    assert "diffusers-0.42-py3-none-any.whl is not installed" in summary["parts"][0]["reason"]
    pip = [call for call in calls if call.startswith("pip")]
    assert len(pip) == 2 and all("--no-index --find-links" in call and "--no-deps" in call for call in pip)
    assert f"--kernels {wheels}/dreammix_trt-0.1.0-cp312-abi3-linux.whl" in calls[-1]


@pytest.mark.slow
def test_a_real_wheel_is_installed_and_found(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "lefty-1.0-py3-none-any.whl", "w") as packed:
        packed.writestr("lefty.py", "HAND = 'left'")
        packed.writestr("lefty-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: lefty\nVersion: 1.0\n")
        packed.writestr("lefty-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        packed.writestr("lefty-1.0.dist-info/RECORD", "")
    # the actor is Python itself but for the suite, which it replaces by an import of what was installed
    actor = tmp_path / "python"
    body = f'case $1 in *gpu_suite.py) exec "{sys.executable}" -c "import lefty; print(lefty.HAND)" ;; esac\n'
    actor.write_text(f'#!/usr/bin/env bash\n{body}exec "{sys.executable}" "$@"\n')
    actor.chmod(0o755)
    script = tmp_path / "checkout" / "benchmarks" / "first_light.sh"  # so that nothing is left in this checkout
    script.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, script)
    options = ["--out", str(tmp_path / "out"), "--wheels", str(tmp_path / "wheels"), "--only", "wheels,kernels"]
    done = subprocess.run(
        ["bash", str(script), *options], env={**os.environ, "PYTHON": str(actor)}, capture_output=True, text=True
    )
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0, log
    assert log.endswith("=== kernels\nleft\n")


def test_the_page_shows_parts_and_options_that_exist() -> None:
    page = (SCRIPT.parents[1] / "docs" / "gpu.md").read_text(encoding="utf-8")
    helped = subprocess.check_output(["bash", str(SCRIPT), "--help"], text=True)
    assert "set -u" not in helped and helped.rstrip().endswith("2 for a wrong call.")
    shown = re.findall(r"first_light\.sh (--.*)|^\| `(--.*?)` \|", page, re.MULTILINE)
    words = [word for line in shown for word in "".join(line).split("#")[0].split("`")[0].split()]
    options = [word for word in words if word.startswith("--")]
    assert {"--out", "--simulated", "--budget", "--only", "--limit", "--wheels"} == set(options)
    assert all(f"{option} " in helped for option in options)
    named = {name for each in re.findall(r"--only ([\w,-]+)", page) for name in each.split(",")}
    assert named <= {"look", *report.PARTS, *report.GROUPS} and len(named) >= 4


def test_what_is_missing_is_told_with_what_it_stops_and_the_remedy() -> None:
    found, missing = look.look(lambda name: None if name == "diffusers" else "1.0", lambda name: None)
    assert "diffusers" not in found and found["numpy"] == "1.0"
    lines = look.lines_of(found, missing)
    assert any(line.startswith("missing  diffusers: stops every part with networks") for line in lines)
    assert any("missing  nvcc: stops building the kernels; remedy: " in line for line in lines)
    assert lines[-1].startswith("MISSING: diffusers, ") and "compute-sanitizer" in lines[-1]
    assert "MISSING" not in str(look.lines_of(found, []))


def test_a_dry_run_on_the_simulated_device(tmp_path: Path) -> None:
    pytest.importorskip("dreammix_trt._cpp")
    options = ["--simulated", "--only", "build,memcheck", "--out", str(tmp_path)]
    done = subprocess.run(
        ["bash", str(SCRIPT), *options], env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert done.returncode == 3, (tmp_path / "log.txt").read_text()
    assert states(summary) == {"build": "skipped", "memcheck": "passed"} and summary["simulated"] is True
    suite = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert suite["simulated"] is True
    rows = {row["metric"]: row["value"] for row in suite["parts"]["memcheck"]["rows"]}
    assert rows["cases that are not right"] == 0 and rows["kernels that ran"] > 20
    assert (tmp_path / "summary.txt").read_text().startswith("SIMULATED")
