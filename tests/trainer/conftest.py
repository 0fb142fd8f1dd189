"""Fixtures that the tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest

from dreammix_trt.core.checkpoint import BaseFiles


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseFiles:
    """A tiny random base."""
    from tests.support.tiny_model import write_tiny_model

    return BaseFiles.open(write_tiny_model(tmp_path_factory.mktemp("tiny") / "base").folder)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs with masks."""
    from tests.support.training import write_photographs

    return write_photographs(tmp_path_factory.mktemp("photos") / "mug")
