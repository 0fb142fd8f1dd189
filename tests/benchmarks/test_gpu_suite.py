"""The GPU suite as far as a machine without one can tell: its numbers, its files, its command, and dry runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _gpu_clock as clock
import _gpu_report as report
import _gpu_setup as setup
import gpu_suite
import numpy as np
import pytest
from _gpu_models import Setting

TINY = Setting(width=0.1, side=64, steps=2, repeats=1, requests=3, swaps=4, compiled=False, simulate=True)
ROW = {"metric": "a", "value": 1.0, "bound": None, "pass": None}


def record(*rows: dict[str, Any], error: str | None = None) -> dict[str, Any]:
    return {"rows": list(rows), "notes": [], "error": error, "seconds": 1.0}


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(("percent", "wanted"), [(50, 50), (99, 99), (100, 100), (1, 1), (0.5, 1)])
def test_percentiles_are_values_that_occurred(percent: float, wanted: int) -> None:
    values = np.random.default_rng(0).permutation(np.arange(1, 101)).tolist()
    assert report.percentile(values, percent) == wanted
    assert sum(value <= wanted for value in values) >= percent


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], 0), ([1.0], 101)])
def test_a_percentile_of_nothing_is_refused(values: list[float], percent: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        report.percentile(values, percent)


def test_one_slow_swap_in_a_thousand_is_beyond_p99_and_eleven_are_not() -> None:
    assert report.Spread.of([1.0] * 999 + [50.0]).p99 == 1.0
    assert report.Spread.of([1.0] * 989 + [50.0] * 11).p99 == 50.0


def test_a_whole_job_costs_what_its_networks_cost() -> None:
    # 30 steps with guidance, two decodes, five encodes, text: 451 TFLOP (13.522, 10.470, 4.879, 0.22 each)
    assert report.job_tflop(30, rows=2) == pytest.approx(451.215, abs=0.01)
    assert report.job_tflop(8, rows=1) == pytest.approx(99.64, abs=0.01)
    assert report.step_tflop(128, 128, rows=1) == pytest.approx(6.761)


@pytest.mark.parametrize(("side", "scale"), [(1024, 0.2), (1000, 1.0)])
def test_flops_nobody_counted_are_not_guessed(side: int, scale: float) -> None:
    assert report.job_tflop(30, 2, side, scale) is None


@pytest.mark.parametrize(
    ("found", "truth", "wanted"),
    [([1.0, 2.0], [1.0, 2.0], 0.0), ([1.0, 2.5], [1.0, 2.0], 0.25), ([1.0, math.nan], [1.0, 2.0], math.inf)],
)
def test_differences_are_relative_and_never_overlook_a_nan(
    found: list[float], truth: list[float], wanted: float
) -> None:
    assert report.largest_difference(found, truth) == wanted


def test_a_merge_reads_and_writes_every_weight_once_and_reads_the_factors() -> None:
    layer = np.zeros((640, 4), np.float32), np.zeros((4, 1280), np.float32)
    assert report.merge_bytes([layer, layer], 2) == 2 * (2 * 2 * 640 * 1280 + 4 * (4 * 640 + 4 * 1280))


def test_numbers_become_the_nearest_of_fp8() -> None:
    """Against another implementation of the format, at all its numbers, between them and beside these middles."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    from _gpu_cases import to_float8

    codes = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middles = (codes[1:] + codes[:-1]) / 2
    values = np.concatenate(
        [codes, middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(9e9))]
    )
    values = np.concatenate([values, -values])
    np.testing.assert_array_equal(to_float8(values), values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    np.testing.assert_array_equal(to_float8(np.array([449, -1e9], np.float32)), [0x7E, 0xFE])  # never no number


def test_differences_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="against"):
        report.largest_difference(np.zeros(2), np.zeros(3))


# ------------------------------------------------------------------------------------------------ parts and files


def test_parts_run_once_and_in_order() -> None:
    assert report.chosen(["soak", "kernels", "soak"]) == ("kernels", "soak")
    assert report.chosen(["compiled", "soak", "compiled-vae"])[-2:] == ("compiled-quick", "soak")
    assert report.chosen(["peers"]) == ("peers-eager", "peers-float32", "peers-guided", "peers-quick", "ratios")
    assert report.chosen([]) == report.PARTS
    with pytest.raises(ValueError, match="colonel"):
        report.chosen(["colonel"])


def test_every_part_has_a_function() -> None:
    for name in sorted({*report.PARTS} - {"build", "ratios"}):  # these two need no process of their own
        assert callable(gpu_suite.work_of(name)), name


def test_rows_are_kept_as_they_come_and_held_against_their_goals() -> None:
    kept: list[dict[str, Any]] = []
    part = report.Part("kernels", keep=lambda part: kept.append(json.loads(json.dumps(part.to_json()))))
    part.add("fill [ms]", 1.5, goal="<= 2")
    part.add("swap [ms]", 6.0, goal="<= 5")
    part.add_share("share", 1.0, None)
    part.note("said")
    assert [len(each["rows"]) for each in kept] == [1, 2, 2]
    assert [row["pass"] for row in part.rows] == [True, False]
    assert report.has_failed(part.to_json())


