"""TensorRT: real plans for SM89, built here without a GPU, from networks these tests write; refusals; TensorRT 11 by a
stand-in."""

from __future__ import annotations

import errno
import json
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dreammix_trt.core.errors import BuildError, EngineError, InputError, MissingExtraError
from dreammix_trt.engine import hardware
from dreammix_trt.engine.backends.tensorrt import builder as tensorrt
from dreammix_trt.engine.backends.tensorrt import package as tensorrt_package
from dreammix_trt.engine.backends.tensorrt.builder import (
    BuildReport,
    Estimate,
    Profile,
    build_engine,
    check_room,
    estimate_build,
    list_targets,
    open_guarded_runtime,
    refuse_host_code,
)
from dreammix_trt.engine.backends.tensorrt.callbacks import BuildSteps, make_monitor, make_writer
from dreammix_trt.engine.backends.tensorrt.package import NAMES, NAMES_AHEAD, PACKAGES, check_package, load
from dreammix_trt.engine.hardware import Driver, Gpu
from dreammix_trt.engine.machine import RTX_TARGETS

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(3)
MATRIX = (RNG.standard_normal((64, 64)) / 8).astype(np.float16)
ROWS = Profile({"x": ((1, 64), (2, 64), (4, 64))})
ADA = Driver("13.0", (Gpu("NVIDIA GeForce RTX 4090", "sm_89", 24 << 30),))
NO_DRIVER = Driver(problem="there is no NVIDIA driver here")


@pytest.fixture(scope="session")
def rtx() -> Any:
    """TensorRT-RTX; a test that builds skips where it is not installed."""
    pytest.importorskip("onnx", reason="the networks of these tests need onnx: pip install dreammix-trt[export]")
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install dreammix-trt[rtx]")


def write_network(
    path: Path,
    nodes: list[tuple[Any, ...]],
    inputs: dict[str, list[Any]],
    weights: dict[str, Any],
    *,
    dtype: str = "FLOAT16",
    opset: int = 21,
) -> Path:
    """Write a network whose last node's output is `y`. A node is (operator, inputs, output, attributes)."""
    import onnx
    from onnx import helper, numpy_helper

    kind = getattr(onnx.TensorProto, dtype)
    made = [
        helper.make_node(operator, taken, [given], name=f"the {operator}", **dict(*attributes))
        for operator, taken, given, *attributes in nodes
    ]
    held = [
        value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(value, name)
        for name, value in weights.items()
    ]
    graph = helper.make_graph(
        made,
        "network",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", kind, None)],
        held,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def write_linear(path: Path, weight: Any = MATRIX) -> Path:
    bias = np.full(64, 0.25, np.float16)
    nodes = [("MatMul", ["x", "w"], "p"), ("Add", ["p", "b"], "y")]
    return write_network(path, nodes, {"x": ["rows", 64]}, {"w": weight, "b": bias})


def build(path: Path, *profiles: Profile, **options: Any) -> BuildReport:
    options = {"backend": "tensorrt-rtx", "targets": ("sm_89",)} | options
    return build_engine(path, path.with_suffix(".plan"), profiles=profiles, **options)


def make_external(file: Path, name: str, weight: Array, offset: int) -> Any:
    """An initializer whose bytes lie in another file."""
    import onnx

    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT16, dims=weight.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", file.name), ("offset", str(offset)), ("length", str(weight.nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def find_offset(file: Path, name: str) -> int:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return int(8 + length + json.loads(raw[8 : 8 + length])[name]["data_offsets"][0])


# --- real builds ------------------------------------------------------------------------------------------------------


def test_a_float16_network_becomes_a_plan_that_holds_its_weights(rtx: Any, tmp_path: Path) -> None:
    heard: list[tuple[float, str]] = []
    threads = set()

    def progress(fraction: float, phase: str) -> None:
        heard.append((fraction, phase))
        threads.add(threading.current_thread())

    report = build(write_linear(tmp_path / "n.onnx"), ROWS, progress=progress)
    plan = (tmp_path / "n.plan").read_bytes()
    assert report.engine_bytes == len(plan) and MATRIX.tobytes() in plan
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in report.inputs] == [("x", "float16", (-1, 64))]
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in report.outputs] == [("y", "float16", (-1, 64))]
    assert report.version == rtx.__version__ and report.targets == ("sm_89",) and report.backend == "tensorrt-rtx"
    assert report.layers > 1 and report.decomposed == 0 and 0 < report.seconds < 60
    fractions = [fraction for fraction, _ in heard]
    assert fractions == sorted(fractions) and (fractions[0], heard[-1]) == (0, (1, "done"))
    assert len(set(fractions)) > 5 and threads == {threading.current_thread()}
    json.dumps(report.to_dict())
    assert [path.name for path in tmp_path.iterdir() if path.suffix not in (".onnx", ".plan")] == []


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells a process its memory")
def test_memory_of_a_build_stays_within_the_estimate(rtx: Any, tmp_path: Path) -> None:
    """In a process of its own: another test's leavings do not count, and 32 MiB of weights do."""
    wide = (np.random.default_rng(0).standard_normal((4096, 4096)) / 64).astype(np.float16)
    nodes = [("MatMul", ["x", "w"], "y")]
    file = tmp_path / "n.safetensors"
    save_file({"w": wide}, file)
    path = write_network(
        tmp_path / "n.onnx", nodes, {"x": [2, 4096]}, {"w": make_external(file, "w", wide, find_offset(file, "w"))}
    )
    probe = (
        "import json, pathlib, sys\n"
        "from dreammix_trt.engine.backends.tensorrt.builder import build_engine\n"
        "path, out = map(pathlib.Path, sys.argv[1:])\n"
        "report = build_engine(path, out, backend='tensorrt-rtx', profiles=(), targets=['sm_89'])\n"
        "print(json.dumps(report.to_dict()))"
    )
    command = [sys.executable, "-c", probe, str(path), str(tmp_path / "n.plan")]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(out.stdout)
    need = estimate_build(path.stat().st_size, wide.nbytes, "tensorrt-rtx")
    assert wide.nbytes < report["peak_anonymous"] < need.host_bytes
    assert report["peak_anonymous"] < report["peak_rss"]
    assert wide.nbytes < report["engine_bytes"] < need.disk_bytes


