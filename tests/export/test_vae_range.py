"""VAEs whose stream leaves float16, as SDXL's own does: they are found, exported in two types, and built."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dreammix_trt.core.checkpoint import BaseFiles
from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.core.network_weights import weights_of
from dreammix_trt.core.networks import Network, describe_networks
from dreammix_trt.export.onnx_export import export_network, write_graph
from dreammix_trt.export.parity import BOUNDS, OnnxNetwork, choose_sizes, run_torch
from dreammix_trt.export.torch_module import make_torch_module
from dreammix_trt.export.vae_range import LIMIT, Kind, _draw_pictures, find_wide_units
from tests.support.tiny_model import write_tiny_model

Floats = NDArray[np.float32]
Change = Callable[[Floats], Floats]
KINDS: tuple[Kind, ...] = ("vae_encoder", "vae_decoder")
SIZES = {"pictures": 1, "h": 8, "w": 8, "H": 64, "W": 64}
#: a block's second branch convolution gives values of some 1e5, the convolution at the block's end takes them back
TALL = {
    "vae_encoder": ("encoder.down_blocks.1.resnets.0", "encoder.down_blocks.1.downsamplers.0.conv"),
    "vae_decoder": ("decoder.up_blocks.1.resnets.0", "decoder.up_blocks.1.upsamplers.0.conv"),
}
UNITS = {
    "vae_encoder": ("blocks.1.0.resnets", "blocks.1.1.downsamplers"),
    "vae_decoder": ("blocks.1.0.resnets", "blocks.1.1.resnets", "blocks.1.2.upsamplers"),
}


def times(factor: float) -> Change:
    return lambda value: value * np.float32(factor)


def make_tall() -> dict[str, Change]:
    changes = {}
    for high, low in TALL.values():
        factors = {"norm2.weight": 300, "norm2.bias": 300, "conv2.weight": 300, "conv2.bias": 9e4}
        changes |= {f"{high}.{name}": times(factor) for name, factor in factors.items()}
        changes[f"{low}.weight"] = times(1 / 9e4)
    return changes


@pytest.fixture(scope="module", autouse=True)
def _export_extra() -> None:
    for package in ("torch", "diffusers", "onnx", "onnxslim"):
        pytest.importorskip(package, reason="exporting needs it: pip install dreammix-trt[export]")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", half=False).folder


@pytest.fixture(scope="module")
def tall_base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseFiles:
    return write_base_with_vae(tiny, tmp_path_factory.mktemp("tall"), make_tall())


def write_base_with_vae(base: Path, folder: Path, changes: Mapping[str, Change]) -> BaseFiles:
    """The base with some of its VAE's weights changed."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(base / "vae", folder / "vae")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: changes.get(name, np.asarray)(value) for name, value in weights.items()}, file)
    return BaseFiles.open(base, vae=folder / "vae")


def network_of(base: BaseFiles, kind: str, wide: tuple[str, ...] = (), fused: bool = False) -> Network:
    found = next(n for n in describe_networks(base, precision="float16", fused=fused) if n.name == kind)
    return replace(found, wide=wide)


def export_unchecked(base: BaseFiles, network: Network, folder: Path) -> Path:
    """The exported graph, unchecked."""
    for part in ("graph", "out"):
        (folder / part).mkdir(parents=True)
    write_graph(network, folder / "graph")
    entry = export_network(base, network, folder / "graph", folder / "out", verify=False)
    return folder / "out" / str(entry["graph"])


def infinite_values(graph: Path, inputs: Mapping[str, NDArray[Any]]) -> list[str]:
    """The values between nodes that are infinite or NaN in ONNX Runtime."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    shown = {item.name for item in model.graph.output}
    for item in onnx.shape_inference.infer_shapes(model).graph.value_info:
        if item.type.tensor_type.elem_type in (1, 10) and item.name not in shown:
            model.graph.output.append(item)
    onnx.save(model, graph.with_name("shown.onnx"))
    values = OnnxNetwork(graph.with_name("shown.onnx"), threads=1).run(**inputs)
    assert len(values) > 15
    return [name for name, value in values.items() if not np.isfinite(value).all()]


def difference(base: BaseFiles, network: Network, graph: Path) -> float:
    """The largest difference between ONNX Runtime and float32 torch, as a share of the output's largest value."""
    module, session = make_torch_module(network, weights_of(base, network.name)), OnnxNetwork(graph, threads=1)
    worst = 0.0
    for seed, sizes in enumerate(choose_sizes(base.divisor)):
        inputs = network.draw_example(sizes, seed)
        found = session.run(**inputs)
        for name, truth in run_torch(module, network, inputs).items():
            worst = max(worst, float(np.abs(found[name] - truth).max() / np.abs(truth).max()))
    return worst


