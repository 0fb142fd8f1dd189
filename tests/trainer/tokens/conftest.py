"""Objects that the tests of the token adapter's trainer share."""

from __future__ import annotations

from pathlib import Path

import pytest

for _name in ("torch", "diffusers", "transformers", "peft"):
    pytest.importorskip(_name, reason="the trainer needs its extra")

from tests.support.token_training import write_objects  # noqa: E402


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three mugs."""
    return write_objects(tmp_path_factory.mktemp("tokens") / "objects")