def test_a_convolution_builds_for_four_profiles_and_several_gpus(rtx: Any, tmp_path: Path) -> None:
    kernel = (RNG.standard_normal((8, 4, 3, 3)) / 6).astype(np.float16)
    nodes = [("Conv", ["x", "k"], "y", {"pads": [1, 1, 1, 1]})]
    path = write_network(tmp_path / "n.onnx", nodes, {"x": ["rows", 4, "h", "w"]}, {"k": kernel})
    inputs = [{"name": "x", "dtype": "float16", "shape": ["rows", 4, "h", "w"]}]
    profiles = tensorrt.profiles_for(inputs, pictures=1, shapes="dynamic", latent_side=16, step=1)
    assert len(profiles) == 4  # landscape and portrait, of one row and of two
    report = build(path, *profiles, targets=("sm_86", "sm_89", "sm_120"))
    assert report.inputs[0].shape == (-1, 4, -1, -1) and report.targets == ("sm_86", "sm_89", "sm_120")
    assert report.engine_bytes == path.with_suffix(".plan").stat().st_size > kernel.nbytes
    assert len(report.kernels) == 4 and all(counts.kinds["correlation"] == 1 for counts in report.kernels)


def test_lora_factors_come_as_inputs(rtx: Any, tmp_path: Path) -> None:
    nodes = [
        ("MatMul", ["x", "w"], "p"),
        ("MatMul", ["x", "a"], "q"),
        ("MatMul", ["q", "b"], "r"),
        ("Add", ["p", "r"], "y"),
    ]
    shapes = {"x": ["rows", 5, 64], "a": ["pictures", 64, 8], "b": ["pictures", 8, 64]}
    path = write_network(tmp_path / "n.onnx", nodes, shapes, {"w": MATRIX})
    inputs = [{"name": name, "shape": shape} for name, shape in shapes.items()]
    # One factor for all rows of a picture: here rows and pictures are the same axis.
    profiles = tensorrt.profiles_for(
        [entry | {"shape": ["pictures", *entry["shape"][1:]]} for entry in inputs],
        pictures=2,
        shapes="static",
        latent_side=128,
    )
    report = build(path, *profiles)
    assert [tensor.name for tensor in report.inputs] == ["x", "a", "b"]


