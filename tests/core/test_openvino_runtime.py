"""OpenVINO reports nothing, for the package that would is not there when it is loaded; and signals do no harm."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dreammix_trt.core.errors import MissingExtraError
from dreammix_trt.core.openvino_runtime import import_openvino

REPORTER = "open({file!r}, 'a').write('loaded ')\nraise ImportError('a reporter of the tests')\n"


def test_the_reporting_package_is_never_loaded(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    told = tmp_path / "told"
    (tmp_path / "openvino_telemetry.py").write_text(REPORTER.format(file=str(told)))
    start = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
    plain, ours = "import openvino", "from dreammix_trt.core.openvino_runtime import import_openvino as f; f().Core()"
    subprocess.run([sys.executable, "-c", start + plain], check=True, timeout=300)
    assert told.exists(), "OpenVINO asks for the package when it is imported"
    told.unlink()
    subprocess.run([sys.executable, "-c", start + ours], check=True, timeout=300)
    assert not told.exists()


def test_what_brings_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "openvino"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtraError, match=r"pip install 'dreammix-trt\[openvino\]'"):
        import_openvino()


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs POSIX signals")
def test_a_signal_after_engines_are_gone_is_handled() -> None:
    """Of two cores of OpenVINO, freed in the order in which they were made, it is a segmentation fault."""
    pytest.importorskip("openvino")
    script = """
        import signal
        from dreammix_trt.core.openvino_runtime import open_core
        first, second = open_core(), open_core()
        for core in (first, second):
            core.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin
        del core, first
        del second
        signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
        signal.raise_signal(signal.SIGUSR1)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    assert done.stdout == "handled\n"