@pytest.mark.parametrize("kind", KINDS)
def test_the_units_that_float16_is_too_narrow_for_are_found(tall_base: BaseFiles, kind: Kind) -> None:
    report = find_wide_units(tall_base, kind)
    assert report.units == UNITS[kind]
    assert min(report.peaks[name] for name in report.units) > 65504
    assert max(peak for name, peak in report.peaks.items() if name not in report.units) < 100
    latents = {"latents": 2} if kind == "vae_decoder" else {}
    assert report.samples == {"drawn": 4, "noise": 1, **latents} and report.limit == LIMIT
    assert find_wide_units(tall_base, kind) == report
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == plain and plain["units"] == list(UNITS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_benign_vae_stays_float16(tiny: Path, kind: Kind) -> None:
    for base in (BaseFiles.open(tiny), BaseFiles.open()):
        report = find_wide_units(base, kind)
        assert report.units == () and 1 < max(report.peaks.values()) < 200


def test_peaks_are_what_diffusers_sees(tiny: Path) -> None:
    """Compare them, except attention scores, with hooks in diffusers' own encoder, on a user's picture."""
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny / "vae")
    peaks: dict[str, float] = {}

    def look(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, out: peaks.update({name: max(peaks.get(name, 0.0), float(out.abs().max()))})

    for name, module in vae.encoder.named_modules():
        if not any(module.children()):
            module.register_forward_hook(look(name))
    with torch.no_grad():
        for picture in (one for part in _draw_pictures(64, []).values() for one in part):
            vae.encode(torch.from_numpy(picture)[None])
    found = find_wide_units(BaseFiles.open(tiny), "vae_encoder").peaks
    assert found["conv_in"] == pytest.approx(peaks["conv_in"], rel=1e-3)
    deepest = max(peak for name, peak in peaks.items() if name.startswith("mid_block.resnets.1"))
    assert found["mid.2"] >= deepest * (1 - 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_in_float16_alone_the_picture_is_lost(tall_base: BaseFiles, kind: str, tmp_path: Path) -> None:
    """Torch in float16 gives NaN. ONNX Runtime, which widens on a CPU, shows where the values become infinite."""
    import torch

    network = network_of(tall_base, kind)
    inputs = network.draw_example(SIZES)
    module = make_torch_module(network, weights_of(tall_base, kind))
    truth = run_torch(module, network, inputs)
    assert all(np.isfinite(value).all() and np.abs(value).max() < 100 for value in truth.values())
    with torch.inference_mode():
        half = module.half()(*(torch.from_numpy(value) for value in inputs.values()))
    assert not torch.isfinite(half[0] if isinstance(half, tuple) else half).any()
    assert infinite_values(export_unchecked(tall_base, network, tmp_path), inputs)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_with_wide_units_it_agrees_with_torch(tall_base: BaseFiles, kind: str, fused: bool, tmp_path: Path) -> None:
    network = network_of(tall_base, kind, UNITS[kind], fused)
    graph = export_unchecked(tall_base, network, tmp_path)
    assert 0 < difference(tall_base, network, graph) < 5e-3 < BOUNDS["float16"]
    assert not infinite_values(graph, network.draw_example(SIZES))
    assert_types(graph, kind)


def assert_types(graph: Path, kind: str) -> None:
    """Weights of wide units are float32 in the file, all others float16; so are inputs and outputs."""
    from safetensors.numpy import load_file

    block = TALL[kind][0].rpartition(".resnets")[0]
    types = {name: str(value.dtype) for name, value in load_file(graph.with_suffix(".safetensors")).items()}
    wide = {name for name, dtype in types.items() if dtype == "float32"}
    assert wide == {name for name in types if name.startswith(f"{block}.")}
    assert set(types.values()) == {"float16", "float32"} and len(wide) < len(types) / 3
    session = OnnxNetwork(graph)._session
    assert {item.type for item in (*session.get_inputs(), *session.get_outputs())} == {"tensor(float16)"}


@pytest.mark.parametrize("fused", [False, True])
def test_tensorrt_builds_it(tall_base: BaseFiles, fused: bool, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install dreammix-trt[rtx]")
    from dreammix_trt.engine.backends.tensorrt.builder import build_engine
    from dreammix_trt.engine.backends.tensorrt.profiles import profiles_for

    network = network_of(tall_base, "vae_decoder", UNITS["vae_decoder"], fused)
    graph, plan = export_unchecked(tall_base, network, tmp_path), tmp_path / "plan"
    profiles = profiles_for(network.describe()["inputs"], pictures=1, shapes="static", latent_side=8)
    report = build_engine(graph, plan, backend="tensorrt-rtx", profiles=profiles, targets=("sm_89",))
    assert report.engine_bytes == plan.stat().st_size > 0
    assert [tensor.dtype for tensor in (*report.inputs, *report.outputs)] == ["float16", "float16"]


@pytest.mark.parametrize(
    ("kind", "changes", "units"),
    [
        (
            "vae_decoder",
            {"post_quant_conv.weight": 1e5, "post_quant_conv.bias": 1e5, "decoder.conv_in.weight": 1e-5},
            ("post_quant_conv", "conv_in"),
        ),
        (
            "vae_encoder",
            {"encoder.conv_out.weight": 1e5, "encoder.conv_out.bias": 1e5, "quant_conv.weight": 1e-5},
            ("conv_out", "quant_conv"),
        ),
        (
            "vae_decoder",
            {f"decoder.mid_block.attentions.0.to_{part}.{side}": 500 for part in "qk" for side in ("weight", "bias")},
            ("mid.1",),
        ),
    ],
    ids=["first", "last", "scores"],
)
def test_every_place_can_be_wide(
    tiny: Path, kind: Kind, changes: dict[str, float], units: tuple[str, ...], tmp_path: Path
) -> None:
    """The outermost convolutions, and an attention with large products of small queries and keys."""
    base = write_base_with_vae(tiny, tmp_path, {name: times(factor) for name, factor in changes.items()})
    assert find_wide_units(base, kind).units == units
    network = network_of(base, kind, units)
    graph = export_unchecked(base, network, tmp_path / "net")
    assert not infinite_values(graph, network.draw_example(SIZES))
    # sharp attention turns inputs that differ in float16's last digit into other choices
    assert difference(base, network, graph) < (0.2 if "mid.1" in units else BOUNDS["float16"])


def test_wide_units_have_no_gaps(tall_base: BaseFiles) -> None:
    report = find_wide_units(tall_base, "vae_decoder", limit=8.0)
    names, over = list(report.peaks), {name for name, peak in report.peaks.items() if peak > 8}
    start = names.index(report.units[0])
    assert report.units == tuple(names[start : start + len(report.units)])
    assert over < set(report.units) < set(names) and {report.units[0], report.units[-1]} <= over


def test_bfloat16_would_show_and_float32_does_not() -> None:
    """The figures of the module's docstring: the decoder's body in bfloat16 or float32, the rest in float16."""
    assert decoder_psnr("bfloat16") == pytest.approx(57, abs=2)
    assert decoder_psnr("float32") > 75


def decoder_psnr(inside: str) -> float:
    """In dB, of drawn pictures against float32 throughout; every activation is rounded to its type."""
    import torch

    from dreammix_trt.export.units import vae_units

    base = BaseFiles.open()
    networks = {network.name: network for network in describe_networks(base)}
    pictures = np.stack(_draw_pictures(128, [])["drawn"])  # of one size
    encoder = make_torch_module(networks["vae_encoder"], weights_of(base, "vae_encoder"))
    decoder = make_torch_module(networks["vae_decoder"], weights_of(base, "vae_decoder"))
    with torch.inference_mode():
        latents = encoder(torch.from_numpy(pictures))[0]
        truth = decoder(latents).clamp(-1, 1)
        outer = ("post_quant_conv", "conv_in", "conv_out")
        for name, unit in vae_units("vae_decoder", decoder.network).items():
            dtype = torch.float16 if name in outer else getattr(torch, inside)
            for part in (part for part in unit.modules() if part is unit or not any(part.children())):
                for weight in part.parameters(recurse=False):
                    weight.data = weight.data.to(dtype).float()
                part.register_forward_hook(lambda _module, _inputs, out, dtype=dtype: out.to(dtype).float())
        error = (decoder(latents).clamp(-1, 1) - truth).square().mean()
    return 10 * math.log10(4 / float(error))


def test_a_users_pictures_are_looked_at_too(tall_base: BaseFiles, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (90, 40, 4), np.uint8), "RGBA").save(tmp_path / "tall.png")
    Image.new("L", (20, 300), 255).save(tmp_path / "white.jpg")
    files = [tmp_path / "tall.png", tmp_path / "white.jpg"]
    for kind in KINDS:
        report = find_wide_units(tall_base, kind, files)
        assert report.units == UNITS[kind] and report.samples["images"] == 2
    (tmp_path / "none.png").write_bytes(b"no picture")
    for name in ("none.png", "absent.png"):
        with pytest.raises(InputError, match=name):
            find_wide_units(tall_base, "vae_encoder", [tmp_path / name])


def test_a_damaged_vae_is_named(tiny: Path, tmp_path: Path) -> None:
    hot = write_base_with_vae(tiny, tmp_path / "hot", {"encoder.mid_block.resnets.0.conv2.weight": times(3e38)})
    for kind in KINDS:
        with pytest.raises(FileFormatError, match=r"hot/vae: .*encoder is damaged: mid\.0 .*another VAE"):
            find_wide_units(hot, kind)
    loud = write_base_with_vae(
        tiny, tmp_path / "loud", {"decoder.conv_out.bias": lambda value: value + np.float32(1e5)}
    )
    assert find_wide_units(loud, "vae_encoder").units == ()
    with pytest.raises(FileFormatError, match=r"loud/vae: the VAE's decoder gives values of 1e\+05, which no picture"):
        find_wide_units(loud, "vae_decoder")