@pytest.mark.parametrize(
    ("rows", "error", "wanted"),
    [([ROW], None, False), ([{**ROW, "pass": True}], None, False), ([{**ROW, "pass": False}], None, True),
     ([ROW], "stopped", True)],
)  # fmt: skip
def test_a_missed_goal_or_an_error_fails(rows: list[dict[str, Any]], error: str | None, wanted: bool) -> None:
    assert report.has_failed(record(*rows, error=error)) is wanted


def test_simulated_parts_have_no_goals() -> None:
    part = report.Part("subjects", goals=False)
    part.add("swap [ms]", 6.0, goal="<= 5")
    assert part.rows[0]["bound"] is None and not report.has_failed(part.to_json())


def test_results_are_merged_part_by_part(tmp_path: Path) -> None:
    path = tmp_path / "new" / "suite.json"
    report.write(path, report.merge_parts(path, {"soak": record()}))
    report.write(path, report.merge_parts(path, {"kernels": record(ROW)}))
    report.write(path, report.merge_parts(path, {"soak": record(ROW)}))
    found = json.loads(path.read_text())
    assert list(found["parts"]) == ["kernels", "soak"]
    assert [len(each["rows"]) for each in found["parts"].values()] == [1, 1]
    assert [each.name for each in path.parent.iterdir()] == ["suite.json"]


def test_simulated_results_never_mix_with_real_ones(tmp_path: Path) -> None:
    path = tmp_path / "suite.json"
    report.write(path, report.merge_parts(path, {"soak": record(ROW)}, simulated=True))
    assert json.loads(path.read_text())["simulated"] is True
    assert list(report.merge_parts(path, {"kernels": record()})["parts"]) == ["kernels"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "fill", "parts": {"soak": {}}}', '{"name": "gpu_suite"}'])
def test_another_file_or_a_damaged_one_counts_as_empty(tmp_path: Path, content: str) -> None:
    path = tmp_path / "suite.json"
    path.write_text(content)
    assert report.merge_parts(path, {"kernels": record()})["parts"] == {"kernels": record()}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "suite.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        report.write(path, {"a": object()})
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_the_table_shows_rows_goals_notes_and_errors() -> None:
    rows = [{"metric": "swap [ms]", "value": 6.0, "bound": "<= 5", "pass": False}, {**ROW, "value": True}]
    text = report.table({"subjects": {**record(*rows, error="stopped after 600 s"), "notes": ["rank 4"]}})
    lines = [line.split() for line in text.splitlines()]
    assert ["swap", "[ms]", "6.0", "<=", "5", "MISSED"] in lines and ["a", "yes"] in lines
    assert "note: rank 4" in text and "FAILED: stopped after 600 s" in text
    assert "MISSED" not in report.table({"subjects": record(*rows)}, goals=False)
    assert report.table({"rtx": record()}).startswith("rtx")


def run_on(gpu: str, *rows: dict[str, Any], error: str | None = None, steps: int = 30) -> dict[str, Any]:
    return {"machine": {"gpu": gpu}, "settings": {"steps": steps}, **record(*rows, error=error)}


def row(metric: str, value: float) -> dict[str, Any]:
    return {**ROW, "metric": metric, "value": value}


def test_a_part_stopped_again_keeps_what_its_earlier_run_had() -> None:
    before = run_on("H200", row("a", 1), row("b", 1), error="stopped")
    again = run_on("H200", row("b", 2), row("c", 2), error="stopped")
    found = report.keep_rows(again, before)
    assert {each["metric"]: each["value"] for each in found["rows"]} == {"b": 2, "c": 2, "a": 1}
    assert found["notes"] == ["1 rows are an earlier run's"]


@pytest.mark.parametrize(
    "again",
    [
        run_on("H200", row("b", 2)),
        run_on("L4", row("b", 2), error="x"),
        run_on("H200", row("b", 2), error="x", steps=8),
    ],
    ids=["complete", "another GPU", "other settings"],
)
def test_rows_that_do_not_belong_together_are_not_mixed(again: dict[str, Any]) -> None:
    assert report.keep_rows(again, run_on("H200", row("a", 1), error="stopped")) == again


def peers(gpu: str, kind: str, theirs: float, ours: float) -> dict[str, Any]:
    return run_on(
        gpu, row(f"30 steps: diffusers, {kind} [s]", theirs),
        row(f"30 steps: ours, torch {kind} in the device runtime [s]", ours),
    )  # fmt: skip


def test_ratios_hold_diffusers_against_our_best_of_all_parts() -> None:
    part = report.Part("ratios")
    parts = {"peers-eager": peers("H200", "eager", 9.0, 4.0), "peers-guided": peers("H200", "compiled", 3.3, 3.0)}
    report.add_ratios(part, parts)
    assert [(each["metric"], each["value"], each["pass"]) for each in part.rows] == [
        ("30 steps: diffusers, eager / ours, best", 3.0, True),
        ("30 steps: diffusers, compiled / ours, best", 1.1, False),
    ]


def test_ratios_are_not_taken_across_machines_nor_of_nothing() -> None:
    part = report.Part("ratios")
    parts = {"peers-eager": peers("L4", "eager", 9.0, 1.0), "peers-guided": peers("H200", "compiled", 3.3, 3.0)}
    report.add_ratios(part, parts)
    assert [each["metric"] for each in part.rows] == ["30 steps: diffusers, compiled / ours, best"]
    nothing = report.Part("ratios")
    report.add_ratios(nothing, {"soak": run_on("H200", row("requests", 3))})
    assert nothing.skipped and not report.is_complete(nothing.to_json()) and not report.has_failed(nothing.to_json())
    assert "SKIPPED: there are no times" in report.table({"ratios": nothing.to_json()})


