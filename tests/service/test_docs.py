"""What docs/serve.md shows is run as it stands, with the address of a service of the test's own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.service.conftest import MASK, PICTURE
from tests.support.fake_service import Running, paint_plainly
from tests.test_readme import blocks

PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
SHELL = [each for each in blocks(PAGE, "sh").values() if "curl" in each]
PYTHON = list(blocks(PAGE, "python").values())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.fromarray(PICTURE).save(tmp_path / "table.png")
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    Image.fromarray(np.dstack([PICTURE, 255 - MASK])).save(tmp_path / "erased.png")
    return tmp_path


def run(running: Running, folder: Path, command: list[str], text: str) -> str:
    """Run a snippet; its out.png must be the picture of seed 7."""
    port = running.url.rpartition(":")[2]
    text = text.replace("http://127.0.0.1:8000", running.url).replace("port=8000", f"port={port}")
    ran = subprocess.run([*command, text], cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert np.array_equal(np.asarray(Image.open(folder / "out.png")), paint_plainly(PICTURE, MASK, 7))
    return ran.stdout


def test_the_lines_of_curl(running: Running, folder: Path) -> None:
    for tool in ("bash", "curl"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    (text,) = SHELL
    told = run(running, folder, ["bash", "-ec"], text)
    assert told.index("event: step") < told.index("event: done") if "event: step" in told else "event: done" in told


@pytest.mark.parametrize("number", [0, 1])
def test_the_lines_of_both_stock_clients(running: Running, folder: Path, number: int) -> None:
    assert len(PYTHON) == 2
    told = run(running, folder, [sys.executable, "-c"], PYTHON[number])
    if number == 0:
        assert told.splitlines()[-1] == "image_edit.completed 64x48"
