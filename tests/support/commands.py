"""Commands, run in the tests' own process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dreammix_trt import cli, terminal


def run_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str | Path
) -> tuple[int, str, str]:
    """Run a command as `main` does; its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["dreammix-trt", *(str(word) for word in words)])
    monkeypatch.setattr(terminal, "_state", terminal._State())
    capsys.readouterr()
    code = cli._run()
    return (code, *capsys.readouterr())