# ------------------------------------------------------------------------------------------------ what must be there


def wheel(folder: Path, name: str, files: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as packed:
        for path, text in files.items():
            packed.writestr(path, text)


def test_wheels_are_unpacked_and_imported_from(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheel(wheels, "lefty", {"lefty/__init__.py": "HAND = 'left'", "lefty/data.txt": "x"})
    wheel(wheels, "righty", {"righty-1.0.data/purelib/righty.py": "HAND = 'right'"})
    environment = setup.with_paths(
        setup.unpack_wheels(wheels, tmp_path / "to"), {**os.environ, "PYTHONPATH": "/before"}
    )
    code = "import lefty, pathlib, righty; print(lefty.HAND, righty.HAND, pathlib.Path(lefty.__file__).parent.exists())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["left", "right", "True"]
    assert environment["PYTHONPATH"].endswith(f"{os.pathsep}/before")


def test_our_own_wheel_gives_its_module_and_never_stands_before_the_checkout(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheel(wheels, "dreammix_trt", {"dreammix_trt/_cpp.abi3.so": "code", "dreammix_trt/_cpp.pyi": "", "x/_cpp.so": ""})
    assert setup.unpack_wheels(wheels, tmp_path / "to") == []
    (file,) = wheels.iterdir()
    assert [each.name for each in setup.extract_extension(file, tmp_path / "module").iterdir()] == ["_cpp.abi3.so"]
    wheel(wheels, "dreammix_trt", {"dreammix_trt/__init__.py": ""})
    with pytest.raises(RuntimeError, match="without the C\\+\\+ extension"):
        setup.extract_extension(file, tmp_path / "none")


def test_a_folder_without_wheels_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        setup.unpack_wheels(tmp_path, tmp_path / "to")


@pytest.mark.parametrize(
    ("cuda", "capability", "wanted"),
    [
        (None, "sm_90", False),
        ({"architectures": ["sm_89", "sm_90"], "ptx": None}, "sm_90", True),
        ({"architectures": ["sm_89"], "ptx": None}, "sm_90", False),
        ({"architectures": ["sm_75"], "ptx": "compute_80"}, "sm_90", True),
        ({"architectures": ["sm_75"], "ptx": "compute_120"}, "sm_90", False),
    ],
)
def test_an_extension_serves_the_gpus_it_has_code_for(cuda: Any, capability: str, wanted: bool) -> None:
    assert setup.extension_serves({"cuda": cuda}, capability) is wanted
    assert not setup.extension_serves(None, capability)


def test_the_build_names_the_gpu_at_hand_and_takes_the_module_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[list[str]] = []

    def ran(command: list[str], environment: dict[str, str], limit: float | None = None) -> str:
        said.append(command)
        assert environment == {"PYTHONPATH": "wheels"}
        if "--build" in command:
            (tmp_path / "cpp_ext").mkdir(parents=True)
            (tmp_path / "cpp_ext" / "_cpp.abi3.so").write_bytes(b"code")
        return "/nanobind\n"

    monkeypatch.setattr(setup, "_ran", ran)
    monkeypatch.setattr(setup, "info_of_extension", lambda *_: None)  # what lies there does not load
    monkeypatch.setattr(setup, "_tool", lambda name: f"/bin/{name}")
    for _ in range(2):  # again: over what is there
        alone = setup.build_extension(tmp_path, "sm_90", {"PYTHONPATH": "wheels"})
        (tmp_path / "cpp_ext" / "_cpp.abi3.so").unlink()
        (tmp_path / "cpp_ext").rmdir()
    assert [file.name for file in alone.iterdir()] == ["_cpp.abi3.so"]
    assert {"-DDREAMMIX_CUDA=ON", "-DDREAMMIX_CUDA_ARCHITECTURES=90-real", "-Dnanobind_DIR=/nanobind"} <= set(said[1])


@pytest.mark.parametrize(
    ("newer", "architecture", "stays"), [(True, "sm_90", True), (False, "sm_90", False), (True, "sm_75", False)]
)
def test_what_was_built_before_stays_while_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newer: bool, architecture: str, stays: bool
) -> None:
    def ran(*_: Any) -> str:
        raise RuntimeError("it builds")

    info = {"cuda": {"architectures": [architecture], "ptx": None}}
    monkeypatch.setattr(setup, "_ran", ran)
    monkeypatch.setattr(setup, "info_of_extension", lambda *_: info)
    module = tmp_path / "alone" / "_cpp.abi3.so"
    module.parent.mkdir()
    module.write_bytes(b"code")
    if not newer:
        os.utime(module, (0, 0))
    if stays:
        assert setup.build_extension(tmp_path, "sm_90") == module.parent
    else:
        with pytest.raises(RuntimeError, match="it builds"):
            setup.build_extension(tmp_path, "sm_90")


def test_a_tool_that_fails_is_quoted() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)failed:.*so it broke"):
        setup._ran([sys.executable, "-c", "raise SystemExit('so it broke')"])


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks processes up in /proc")
def test_a_tool_that_takes_too_long_ends_with_what_it_started(tmp_path: Path) -> None:
    code = f"import subprocess; subprocess.run(['bash', '-c', 'echo $$ > {tmp_path / 'pid'}; exec sleep 60'])"
    with pytest.raises(subprocess.TimeoutExpired):
        setup._ran([sys.executable, "-c", code], limit=3)
    has_ended(int((tmp_path / "pid").read_text()))


def has_ended(pid: int) -> None:
    """Wait until a process is gone, or dead and not yet collected."""
    state, deadline = Path("/proc", str(pid), "stat"), time.perf_counter() + 10
    while state.exists() and state.read_text().split()[2] not in "ZX" and time.perf_counter() < deadline:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] in "ZX"


