"""Nothing phones home: ONNX Runtime is told before it is loaded, however the product is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from dreammix_trt.core.errors import MissingExtraError
from dreammix_trt.core.onnx_runtime import SWITCHES, import_onnxruntime

#: What tells ONNX Runtime not to report from outside, so that only our own switch can.
OUTSIDE = {*SWITCHES, "CI", "GITHUB_ACTIONS", "TF_BUILD", "BUILD_ID", "ORT_RUNNING_UNIT_TESTS"}
RUN = "session.run(None, {'x': numpy.ones(3, numpy.float32)})"


def run_alone(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with a home of its own, empty at first."""
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name not in OUTSIDE and not name.startswith("XDG_")}
    environment = kept | {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def list_strangers(home: Path) -> list[str]:
    """What lies in a home; ours is where DREAMMIX_HOME says."""
    return sorted(str(path.relative_to(home)) for path in home.rglob("*"))


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """An ONNX file that adds x to itself."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in "xy"]
    made = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", values[:1], values[1:])
    file = tmp_path / "double.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), file)
    return file


def test_ours_leaves_nothing_where_a_plain_session_leaves_its_reports(graph: Path, tmp_path: Path) -> None:
    opens = f"session = ort.InferenceSession({str(graph)!r}); {RUN}"
    plain = run_alone(tmp_path / "plain", "-c", f"import numpy, onnxruntime as ort; {opens}")
    assert plain.returncode == 0, plain.stderr
    if not list_strangers(tmp_path / "plain"):
        pytest.skip("this ONNX Runtime reports nothing")
    ours = f"import numpy; from dreammix_trt.core.onnx_runtime import import_onnxruntime as f; ort = f(); {opens}"
    indirect = f"import numpy, dreammix_trt, onnxruntime as ort; {opens}"
    plainly = f"import numpy, onnxruntime as ort; {opens}"
    child = f"import dreammix_trt, subprocess, sys; subprocess.run([sys.executable, '-c', {plainly!r}], check=True)"
    for name, code in {"ours": ours, "indirect": indirect, "child": child}.items():
        done = run_alone(tmp_path / name, "-c", code)
        assert done.returncode == 0, done.stderr
        assert list_strangers(tmp_path / name) == [], name


def test_a_request_on_the_command_line_writes_nothing_of_others(mug_engine: Path, tmp_path: Path) -> None:
    Image.new("RGB", (96, 96), (90, 120, 150)).save(tmp_path / "image.png")
    mask = np.zeros((96, 96), np.uint8)
    mask[30:70, 30:70] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = ["inpaint", str(mug_engine), "--image", "image.png", "--mask", "mask.png", "--out", "out.png"]
    arguments = [str(tmp_path / name) if name.endswith(".png") else name for name in arguments]
    done = run_alone(tmp_path / "home", "-m", "dreammix_trt", *arguments, "--prompt", "a sks mug", "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").is_file()
    assert list_strangers(tmp_path / "home") == []


def test_the_switch_is_set_even_against_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    import_onnxruntime()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


def test_an_empty_folder_is_no_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left where one of two packages that share a folder was removed: it can be imported, and has nothing."""
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    with pytest.raises(MissingExtraError, match="not whole: dreammix-trt doctor --mend"):
        import_onnxruntime()
