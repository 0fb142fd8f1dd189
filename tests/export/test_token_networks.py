"""The networks of a token adapter exported: where a base has one, equal to torch, to its UNet and to numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs it: pip install dreammix-trt[export]")
pytest.importorskip("onnxslim", reason="exporting needs it: pip install dreammix-trt[export]")

from dreammix_trt.core.checkpoint import BaseFiles  # noqa: E402
from dreammix_trt.core.network_weights import weights_of  # noqa: E402
from dreammix_trt.core.networks import Network, describe_networks, kind_of  # noqa: E402
from dreammix_trt.core.subject_tokens import TokenConfig, select_tokens  # noqa: E402
from dreammix_trt.core.torch_modules.subject_tokens import run_down_stack  # noqa: E402
from dreammix_trt.export.onnx_export import export_network, write_graph  # noqa: E402
from dreammix_trt.export.parity import BOUNDS, OnnxNetwork  # noqa: E402
from dreammix_trt.export.torch_module import make_torch_module  # noqa: E402
from tests.export.test_vae_range import export_unchecked  # noqa: E402
from tests.support.tiny_model import write_tiny_model  # noqa: E402
from tests.support.tokens import write_small_adapter  # noqa: E402

NAMES = ("subject_features", "token_select", "token_proj")
FORMS = {"float32": {}, "float16": {"precision": "float16", "fused": "attention"}}
SIZES = {"pictures": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", half=False).folder


@pytest.fixture(scope="module")
def base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseFiles:
    file = tmp_path_factory.mktemp("tokens") / "adapter.safetensors"
    write_small_adapter(file, BaseFiles.open(tiny))
    return BaseFiles.open(tiny, tokens=file)


def network_of(base: BaseFiles, name: str, **form: Any) -> Network:
    return next(network for network in describe_networks(base, **form) if network.name == name)


def test_a_base_without_an_adapter_has_none(tiny: Path, base: BaseFiles) -> None:
    plain = describe_networks(BaseFiles.open(tiny), precision="float16")
    found = describe_networks(base, precision="float16")
    assert [network for network in found if network.name not in NAMES] == list(plain)
    assert [network.name for network in found if network not in plain] == list(NAMES)
    assert not any(kind_of(name).required or kind_of(name).twin or kind_of(name).factors for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_the_graph_is_torch(base: BaseFiles, name: str, form: str, tmp_path: Path) -> None:
    network = network_of(base, name, **FORMS[form])
    for part in ("graph", "out"):
        (tmp_path / part).mkdir()
    write_graph(network, tmp_path / "graph")
    entry = export_network(base, network, tmp_path / "graph", tmp_path / "out", verify=True)
    assert entry["parity"]["max_rel"] <= BOUNDS[network.precision]
    kinds = {each["name"]: each["dtype"] for each in (*entry["inputs"], *entry["outputs"])}
    if name == "subject_features":
        assert (kinds["sample"], kinds["time_ids"], kinds["features"]) == (form, "float32", "float32")
    else:
        assert network.precision == "float32" and set(kinds.values()) <= {"float32", "int64"}
    if name == "token_select":
        assert entry["parity"]["max_abs"] < 1e-6, "the same are chosen"


def test_features_are_those_of_the_base_s_unet(base: BaseFiles) -> None:
    """Of diffusers' own UNet at t = 0, what its second block hands to its downsampler."""
    from diffusers import UNet2DConditionModel

    state = {name: torch.from_numpy(value) for name, value in base.unet_patched_state().items()}
    unet = UNet2DConditionModel.from_config(dict(base.configs["unet"])).eval()
    unet.load_state_dict(state)
    network, config = network_of(base, "subject_features"), TokenConfig.of_base(base.configs)
    inputs = {name: torch.from_numpy(value) for name, value in network.draw_example(SIZES).items()}
    text = torch.randn(2, 77, config.context_width, generator=torch.Generator().manual_seed(0))
    seen: list[Any] = []
    last = unet.down_blocks[1].attentions[-1]
    last.register_forward_hook(lambda _module, _given, out: seen.append(out[0]))
    sizes = {name: inputs[name] for name in ("text_embeds", "time_ids")}
    with torch.inference_mode():
        unet(inputs["sample"], 0, text, added_cond_kwargs=sizes)
        own = run_down_stack(unet, inputs["sample"], text, **sizes, block=1)
        for name in inputs:
            layer, _, part = name.rpartition(".")
            if part in ("key", "value"):
                inputs[name] = unet.get_submodule(f"{layer}.to_{part[0]}")(text)
        module = make_torch_module(network, weights_of(base, "subject_features"))
        ours = module(*inputs.values())
    truth = seen[0].flatten(2).transpose(1, 2)
    assert truth.shape == (2, config.cells, config.width) == ours.shape
    torch.testing.assert_close(own, truth, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, truth, atol=1e-4, rtol=1e-4)
    assert {name for name in state if name in module.network.state_dict()} == set(module.network.state_dict())