def test_an_extension_elsewhere_is_taken_and_the_installed_one_stays(tmp_path: Path) -> None:
    (tmp_path / "_cpp.py").write_text("def build_info():\n    return {'cuda': {'toolkit': '13.0'}}\n")
    code = (
        "import sys; from pathlib import Path; import _gpu_setup as setup; "
        f"setup.use_extension(Path({str(tmp_path)!r})); import dreammix_trt._cpp as c, dreammix_trt.core.noise; "
        "print(c.build_info()['cuda']['toolkit'])"
    )
    environment = setup.with_paths([setup.ROOT / "benchmarks", setup.ROOT], os.environ)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "13.0"


def test_what_nvidia_smi_says_is_read() -> None:
    line = "NVIDIA H200, 9.0, 143771, 580.159.03, 345, 3201, 1980, 3201, [N/A]\n"
    assert setup.parse_state(line) == {
        "gpu": "NVIDIA H200",
        "capability": "sm_90",
        "memory [MiB]": 143771,
        "driver": "580.159.03",
        "SM clock [MHz]": 345,
        "memory clock [MHz]": 3201,
        "SM clock, most [MHz]": 1980,
        "memory clock, most [MHz]": 3201,
    }
    assert setup.parse_state("") == {} == setup.parse_state("No devices were found")


def test_the_description_names_machine_and_kernels() -> None:
    told = setup.describe({"cuda": {"toolkit": "13.0"}})
    assert told["kernels"] == {"toolkit": "13.0"} and told["processor"] and "numpy" not in told["versions"]
    json.dumps(told)


# ------------------------------------------------------------------------------------------------ the command


def test_without_a_gpu_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_suite, "gpu_capability", lambda: None)
    out = tmp_path / "suite.json"
    assert gpu_suite.main(["kernels", "--out", str(out)]) == 2
    assert not out.exists() and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [["--simulate"], ["--simulate", "--out", str(gpu_suite.RESULTS / "x.json")], ["no part"]]
)
def test_what_cannot_be_meant_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        gpu_suite.main(arguments)
    assert refused.value.code == 2 and capsys.readouterr().err


def given(**changed: Any) -> Any:
    return SimpleNamespace(**{**vars(gpu_suite.options().parse_args([])), "simulate": True, **changed})


def in_place_of_the_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    script = tmp_path / "child.py"
    script.write_text(f"import sys, json, time\nout = sys.argv[sys.argv.index('--out') + 1]\n{code}\n")
    monkeypatch.setattr(gpu_suite, "__file__", str(script))


def test_a_part_that_takes_too_long_is_stopped_and_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"open(out, 'w').write(json.dumps({record(ROW)!r})); time.sleep(60)"
    in_place_of_the_child(monkeypatch, tmp_path, code)
    started = time.perf_counter()
    found = gpu_suite.supervise("soak", given(limit=5), os.environ, tmp_path / "suite.json", tmp_path)
    assert time.perf_counter() - started < 30
    assert found["rows"] == [ROW] and found["error"] == "stopped after 5 s"
    assert json.loads((tmp_path / "suite.json").read_text())["parts"]["soak"] == found


def test_rows_are_in_the_file_while_the_part_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"open(out, 'w').write(json.dumps({record(ROW)!r})); time.sleep(60)"
    in_place_of_the_child(monkeypatch, tmp_path, code)
    monkeypatch.setattr(gpu_suite, "_POLL", 0.2)
    written: list[dict[str, Any]] = []

    def kept(path: Path, content: dict[str, Any]) -> None:
        written.append(content["parts"]["soak"])
        if written[-1]["rows"]:
            raise SystemExit(143)  # as when the suite itself is told to end

    monkeypatch.setattr(gpu_suite, "write", kept)
    with pytest.raises(SystemExit):
        gpu_suite.supervise("soak", given(limit=30), os.environ, tmp_path / "suite.json", tmp_path)
    assert {each["error"] for each in written} == {"not finished", "interrupted"} and written[-1]["rows"] == [ROW]


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks processes up in /proc")
def test_no_process_of_a_stopped_part_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import subprocess; helper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(helper.pid)); time.sleep(60)"
    )
    in_place_of_the_child(monkeypatch, tmp_path, code)
    gpu_suite.supervise("soak", given(limit=3), os.environ, tmp_path / "suite.json", tmp_path)
    has_ended(int((tmp_path / "pid").read_text()))


def test_a_part_that_crashes_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of_the_child(monkeypatch, tmp_path, "sys.exit(9)")
    found = gpu_suite.supervise("soak", given(), os.environ, tmp_path / "suite.json", tmp_path)
    assert found["error"] == "the part's process ended with 9" and report.has_failed(found)


