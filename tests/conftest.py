"""Fixtures that all tests share; markers follow from them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_golden = {"passed": 0, "failed": 0, "skipped": 0}


def shared_folder() -> Path:
    """The folder of recorded runs and real data: DREAMMIX_SHARED, or `shared` beside the checkout."""
    return Path(os.environ.get("DREAMMIX_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared data; a test that needs it skips where it is absent."""
    folder = shared_folder()
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set DREAMMIX_SHARED")
    return folder


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """The recorded runs of the authors' code (golden/README.md there describes them)."""
    folder = shared / "golden"
    if not folder.is_dir():
        pytest.skip(f"no golden data at {folder}")
    return folder


@pytest.fixture(autouse=True)
def _own_store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's own store."""
    if "DREAMMIX_TEST_HOME" not in os.environ:
        os.environ["DREAMMIX_TEST_HOME"] = str(tmp_path_factory.mktemp("home"))
    monkeypatch.setenv("DREAMMIX_HOME", os.environ["DREAMMIX_TEST_HOME"])


@pytest.fixture
def gpu() -> None:
    """For tests that need an NVIDIA GPU."""
    if not Path("/proc/driver/nvidia").exists():
        pytest.skip("no NVIDIA GPU here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Markers follow from fixtures."""
    for item in items:
        if "gpu" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count the tests on recorded runs."""
    if getattr(report, "golden", False) and (report.when == "call" or (report.when == "setup" and report.skipped)):
        _golden[report.outcome] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many golden tests ran."""
    terminalreporter.write_line(
        f"golden tests: {_golden['passed'] + _golden['failed']} ran"
        f" ({_golden['failed']} failed), {_golden['skipped']} skipped"
    )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):  # type: ignore[no-untyped-def]
    """Remember on the report whether the test used the golden folder."""
    outcome = yield
    outcome.get_result().golden = "golden" in getattr(item, "fixturenames", ())
