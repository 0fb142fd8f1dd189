"""One export of the tiny model serves all tests here: it takes some seconds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Exported(NamedTuple):
    """A base, the folder of its parts, each network's `network.json`, and the folder of the graphs as traced."""

    base: Any
    folder: Path
    table: dict[str, dict[str, Any]]
    traces: Path

    def graph(self, name: str) -> Path:
        return self.folder / name / str(self.table[name]["graph"])

    def weights(self, name: str) -> Path:
        return self.folder / name / str(self.table[name]["weights"])

    def slot_weights(self, name: str) -> Path:
        return self.folder / name / str(self.table[name]["slot_weights"])


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The tiny model's parts, freshly exported in float32 and checked against torch."""
    for package in ("torch", "diffusers", "onnx", "onnxslim", "onnxruntime"):
        pytest.importorskip(package)
    from dreammix_trt.core.checkpoint import BaseFiles
    from dreammix_trt.export import onnx_export
    from tests.support.tiny_model import write_tiny_model

    base = BaseFiles.open(write_tiny_model(tmp_path_factory.mktemp("tiny") / "model").folder)
    folder, traces, traced = tmp_path_factory.mktemp("networks"), tmp_path_factory.mktemp("traces"), []

    def keep_graph(network: Any, out: Path) -> None:
        trace(network, out)
        traced.append(network.name)
        shutil.copytree(out, traces / network.graph)

    trace = onnx_export.write_graph
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "write_graph", keep_graph)
        table = onnx_export.export_base(base, folder)
    assert traced == [name for name in table if not name.startswith("unet_raw")], "both UNets share their graphs"
    return Exported(base, folder, table, traces)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A two-level SDXL as a single file, with patch and head: every kind of layer, little of each."""
    for package in ("torch", "diffusers", "onnx", "onnxslim", "onnxruntime"):
        pytest.importorskip(package)
    from dreammix_trt.core.checkpoint import BaseFiles
    from tests.support.mini_sdxl import small_configs, write_single

    held = write_single(tmp_path_factory.mktemp("small"), small_configs())
    return BaseFiles.open(held.base, held.patch, held.head, tokenizer=held.tokenizer)