def test_weights_are_read_from_an_offset_inside_safetensors(rtx: Any, tmp_path: Path) -> None:
    """The plan holds the bytes of the tensor named, not of the one before it."""
    file, other = tmp_path / "n.safetensors", (RNG.standard_normal((64, 64)) / 8).astype(np.float16)
    save_file({"a": other, "b": MATRIX, "c": np.ones(3, np.float16)}, file)
    offset = find_offset(file, "b")
    assert offset > other.nbytes
    build(write_linear(tmp_path / "n.onnx", make_external(file, "w", MATRIX, offset)), ROWS)
    plan = (tmp_path / "n.plan").read_bytes()
    assert MATRIX.tobytes() in plan and other.tobytes() not in plan


def test_missing_or_cut_weights_are_named(rtx: Any, tmp_path: Path) -> None:
    file = tmp_path / "n.safetensors"
    path = write_linear(tmp_path / "n.onnx", make_external(file, "w", MATRIX, 0))
    with pytest.raises(BuildError, match=r"n\.onnx.*weights are missing or cut .*n\.safetensors"):
        build(path, ROWS)
    file.write_bytes(b"\0" * 100)
    with pytest.raises(BuildError, match=r"n\.onnx.*weights are missing or cut"):
        build(path, ROWS)
    assert not path.with_suffix(".plan").exists()


def test_a_network_without_dynamic_sides_builds_with_and_without_a_profile(rtx: Any, tmp_path: Path) -> None:
    path = write_network(tmp_path / "n.onnx", [("MatMul", ["x", "w"], "y")], {"x": [2, 64]}, {"w": MATRIX})
    for profiles in ((), (Profile({"x": ((2, 64),) * 3}),)):
        assert build(path, *profiles).inputs[0].shape == (2, 64)


def write_attention(path: Path, dtype: str, width: int) -> tuple[Path, Profile]:
    shape, name = [2, 4, "tokens", width], ("q", "k", "v")
    write_network(path, [("Attention", list(name), "y")], dict.fromkeys(name, shape), {}, dtype=dtype, opset=23)
    return path, Profile(dict.fromkeys(name, ((2, 4, 64, width), (2, 4, 256, width), (2, 4, 256, width))))


def test_fused_attention_takes_half_precision_heads_of_64(rtx: Any, tmp_path: Path) -> None:
    path, profile = write_attention(tmp_path / "n.onnx", "FLOAT16", 64)
    report = build(path, profile)
    assert report.decomposed == 0 and report.messages == ()


@pytest.mark.parametrize("dtype, width", [("FLOAT", 64), ("FLOAT16", 512)])
def test_attention_that_no_fused_kernel_takes_is_taken_apart(rtx: Any, tmp_path: Path, dtype: str, width: int) -> None:
    path, profile = write_attention(tmp_path / "n.onnx", dtype, width)
    report = build(path, profile)
    assert report.decomposed == 1
    assert report.engine_bytes == path.with_suffix(".plan").stat().st_size > 0


def test_group_normalization_builds_in_half_precision(rtx: Any, tmp_path: Path) -> None:
    nodes = [("GroupNormalization", ["x", "scale", "bias"], "y", {"num_groups": 4})]
    ones = np.ones(16, np.float16)
    path = write_network(tmp_path / "n.onnx", nodes, {"x": [2, 16, "h", "w"]}, {"scale": ones, "bias": ones})
    sides = (2, 16, 8, 8), (2, 16, 16, 16), (2, 16, 16, 24)
    assert build(path, Profile({"x": sides})).messages == ()


def test_builds_run_side_by_side_and_each_hears_its_own_errors(rtx: Any, tmp_path: Path) -> None:
    good = [write_linear(tmp_path / f"good{index}.onnx") for index in range(3)]
    bad = write_network(tmp_path / "bad.onnx", [("NoSuchOperator", ["x"], "y")], {"x": [2, 64]}, {})
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(build, path, ROWS) for path in good]
        failed = pool.submit(build, bad)
    assert len({future.result().engine_bytes for future in futures}) == 1
    assert all(future.result().messages == () for future in futures)
    with pytest.raises(BuildError, match="NoSuchOperator"):
        failed.result()


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_an_operator_that_cannot_be_built_is_named(rtx: Any, tmp_path: Path) -> None:
    path = write_network(tmp_path / "n.onnx", [("NoSuchOperator", ["x"], "y")], {"x": [2, 64]}, {})
    with pytest.raises(BuildError, match=r"n\.onnx: TensorRT-RTX 1\.\S+ cannot read it: NoSuchOperator.*onnxruntime"):
        build(path)
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_no_networks_are_named(rtx: Any, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"n\.onnx is missing"):
        build(tmp_path / "n.onnx", ROWS)
    for content in (b"", b"no network", bytes(300)):
        (tmp_path / "n.onnx").write_bytes(content)
        with pytest.raises(BuildError, match=r"n\.onnx: .* cannot read it"):
            build(tmp_path / "n.onnx", ROWS)