def test_an_error_within_a_part_is_kept_with_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(part: report.Part, setting: Any) -> None:
        part.add("first", 1.0)
        gpu_suite.logging.getLogger("dreammix_trt.engine").warning("painting again")
        gpu_suite.logging.getLogger("dreammix_trt.engine").warning("painting again")
        raise RuntimeError("it broke")

    monkeypatch.setattr(gpu_suite, "work_of", lambda name: work)
    monkeypatch.setattr(gpu_suite.logging.getLogger("dreammix_trt"), "handlers", [])
    assert gpu_suite.child("soak", Setting(simulate=True), tmp_path / "soak.json") == 0
    found = json.loads((tmp_path / "soak.json").read_text())
    assert [row["metric"] for row in found["rows"]] == ["first"] and found["error"] == "RuntimeError: it broke"
    assert found["notes"] == ["warning: painting again"] and found["settings"]["simulate"] is True


def test_a_part_is_skipped_where_a_package_is_missing_and_fails_where_ours_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for missing, wanted in (("diffusers", "skipped"), ("_gpu_nothing", "error")):

        def work(name: str, missing: str = missing) -> None:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=f"{missing}.models")

        monkeypatch.setattr(gpu_suite, "work_of", work)
        gpu_suite.child("soak", Setting(simulate=True), tmp_path / "soak.json")
        found = json.loads((tmp_path / "soak.json").read_text())
        assert missing in found[wanted] and report.has_failed(found) is (wanted == "error")


def test_resuming_runs_what_is_not_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def supervised(name: str, *_: Any) -> dict[str, Any]:
        ran.append(name)
        return {"settings": gpu_suite.asdict(gpu_suite.setting_of(given())), **record(ROW)}

    monkeypatch.setattr(gpu_suite, "supervise", supervised)
    monkeypatch.setattr(gpu_suite, "gpu_state", dict)
    out, kernels = tmp_path / "suite.json", SimpleNamespace(plain={}, environment=dict)
    resumed = given(resume=True)
    for names, wanted in (
        (["loop", "soak"], ["loop", "soak"]),  # both for the first time
        (["loop", "graphs"], ["graphs"]),
    ):
        ran.clear()
        gpu_suite.run_parts(names, resumed, kernels, out, tmp_path)
        assert ran == wanted
    stopped = {**json.loads(out.read_text())["parts"]["loop"], "error": "stopped after 600 s"}
    report.write(out, report.merge_parts(out, {"loop": stopped}, simulated=True))
    ran.clear()
    gpu_suite.run_parts(["loop", "soak"], resumed, kernels, out, tmp_path)
    assert ran == ["loop"]
    ran.clear()
    gpu_suite.run_parts(["loop", "soak"], given(resume=True, steps=9), kernels, out, tmp_path)
    assert ran == ["loop", "soak"]  # other settings


def test_without_kernels_the_parts_that_need_none_still_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Path:
        raise RuntimeError("nvcc is needed to build the kernels and is not on PATH")

    monkeypatch.setattr(gpu_suite, "build_extension", fails)
    monkeypatch.setattr(gpu_suite, "extension_info", lambda _: None)
    monkeypatch.setattr(gpu_suite, "supervise", lambda *_: record(ROW))
    real = given(simulate=False)
    kernels = gpu_suite.Kernels(real, "sm_90", tmp_path)
    found = gpu_suite.run_parts(["machine", "build", "kernels"], real, kernels, tmp_path / "suite.json", tmp_path)
    assert found["machine"]["rows"] == [ROW] and "nvcc is needed" in found["build"]["error"]
    assert found["kernels"]["error"] == "there are no kernels for this GPU; the part `build` says why"


def test_kernels_are_taken_from_a_wheel_that_fits_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(tmp_path / "wheels", "dreammix_trt", {"dreammix_trt/_cpp.abi3.so": "code"})
    (file,) = (tmp_path / "wheels").iterdir()
    monkeypatch.setattr(gpu_suite, "extension_info", lambda _: None)
    for architectures, wanted in ((["sm_90"], None), (["sm_75"], "no kernels for sm_90")):
        info = {"cuda": {"architectures": architectures, "ptx": None}}
        monkeypatch.setattr(gpu_suite, "info_of_extension", lambda *_, info=info: info)
        kernels = gpu_suite.Kernels(given(simulate=False, kernels=file), "sm_90", tmp_path)
        if wanted is None:
            assert (Path(kernels.environment()[gpu_suite._EXTENSION]) / "_cpp.abi3.so").read_text() == "code"
        else:
            assert wanted in (kernels.part.error or "")


