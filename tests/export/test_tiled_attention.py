"""An attention that TensorRT has no kernel for is written out in tiles of its queries: the values are torch's own."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install dreammix-trt[export]")
onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install dreammix-trt[export]")

from dreammix_trt.core.onnx_runtime import import_onnxruntime  # noqa: E402
from dreammix_trt.export.operators import QUERY_TILES, attend, fuse_operators  # noqa: E402

WIDE = 320  # one head, wider than TensorRT's kernels take


class Attend(torch.nn.Module):  # type: ignore[misc]
    def forward(self, q: Any, k: Any, v: Any) -> Any:
        return attend(q, k, v, 1)


def draw(batch: int, length: int) -> list[Any]:
    generator = torch.Generator().manual_seed(batch + length)
    return [torch.randn((batch, length, WIDE), generator=generator) for _ in range(3)]


@pytest.fixture(scope="module")
def graph() -> bytes:
    out = io.BytesIO()
    names = ["q", "k", "v"]
    axes = {name: {0: "batch", 1: "length"} for name in (*names, "y")}
    with warnings.catch_warnings(), fuse_operators(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Attend(), tuple(draw(2, 384)), out, input_names=names, output_names=["y"], dynamic_axes=axes,
            opset_version=20, dynamo=False,
        )  # fmt: skip
    return out.getvalue()


@pytest.mark.parametrize("batch, length", [(1, 64), (1, 1024), (2, 192)])
def test_tiles_give_torchs_values_at_every_size(graph: bytes, batch: int, length: int) -> None:
    session = import_onnxruntime().InferenceSession(graph, providers=["CPUExecutionProvider"])
    q, k, v = draw(batch, length)
    (found,) = session.run(None, {"q": q.numpy(), "k": k.numpy(), "v": v.numpy()})
    wanted = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double()).numpy()
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < 2e-6 * np.abs(wanted).max() + 1e-6


def test_every_tile_has_a_softmax_of_its_own(graph: bytes) -> None:
    operators = [node.op_type for node in onnx.load_from_string(graph).graph.node]
    assert operators.count("Softmax") == QUERY_TILES and operators.count("Split") == 1
    assert "Shape" not in operators[operators.index("Split") :], "tiles must not bring shape arithmetic"