@pytest.mark.parametrize(
    "profile, named",
    [
        (Profile({"z": ((1, 64), (2, 64), (4, 64))}), "inputs without one are x, profiles without an input z"),
        (Profile({"x": ((1, 32), (2, 32), (4, 32))}), r"its input x is \[-1, 64\]"),
        (Profile({"x": ((1,), (2,), (4,))}), r"its input x is \[-1, 64\]"),
        (Profile({"x": ((1, 64), (8, 64), (4, 64))}), "shapes of x do not grow"),
    ],
)
def test_a_profile_for_another_network_is_refused(rtx: Any, tmp_path: Path, profile: Profile, named: str) -> None:
    with pytest.raises(BuildError, match=named):
        build(write_linear(tmp_path / "n.onnx"), profile)


def test_a_failing_build_leaves_no_file_and_says_why(rtx: Any, tmp_path: Path) -> None:
    path = write_linear(tmp_path / "n.onnx")
    with pytest.raises(BuildError, match=r"n\.onnx.*cannot build it.*needs a profile"):
        build(path)
    with pytest.raises(BuildError, match=r"cannot build it.*--workspace"):
        build(path, ROWS, workspace=0)
    assert list(tmp_path.iterdir()) == [path]
    build(path, ROWS, workspace=64 << 20)


