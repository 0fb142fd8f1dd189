"""What the builder prints is read and counted: lines as TensorRT-RTX 1.7.1 writes them, and real plans."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.networks import Network, describe_networks
from dreammix_trt.engine.backends.tensorrt.builder import BuildReport, build_engine
from dreammix_trt.engine.backends.tensorrt.kernel_list import Kernel, KernelCounts, count_kernels, read_kernels
from dreammix_trt.engine.backends.tensorrt.profiles import profiles_for

ROWS = "Strides: [64,1], StrideOrder: [1,0], Datatype: {dtype}, Format: (Linear) Row major linear format"
BLOCKS = 11  # transformer blocks of SDXL's UNet at one layer a transformer


def tensor(name: str, *shape: int, dtype: str = "Half") -> str:
    sides = ",".join(map(str, shape))
    return f"{{ Name: {name}, Dimensions: [{sides}], {ROWS.format(dtype=dtype)} }}"


def line(name: str, kind: str, inputs: list[str], constants: list[str], outputs: list[str]) -> str:
    lists = (f"{title}: [{', '.join([' ' + ', '.join(given)] if given else [])}]" for title, given in (
        ("Inputs", inputs), ("Constants", constants), ("Outputs", outputs)))  # fmt: skip
    return f"Name: {name}, LayerType: {kind}, {', '.join(lists)}, TacticName: , StreamId: 0, Metadata: [ONNX Layer: a]"


X, RESIDUAL, BIAS = tensor("x", 2048, 256), tensor("residual", 2048, 256), tensor("bias", 1, 256)
WEIGHT, Y = tensor("block.to_out.0.weight", 256, 256), tensor("y", 2048, 256)
LIST = "\n".join(
    (
        "Layers:",
        line("block/to_q/MatMul_myl0_0", "gemm", [X], [tensor("w", 256, 256)], [Y]),
        line("__myl_FcAddAdd_myl0_1", "runtime_fusion", [RESIDUAL, X, WEIGHT], [BIAS], [Y]),
        line("__myl_FcAdd_myl0_2", "runtime_fusion", [X], [BIAS, tensor("w", 256, 256)], [Y]),
        line("_gemm_mha_v2_myl0_3", "kgen", [tensor("q", 8, 1024, 64)] * 3, [], [tensor("a", 8, 1024, 64)]),
        line("__myl_ReshTranReshMove_myl0_4", "kgen", [X], [], [Y]),
        line("__myl_MaxrSubExpSumDiv_myl0_5", "kgen", [tensor("s", 1, 4096, 4096)], [], [tensor("p", 1, 4096, 4096)]),
        line("conv/Conv_myl0_6", "correlation", [tensor("i", 2, 4, 8, 8), tensor("r", 2, 64, 8, 8)], [],
             [tensor("o", 2, 64, 8, 8)]),
        "",
        "I/O Tensors:",
        " Name: x, IOMode: Input, DataType: Half, Dimensions: [-1,64], Location: Device",
    )
)  # fmt: skip


def test_a_list_is_counted() -> None:
    (counts,) = count_kernels(["Engine generation completed in 1 seconds.", LIST])
    assert counts == KernelCounts(
        total=7,
        kinds={"correlation": 1, "gemm": 1, "kgen": 3, "runtime_fusion": 2},
        products=3,
        narrow_products=0,
        wide_products=0,
        attentions=1,
        scores=1,
        residuals=2,
        copies=1,
        waits=0,
        constant_bytes=2 * (256 * 256 + 256),
        largest_bytes=2 * 4096 * 4096,
    )


def test_a_line_is_read_whole() -> None:
    (kernels,) = read_kernels([LIST])
    fused = kernels[1]
    assert (fused.name, fused.kind, fused.steps) == ("__myl_FcAddAdd_myl0_1", "runtime_fusion", ("Fc", "Add", "Add"))
    assert [(t.name, t.shape, t.dtype) for t in fused.inputs] == [
        ("residual", (2048, 256), "Half"),
        ("x", (2048, 256), "Half"),
        ("block.to_out.0.weight", (256, 256), "Half"),
    ]
    assert [t.name for t in fused.constants] == ["bias"] and fused.outputs[0].nbytes == 2048 * 256 * 2


def read_line(*parts: Any) -> Kernel:
    ((kernel,),) = read_kernels([line(*parts)])
    return kernel


def test_products_of_a_loras_rank_are_found() -> None:
    down = read_line("a_myl0_0", "gemm", [X, tensor("l.lora_A", 256, 8)], [], [tensor("d", 2048, 8)])
    up = read_line("b_myl0_1", "gemm", [tensor("d", 2048, 8), tensor("l.lora_B", 8, 256)], [], [Y])
    few_rows = read_line("c_myl0_2", "gemm", [tensor("e", 2, 256)], [tensor("w", 256, 256)], [tensor("f", 2, 256)])
    copy = read_line("__myl_Move_myl0_3", "kgen", [tensor("d", 2048, 8)], [], [tensor("d2", 2048, 8)])
    assert (down.narrow, up.narrow, few_rows.narrow, copy.narrow) == (True, True, False, False)


def test_products_of_float32_values_are_found() -> None:
    scale = tensor("alpha", 1, dtype="Float")  # every library kernel has such a constant
    assert not read_line("a_myl0_0", "gemm", [X], [scale], [Y]).wide
    assert read_line("a_myl0_0", "gemm", [tensor("x", 2048, 256, dtype="Float")], [scale], [Y]).wide
    assert read_line("c_myl0_1", "correlation", [X], [], [tensor("y", 2, 4, 8, 8, dtype="Float")]).wide
    assert not read_line("__myl_CastMean_myl0_2", "kgen", [tensor("x", 2, 2, dtype="Float")], [], [Y]).wide


def test_a_residual_counts_where_the_product_is_made() -> None:
    pair = [tensor("x", 2048, 1024), WEIGHT]
    assert read_line("__myl_FcAddAdd_myl0_0", "runtime_fusion", [RESIDUAL, *pair], [BIAS], [Y]).adds_residual
    assert not read_line("__myl_FcAdd_myl0_0", "runtime_fusion", [RESIDUAL, *pair], [BIAS], [Y]).adds_residual
    assert not read_line("__myl_FcAddAdd_myl0_0", "runtime_fusion", pair, [BIAS, BIAS], [Y]).adds_residual
    assert not read_line("__myl_AddAdd_myl0_0", "kgen", [RESIDUAL, X], [BIAS], [Y]).adds_residual


def test_streams_that_join_and_profiles_are_told_apart() -> None:
    lists = [
        line("a_myl0_0", "signal", [], [], []),
        line("b_myl0_1", "wait", [], [], []),
        line("c [profile 1]_myl1_0", "gemm", [X], [WEIGHT], [Y]),
    ]
    first, second = count_kernels(["\n".join(lists)])
    assert (first.total, first.waits, second.total, second.waits) == (2, 2, 1, 0)
    assert count_kernels(["no list"]) == ()


# --- the plans of real networks ---------------------------------------------------------------------------------------

Planned = Callable[[str], BuildReport]


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    """Builds a network's plan for SM89: SDXL's UNet at a fifth of its width, with every kind of block and one
    transformer layer in each, for 1024 x 1024; once in the session."""
    for name, extra in (("tensorrt_rtx", "rtx"), ("torch", "export"), ("onnxslim", "export")):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install dreammix-trt[{extra}]")
    from benchmarks import _sdxl_files as files
    from dreammix_trt.export.onnx_export import export_network, write_graph

    folder = tmp_path_factory.mktemp("plans")
    base = BaseFiles.open(files.write_folder(folder / "base", files.sdxl_configs(0.2, depth=1)))
    found: dict[str, BuildReport] = {}

    def build(name: str, network: Network) -> BuildReport:
        graph, out = folder / f"{name}-graph", folder / name
        graph.mkdir()
        out.mkdir()
        write_graph(network, graph)
        entry = export_network(base, network, graph, out, verify=False)
        call = network.kind.call
        (*_, profile) = profiles_for(entry["inputs"], pictures=1, shapes="static", latent_side=128, call=call)
        return build_engine(
            out / entry["graph"],
            out / "n.plan",
            backend="tensorrt-rtx",
            profiles=[profile],
            targets=("sm_89",),
        )

    def plan(name: str) -> BuildReport:
        if name not in found:
            wanted, _, without = name.partition(" ")
            networks = (
                describe_networks(base, False, "float16", True)
                if without
                else describe_networks(base, precision="float16", fused=True)
            )
            found[name] = build(name, next(network for network in networks if network.name == wanted))
        return found[name]

    return plan


def test_the_unet_of_a_subject_launches_little_more_than_without(planned: Planned) -> None:
    """Measured: 408 kernels with weights as inputs and keys and values of the text outside, 387 without slots."""
    report = planned("unet")
    (counts,) = report.kernels
    assert counts.total <= 410, counts
    assert counts.narrow_products == 0 and counts.waits == 0 and counts.wide_products == 0, counts
    assert (counts.attentions, counts.scores, report.decomposed) == (2 * BLOCKS, 0, 0), counts
    assert counts.residuals >= 3 * BLOCKS, counts
    json.dumps(report.to_dict())


def test_the_unet_without_slots(planned: Planned) -> None:
    (counts,) = planned("unet without slots").kernels
    assert counts.total <= 390, counts
    assert counts.narrow_products == 0 and counts.waits == 0 and counts.wide_products == 0, counts
    assert (counts.attentions, counts.scores) == (2 * BLOCKS, 0), counts
    assert counts.residuals >= 3 * BLOCKS, counts


def test_counts_are_plain_values(planned: Planned) -> None:
    for counts in planned("unet without slots").kernels:
        assert json.loads(json.dumps(counts.to_dict())) == dataclasses.asdict(counts)
        assert sum(counts.kinds.values()) == counts.total
