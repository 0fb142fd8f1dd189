"""The arrows of docs/architecture.md: a floor imports only what stands below it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    **{"core": set(), "export": {"core"}, "engine": {"core"}, "trainer": {"core"}},
    "evaluation": {"core", "engine", "trainer", "report"},  # it stands beside the face, and draws with it
    "service": {"core", "engine"},  # beside the face, too, whose command line alone starts it
}
FACE = {
    *(
        "cli",
        "train_cli",
        "build_cli",
        "inpaint_cli",
        "painting_cli",
        "remove_cli",
        "store_cli",
        "doctor_cli",
        "segment_cli",
        "eval_cli",
        "terminal",
    ),
    *("calibrate_cli", "building", "calibration", "demo", "report", "on_torch", "train_validation", "train_report"),
    *(
        "attributes_cli",
        "regularize",
        "regularize_cli",
        "train_watch",
        "distill_cli",
        "train_asuka_cli",
        "train_tokens_cli",
        "enroll_cli",
        "training_options",
    ),
    *("painting_cli", "remove_cli", "endpoint_options", "serve_cli", "serve_on_ray", "ray_cluster"),
    *("many", "many_subjects", "many_cli"),
}
#: the rooms of the engine floor, lowest first: each imports what stands in the rows before its own, and its own room
ROOMS = (
    ("hardware", "machine", "prompt_syntax", "text", "numpy_kernels", "kernels", "drivers"),
    (
        "canvas",
        "prompt_warnings",
        "prompts",
        "enrolment",
        "subject_phrase",
        "retrieval",
        "painting",
        "imprint",
        "result",
    ),
    ("endpoint_retriever",),
    ("runtime", "directory", "backends"),
    ("host", "device"),
    ("roster", "jobs"),
    ("dreammix",),
    ("requests",),
)
HEAVY = {
    "torch", "diffusers", "transformers", "peft", "accelerate", "onnx", "onnxslim", "polygraphy", "tensorrt",
    "tensorrt_rtx", "torchmetrics", "flip_evaluator", "sklearn",
}  # fmt: skip
#: the one folder of core that loads torch: networks that export and trainer share, which never import each other
SHARED_TORCH = "core/torch_modules"


def imports_of(path: Path, *, top_level_only: bool, types: bool = True) -> Iterator[str]:
    """Dotted names that a file imports, everywhere or only when the file itself is imported.

    types: also those that only a type checker sees.
    """
    tree = ast.parse(path.read_text())
    blocks = [node for node in ast.walk(tree) if _is_type_checking(node) and (top_level_only or not types)]
    if top_level_only:
        blocks += [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    guarded = {id(node) for block in blocks for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def files(floor: str) -> list[Path]:
    return sorted((ROOT / floor).rglob("*.py"))


@pytest.mark.parametrize("floor", sorted(FLOORS))
def test_a_floor_imports_only_what_stands_below(floor: str) -> None:
    allowed = FLOORS[floor] | {floor}
    wrong = []
    for path in files(floor):
        for name in imports_of(path, top_level_only=False):
            parts = name.split(".")
            if parts[0] != "dreammix_trt" or len(parts) < 2:
                continue
            if parts[1] in (set(FLOORS) | FACE) - allowed:
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert files(floor), f"{floor}/ has no files"
    assert not wrong


def test_no_arrow_points_upwards_in_the_engine() -> None:
    level = {name: number for number, row in enumerate(ROOMS) for name in row}
    wrong = []
    for path in files("engine"):
        room = path.relative_to(ROOT / "engine").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for name in imports_of(path, top_level_only=False):
            target = name.split(".")[2] if name.startswith("dreammix_trt.engine.") else room
            if target in level and target != room and level[target] > level[room]:
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    rooms = {path.relative_to(ROOT / "engine").parts[0].removesuffix(".py") for path in files("engine")}
    assert rooms - {"__init__"} == level.keys()
    assert not wrong


def test_no_modules_import_each_other() -> None:
    """No circle of modules, not even through imports within functions; a part may name its owner as a type."""
    paths = [path for floor in FLOORS for path in files(floor)]
    names = {path: ".".join(("dreammix_trt", *path.relative_to(ROOT).with_suffix("").parts)) for path in paths}
    known = {name.removesuffix(".__init__"): path for path, name in names.items()}
    below = {
        path: {known[name] for name in imports_of(path, top_level_only=False, types=False) if name in known} - {path}
        for path in paths
        if path.stem != "__init__"
    }
    while leaves := [path for path, targets in below.items() if not targets & below.keys()]:
        for path in leaves:
            del below[path]
    assert not sorted(str(path.relative_to(ROOT)) for path in below)


def test_neither_engine_nor_service_import_the_heavy_packages() -> None:
    wrong = [
        f"{path.name}: {name}"
        for floor in ("engine", "service")
        for path in files(floor)
        for name in imports_of(path, top_level_only=False)
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong


@pytest.mark.parametrize("package", ["onnxruntime", "openvino"])
def test_one_module_imports_what_reports(package: str) -> None:
    """The others ask it, so that none loads it before its reports are switched off."""
    places = [path for folder in (*FLOORS, "dreammix_trt", "benchmarks", "tests") for path in files(folder)]
    found = {
        path.resolve().relative_to(ROOT).as_posix()
        for path in places
        for name in imports_of(path, top_level_only=False, types=False)
        if name.split(".")[0] == package
    }
    assert found == {f"core/{ {'onnxruntime': 'onnx_runtime', 'openvino': 'openvino_runtime'}[package] }.py"}


def test_core_loads_nothing_heavy_at_import() -> None:
    wrong = [
        f"{path.name}: {name}"
        for path in files("core")
        if not _shares_torch(path)
        for name in imports_of(path, top_level_only=True)
        if name.split(".")[0] in HEAVY | {"onnxruntime", "openvino"}
    ]
    assert not wrong


def test_networks_in_torch_are_shared_by_export_and_trainer_alone() -> None:
    """The rest of core and the engine never import them, not even within functions."""
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for floor in ("core", "engine")
        for path in files(floor)
        if not _shares_torch(path)
        for name in imports_of(path, top_level_only=False)
        if name.startswith(f"dreammix_trt.{SHARED_TORCH.replace('/', '.')}")
    ]
    assert files(SHARED_TORCH) and not wrong


def _shares_torch(path: Path) -> bool:
    return path.is_relative_to(ROOT / SHARED_TORCH)


def test_every_module_of_core_engine_and_service_loads_without_the_heavy_packages() -> None:
    """And so do the command line and the build: nothing is imported before it is needed."""
    paths = [path for floor in ("core", "engine", "service") for path in files(floor) if not _shares_torch(path)]
    paths = [path.relative_to(ROOT).with_suffix("") for path in paths]
    names = [".".join(("dreammix_trt", *path.parts)) for path in paths]
    names += ["dreammix_trt.cli", "dreammix_trt.building", "dreammix_trt.export.onnx_export"]
    names = [name.removesuffix(".__init__") for name in names]
    code = (
        "import importlib, sys\n"
        f"for name in {names}: importlib.import_module(name)\n"
        f"print(sorted(set(sys.modules) & {HEAVY | {'onnxruntime', 'openvino'}}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_the_face_is_known() -> None:
    """What stands on the top floor; a new module there is to be named here."""
    found = {path.stem for path in (ROOT / "dreammix_trt").glob("*.py")}
    found |= {path.parent.name for path in (ROOT / "dreammix_trt").glob("*/__init__.py")} - FLOORS.keys()
    assert found == FACE | {"__init__", "__main__"}


def test_importing_the_package_is_free() -> None:
    probe = "import sys, dreammix_trt; print([m for m in ('torch','numpy','onnxruntime','rich') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_public_surface_fits_a_screen() -> None:
    import dreammix_trt

    assert len(dreammix_trt.__all__) <= 12
    for name in dreammix_trt.__all__:
        assert getattr(dreammix_trt, name) is not None


def test_the_floors_are_linked_into_the_package() -> None:
    for floor in FLOORS:
        assert (ROOT / "dreammix_trt" / floor).resolve() == (ROOT / floor).resolve()
