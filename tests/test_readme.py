"""What README.md shows of Python passes the type checker as a user's file would, each snippet on its own."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets() -> dict[int, str]:
    """The Python blocks by the line of README.md on which each begins."""
    blocks = re.finditer(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return {README.count("\n", 0, block.start(1)): block[1] for block in blocks}


@pytest.mark.slow
def test_every_python_snippet_passes_the_type_checker(tmp_path: Path) -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("needs mypy")
    found = snippets()
    assert len(found) == README.count("```python") >= 3
    files = [tmp_path / f"readme_{line}.py" for line in found]
    for file, (line, code) in zip(files, found.items(), strict=True):
        file.write_text("\n" * line + code, encoding="utf-8")  # so that mypy names the line of README.md
    # The project's configuration for what is imported; only the snippets' own errors count.
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "pyproject.toml"]
    command += ["--follow-imports", "silent", "--cache-dir", str(tmp_path / "cache"), *map(str, files)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md", "docs/model-card.md", "CHANGELOG.md"])
def test_every_link_to_a_file_leads_to_one(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in target]
    assert [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()] == []