def test_torch_onnx_and_numpy_select_the_same(base: BaseFiles, tmp_path: Path) -> None:
    network = network_of(base, "token_select", precision="float16")
    session = OnnxNetwork(export_unchecked(base, network, tmp_path), threads=1)
    module = make_torch_module(network, weights_of(base, "token_select"))
    for seed in range(4):
        given = network.draw_example(SIZES, seed)
        found = session.run(**given)
        tokens, chosen = module(*map(torch.from_numpy, given.values()))
        for number in range(2):
            truth = select_tokens(given["features"][number], given["inside"][number], network.outputs[0].shape[1])
            for one in (found["chosen"][number], chosen[number].numpy()):
                np.testing.assert_array_equal(one, truth[1])
            for one in (found["tokens"][number], tokens[number].numpy()):
                np.testing.assert_array_equal(one, truth[0])


@pytest.mark.parametrize("name", NAMES)
def test_tensorrt_builds_it(base: BaseFiles, name: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install dreammix-trt[rtx]")
    from dreammix_trt.engine.backends.tensorrt.builder import build_engine
    from dreammix_trt.engine.backends.tensorrt.profiles import profiles_for

    network = network_of(base, name, precision="float16", fused=True)
    graph, plan = export_unchecked(base, network, tmp_path / "net"), tmp_path / "plan"
    profiles = profiles_for(
        network.describe()["inputs"], pictures=2, shapes="dynamic", latent_side=8, call=network.kind.call
    )
    report = build_engine(graph, plan, backend="tensorrt-rtx", profiles=profiles, targets=("sm_89",))
    assert len(profiles) == 1 and report.engine_bytes == plan.stat().st_size > 0
    kinds = {tensor.name: tensor.dtype for tensor in (*report.inputs, *report.outputs)}
    assert all(kinds[each] == "float32" for each in ("features", "tokens", "token_rows") if each in kinds)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_runs_them_on_a_device(base: BaseFiles, dtype: str) -> None:
    """As a GPU's runtime would, here on the CPU: selection and projection in float32 whatever the rest is."""
    from dreammix_trt.core.axes import Sides
    from dreammix_trt.export.torch_backend.engine_set import TorchEngineSet
    from dreammix_trt.export.torch_backend.on_device import TorchNetworks
    from tests.export.test_torch_networks import BOUNDS as LIMITS
    from tests.export.test_torch_networks import Held

    truth = TorchEngineSet(base)
    with TorchNetworks.of(base, device="cpu", dtype=dtype, names=NAMES, wide={}) as networks:
        for name in NAMES:
            given = network_of(base, name).draw_example(SIZES)
            found = Held(networks, name, Sides(2, 2, 8, 8), given).run()
            for key, value in truth.run(name, **given).items():
                limit = LIMITS[dtype] if name == "subject_features" else 1e-6
                assert np.abs(found[key] - value).max() <= limit * np.abs(value).max()