@pytest.mark.parametrize("at", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_stopping_a_build_leaves_what_was_there(
    rtx: Any, tmp_path: Path, error: type[BaseException], at: float
) -> None:
    path = write_linear(tmp_path / "n.onnx")
    path.with_suffix(".plan").write_text("old")

    def progress(fraction: float, phase: str) -> None:
        if fraction >= at:
            raise error

    with pytest.raises(error):
        build(path, ROWS, progress=progress)
    assert path.with_suffix(".plan").read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["n.onnx", "n.plan"]


def test_stopping_tells_the_builder_to_stop(rtx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[threading.Event] = []

    def noted(trt: Any, events: Any, cancelled: threading.Event) -> Any:
        told.append(cancelled)
        return make_monitor(trt, events, cancelled)

    def progress(fraction: float, phase: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tensorrt, "make_monitor", noted)
    with pytest.raises(KeyboardInterrupt):
        build(write_linear(tmp_path / "n.onnx"), ROWS, progress=progress)
    assert [cancelled.is_set() for cancelled in told] == [True]


def test_a_full_disk_is_not_taken_for_a_plan(rtx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder itself reports success when its writer fails."""

    def full(trt: Any, stream: Any) -> Any:
        def write(data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        return make_writer(trt, SimpleNamespace(write=write))

    path = write_linear(tmp_path / "n.onnx")
    monkeypatch.setattr(tensorrt, "make_writer", full)
    with pytest.raises(BuildError, match="no space left"):
        build(path, ROWS)
    assert list(tmp_path.iterdir()) == [path]


def test_a_cancelled_monitor_stops_the_builder(rtx: Any) -> None:
    cancelled = threading.Event()
    monitor = make_monitor(rtx, tensorrt.Events(), cancelled)
    monitor.phase_start("build", None, 2)
    assert monitor.step_complete("build", 0) is True
    cancelled.set()
    assert monitor.step_complete("build", 1) is False


def test_nested_steps_add_up_to_a_fraction_that_never_falls() -> None:
    steps = BuildSteps()
    assert steps.start("build", None, 4) == 0
    assert steps.complete("build", 0) == 0.25
    assert steps.start("inner", "build", 2) == 0.25
    assert steps.complete("inner", 0) == 0.375
    assert steps.start("innermost", "inner", 2) == 0.375
    assert steps.complete("innermost", 0) == 0.4375
    steps.finish("innermost")
    steps.finish("inner")
    assert steps.start("again", "build", 10) == 0.4375
    assert steps.complete("build", 3) == 1
    assert steps.complete("unknown", 0) == 1


# --- targets and packages ---------------------------------------------------------------------------------------------


def test_targets_are_those_of_the_package(rtx: Any) -> None:
    assert tuple(list_targets(rtx)) == RTX_TARGETS
    assert list_targets(rtx)["sm_89"] == rtx.ComputeCapability.SM89


@pytest.mark.parametrize("targets", [["sm_90"], ["sm_89", "ada"], [], ["sm_89", "sm_89"], ["sm_89", "current"]])
def test_impossible_targets_are_named_with_what_there_is(rtx: Any, tmp_path: Path, targets: list[str]) -> None:
    with pytest.raises(InputError, match="sm_89") as caught:
        build(write_linear(tmp_path / "n.onnx"), ROWS, targets=targets)
    assert all(target in str(caught.value) for target in targets)


def test_the_current_gpu_needs_a_driver(rtx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "ask_driver", lambda: NO_DRIVER)
    with pytest.raises(EngineError, match=r"no NVIDIA driver here.*--target sm_89"):
        build(write_linear(tmp_path / "n.onnx"), ROWS, targets=["current"])


def test_everything_used_of_the_package_is_there(rtx: Any) -> None:
    """Instances, too: properties of a class need not exist before there is one."""
    check_package(rtx, PACKAGES["tensorrt-rtx"])
    config = rtx.Builder(tensorrt.get_logger(rtx)).create_builder_config()
    assert config.num_compute_capabilities == 0 and config.get_flag(rtx.BuilderFlag.TF32)
    assert not hasattr(rtx.BuilderFlag, "FP16")


@pytest.mark.parametrize("backend", ["tensorrt-rtx", "tensorrt"])
def test_contexts_of_tensorrt_rtx_never_allocate_while_they_run(
    rtx: Any, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else no graph could hold them; of TensorRT 11 nothing like it is asked. The revision is in the parts' keys."""
    seen: list[bool] = []
    make = tensorrt._Build._make_config

    def noted(self: Any, builder: Any, network: Any) -> Any:
        config = make(self, builder, network)
        seen.append(bool(config.get_flag(rtx.BuilderFlag.REQUIRE_USER_ALLOCATION)))
        return config

    monkeypatch.setattr(tensorrt._Build, "_make_config", noted)
    monkeypatch.setattr(hardware, "ask_driver", lambda: ADA)
    monkeypatch.setitem(sys.modules, "tensorrt", rtx_as_eleven(rtx))
    build(write_linear(tmp_path / "n.onnx"), ROWS, backend=backend)
    assert seen == [backend == "tensorrt-rtx"] and tensorrt.REVISION >= 2


def make_package(version: str, names: tuple[str, ...]) -> ModuleType:
    """A module with the given dotted names and nothing else."""
    module: Any = ModuleType("package")
    module.__version__ = version
    for name in names:
        holder = module
        for part in name.split("."):
            if not hasattr(holder, part):
                setattr(holder, part, type(part, (), {}))
            holder = getattr(holder, part)
    return module  # type: ignore[no-any-return]


def test_tensorrt_11_needs_no_names_of_capabilities_and_tensorrt_rtx_does() -> None:
    assert not any(name.startswith("ComputeCapability") for name in NAMES)
    check_package(make_package("11.4.0.106", NAMES), PACKAGES["tensorrt"])
    with pytest.raises(EngineError, match="set_compute_capability"):
        check_package(make_package("1.7.1", NAMES), PACKAGES["tensorrt-rtx"])
    check_package(make_package("1.7.1", NAMES + NAMES_AHEAD), PACKAGES["tensorrt-rtx"])


def test_old_and_incomplete_packages_are_refused() -> None:
    with pytest.raises(EngineError, match=r"TensorRT 10\.16\.2 is too old, 11\.0 is needed.*dreammix-trt\[trt\]"):
        check_package(make_package("10.16.2", NAMES), PACKAGES["tensorrt"])
    for name in NAMES:
        with pytest.raises(EngineError, match=f"lacks {name}"):
            check_package(make_package("11.4", tuple(n for n in NAMES if not n.startswith(name))), PACKAGES["tensorrt"])


def test_packages_that_are_absent_or_broken_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_failing_importer(error: Exception) -> Any:
        def import_module(name: str) -> Any:
            raise error

        return SimpleNamespace(import_module=import_module)

    with pytest.raises(InputError, match=r"onnxruntime.*tensorrt-rtx"):
        load("onnxruntime")
    monkeypatch.setattr(
        tensorrt_package, "importlib", make_failing_importer(ModuleNotFoundError("none", name="tensorrt_rtx"))
    )
    with pytest.raises(MissingExtraError, match=r"dreammix-trt\[rtx\]"):
        load("tensorrt-rtx")
    monkeypatch.setattr(tensorrt_package, "importlib", make_failing_importer(OSError("libnvinfer.so.11: cannot open")))
    with pytest.raises(EngineError, match=r"libnvinfer.*dreammix-trt\[trt\]"):
        load("tensorrt")


def rtx_as_eleven(rtx: Any) -> ModuleType:
    """A stand-in for TensorRT 11: TensorRT-RTX without what only that has."""
    module: Any = ModuleType("tensorrt")
    vars(module).update({name: value for name, value in vars(rtx).items() if name != "ComputeCapability"})
    module.__version__ = "11.4.0.106"
    return module  # type: ignore[no-any-return]


@pytest.fixture
def eleven(rtx: Any, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = rtx_as_eleven(rtx)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def test_tensorrt_builds_on_the_same_path_for_the_gpu_at_hand(
    eleven: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "ask_driver", lambda: ADA)
    for targets in ((), ("current",), ("sm_89",)):
        report = build(write_linear(tmp_path / "n.onnx"), ROWS, backend="tensorrt", targets=targets)
        assert (report.backend, report.version, report.targets) == ("tensorrt", "11.4.0.106", ("sm_89",))
        assert MATRIX.tobytes() in (tmp_path / "n.plan").read_bytes()


def test_tensorrt_refuses_other_gpus_and_none_with_the_way_out(
    eleven: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_linear(tmp_path / "n.onnx")
    monkeypatch.setattr(hardware, "ask_driver", lambda: ADA)
    with pytest.raises(InputError, match=r"RTX 4090.*not for sm_86.*tensorrt-rtx"):
        build(path, ROWS, backend="tensorrt", targets=("sm_86",))
    monkeypatch.setattr(hardware, "ask_driver", lambda: NO_DRIVER)
    with pytest.raises(EngineError, match=r"no NVIDIA driver here.*--backend tensorrt-rtx"):
        build(path, ROWS, backend="tensorrt")


# --- room -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "graph, weights, held, plan",
    # bytes of graph and weights -> most anonymous memory seen and size of the plan; the last four are plans alone
    [
        (4_000, 400 << 20, 640 << 20, 419_499_860),
        (12_000, 1200 << 20, 1445 << 20, 1_258_482_996),
        (3_000, 450 << 20, 1015 << 20, 474_331_000),
        (57_398_475, 0, (214 + 248) << 20, 59_833_788),
        (11_000_000, 5_146_000_000, 0, 5_189_000_000),
        (1_000_000, 1_393_000_000, 0, 1_396_000_000),
        (300_000, 100_000_000, 0, 104_000_000),
        (300_000, 69_000_000, 0, 72_000_000),
        (1_000_000, 5_135_000_000, 12_930_000_000, 5_194_000_000),
    ],
)
def test_the_estimate_bounds_what_was_measured(graph: int, weights: int, held: int, plan: int) -> None:
    need = estimate_build(graph, weights, "tensorrt-rtx")
    assert held < need.host_bytes < 2.5 * weights + (1200 << 20)
    assert plan < need.disk_bytes
    assert estimate_build(graph, weights, "tensorrt").host_bytes > need.host_bytes


def test_too_little_memory_or_disk_is_said_before_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    monkeypatch.setattr(hardware, "measure_memory", lambda: (16 * gib, 8 * gib))
    monkeypatch.setattr(hardware, "disk_free", lambda folder: 4 * gib)
    check_room(Estimate(8 * gib, 4 * gib), tmp_path)
    with pytest.raises(BuildError, match=r"needs 9\.0 GiB of memory and 8\.0 GiB are free; end other programs"):
        check_room(Estimate(9 * gib, 1), tmp_path)
    with pytest.raises(BuildError, match=r"needs 5\.0 GiB and 4\.0 GiB are free there; free some"):
        check_room(Estimate(1, 5 * gib), tmp_path)
    monkeypatch.setattr(hardware, "measure_memory", lambda: (None, None))
    monkeypatch.setattr(hardware, "disk_free", lambda folder: None)
    check_room(Estimate(1 << 60, 1 << 60), tmp_path)


def test_our_plans_carry_none_and_the_runtime_refuses_the_others(rtx: Any, tmp_path: Path) -> None:
    path = write_linear(tmp_path / "n.onnx")
    build(path, ROWS)
    refuse_host_code(path.with_suffix(".plan"))
    assert open_guarded_runtime("tensorrt-rtx").engine_host_code_allowed is False
