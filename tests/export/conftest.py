"""One export of the tiny model serves all tests here: it takes some seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Exported(NamedTuple):
    base: Any
    folder: Path
    table: dict[str, Any]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The tiny model's networks, freshly exported and checked against torch."""
    for package in ("torch", "diffusers", "onnx", "onnxslim", "onnxruntime"):
        pytest.importorskip(package)
    from dreammix_trt.core.checkpoint import BaseFiles
    from dreammix_trt.export.onnx_export import export_base
    from tests.support.tiny_model import write_tiny_model

    base = BaseFiles.open(write_tiny_model(tmp_path_factory.mktemp("tiny") / "model").folder)
    folder = tmp_path_factory.mktemp("networks")
    return Exported(base, folder, export_base(base, folder))