def test_memcheck_runs_under_the_checker_or_says_that_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(gpu_suite, "supervise", lambda *arguments: seen.append(arguments[-1]) or record())
    kernels: Any = SimpleNamespace(plain={}, environment=dict)
    for found in ("/bin/compute-sanitizer", None):
        monkeypatch.setattr(gpu_suite.shutil, "which", lambda *_, found=found, **__: found)
        records = gpu_suite.run_parts(["memcheck"], given(simulate=False), kernels, tmp_path / "s.json", tmp_path)
    assert seen == [["/bin/compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "99"]]
    assert "compute-sanitizer is not on PATH" in records["memcheck"]["skipped"]


# ------------------------------------------------------------------------------------------------ on a simulated device


@pytest.fixture
def device() -> Any:
    from dreammix_trt.engine.drivers.simulated import SimulatedDevice

    with SimulatedDevice() as device:
        yield device


def test_a_copy_is_timed_over_all_its_bytes(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "event_seconds", lambda device, stream, work: work() or [0.5, 0.5, 9.0])
    assert clock.copy_bandwidth(device, nbytes=1 << 20) == 2 * (1 << 20) / 0.5
    copied = [entry for entry in device.record if entry.kind == "copy"]
    assert [array.nbytes for array in copied[0].arrays.values()] == [1 << 20] * 2
    assert device.used == 0


def test_what_a_device_is_asked_for_is_counted(device: Any) -> None:
    from contextlib import ExitStack

    stream = device.make_stream()
    with ExitStack() as owned:
        here, there = (clock.array(device, owned, (100,), "float32") for _ in range(2))
        with clock.count_calls(device) as calls:
            device.upload(here, np.zeros(100, np.float32), stream)
            device.copy(there, here, stream)
            device.launch_kernel("scaled", stream, latent=here, out=there, factor=1.0, count=100, half=0)
            device.synchronize(stream)
        device.copy(there, here, stream)
    assert (calls.copies, calls.copied, calls.uploaded, calls.downloaded) == (1, 400, 400, 0)
    assert dict(calls.kernels) == {"scaled": 1}


def test_kernels_are_counted_among_what_the_profiler_saw() -> None:
    import _gpu_networks

    def event(kind: str, name: str) -> Any:
        return SimpleNamespace(device_type=SimpleNamespace(name=kind), name=name)

    seen = [event("CUDA", "gemm(float*)"), event("CUDA", "gemm(float*)"), event("CUDA", "Memcpy DtoD"),
            event("CUDA", "Memset (Device)"), event("CPU", "cudaLaunchKernel"), event("CUDA", "softmax")]  # fmt: skip
    found = _gpu_networks.kernels_of(seen)
    assert found == {"gemm(float*)": 2, "softmax": 1}
    assert _gpu_networks.name_kernels(found) == "2 x gemm; 1 x softmax"


def test_a_replay_counts_one_of_its_works(device: Any) -> None:
    stream, done = device.make_stream(), []

    def work(number: int) -> None:
        device.enqueue_work("network", stream, lambda: done.append(number))

    times = clock.replay_seconds(device, stream, [lambda: work(1), lambda: work(2)], repeats=3, warm=1)
    assert done == [1, 2] * 5  # once to load, once to warm up, three times measured
    assert len(times) == 3 and all(0 <= each < 1 for each in times)


@pytest.mark.parametrize("fault", [None, "wrong", "unwritten"])
def test_every_kernel_is_held_against_right_values(
    device: Any, fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import _gpu_cases
    import _gpu_kernels

    from dreammix_trt import _cpp

    launch = device.launch_kernel

    def spoilt(name: str, stream: Any, **arguments: Any) -> None:
        if name == "scaled" and fault == "unwritten":
            return
        launch(name, stream, **arguments)
        if name == "paste" and fault == "wrong":
            device.view(arguments["out"])[0, 0, 0] ^= 1

    device.launch_kernel = spoilt
    monkeypatch.setattr(clock, "REPEATS", 1)
    part = report.Part("kernels")
    for case in _gpu_cases.all_cases(64, _cpp.gpu):
        right, _ = _gpu_kernels.one(part, device, _cpp.gpu, case, 1e9)
        assert right is not (fault and case.kernel == {"wrong": "paste", "unwritten": "scaled"}[fault]), case.label
    tried = {case.kernel for case in _gpu_cases.all_cases(64, _cpp.gpu)}
    assert tried == _gpu_cases.kernels_of(_cpp.gpu)
    assert device.used == 0


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread: on so little work several only wait for one another."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def networks() -> Any:
    """One miniature for all dry runs."""
    pytest.importorskip("diffusers")
    import _gpu_models

    from dreammix_trt.export.torch_backend.on_device import TorchNetworks

    configs = {name: each for name, each in _gpu_models.configs_of(TINY).items() if name != "scheduler"}
    with TorchNetworks.random(configs, device="cpu", dtype="float32") as networks:
        yield networks


def run(name: str, networks: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A part's rows by metric, simulated, in this process."""
    import _gpu_full
    import _gpu_models
    import _gpu_networks
    import _gpu_parts
    import _gpu_peers
    import _gpu_runtime

    @contextmanager
    def made(setting: Any, device: Any, *, compiled: bool = False) -> Iterator[Any]:
        yield _gpu_models.on_device(setting, device, networks)

    for module in (_gpu_full, _gpu_networks, _gpu_parts, _gpu_peers, _gpu_runtime):
        monkeypatch.setattr(module, "random_networks", made)
    monkeypatch.setattr(clock, "REPEATS", 1)
    part = report.Part(name, goals=False)
    gpu_suite.work_of(name)(part, TINY)
    return {row["metric"]: row["value"] for row in part.rows} | {"notes": part.notes}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_full_measures_steps_and_whole_pictures(networks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run("full", networks, monkeypatch)
    jobs = TINY.jobs()
    assert all(found[f"torch, eager: {name}: whole picture [s]"] > 0 for name in jobs) and len(jobs) == 2
    assert all(f"torch, eager: {name}: loop beyond the sum of its UNet calls" in found for name in jobs)
    for name in jobs:
        assert found[f"torch, eager: {name}: uploaded before the first step [bytes]"] > 4 * TINY.side**2
        assert found[f"torch, eager: {name}: uploaded from the first step on [bytes]"] == 0
        assert found[f"torch, eager: {name}: downloaded before the last step is enqueued [bytes]"] == 0
        assert found[f"torch, eager: {name}: downloaded beyond picture and flags [bytes]"] == 0
    assert found["notes"] == []


@pytest.mark.slow
def test_an_engine_is_timed_in_its_own_stream_from_nothing_loaded(
    mug_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ONNX Runtime's networks and TensorRT-RTX's are opened."""
    import _gpu_rtx

    from dreammix_trt.engine.backends.onnxruntime.engine_set import EngineSet
    from dreammix_trt.engine.device import loading
    from dreammix_trt.engine.drivers.simulated import SimulatedDevice, SimulatedNetworks

    device = SimulatedDevice()
    own = device.make_stream()

    class OneStream(SimulatedNetworks):
        def serves(self, stream: Any) -> bool:
            return stream is own

        def enqueue(self, name: str, arrays: Any, stream: Any) -> None:
            assert stream is own
            super().enqueue(name, arrays, stream)

    def opened(engine: Any) -> Any:
        networks = OneStream(device, EngineSet.load(engine.parts, 1))
        for name in networks.loaded:
            networks.unload(name)
        return loading.OnDevice(device, networks, own)

    monkeypatch.setattr(loading, "open_device", opened)
    monkeypatch.setattr(clock, "REPEATS", 1)
    part = report.Part("rtx", goals=False)
    _gpu_rtx.time_engine(part, Setting(side=128, steps=2, repeats=1, simulate=True), mug_engine)
    kind = f"onnxruntime ({mug_engine.name})"
    found = {row["metric"]: row["value"] for row in part.rows}
    assert found[f"{kind}: UNet call with guidance [ms]"] > 0
    assert found[f"{kind}: 2 steps, guidance 4: whole picture [s]"] > 0


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
def test_peers_paint_as_many_steps_as_we(networks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    found = run("peers-eager", networks, monkeypatch)
    assert {f"{name}: diffusers / ours, both eager" for name in TINY.jobs()} <= found.keys()
    assert len(found["notes"]) == 1  # diffusers' own pipeline ran


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_a_captured_step_gives_the_same_bits(networks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("graphs", networks, monkeypatch)["the same bits either way"] is True


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_subjects_swap_and_come_back(networks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run("subjects", networks, monkeypatch)
    held = "pristine weights with the host"
    for told in ("A, B, A", f"A, B, A, {held}"):
        assert found[f"{told}: the same bits as before"] is True and found[f"{told}: another result between"] is True
    for told in ("A, tokens, A", "tokens, tokens beside A, tokens"):
        assert found[f"{told}: the same bits as before"] is True and found[f"{told}: another result between"] is True
    swap = "a swap between a LoRA and tokens"
    assert 0 < found[f"{swap}, p50 of 4 [ms]"] <= found[f"{swap}, p99 of 4 [ms]"]
    assert found["from tokens to others: kernels and bytes"] == 0
    assert found["a step with 77 rows of condition [ms]"] > 0 and "a step with 24 tokens: costs more by" in found
    assert found["the same bits from either place"] is True
    assert found["a swap, p50 of 4 [ms]"] <= found["a swap, p99 of 4 [ms]"]
    assert found["a swap: kernels launched"] == found[f"a swap, {held}: kernels launched"] == 1
    slots = found["unet slots [MB]"] + found["unet_kv slots [MB]"]
    assert found["unet pristine [MB]"] + found["unet_kv pristine [MB]"] == slots
    table = found["a swap: uploaded [bytes]"]
    assert found[f"a swap, {held}: uploaded [bytes]"] - table == pytest.approx(1e6 * slots, rel=0.01)
    assert 0 < table < 2e4 and found["a swap: fewest bytes it can move [MB]"] > 2 * slots
    assert found["a swap, on the device [ms]"] > 0 and found[f"a swap, {held}: over the bus [GB/s]"] > 0
    assert found["a step with a subject [ms]"] > 0 and found["a step without a subject [ms]"] > 0


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_every_network_is_measured_alone(networks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreammix_trt.core.networks import KINDS

    found = run("networks", networks, monkeypatch)
    names = [kind.name for kind in KINDS if kind.name in networks]
    assert names and all(found[f"{name}: a call [ms]"] > 0 for name in names)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_the_compiled_parts_share_the_rows_of_full(networks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled here, and the rows say so."""
    assert "torch, eager: UNet call with guidance [ms]" in run("compiled-step", networks, monkeypatch)
    assert "torch, eager: vae_decoder [ms]" in run("compiled-vae", networks, monkeypatch)
    found = run("compiled-quick", networks, monkeypatch)
    quick = list(TINY.jobs())[1]
    assert f"torch, eager: {quick}: whole picture [s]" in found
    assert f"torch, eager: {quick}: loop beyond the sum of its UNet calls" in found
    assert "torch, eager: UNet call without guidance [ms]" in found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_memory_tells_three_plans(networks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = run("memory", networks, monkeypatch)["notes"]
    assert [plan.splitlines()[0] for plan in plans] == [
        "plan for this device:",
        "plan as if the device had 24 GiB:",
        "plan as if the device had 12 GiB:",
    ]
    assert "of 12.0 GiB that can be used" in plans[2]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_a_soak_holds_memory_against_what_was_there_before(networks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run("soak", networks, monkeypatch)
    assert found["requests"] == 3 and found["device memory grown after the first 1 [MiB]"] == 0


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_the_loop_gives_the_hosts_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    found = run("loop", None, monkeypatch)
    assert found["two stages: largest difference of 255 levels"] <= 1
    assert found["two stages: the same bits again"] is True


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_the_command_runs_a_part_from_its_options_to_its_file(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "suite.json"
    script = str(setup.ROOT / "benchmarks" / "gpu_suite.py")
    command = [sys.executable, script, "machine", "--simulate", "--side", "64", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    assert content["simulated"] is True and content["parts"]["machine"]["settings"]["side"] == 64
    assert content["parts"]["machine"]["machine"]["processor"]
    assert "device memory, all [MiB]" in done.stdout


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
def test_the_plain_loop_stands_in_for_a_pipeline_that_cannot_be_imported(
    networks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    import _gpu_models
    import _gpu_peers

    def missing(*_: object) -> None:
        raise ImportError("no transformers")

    monkeypatch.setattr(_gpu_peers, "pipeline_of", missing)
    part = report.Part("peers")
    with _gpu_models.device_of(TINY) as device:
        on = _gpu_models.on_device(TINY, device, networks)
        paint: Any = _gpu_peers.painter(part, TINY, on, TINY.jobs(), compiled=False)
        unet = _gpu_peers.unet_of(TINY, on, compiled=False)
        ours, theirs = networks._made["unet"].module.network.state_dict(), unet.state_dict()
        assert all(theirs[name].data_ptr() == value.data_ptr() for name, value in ours.items())
        slots = {slot.module: (each, slot) for each in ("unet", "unet_kv") for slot in networks.slots(each)}
        assert {f"{module}.weight" for module in slots} == theirs.keys() - ours.keys()
        for module, (each, slot) in slots.items():
            own = slot.view(networks.weights(each)[slot.weight])
            np.testing.assert_array_equal(theirs[f"{module}.weight"].numpy(), own.T)
        picture = paint({"num_inference_steps": 2, "guidance_scale": 4.0})
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8 and picture.std() > 0
    assert "no transformers" in part.notes[0]
    assert torch.is_grad_enabled()


def test_diffusers_gets_weights_of_slots_from_stacked_inputs() -> None:
    """q, k and v beside one another in one input, o transposed in another; torch wants (outputs, inputs)."""
    torch = pytest.importorskip("torch")
    from _gpu_peers import state_of

    from dreammix_trt.core.slots import Slot

    rng = np.random.default_rng(0)
    q, k, v, o = (rng.standard_normal((4, 6)).astype(np.float32) for _ in range(4))
    held = {"qkv": np.concatenate([q, k, v], axis=1), "o": np.ascontiguousarray(o.T)}
    slots = [*(Slot(name, 4, 6, "qkv", 6 * n, 18) for n, name in enumerate("qkv")), Slot("o", 4, 6, "o", 0, 4, True)]
    own = torch.nn.Linear(2, 2)
    networks = SimpleNamespace(
        _made={"unet": SimpleNamespace(module=SimpleNamespace(network=own))},
        slots=lambda name: slots, weights=lambda name: held, device=torch.device("cpu"),
    )  # fmt: skip
    found = state_of(networks, "unet")
    assert found.keys() == {"weight", "bias", "q.weight", "k.weight", "v.weight", "o.weight"}
    assert found["weight"].data_ptr() == own.weight.data_ptr()
    for name, wanted in zip("qkvo", (q, k, v, o), strict=True):
        np.testing.assert_array_equal(found[f"{name}.weight"].numpy(), wanted.T)


@pytest.mark.parametrize("captures", [True, False])
def test_phases_that_cannot_be_captured_miss_a_goal_where_they_should_be(captures: bool) -> None:
    from _gpu_full import graph_rows

    from dreammix_trt.engine.device.captures import Failure, Statistics

    part = report.Part("full")
    failed = {"a step on unet": Failure(3, "it allocates")} if captures else {}
    studio = SimpleNamespace(statistics=Statistics(2, 30, 4, failed), networks=SimpleNamespace(captures=captures))
    front: Any = SimpleNamespace(studio=studio)
    graph_rows(part, front, "torch")
    assert [each["value"] for each in part.rows] == [30, 4, *([1] if captures else [])]
    assert report.has_failed(part.to_json()) is captures
    assert part.notes == (["torch: a step on unet was not captured, 3 times: it allocates"] if captures else [])


def test_networks_alone_get_numbers_of_every_type() -> None:
    from _gpu_full import _draw_input

    from dreammix_trt.core.axes import FLOAT8, Tensor

    ml_dtypes = pytest.importorskip("ml_dtypes")
    eighths = _draw_input(np.random.default_rng(0), Tensor("w", FLOAT8, (64, 64)), (64, 64))
    values = eighths.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert eighths.dtype == np.uint8 and np.abs(values).max() < 1 and values.min() < 0 < values.max()
    halves = _draw_input(np.random.default_rng(0), Tensor("k", "float16", ("rows", 7)), (2, 7))
    assert halves.dtype == np.float16 and np.abs(halves).max() <= 1
    assert (_draw_input(np.random.default_rng(0), Tensor("timestep", "float32", ("rows",)), (2,)) == 500).all()


def test_a_job_that_takes_other_steps_is_refused() -> None:
    import _gpu_peers

    _gpu_peers.check_calls(8, {"num_inference_steps": 8})
    with pytest.raises(ValueError, match="7 times"):
        _gpu_peers.check_calls(7, {"num_inference_steps": 8})
